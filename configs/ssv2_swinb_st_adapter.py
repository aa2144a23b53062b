"""Trains ImageNet-21K Swin-B with ST-Adapter on Something-Something-v2 (CVPR 2023, Table A2).

    python -m dualpath_jax.main --config=configs/ssv2_swinb_st_adapter.py

Trainable parameters: 9,477,038 of 96,220,262 (measured; paper: 7M).
Top-1: 65.1 (paper; not reproduced).
GMACs per video: 428 (measured).
GFLOPs per video: 385 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.baseline(recipes.swin_b(recipes.ssv2()), "st_adapter")
