"""Trains CLIP ViT-B/16 with a linear classifier on HMDB51 (CVPR 2023, Table 3).

    python -m dualpath_jax.main --config=configs/hmdb51_vitb_linear.py --config.data.split=all

Trainable parameters: 39,219 of 86,231,859 (measured; paper: 0.1M).
Top-1, mean of three splits: 61.2 (paper; not reproduced).
GMACs per video: 843 plain, 774 executed (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.baseline(recipes.vit_b16(recipes.hmdb51()), "linear")
