"""Trains CLIP ViT-B/16 with ZeroI2V on Something-Something-v2 (not in the tables of CVPR 2023).

    python -m dualpath_jax.main --config=configs/ssv2_vitb_zeroi2v.py

The recipe is that of its authors' released configuration for 16 frames.
Trainable parameters: 14,347,950 of 100,540,590 (measured). After merging (docs/using_models.md)
only positions in time and classifier remain next to the backbone.
Top-1 at 8x1x3 views: 67.7 (ZeroI2V's own page; not reproduced).
GMACs per video: 977 plain, 916 executed; merged 843 and 790 (measured).
"""

from dualpath_jax.config import recipes


def get_config():
    config = recipes.baseline(recipes.vit_b16(recipes.ssv2()), "zeroi2v")
    config.data.batch_size = 64
    config.data.num_frames = 16
    config.data.flip, config.data.label_swap = True, "ssv2"
    config.model.zeroi2v.offsets = (-1, 1, -2, 2)
    config.model.zeroi2v.scale = 1.0
    config.model.zeroi2v.adapter_dropout = 0.0
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_epochs = 2.5
    return config
