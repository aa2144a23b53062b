"""Trains CLIP ViT-L/14 with DualPath on Kinetics-400 (CVPR 2023, Table 1).

    python -m dualpath_jax.main --config=configs/k400_vitl.py

Trainable parameters: 27,029,648 of 330,995,856 (measured; paper: 27M).
Top-1 / top-5 at 32x3x1 views: 87.7 / 97.8 (paper; not reproduced).
GMACs per video: 2527 plain, 2423 executed (measured).
GFLOPs per video: 1868 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.vit_l14(recipes.k400())
