"""Trains CLIP ViT-B/16 with Pro-tuning on Something-Something-v2 (CVPR 2023, Table 2).

    python -m dualpath_jax.main --config=configs/ssv2_vitb_protuning.py

Trainable parameters: 9,037,614 of 95,230,254 (measured; paper: 9M).
Top-1 / top-5 at 8x1x3 views: 50.8 / 69.9 (paper; not reproduced).
GMACs per video: 430 (measured).
GFLOPs per video: 538 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.baseline(recipes.vit_b16(recipes.ssv2()), "protuning")
