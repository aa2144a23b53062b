"""Trains CLIP ViT-B/16 with VPT on HMDB51 (CVPR 2023, Table 3).

    python -m dualpath_jax.main --config=configs/hmdb51_vitb_vpt.py --config.data.split=all

Trainable parameters: 7,225,395 of 93,418,035 (measured; paper: 7M).
Top-1, mean of three splits: 62.4 (paper; not reproduced).
GMACs per video: 888 (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.baseline(recipes.vit_b16(recipes.hmdb51()), "vpt")
