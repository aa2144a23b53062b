"""Trains CLIP ViT-B/16 with VideoPrompt on HMDB51 (CVPR 2023, Table 3).

    python -m dualpath_jax.main --config=configs/hmdb51_vitb_videoprompt.py --config.data.split=all

Trainable parameters: 7,157,811 of 93,350,451 (measured; paper: 6M).
Top-1, mean of three splits: 66.4, with the text branch, which is not here (paper; not reproduced).
GMACs per video: 845 plain, 775 executed (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    return recipes.baseline(recipes.vit_b16(recipes.hmdb51()), "videoprompt")
