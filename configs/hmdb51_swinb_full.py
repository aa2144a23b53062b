"""Trains ImageNet-21K Swin-B with full-tuning on HMDB51 (CVPR 2023, Table A2).

    python -m dualpath_jax.main --config=configs/hmdb51_swinb_full.py --config.data.split=all

Trainable parameters: 86,795,499 of 86,795,499 (measured; paper: 88M).
Top-1: 61.2 (paper; not reproduced).
GMACs per video: 741 (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    config = recipes.baseline(recipes.swin_b(recipes.hmdb51()), "full")
    config.optimizer.learning_rate = 1e-5  # ours
    return config
