"""Trains CLIP ViT-B/16 with Pro-tuning on HMDB51 (CVPR 2023, Table 3).

    python -m dualpath_jax.main --config=configs/hmdb51_vitb_protuning.py --config.data.split=all

Trainable parameters: 8,943,027 of 95,135,667 (measured; paper: 9M).
Top-1, mean of three splits: 63.3 (paper; not reproduced).
GMACs per video: 860 (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.baseline(recipes.vit_b16(recipes.hmdb51()), "protuning")
