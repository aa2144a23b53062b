"""Trains CLIP ViT-B/16 with AIM on Kinetics-400, or evaluates the weights of its authors.

    python -m dualpath_jax.main --config=configs/k400_vitb_aim.py

The argument is the number of frames: `--config=configs/k400_vitb_aim.py:8`, 16 or 32 (default).
Scale, stochastic depth and sampling are those of AIM's own paper (arXiv 2302.03024): frames cover
128 frames of the video. Weights of its authors: docs/published.md.
Trainable parameters: 10,983,568 of 97,176,208 (measured).
"""

from dualpath_jax.config import recipes


def get_config(frames: str = "32"):
    if frames not in ("8", "16", "32"):
        raise ValueError(f"unknown argument {frames!r} of this config: known are 8, 16, 32")
    config = recipes.baseline(recipes.vit_b16(recipes.k400()), "aim")
    config.data.num_frames = int(frames)
    config.data.sampling_interval = 128 // int(frames)
    return config
