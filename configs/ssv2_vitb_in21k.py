"""Trains ImageNet-21K ViT-B/16 with DualPath on Something-Something-v2 (CVPR 2023, Table A2).

    python -m dualpath_jax.main --config=configs/ssv2_vitb_in21k.py

Trainable parameters: 13,317,294 of 99,115,950 (measured; paper: 13M).
Top-1 at 16x1x3 views: 64.7 (paper; not reproduced).
GMACs per video: 501 plain, 460 executed (measured).
GFLOPs per video: 642 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.vit_b16_in21k(recipes.ssv2())
