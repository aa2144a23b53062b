"""Trains CLIP ViT-B/16 with full-tuning on HMDB51 (CVPR 2023, Table 3).

    python -m dualpath_jax.main --config=configs/hmdb51_vitb_full.py --config.data.split=all

Trainable parameters: 85,838,643 of 86,231,859 (measured; paper: 86M).
Top-1, mean of three splits: 59.4 (paper; not reproduced).
GMACs per video: 843 plain, 774 executed (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    config = recipes.baseline(recipes.vit_b16(recipes.hmdb51()), "full")
    config.optimizer.learning_rate = 1e-5  # ours
    return config
