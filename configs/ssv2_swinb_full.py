"""Trains ImageNet-21K Swin-B with full-tuning on Something-Something-v2 (CVPR 2023, Table A2).

    python -m dualpath_jax.main --config=configs/ssv2_swinb_full.py

Trainable parameters: 86,921,574 of 86,921,574 (measured; paper: 88M).
Top-1: 44.3 (paper; not reproduced).
GMACs per video: 370 (measured).
GFLOPs per video: 124 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    config = recipes.baseline(recipes.swin_b(recipes.ssv2()), "full")
    config.optimizer.learning_rate = 3e-5  # ours
    return config
