"""EVL, CLIP ViT-L/14, Something-Something-v2 (CVPR 2023, Table 2).

    python -m dualpath_jax.main --config=configs/ssv2_vitl_evl.py

Trainable parameters: 58,594,478 of 362,558,638 (measured; paper: 175M).
Top-1 at 32x1x3 views: 66.7 (paper; not reproduced).
GFLOPs per video: 9641 (paper).
"""

from configs import recipes


def get_config():
    config = recipes.baseline(recipes.vit_l14(recipes.ssv2()), "evl")
    config.data.num_frames = 32
    return config
