"""Sets up the embedded demo: renders its videos, prepares them and converts its backbone."""

import pathlib
from typing import Any

from etils import epath

from dualpath_jax.data.datasets import registry as dataset_registry
from dualpath_jax.data.preparation import prepare
from dualpath_jax.demo import render
from dualpath_jax.weights import convert

# Written by scripts/pretrain_demo_backbone.py, in the layout of OpenAI's CLIP checkpoints.
BACKBONE = pathlib.Path(__file__).parent / "demo_backbone.safetensors"


def ensure_demo_data(config: Any) -> None:
    """Create the prepared videos and the converted backbone of `config` if they do not exist.

    Args:
      config: a configuration of the demo; `data.dir` and `backbone.checkpoint` are written.

    Raises:
      ValueError: `data.dir` is in Cloud Storage and has no prepared demo.
    """
    if not (epath.Path(config.data.dir) / "dataset_info.json").exists():
        if "://" in config.data.dir:
            raise ValueError(
                f"no prepared demo in config.data.dir={config.data.dir}: the demo can only be "
                "rendered into a local folder; do that, then copy the folder with gcloud storage "
                "rsync --recursive"
            )
        raw = pathlib.Path(config.data.dir) / "raw"
        render.render_demo(raw)
        videos, labels = str(raw / "videos"), str(raw / "labels")
        listing = dataset_registry.list_videos("ssv2", videos, labels, validation_fraction=0)
        prepare.prepare_dataset(listing, videos, config.data.dir)
    if not epath.Path(config.backbone.checkpoint).exists():
        convert.convert_checkpoint(BACKBONE, config.backbone.checkpoint)
