"""Trains CLIP ViT-B/16 with ST-Adapter on Kinetics-400 (CVPR 2023, Table 1).

    python -m dualpath_jax.main --config=configs/k400_vitb_st_adapter.py

`--config=configs/k400_vitb_st_adapter.py:released` is the model that ST-Adapter's authors released:
8 frames, 16 apart, and an adapter before the MLP of each block. Their weights: docs/published.md.
The recipe is the paper's, not that of ST-Adapter's authors.
Trainable parameters: 7,417,744 of 93,610,384 (measured; paper: 7M).
Top-1 / top-5 at 32x3x1 views: 82.7 / 96.2 (paper; not reproduced).
GMACs per video: 1820 (measured).
GFLOPs per video: 1821 (paper).
"""

from dualpath_jax.config import recipes


def get_config(form: str = "paper"):
    if form not in ("paper", "released"):
        raise ValueError(f"unknown argument {form!r} of this config: known are paper, released")
    config = recipes.baseline(recipes.vit_b16(recipes.k400()), "st_adapter")
    config.data.num_frames = 32
    config.data.sampling_interval = None  # the default of section 5.1
    if form == "released":
        config.data.num_frames, config.data.sampling_interval = 8, 16
        config.model.st_adapter.form, config.model.st_adapter.places = "released", "mlp"
    return config
