"""Trains CLIP ViT-L/14 with DualPath on Something-Something-v2 (CVPR 2023, Table 2).

    python -m dualpath_jax.main --config=configs/ssv2_vitl.py

An argument sets the number of frames T: `--config=configs/ssv2_vitl.py:16` (default), `:32` or
`:48`.

Trainable parameters: 33,174,958 of 337,141,166 (measured; paper: 33M).
Top-1 / top-5 at T x 1 x 3 views: 70.2 / 92.7, 71.4 / 93.4, 72.2 / 93.7 for T = 16, 32, 48
(paper; not reproduced).
GMACs per video: 2280 / 2537 / 2795 plain, 2185 / 2433 / 2680 executed (measured).
GFLOPs per video: 1713 / 1932 / 2151 (paper).
"""

from dualpath_jax.config import recipes


def get_config(num_frames: str = "16"):
    config = recipes.vit_l14(recipes.ssv2())
    config.data.num_frames = recipes.parse_num_frames(num_frames)
    return config
