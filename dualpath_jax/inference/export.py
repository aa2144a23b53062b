"""Exports the forward pass of a trained model for programs that do not have this package.

`dualpath export` is the command. The exported function takes frames; sampling, crops, scaling,
framesets, normalization and weights are inside:

    frames  [B, T, H, W, 3] uint8, RGB, 0..255; T, H and W are fixed, see `FrameShape`
    result  [B, classes] float32: logits, whose softmax has the probabilities of `predict`

`jax.export` promises that a later JAX reads a file only for six months. Therefore each file holds
the versions and the date that it was made with, see `export_info`.
"""

import dataclasses
import datetime
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from dualpath_jax.data import frame_sampling
from dualpath_jax.inference import frame_inputs, trained_model
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.runtime import files
from dualpath_jax.runtime.safe_read import read_json
from dualpath_jax.version import __version__

PLATFORMS = ("cpu", "cuda", "tpu")
# What is written in the output folder.
_OUTPUTS = (
    "model.stablehlo",
    "saved_model",
    "saved_model.tmp",
    "class_names.json",
    "model_card.md",
)


def export_info() -> dict[str, str]:
    """Return what an exported file is made with: versions of dualpath_jax and jax, and the date."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"dualpath_jax": __version__, "jax": jax.__version__, "date": today}


@dataclasses.dataclass(frozen=True)
class FrameShape:
    """Describes the videos that an exported program takes.

    Attributes:
      num_frames: T, frames of a video; more than a clip has are sampled as in evaluation.
      height, width: of the frames, pixels.
    """

    num_frames: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Return (T, H, W, 3)."""
        return self.num_frames, self.height, self.width, 3


def default_shape(model: trained_model.TrainedModel) -> FrameShape:
    """Return the frames of one clip, cropped and scaled to what the model sees."""
    data = model.config.data
    clip = method_registry.clip_format(model.config)
    num_frames = clip.num_frames
    if clip.sampling == "dense":
        interval = clip.sampling_interval or frame_sampling.default_interval(clip.num_frames)
        num_frames = (clip.num_frames - 1) * interval + 1
    return FrameShape(num_frames, data.image_size, data.image_size)


def build_serving_fn(model: trained_model.TrainedModel) -> Callable[[jax.Array], jax.Array]:
    """Return the function frames -> logits, see the module docstring.

    Its name holds `export_info`; `jax.export.deserialize(...).fun_name` shows it.
    """

    def logits(frames: jax.Array) -> jax.Array:
        views = frame_inputs.frame_logits(model.module, model.config, model.params, frames)
        return frame_inputs.mean_logits(views)

    info = "_".join(f"{name}_{value}" for name, value in export_info().items())
    logits.__name__ = "logits_" + info.replace(".", "_").replace("-", "_")
    return logits


def _write_stablehlo(
    model: trained_model.TrainedModel,
    out: pathlib.Path,
    shape: FrameShape,
    batch_size: int | None,
) -> None:
    """Write OUT/model.stablehlo."""
    batch = "b" if batch_size is None else str(batch_size)
    text = ", ".join([batch, *map(str, shape.shape)])
    argument = jax.export.symbolic_args_specs(
        jax.ShapeDtypeStruct((1, *shape.shape), np.uint8), text
    )
    exported = jax.export.export(jax.jit(build_serving_fn(model)), platforms=PLATFORMS)(argument)
    with files.atomic_path(out / "model.stablehlo") as temporary:
        temporary.write_bytes(exported.serialize())


def _write_saved_model(
    model: trained_model.TrainedModel,
    out: pathlib.Path,
    shape: FrameShape,
    batch_size: int | None,
) -> None:
    """Write OUT/saved_model."""
    import tensorflow as tf
    from jax.experimental import jax2tf

    batch = "b" if batch_size is None else str(batch_size)
    function = jax2tf.convert(
        build_serving_fn(model),
        polymorphic_shapes=[", ".join([batch, *map(str, shape.shape)])],
        native_serialization_platforms=PLATFORMS,
        with_gradient=False,
    )
    module = tf.Module()
    info = json.dumps(export_info())
    module.export_info = tf.function(lambda: tf.constant(info), input_signature=[])
    module.logits = tf.function(
        lambda frames: {"logits": function(frames)},
        autograph=False,
        input_signature=[tf.TensorSpec((batch_size, *shape.shape), tf.uint8, name="frames")],
    )
    temporary = out / "saved_model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        tf.saved_model.save(module, str(temporary), signatures=module.logits)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if files.is_disk_error(error):
            raise files.explain_write_error(out / "saved_model", error) from None
        raise
    shutil.rmtree(out / "saved_model", ignore_errors=True)
    temporary.rename(out / "saved_model")


# By format: the function that writes it, its description, and the code that reads it (the last two
# for the model card).
FORMATS = {
    "stablehlo": (
        _write_stablehlo,
        "`model.stablehlo`: a `jax.export` artifact for CPU, CUDA and TPU",
        'import jax\nprogram = jax.export.deserialize(open("model.stablehlo", "rb").read())\n'
        "logits = program.call(frames)",
    ),
    "saved_model": (
        _write_saved_model,
        "`saved_model/`: a TensorFlow SavedModel",
        "import tensorflow as tf\n"
        'logits = tf.saved_model.load("saved_model").logits(frames)["logits"].numpy()',
    ),
}


def find_format_problem(name: str) -> str | None:
    """Return why this installation cannot write a format of `FORMATS`; None if it can."""
    if name == "saved_model" and jax.__version_info__ >= (0, 12):
        return (
            f"TensorFlow 2.21, the newest, cannot read a SavedModel that jax {jax.__version__} "
            "writes: export with Python 3.11, which has jax 0.10, or use --formats stablehlo"
        )
    return None


def export_model(
    model: trained_model.TrainedModel,
    out: str,
    formats: list[str],
    batch_size: int | None = None,
    results: dict[str, Any] | None = None,
    shape: FrameShape | None = None,
) -> None:
    """Write `model` in each of `formats`, with class_names.json and model_card.md.

    Args:
      model: a model from `trained_model.load`.
      out: local folder to write; it is created if it does not exist.
      formats: keys of `FORMATS`.
      batch_size: B of the exported function; None accepts any.
      results: content of the run's results.json for the model card; None if unknown.
      shape: of the videos; None: `default_shape`.

    Raises:
      ValueError: a format is unknown or cannot be written, the batch size is below 1, or a file to
        write is a link.
      OSError: a file cannot be written; the message names it.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"unknown format {unknown[0]!r}: choose from {', '.join(FORMATS)}")
    if problem := next(filter(None, map(find_format_problem, formats)), None):
        raise ValueError(problem)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch_size={batch_size} must be at least 1")
    folder = pathlib.Path(out)
    files.check_no_links(folder, _OUTPUTS)
    shape = shape or default_shape(model)
    folder.mkdir(parents=True, exist_ok=True)
    for name in formats:
        FORMATS[name][0](model, folder, shape, batch_size)
    files.write_text(folder / "class_names.json", json.dumps(model.class_names, indent=1) + "\n")
    card = format_model_card(model, formats, batch_size, results, shape)
    files.write_text(folder / "model_card.md", card)


def read_results(workdir: str) -> dict[str, Any] | None:
    """Read results.json of a run; return None if it does not exist.

    Raises:
      ValueError: the file is damaged.
    """
    path = epath.Path(workdir) / "results.json"
    return read_json(path, dict) if path.exists() else None


def format_model_card(
    model: trained_model.TrainedModel,
    formats: list[str],
    batch_size: int | None,
    results: dict[str, Any] | None,
    shape: FrameShape,
) -> str:
    """Return a Markdown text that explains how to use the exported model.

    Args:
      model: the exported model.
      formats: keys of `FORMATS` that were written.
      batch_size: B of the exported function; None for any.
      results: content of the run's results.json; None if unknown.
      shape: of the videos.
    """
    config = model.config
    total = param_tree.count_params(model.params)
    trainable = total - param_tree.count_params(model.params["backbone"])
    lines = [
        f"# {config.model.method} on {config.backbone.name}, {len(model.class_names)} classes",
        "",
        f"Action recognition in video, trained for {model.step} steps with dualpath_jax on "
        f"`{config.data.source}` data.",
        "",
        *_format_inputs(model, batch_size, shape),
        "",
        "## Files",
        "",
        *_format_files(formats, batch_size, shape),
        "The files were exported on {date} with jax {jax} and dualpath_jax {dualpath_jax}. "
        "`jax.export` promises that later versions of jax read them for six months; export the "
        "model again after that.".format(**export_info()),
        "",
        "## Parameters",
        "",
        f"{total:,}, of which {trainable:,} outside the backbone.",
        "",
        "## Scores",
        "",
        _format_scores(model, results),
        "",
        "## License",
        "",
        "The weights of the backbone and the videos it was adapted to have their own licenses, "
        "which also apply to models made from them. This card does not list them.",
        "",
    ]
    return "\n".join(lines)


def _format_inputs(
    model: trained_model.TrainedModel, batch_size: int | None, shape: FrameShape
) -> list[str]:
    """Return the model card's section on input and output."""
    config = model.config
    batch = "B" if batch_size is None else batch_size
    clips = len(frame_inputs.view_frames(config, shape.num_frames))
    return [
        "## Input and output",
        "",
        f"- `frames`: uint8 [{batch}, {', '.join(map(str, shape.shape))}], RGB, 0..255: "
        f"{shape.num_frames} frames of each video in their order, {shape.height} pixels high and "
        f"{shape.width} wide",
        f"- result: float32 [{batch}, {len(model.class_names)}], logits; their softmax are the "
        "probabilities; `class_names.json` has the names of the classes in this order",
        "",
        f"The program takes {clips} x {config.eval.spatial_crops} views (clips x crops) of "
        f"{config.data.num_frames} frames from each video, sampled by `{config.data.sampling}`, "
        "scales and normalizes them, and averages the probabilities. In training the short side of "
        f"a video had {model.frame_format.short_side} pixels or its own size.",
    ]


def _format_files(formats: list[str], batch_size: int | None, shape: FrameShape) -> list[str]:
    """Return the model card's list of files, each with a program that uses it."""
    lines = []
    for name in formats:
        _, description, code = FORMATS[name]
        program = [
            "import json",
            "import numpy as np",
            f"frames = np.zeros({(batch_size or 1, *shape.shape)}, np.uint8)  # your videos",
            *code.splitlines(),
            'names = json.load(open("class_names.json"))',
            "print([names[label] for label in np.argmax(logits, axis=-1)])",
        ]
        lines += [f"- {description}", "", *(f"      {line}" for line in program), ""]
    return lines


def _format_scores(model: trained_model.TrainedModel, results: dict[str, Any] | None) -> str:
    """Return the model card's line on the scores of the exported step."""
    if results is None or "top1" not in results or results.get("step") != model.step:
        return "There are none: the run has not been evaluated at this step."
    return (
        f"Top-1 {results['top1']:.4f}, top-5 {results.get('top5', float('nan')):.4f} on "
        f"{results.get('num_videos', 'the')} videos of split `{results.get('split')}`, views "
        f"{results.get('views')} (step {results.get('step')})."
    )
