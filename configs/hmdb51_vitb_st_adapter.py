"""Trains CLIP ViT-B/16 with ST-Adapter on HMDB51 (CVPR 2023, Table 3).

    python -m dualpath_jax.main --config=configs/hmdb51_vitb_st_adapter.py --config.data.split=all

Trainable parameters: 7,149,363 of 93,342,003 (measured; paper: 7M).
Top-1, mean of three splits: 65.9 (paper; not reproduced).
GMACs per video: 910 (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.baseline(recipes.vit_b16(recipes.hmdb51()), "st_adapter")
