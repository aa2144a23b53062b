"""Trains ImageNet-21K Swin-B with DualPath on HMDB51 (CVPR 2023, Table A2).

    python -m dualpath_jax.main --config=configs/hmdb51_swinb.py --config.data.split=all

Trainable parameters: 8,341,043 of 95,084,267 (measured; paper: not printed).
Top-1: 75.2 (paper; not reproduced).
GMACs per video: 876 (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.swin_b(recipes.hmdb51())
