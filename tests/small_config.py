"""The demo's configuration on the small set of `conftest.demo_data`."""

from configs import demo


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
