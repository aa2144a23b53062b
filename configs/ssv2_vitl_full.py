"""Trains CLIP ViT-L/14 with full-tuning on Something-Something-v2 (CVPR 2023, Table 2).

    python -m dualpath_jax.main --config=configs/ssv2_vitl_full.py

Trainable parameters: 303,358,126 of 304,144,558 (measured; paper: 303M).
Top-1 / top-5 at 8x1x3 views: 48.7 / 77.5 (paper; not reproduced).
GMACs per video: 1944 plain, 1864 executed (measured).
GFLOPs per video: 1941 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    config = recipes.baseline(recipes.vit_l14(recipes.ssv2()), "full")
    config.optimizer.learning_rate = 3e-5  # ours
    return config
