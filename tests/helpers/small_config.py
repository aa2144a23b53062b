"""Defines the demo's config on the small data of `conftest.demo_data`, and a tiny ViT."""

from configs import demo

# Values of config.backbone, for the name "custom".
TINY_VIT = {
    "patch_size": 16,
    "width": 48,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 96,
    "projection_dim": 32,
}


def small_config(data, backbone):
    """Return a config with eight clips per step, small images and five steps."""
    config = demo.get_config("paper")
    config.data.source = "ssv2"  # prepared already
    config.data.dir = str(data)
    config.data.batch_size = config.eval.batch_size = 8
    config.backbone.checkpoint = str(backbone)
    config.data.image_size = 32
    config.model.scan_blocks = True
    config.log_every_steps = 5
    config.num_train_steps = 5
    config.eval.every_epochs = 0
    return config
