"""Trains CLIP ViT-B/16 with ZeroI2V on Kinetics-400 (not in the tables of CVPR 2023).

    python -m dualpath_jax.main --config=configs/k400_vitb_zeroi2v.py

The argument is the number of frames: `--config=configs/k400_vitb_zeroi2v.py:8`, 16 (default) or 32.
The recipe is that of its authors' released configuration for 16 frames, 8 apart; frames cover 128
frames of the video also with another number, which is ours.
Trainable parameters: 14,521,744 of 100,714,384 (measured). After merging (docs/using_models.md)
only positions in time and classifier remain next to the backbone.
Top-1 at 8x3x1 views: 83.0 (ZeroI2V's own page; not reproduced).
GMACs per video: 977 plain, 916 executed; merged 843 and 790 (measured).
"""

from dualpath_jax.config import recipes


def get_config(frames: str = "16"):
    if frames not in ("8", "16", "32"):
        raise ValueError(f"unknown argument {frames!r} of this config: known are 8, 16, 32")
    config = recipes.baseline(recipes.vit_b16(recipes.k400()), "zeroi2v")
    config.num_epochs = 40
    config.data.num_frames = int(frames)
    config.data.sampling_interval = 128 // int(frames)
    config.optimizer.warmup_epochs = 2.5
    return config
