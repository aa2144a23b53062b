"""Trains CLIP ViT-L/14 with EVL on Kinetics-400 (CVPR 2023, Table 1).

    python -m dualpath_jax.main --config=configs/k400_vitl_evl.py

Trainable parameters: 58,826,128 of 362,790,288 (measured; paper: 59M).
Top-1 at 32x3x1 views: 87.3 (paper; not reproduced).
GMACs per video: 8395 (measured).
GFLOPs per video: 8088 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    config = recipes.baseline(recipes.vit_l14(recipes.k400()), "evl")
    config.data.num_frames = 32
    config.data.sampling_interval = None  # the default of section 5.1
    return config
