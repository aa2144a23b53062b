"""Trains CLIP ViT-L/14 with EVL on Something-Something-v2 (CVPR 2023, Table 2).

    python -m dualpath_jax.main --config=configs/ssv2_vitl_evl.py

Trainable parameters: 175,420,590 of 479,384,750 (measured; paper: 175M).
Top-1 at 32x1x3 views: 66.7 (paper; not reproduced).
GMACs per video: 9630 (measured).
GFLOPs per video: 9641 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    config = recipes.baseline(recipes.vit_l14(recipes.ssv2()), "evl")
    config.data.num_frames = 32
    config.model.evl.num_blocks = 12  # gives the printed 175M
    return config
