"""Trains CLIP ViT-B/16 with DualPath on Diving48 (CVPR 2023, Table 4).

    python -m dualpath_jax.main --config=configs/diving48_vitb.py

Trainable parameters: 10,182,448 of 96,375,088 (measured; paper: 10M).
Top-1 at 32x1x1 views: 88.7 (paper; not reproduced).
GMACs per video: 185 plain, 170 executed (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.vit_b16(recipes.diving48())
