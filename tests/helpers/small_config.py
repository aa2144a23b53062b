"""The demo's configuration on the small set of `conftest.demo_data`; a tiny ViT for others."""

from configs import demo

# Of `backbone`, with the name "custom".
TINY_VIT = {
    "patch_size": 16,
    "width": 48,
    "depth": 2,
    "heads": 2,
    "mlp_dim": 96,
    "projection_dim": 32,
}


def small_config(data, backbone):
    """Eight clips a step, small images, five steps."""
    config = demo.get_config()
    config.data.source = "ssv2"  # prepared already
    config.data.dir = str(data)
    config.data.batch_size = config.eval.batch_size = 8
    config.backbone.checkpoint = str(backbone)
    config.data.image_size = 32
    config.model.scan_blocks = True
    config.log_every_steps = 5
    config.num_train_steps = 5
    return config
