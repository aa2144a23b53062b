"""Defines the recipes of the data sets (Table A1) and of the baselines (section 3.2).

They set the keys that all configurations of a data set or a kind of method share; the config files
set the others. `schema.py` lists all keys. The paper does not give the values marked `ours`.
"""

from collections.abc import Collection

from ml_collections import ConfigDict

from dualpath_jax.config import schema

DEMO_CHECKPOINT = "data/demo/backbone.safetensors"  # written by `demo.setup` where it is missing


def k400() -> ConfigDict:
    """Return the recipe of Kinetics-400: dense clips of 32 frames; 3x1 views."""
    config = schema.get_config()
    config.num_epochs = 30  # ours
    config.data.dir = "data/k400"
    config.data.source = "k400"
    config.data.batch_size = 64
    config.data.num_frames = 32
    config.data.randaugment_layers = 4  # ours; the paper uses RandAugment
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 5e-2
    config.eval.temporal_views = 3
    config.eval.spatial_crops = 1
    return config


def ssv2() -> ConfigDict:
    """Return the recipe of Something-Something-v2.

    It has 16 frames over the whole video, a fifth adapter, and 1x3 views.
    """
    config = schema.get_config()
    config.num_epochs = 50  # ours
    config.data.dir = "data/ssv2"
    config.data.source = "ssv2"
    config.data.batch_size = 128
    config.data.num_frames = 16
    config.data.sampling = "segments"
    config.data.flip = False  # ours; classes are named by left and right
    config.data.randaugment_layers = 4  # ours; the paper uses RandAugment
    config.data.erasing_probability = 0.25  # ours; the paper uses random erasing
    config.model.pre_attention_adapter = True
    config.optimizer.learning_rate = 5e-4
    config.optimizer.weight_decay = 5e-2
    config.optimizer.label_smoothing = 0.1  # ours
    config.eval.temporal_views = 1
    config.eval.spatial_crops = 3
    return config


def hmdb51() -> ConfigDict:
    """Return the recipe of HMDB51: dense clips of 16 frames; 2x3 views.

    It trains on the first of three splits, see `data.split`.
    """
    config = schema.get_config()
    config.num_epochs = 50  # ours
    config.data.dir = "data/hmdb51"
    config.data.source = "hmdb51"
    config.data.train_split = "train1"
    config.data.batch_size = 128
    config.data.num_frames = 16
    config.data.randaugment_layers = 4  # ours; the paper uses RandAugment
    config.data.erasing_probability = 0.25  # ours; the paper uses random erasing
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 2e-2
    config.eval.split = "test1"
    config.eval.temporal_views = 2
    config.eval.spatial_crops = 3
    return config


def diving48() -> ConfigDict:
    """Return the recipe of Diving48: dense clips of 32 frames (ours); 1x1 views."""
    config = schema.get_config()
    config.num_epochs = 50  # ours
    config.data.dir = "data/diving48"
    config.data.source = "diving48"
    config.data.batch_size = 128
    config.data.num_frames = 32
    config.data.randaugment_layers = 4  # ours; the paper uses RandAugment
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 3e-2
    config.eval.split = "test"
    config.eval.temporal_views = 1
    config.eval.spatial_crops = 1
    return config


def finetune(backbone: str) -> ConfigDict:
    """Return the recipe for one's own videos: `own_videos` with the form for small data.

    Everything in it is ours. docs/notes/small_data.md has the trials that led to it.
    """
    return set_small_data_form(own_videos(backbone))


def own_videos(backbone: str) -> ConfigDict:
    """Return training and data settings for one's own videos; the method is the paper's DualPath.

    A clip has 16 frames over the whole video; a test video has 1x1 views.

    Args:
      backbone: "clip", the backbone of any converted file, by default CLIP's ViT-B/16; or "demo",
        the demo's small backbone at 64 pixels.

    Raises:
      ValueError: `backbone` is neither.
    """
    backbones = {"clip": any_backbone, "demo": demo_backbone}
    if backbone not in backbones:
        raise ValueError(
            f"unknown argument {backbone!r} of this config: known are {', '.join(backbones)}"
        )
    config = schema.get_config()
    config.num_epochs = 100  # for a few hundred videos
    config.data.batch_size = 16
    config.data.num_frames = 16
    config.data.num_spatial_frames = 2
    config.data.sampling = "segments"
    config.data.flip = False  # True where a mirrored video has the same class
    config.data.randaugment_layers = 3
    config.optimizer.learning_rate = 1e-3
    config.optimizer.clip_norm = 1.0
    config.eval.temporal_views = 1
    config.eval.spatial_crops = 1
    return backbones[backbone](config)


def set_small_data_form(config: ConfigDict) -> ConfigDict:
    """Set the form of DualPath that generalizes from few videos (ours)."""
    config.data.frameset_input = "motion"
    config.data.frame_scale = 2
    config.model.adapter_layer_norm = True
    config.model.pre_attention_adapter = True
    config.model.spatial_dropout = 0.5
    config.model.time_kernel_size = 3
    config.model.readout_width = 16
    config.model.readout_frame_width = 32
    return config


def baseline(config: ConfigDict, method: str) -> ConfigDict:
    """Set a method of section 3.2, with 8 frames; the rest of the recipe stays as it is."""
    config.model.method = method
    config.model.pre_attention_adapter = False
    config.data.num_frames = 8
    if config.data.sampling == "dense":
        config.data.sampling_interval = 8  # as far apart as the frames of the spatial path
    if config.data.source == "ssv2":
        config.eval.temporal_views, config.eval.spatial_crops = 1, 3
    return config


def any_backbone(config: ConfigDict) -> ConfigDict:
    """Set the backbone: that of the file, whatever it is; by default CLIP's ViT-B/16."""
    config.backbone.checkpoint = "weights/clip_vit_b16.safetensors"
    return config


def vit_b16(config: ConfigDict) -> ConfigDict:
    """Set the backbone: CLIP's ViT-B/16."""
    config.backbone.name = "ViT-B/16"
    config.backbone.checkpoint = "weights/clip_vit_b16.safetensors"
    return config


def demo_backbone(config: ConfigDict) -> ConfigDict:
    """Set the backbone: the demo's, a small ViT for 64 pixels, which comes with this package."""
    config.data.image_size = 64
    config.data.crop_scale = (0.8, 1.0)
    config.backbone.name = "custom"
    config.backbone.checkpoint = DEMO_CHECKPOINT
    config.backbone.patch_size = 8
    config.backbone.width = 96
    config.backbone.depth = 4
    config.backbone.heads = 2
    config.backbone.mlp_dim = 384
    config.backbone.projection_dim = 64
    config.model.adapter_bottleneck = 64
    config.model.temporal_position = "sincos3d+clip"  # a small backbone needs its own table too
    config.model.dtype = "float32"
    config.model.scan_blocks = False
    config.optimizer.learning_rate = 3e-3
    return config


def vit_l14(config: ConfigDict) -> ConfigDict:
    """Set the backbone: CLIP's ViT-L/14."""
    config.backbone.name = "ViT-L/14"
    config.backbone.checkpoint = "weights/clip_vit_l14.safetensors"
    return config


def vit_b16_in21k(config: ConfigDict) -> ConfigDict:
    """Set the backbone: ViT-B/16 of ImageNet-21K."""
    config.backbone.name = "ViT-B/16-IN21K"
    config.backbone.checkpoint = "weights/in21k_vit_b16.safetensors"
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)  # its checkpoints expect these
    return config


def swin_b(config: ConfigDict) -> ConfigDict:
    """Set the backbone: Swin-B of ImageNet-21K."""
    config.backbone.name = "Swin-B"
    config.backbone.checkpoint = "weights/in21k_swin_b.safetensors"
    config.data.mean = (0.485, 0.456, 0.406)  # its checkpoints expect these
    config.data.std = (0.229, 0.224, 0.225)
    return config


def parse_num_frames(argument: str, variants: Collection[str] = ()) -> int:
    """Parse T, the number of frames, from the argument of a config file.

    Args:
      argument: "16", "32" or "48".
      variants: other arguments that the config takes, for the message.

    Raises:
      ValueError: the argument is none of these.
    """
    known = ("16", "32", "48")
    if argument not in known:
        raise ValueError(
            f"unknown argument {argument!r} of this config: known are "
            f"{', '.join([*known, *variants])}"
        )
    return int(argument)
