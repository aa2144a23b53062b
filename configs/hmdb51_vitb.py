"""Trains CLIP ViT-B/16 with DualPath on HMDB51 (CVPR 2023, Table 3).

    python -m dualpath_jax.main --config=configs/hmdb51_vitb.py --config.data.split=all

Trainable parameters: 10,183,987 of 96,376,627 (measured; paper: 10M).
Top-1, mean of three splits: 75.6 (paper; not reproduced).
GMACs per video: 999 plain, 917 executed (measured).
GFLOPs per video: 612 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.vit_b16(recipes.hmdb51())
