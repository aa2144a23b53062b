"""Sets up the generated data sets: renders and prepares videos, converts the demo's backbone."""

import functools
import os
import pathlib
from typing import Any

from etils import epath

from dualpath_jax.config.recipes import DEMO_CHECKPOINT
from dualpath_jax.data.datasets import registry as dataset_registry
from dualpath_jax.data.datasets.annotations import DatasetIndex
from dualpath_jax.data.preparation import prepare
from dualpath_jax.demo import paths, render
from dualpath_jax.runtime import file_lock, files
from dualpath_jax.runtime.safe_read import read_bytes
from dualpath_jax.weights import convert

# Written by scripts/pretrain_demo_backbone.py, in the layout of OpenAI's CLIP checkpoints.
BACKBONE = pathlib.Path(__file__).parent / "demo_backbone.safetensors"
CHECKPOINT = DEMO_CHECKPOINT  # where configurations expect it, converted


def _render_demo(raw: pathlib.Path) -> tuple[DatasetIndex, str]:
    render.render_demo(raw)
    videos, labels = str(raw / "videos"), str(raw / "labels")
    return dataset_registry.list_videos("ssv2", videos, labels, validation_fraction=0), videos


def _render_paths(raw: pathlib.Path, sizes: dict[str, int]) -> tuple[DatasetIndex, str]:
    paths.render_paths(raw, sizes)
    return dataset_registry.list_videos("folder", str(raw)), str(raw)


# data.source -> function that renders into a folder and returns the listing and folder of videos.
GENERATED = {
    "demo": _render_demo,
    "paths": functools.partial(_render_paths, sizes=paths.SIZES),
    "paths_large": functools.partial(_render_paths, sizes=paths.LARGE_SIZES),
}


def ensure_generated(config: Any) -> None:
    """Create what a run takes from this package and has not been created: videos and backbone.

    Args:
      config: a configuration. If `data.source` is in `GENERATED`, videos are rendered and prepared
        in `data.dir`. The demo's backbone is written to `backbone.checkpoint` if that is
        `CHECKPOINT`, or if `data.source` is "demo" and `backbone.name` "custom".

    Raises:
      ValueError: `data.dir` is in Cloud Storage and has no prepared videos, or it has others.
    """
    source, folder, checkpoint = config.data.source, config.data.dir, config.backbone.checkpoint
    if source in GENERATED and folder is not None:
        with file_lock.waiting_lock(folder):
            _ensure_videos(source, folder)
    is_ours = source == "demo" and config.backbone.name == "custom"
    if checkpoint is not None and (checkpoint == CHECKPOINT or is_ours):
        with file_lock.waiting_lock(os.path.dirname(checkpoint) or "."):
            if not epath.Path(checkpoint).exists():
                convert.convert_checkpoint(BACKBONE, checkpoint)


def _ensure_videos(source: str, folder: str) -> None:
    """Render and prepare the videos of a generated set, unless they are there."""
    note = epath.Path(folder) / "generated_set.txt"  # version 0.1.0 wrote none for the demo
    if (epath.Path(folder) / "dataset_info.json").exists():
        found = read_bytes(note).decode(errors="replace").strip() if note.exists() else "demo"
        if found != source:
            raise ValueError(
                f"config.data.dir={folder} holds the videos of {found!r}, not those of "
                f"config.data.source={source}: choose another folder, such as data/{source}"
            )
        return
    if "://" in folder:
        raise ValueError(
            f"no prepared {source} in config.data.dir={folder}: it can only be rendered into a "
            "local folder; do that, then copy the folder with gcloud storage rsync --recursive"
        )
    files.check_no_links(folder, ("raw", note.name))
    listing, videos = GENERATED[source](pathlib.Path(folder) / "raw")
    files.write_text(note, source + "\n")
    prepare.prepare_dataset(listing, videos, folder)
