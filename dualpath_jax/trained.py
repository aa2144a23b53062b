"""A trained model from its workdir, and video files as evaluation would see them.

Public: `Trained`, `load`.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath
from flax import traverse_util

from dualpath_jax import convert
from dualpath_jax import params as params_lib
from dualpath_jax import run as run_lib
from dualpath_jax.checkpoint import Checkpoints, DamagedCheckpoint
from dualpath_jax.data import decode, pipeline
from dualpath_jax.data.records import encode_frame
from dualpath_jax.models import tuning

SHORT_SIDE, QUALITY = 256, 90  # of stored frames, as scripts/prepare_dataset.py has them


class _VideoFile:
    """Stands in for `records.VideoDataset`: one video file, of class 0; VideoError if it is bad."""

    def __init__(self, path: str, class_names: Sequence[str]):
        limits = decode.DecodeLimits()
        self._jpegs, facts = decode.video_to_jpegs(path, SHORT_SIDE, QUALITY, limits)
        self.class_names, self.ids = list(class_names), [path]
        self.labels = np.zeros(1, np.int32)
        self.num_frames = np.array([facts.num_frames])
        self.heights, self.widths = np.array([facts.height]), np.array([facts.width])

    def __len__(self) -> int:
        return 1

    def read_frames(self, video_index: int, frame_indices: Sequence[int]) -> list[bytes]:
        """Records of some frames; see `VideoDataset.read_frames`."""
        del video_index
        return [encode_frame(self._jpegs[frame]) for frame in frame_indices]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
      config: of its run.
      module, params: `module.apply({"params": params}, spatial, temporal)` -> logits.
      class_names: one per class.
      step: number of updates it was trained for.
    """

    config: Any
    module: Any
    params: Any
    class_names: list[str]
    step: int

    def clips(self, video: str | os.PathLike[str]) -> pipeline.Batch:
        """All views of a video file, as `pipeline.eval_batches` makes them: a batch of one.

        Raises:
          decode.VideoError: the file cannot be decoded.
        """
        config = self.config
        return next(
            pipeline.eval_batches(
                _VideoFile(os.fspath(video), self.class_names),
                config.data,
                config.eval.temporal_views,
                config.eval.spatial_crops,
                batch_size=1,
                framesets=tuning.takes_framesets(config.model.method),
            )
        )


def load(workdir: str, backbone: str | None = None) -> Trained:
    """The model of the newest checkpoint of a run.

    Args:
      workdir: of the run, local or gs://.
      backbone: file of the converted backbone, where it is not where the run had it.

    Raises:
      OSError: the backbone's file is not there.
      ValueError: no checkpoint, a damaged one, or another backbone than the run's.
    """
    if not (epath.Path(workdir) / "checkpoints").is_dir():
        raise ValueError(f"no checkpoints in {workdir}: pass the --workdir of a training run")
    checkpoints = Checkpoints(workdir, read_only=True)  # the run may be going on
    step = checkpoints.latest_step()
    if step is None:
        raise ValueError(f"no finished checkpoint in {workdir}: wait until the run has saved one")
    try:
        leaves, saved = checkpoints.read(step)
    except DamagedCheckpoint as damage:
        raise ValueError(str(damage)) from None
    config = ml_collections.ConfigDict(saved["config"])
    path = backbone or config.backbone.checkpoint
    frozen, shape, info = convert.load_backbone(path, run_lib.backbone_shape(config))
    if info.sha256 != saved["backbone_sha256"]:
        raise ValueError(
            f"{path} is not the backbone that {workdir} was trained with (SHA-256 {info.sha256}, "
            f"not {saved['backbone_sha256']}): pass --backbone=FILE"
        )
    module = tuning.build_model(config, shape, len(saved["class_names"]))
    flat = params_lib.flatten({"backbone": frozen})
    dtype = tuning.compute_dtype(config)  # of what is frozen, as in `run.init_params`
    params = {name: jnp.asarray(leaf).astype(dtype) for name, leaf in flat.items()}
    prefix = "trainable/"
    params |= {
        name.removeprefix(prefix): jnp.asarray(leaf)
        for name, leaf in leaves.items()
        if name.startswith(prefix)
    }
    params = traverse_util.unflatten_dict(params, sep="/")
    return Trained(config, module, jax.device_put(params), list(saved["class_names"]), step)
