"""Trains CLIP ViT-B/16 with AdaptFormer on Something-Something-v2 (CVPR 2023, Table 2).

    python -m dualpath_jax.main --config=configs/ssv2_vitb_adaptformer.py

Trainable parameters: 8,417,454 of 94,610,094 (measured; paper: 8M).
Top-1 / top-5 at 8x1x3 views: 51.3 / 70.6 (paper; not reproduced).
GMACs per video: 427 plain, 392 executed (measured).
GFLOPs per video: 544 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.baseline(recipes.vit_b16(recipes.ssv2()), "adaptformer")
