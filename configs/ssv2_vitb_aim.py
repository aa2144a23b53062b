"""Trains CLIP ViT-B/16 with AIM on Something-Something-v2 (not in the tables of CVPR 2023).

    python -m dualpath_jax.main --config=configs/ssv2_vitb_aim.py

Trainable parameters: 14,341,806 of 100,534,446 (measured).
Top-1: see AIM's own paper (arXiv 2302.03024).
GMACs per video: 623 plain, 586 executed (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    config = recipes.baseline(recipes.vit_b16(recipes.ssv2()), "aim")
    config.model.aim.num_temporal_adapters = 2
    config.model.aim.scale = 1.0
    return config
