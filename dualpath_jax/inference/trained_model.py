"""Loads trained models and predicts the classes of video files, as evaluation does.

`load` is `dualpath_jax.load`.
"""

import dataclasses
import functools
import io
import os
import threading
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from PIL import Image

from dualpath_jax.config.schema import check_values
from dualpath_jax.config.values import INVALID_CONFIG_ERRORS, restore_config
from dualpath_jax.data import dataset_metadata, pipeline
from dualpath_jax.data.clip_spec import Views
from dualpath_jax.data.preparation import video_decoder
from dualpath_jax.data.preparation.shard_writer import encode_frame
from dualpath_jax.data.preparation.worker_pool import Failure, WorkerPool
from dualpath_jax.data.video_source import FrameFormat
from dualpath_jax.inference import frame_inputs
from dualpath_jax.models import abstract, param_tree, preprocess
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones.contract import BackboneConfig
from dualpath_jax.models.forward import flatten_views, view_logits
from dualpath_jax.runtime.command_line import command_line
from dualpath_jax.runtime.safe_read import truncated_repr
from dualpath_jax.training import adapter_file
from dualpath_jax.training.checkpoint import Checkpoints, DamagedCheckpoint
from dualpath_jax.weights import convert

_MAX_POSITIONS = 2**28  # numbers in the position tables of a clip; ViT-L with 96 frames: 57 million


class SingleVideo:
    """Implements `VideoSource` with the decoded frames of one video, of class 0.

    Args:
      jpegs: files in memory, see `video_decoder.video_to_jpegs`.
      height: of each frame, pixels.
      width: of each frame, pixels.
      name: of the video, for messages.
      class_names: of the model.
    """

    def __init__(
        self, jpegs: Sequence[bytes], height: int, width: int, name: str, class_names: Sequence[str]
    ):
        self._jpegs = jpegs
        self.class_names, self.ids = list(class_names), [name]
        self.labels = np.zeros(1, np.int32)
        self.num_frames = np.array([len(jpegs)])
        self.heights, self.widths = np.array([height]), np.array([width])

    def __len__(self) -> int:
        return 1

    def read_frames(self, video_index: int, frame_indices: Sequence[int]) -> list[bytes]:
        """Return the records of some frames, see `VideoDataset.read_frames`."""
        del video_index
        return [encode_frame(self._jpegs[frame]) for frame in frame_indices]

    def image(self, frame: int) -> Image.Image:
        """Return one frame, RGB."""
        return Image.open(io.BytesIO(self._jpegs[frame])).convert("RGB")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Holds the predicted classes of a video.

    Attributes:
      class_names: the most probable first.
      probabilities: of these, in 0..1, averaged over the views as in evaluation.
    """

    class_names: list[str]
    probabilities: list[float]

    @classmethod
    def from_logits(
        cls, logits: np.ndarray, class_names: Sequence[str], top_k: int
    ) -> "Prediction":
        """Return the `top_k` most probable classes by logits [V, classes] of all views."""
        probabilities = mean_probabilities(logits)
        best = np.argsort(-probabilities, kind="stable")[: max(1, top_k)]
        return cls([class_names[i] for i in best], [float(probabilities[i]) for i in best])


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """Predicts videos with a trained model.

    Attributes:
      config: of its run.
      module, params: `module.apply({"params": params}, spatial, temporal)` -> logits.
      class_names: one per class.
      step: number of updates it was trained for.
      frame_format: of the frames that it was trained on.
    """

    config: Any = dataclasses.field(repr=False)
    module: Any = dataclasses.field(repr=False)
    params: Any = dataclasses.field(repr=False)
    class_names: list[str]
    step: int
    frame_format: FrameFormat = FrameFormat()
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False)

    def clips(self, video: str | os.PathLike[str]) -> pipeline.Batch:
        """Return all views of a video file as `pipeline.eval_batches` makes them, a batch of one.

        The file is decoded in a process that can be killed, with the limits of `DecodeLimits`. It
        starts with the first video and serves all later ones.

        Raises:
          video_decoder.VideoError: the file cannot be decoded, or hangs or crashes the decoder.
        """
        path = os.fspath(video)
        stored = self.frame_format
        limits = video_decoder.DecodeLimits()
        arguments = (path, stored.short_side, stored.quality, limits, stored.fps)
        with self._lock:
            (result,) = self._pool.map(video_decoder.video_to_jpegs, [arguments])
        if isinstance(result, Failure):
            raise video_decoder.VideoError(f"{path}: {result.reason}")
        jpegs, info = result
        return self.clips_from_frames(
            SingleVideo(jpegs, info.height, info.width, path, self.class_names)
        )

    def clips_from_frames(self, frames: SingleVideo) -> pipeline.Batch:
        """Return all views of a decoded video, see `clips`.

        Several threads may call it at the same time.
        """
        return self._make_clips(frames)

    @functools.cached_property
    def _make_clips(self) -> pipeline.EvalClips:
        views = Views(self.config.eval.temporal_views, self.config.eval.spatial_crops)
        inputs = method_registry.clip_inputs(self.config)
        return pipeline.EvalClips(self.config.data, views, inputs)

    @functools.cached_property
    def _pool(self) -> WorkerPool:
        return WorkerPool(1, video_decoder.DecodeLimits())

    @functools.cached_property
    def _logits(self) -> Any:
        return jax.jit(functools.partial(view_logits, self.module, self.config))

    @functools.cached_property
    def _features(self) -> Any:
        """Return the compiled function of `features` for dualpath."""

        def features(params: Any, batch: Any) -> dict[str, jax.Array]:
            dtype = method_registry.compute_dtype(self.config)
            clips = flatten_views(batch)
            spatial, temporal = preprocess.model_inputs(clips, self.config.data, dtype)
            apply = functools.partial(self.module.apply, {"params": params})
            outputs = {"logits": apply(spatial, temporal)}
            if self.module.spatial_path:
                outputs["y_SP"] = apply(spatial, method="spatial_features")
            if self.module.temporal_path:
                outputs["y_TP"] = apply(temporal, method="temporal_features")
            return outputs

        return jax.jit(features)

    def logits(self, clips: pipeline.Batch) -> np.ndarray:
        """Return logits [V, classes] float32 of the views of `clips` or `clips_from_frames`."""
        return np.asarray(self._logits(self.params, model_arrays(clips)))[0]

    @functools.cached_property
    def _frame_logits(self) -> Any:
        return jax.jit(functools.partial(frame_inputs.frame_logits, self.module, self.config))

    def logits_of_frames(self, frames: np.ndarray) -> np.ndarray:
        """Return logits [V, classes] float32 of the views of a video uint8 [T, H, W, 3], RGB.

        Frames are scaled and cropped without JPEG in between, so that the result differs slightly
        from that of a file. Each new shape is compiled.

        Raises:
          ValueError: the array is not of this dtype and shape.
        """
        frames = frame_inputs.check_frames(frames)
        return np.asarray(self._frame_logits(self.params, frames[None]))[0]

    def predict(
        self, video: str | os.PathLike[str] | np.ndarray | Sequence[Any], top_k: int = 5
    ) -> Prediction | list[Prediction]:
        """Return the `top_k` most probable classes of a video, over all views of evaluation.

        Args:
          video: path of a file; or its frames, uint8 [T, H, W, 3], RGB; or a list of such paths and
            arrays, for which a list is returned.
          top_k: number of classes.

        Raises:
          video_decoder.VideoError: see `clips`.
          ValueError: an array has another dtype or shape.
        """
        if isinstance(video, list | tuple):
            return [self.predict(one, top_k) for one in video]
        is_path = isinstance(video, str | os.PathLike)
        logits = self.logits(self.clips(video)) if is_path else self.logits_of_frames(video)
        return Prediction.from_logits(logits, self.class_names, top_k)

    def features(self, clips: pipeline.Batch) -> dict[str, np.ndarray]:
        """Return "logits" [V, classes] and, for dualpath, "y_SP" and "y_TP" [V, e] (eq. 8, 10).

        All are float32. A path that the config switches off has no features.
        """
        if self.config.model.method != "dualpath":
            return {"logits": self.logits(clips)}
        return {
            k: np.asarray(v) for k, v in self._features(self.params, model_arrays(clips)).items()
        }


def mean_probabilities(logits: np.ndarray) -> np.ndarray:
    """Average the probabilities of logits [V, classes] over views: float32 [classes], 0..1."""
    return np.asarray(jax.nn.softmax(logits, axis=-1)).mean(axis=0)


def model_arrays(clips: pipeline.Batch) -> dict[str, np.ndarray]:
    """Return the model's inputs in a batch: "spatial" and "temporal", or one of them."""
    return {key: clips[key] for key in ("spatial", "temporal") if key in clips}


def read_trained_params(
    path: str, which: str = "latest"
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the trained parameters of a run or an adapter file.

    Args:
      path: workdir of a run, or an adapter file; local or gs://.
      which: checkpoint of a run: "latest", or "best" during training by `eval.criterion`.

    Returns:
      (trainable parameters by path, float32; metadata with "step").

    Raises:
      OSError: there is no such file.
      ValueError: there is no checkpoint, or it is damaged.
    """
    if path.endswith(".safetensors"):
        return adapter_file.read_adapter(path)
    if not (epath.Path(path) / "checkpoints").is_dir():
        raise ValueError(f"no checkpoints in {path}: pass the --workdir of a training run")
    checkpoints = Checkpoints(path, read_only=True)  # the run may still be training
    step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
    if step is None:
        kind = "evaluated during training (config.eval.every_epochs)" if which == "best" else "yet"
        raise ValueError(f"no checkpoint {kind} in {path}: wait until the run has saved one")
    try:
        leaves, metadata = checkpoints.read(step)
    except DamagedCheckpoint as damage:
        raise ValueError(str(damage)) from None
    prefix = "trainable/"
    trained = {
        name.removeprefix(prefix): np.asarray(leaf)
        for name, leaf in leaves.items()
        if name.startswith(prefix)
    }
    return trained, metadata | {"step": step}


def load(path: str, backbone: str | None = None, checkpoint: str = "latest") -> TrainedModel:
    """Load a trained model; its data set is not needed.

        import dualpath_jax as dp
        model = dp.load("runs/demo")
        model.predict("clip.mp4")

    Args:
      path: workdir of a run, or an adapter file; local or gs://.
      backbone: file of the converted backbone; None: the file that the run used.
      checkpoint: of a run: "latest", or "best" during training by `eval.criterion`.

    Raises:
      OSError: a file is missing.
      ValueError: there is no checkpoint, it is damaged, its parameters do not belong to the model,
        or the backbone is not that of the run.
    """
    path = os.path.expanduser(path)
    leaves, saved = read_trained_params(path, checkpoint)
    config = check_trained_params(path, leaves, saved)
    frozen, shape, _ = load_backbone_of(path, config, saved, backbone)
    module = method_registry.build_model(config, shape, len(saved["class_names"]))
    flat = param_tree.flatten({"backbone": frozen})
    # Frozen weights have the compute dtype, as in `experiment.init_params`.
    dtype = method_registry.compute_dtype(config)
    params = {name: jnp.asarray(leaf).astype(dtype) for name, leaf in flat.items()}
    params |= {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    params = traverse_util.unflatten_dict(params, sep="/")
    class_names, step = list(saved["class_names"]), saved["step"]
    frame_format = FrameFormat()
    if saved.get("frame_format") is not None:  # older versions did not save it
        frame_format = dataset_metadata.parse_frame_format(saved["frame_format"], path)
    return TrainedModel(config, module, jax.device_put(params), class_names, step, frame_format)


def load_backbone_of(
    path: str, config: Any, saved: dict[str, Any], backbone: str | None = None
) -> tuple[dict[str, Any], BackboneConfig, convert.BackboneInfo]:
    """Load the backbone that a model was trained with.

    Args:
      path: workdir or adapter file, for messages.
      config: of the model.
      saved: metadata of the model.
      backbone: file of the converted backbone; None: the file that the run used.

    Returns:
      See `convert.load_backbone`.

    Raises:
      OSError: the file is missing.
      ValueError: it is damaged, or not the backbone of the run.
    """
    file = os.path.expanduser(backbone or config.backbone.checkpoint or "")
    if not file:
        raise ValueError(f"{path} does not name the file of its backbone: pass --backbone=FILE")
    try:
        frozen, shape, info = convert.load_backbone(file, abstract.build_backbone_config(config))
    except FileNotFoundError as error:
        if backbone:
            raise
        raise FileNotFoundError(
            f"the backbone of {path} is not at {file}, where the run had it: pass its new place, "
            "--backbone=FILE or in Python backbone=FILE"
        ) from error
    if info.sha256 != saved["backbone_sha256"]:
        raise ValueError(
            f"{file} is not the backbone that {path} was trained with (SHA-256 {info.sha256}, "
            f"not {saved['backbone_sha256']}): pass --backbone=FILE"
        )
    convert.check_merged(file, info, config.model)
    return frozen, shape, info


def parse_saved_config(saved: dict[str, Any]) -> Any:
    """Parse the config in the metadata of a checkpoint or an adapter file, which may be untrusted.

    Raises:
      INVALID_CONFIG_ERRORS: it is not a configuration, or its model is implausibly large.
    """
    config = restore_config(saved["config"])
    check_values(config)
    if not isinstance(config.backbone.checkpoint, str | None):
        raise ValueError(
            f"backbone.checkpoint={truncated_repr(config.backbone.checkpoint)} is not a path"
        )
    shape = abstract.build_backbone_config(config)
    positions = config.data.num_frames * shape.num_tokens * shape.width
    if positions > _MAX_POSITIONS:
        raise ValueError(f"its clips have {positions:,} numbers of positions")
    return config


def check_trained_params(path: str, leaves: dict[str, np.ndarray], saved: dict[str, Any]) -> Any:
    """Return the config of a trained model, after a check of its parameters.

    Args:
      path: workdir or adapter file, for messages.
      leaves: trained parameters by path.
      saved: metadata.

    Raises:
      ValueError: the config is invalid, or the model that it builds has other parameters.
    """
    command = command_line("export-adapter")
    remedy = f"use the workdir of the run, or write the file again by `{command}`"
    try:
        config = parse_saved_config(saved)
        model = abstract.abstract_model(config, len(saved["class_names"]))
    except INVALID_CONFIG_ERRORS as error:
        raise ValueError(f"{path}: its config builds no model ({error}): {remedy}") from None
    if config.model.st_adapter.form == "released" and "adapters/down/kernel" in leaves:
        raise ValueError(
            f"{path} was trained by an older version, in which model.st_adapter.form=released "
            "normalized class tokens before their average: train it again"
        )
    is_trainable = param_tree.flatten(model.mask)
    shapes = {n: p.shape for n, p in param_tree.flatten(model.params).items() if is_trainable[n]}
    for name in sorted(shapes.keys() | leaves.keys()):
        actual = f"{name} of shape {leaves[name].shape}" if name in leaves else f"no {name}"
        expected = f"{name} of shape {shapes[name]}" if name in shapes else f"no {name}"
        if actual != expected:
            raise ValueError(f"{path} has {actual}, its config builds {expected}: {remedy}")
        if not np.isfinite(leaves[name]).all():
            raise ValueError(f"{path} is damaged: {name} has values that are not finite: {remedy}")
    return config
