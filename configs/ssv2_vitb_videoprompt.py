"""Trains CLIP ViT-B/16 with VideoPrompt on Something-Something-v2 (CVPR 2023, Table 2).

    python -m dualpath_jax.main --config=configs/ssv2_vitb_videoprompt.py

Trainable parameters: 7,252,398 of 93,445,038 (measured; paper: 6M).
Top-1 / top-5 at 8x1x3 views: 31.0 / 60.3 (paper; not reproduced).
GMACs per video: 422 plain, 388 executed (measured).
GFLOPs per video: 537 (paper).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.baseline(recipes.vit_b16(recipes.ssv2()), "videoprompt")
