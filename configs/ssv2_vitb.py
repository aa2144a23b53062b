"""DualPath, CLIP ViT-B/16, Something-Something-v2 (CVPR 2023, Table 2, "DualPath w/ ViT-B/16").

    python -m dualpath_jax.main --config=configs/ssv2_vitb.py

Frames T by argument: `--config=configs/ssv2_vitb.py:16` (default), `:32`, `:48`.

Trainable parameters: 12,617,134 (measured; paper: 13M).
Top-1 at T x 1 x 3 views: 69.6 / 70.3 / 71.2 for T = 16 / 32 / 48 (paper; not reproduced).
GFLOPs per video: 642 / 716 / 791 (paper).
Not yet in this code: RandAugment and random erasing of Table A1.
"""

from configs import base


def get_config(num_frames: str = "16"):
    config = base.get_config()
    config.num_epochs = 50  # ours
    config.data.dir = "data/ssv2"
    config.data.source = "ssv2"
    config.data.batch_size = 128
    config.data.num_frames = int(num_frames)
    config.data.sampling = "segments"
    config.data.flip = False  # classes name left and right; ours
    config.backbone.checkpoint = "weights/clip_vit_b16.safetensors"
    config.model.pre_attention_adapter = True
    config.optimizer.learning_rate = 5e-4
    config.optimizer.label_smoothing = 0.1  # ours
    config.eval.temporal_views = 1
    config.eval.spatial_crops = 3
    return config
