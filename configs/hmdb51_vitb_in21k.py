"""Trains ImageNet-21K ViT-B/16 with DualPath on HMDB51 (CVPR 2023, Table A2).

    python -m dualpath_jax.main --config=configs/hmdb51_vitb_in21k.py --config.data.split=all

Trainable parameters: 10,852,659 of 96,651,315 (measured; paper: not printed).
Top-1: 70.5 (paper; not reproduced).
GMACs per video: 999 plain, 917 executed (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.vit_b16_in21k(recipes.hmdb51())
