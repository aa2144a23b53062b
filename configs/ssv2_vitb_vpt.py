"""Trains CLIP ViT-B/16 with VPT on Something-Something-v2 (CVPR 2023, Table 2).

    python -m dualpath_jax.main --config=configs/ssv2_vitb_vpt.py

Trainable parameters: 7,319,982 of 93,512,622 (measured; paper: 6M).
Top-1 / top-5 at 8x1x3 views: 36.2 / 61.1 (paper; not reproduced).
GMACs per video: 444 (measured).
GFLOPs per video: 537 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.baseline(recipes.vit_b16(recipes.ssv2()), "vpt")
