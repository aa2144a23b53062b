"""Trains CLIP ViT-B/16 with ST-Adapter on Something-Something-v2 (CVPR 2023, Table 2).

    python -m dualpath_jax.main --config=configs/ssv2_vitb_st_adapter.py

`--config=configs/ssv2_vitb_st_adapter.py:released` is the model that ST-Adapter's authors released:
8 frames, and adapters before attention and MLP of each block. Their weights: docs/published.md.
Trainable parameters: 7,243,950 of 93,436,590 (measured; paper: 11M);
released form: 14,354,094 (measured). The recipe is the paper's, not that of ST-Adapter's authors.
Top-1 / top-5 at 32x3x1 views: 69.5 / 92.6 (paper; not reproduced; 32x1x3 in its own paper).
GMACs per video: 1820 (measured).
GFLOPs per video: 1955 (paper).
"""

from dualpath_jax.config import recipes


def get_config(form: str = "paper"):
    if form not in ("paper", "released"):
        raise ValueError(f"unknown argument {form!r} of this config: known are paper, released")
    config = recipes.baseline(recipes.vit_b16(recipes.ssv2()), "st_adapter")
    config.data.num_frames = 32
    if form == "released":
        config.data.num_frames = 8
        config.model.st_adapter.form, config.model.st_adapter.places = "released", "both"
    return config
