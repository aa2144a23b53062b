"""Trains CLIP ViT-B/16 with DualPath on Kinetics-400 (CVPR 2023, Table 1).

    python -m dualpath_jax.main --config=configs/k400_vitb.py

Trainable parameters: 10,363,024 of 96,555,664 (measured; paper: 10M).
Top-1 / top-5 at 32x3x1 views: 85.4 / 97.1 (paper; not reproduced).
GMACs per video: 555 plain, 509 executed (measured).
GFLOPs per video: 710 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.vit_b16(recipes.k400())
