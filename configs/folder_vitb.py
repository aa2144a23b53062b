"""Trains CLIP ViT-B/16 with DualPath on your own videos, prepared from class folders or a CSV.

    python -m dualpath_jax.main --config=configs/folder_vitb.py --config.data.dir=DIR

Classes are taken from the data. The recipe is that of HMDB51, the smallest data set of the paper
(Table A1).
"""

from dualpath_jax.config import schema


def get_config():
    config = schema.get_config()
    config.num_epochs = 50  # ours
    config.data.batch_size = 32  # paper: 128 on sets of thousands of videos
    config.data.num_frames = 16
    config.data.randaugment_layers = 4  # ours; the paper uses RandAugment
    config.data.erasing_probability = 0.25  # ours; the paper uses random erasing
    config.backbone.checkpoint = "weights/clip_vit_b16.safetensors"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 2e-2
    config.eval.temporal_views = 2
    config.eval.spatial_crops = 3
    return config
