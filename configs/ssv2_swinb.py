"""Trains ImageNet-21K Swin-B with DualPath on Something-Something-v2 (CVPR 2023, Table A2).

    python -m dualpath_jax.main --config=configs/ssv2_swinb.py

Trainable parameters: 10,014,766 of 96,757,990 (measured; paper: 11M).
Top-1 at 16x1x3 views: 67.8 (paper; not reproduced).
GMACs per video: 439 (measured).
GFLOPs per video: 287 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.swin_b(recipes.ssv2())
