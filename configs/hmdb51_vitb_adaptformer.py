"""Trains CLIP ViT-B/16 with AdaptFormer on HMDB51 (CVPR 2023, Table 3).

    python -m dualpath_jax.main --config=configs/hmdb51_vitb_adaptformer.py --config.data.split=all

Trainable parameters: 8,322,867 of 94,515,507 (measured; paper: 8M).
Top-1, mean of three splits: 63.7 (paper; not reproduced).
GMACs per video: 855 plain, 784 executed (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.baseline(recipes.vit_b16(recipes.hmdb51()), "adaptformer")
