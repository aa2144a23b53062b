"""Trains CLIP ViT-B/16 with full-tuning on Something-Something-v2 (CVPR 2023, Table 2).

    python -m dualpath_jax.main --config=configs/ssv2_vitb_full.py

Trainable parameters: 85,933,230 of 86,326,446 (measured; paper: 86M).
Top-1 / top-5 at 8x1x3 views: 44.0 / 77.0 (paper; not reproduced).
GMACs per video: 422 plain, 387 executed (measured).
GFLOPs per video: 419 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    config = recipes.baseline(recipes.vit_b16(recipes.ssv2()), "full")
    config.optimizer.learning_rate = 3e-5  # ours
    return config
