"""Exports the forward pass of a trained model for programs that do not have this package.

`dualpath export` is the command. The exported function takes one view of each video,
cropped as in evaluation; normalization and weights are inside:

    spatial   [B, S, H, W, 3] uint8, RGB, 0..255
    temporal  [B, G, H', W', 3] uint8: framesets
    result    [B, classes] float32: logits

It takes only the inputs that the model uses, in this order, see `input_shapes`.

`jax.export` promises that a later JAX reads a file only for six months. Therefore each file holds
the versions and the date that it was made with, see `export_info`.
"""

import datetime
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from dualpath_jax.inference import trained_model
from dualpath_jax.models import param_tree
from dualpath_jax.models.abstract import clip_shapes
from dualpath_jax.models.forward import clip_logits
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


def build_serving_fn(model: trained_model.TrainedModel) -> Callable[..., jax.Array]:
    """Return the function (spatial, temporal) -> logits, see the module docstring.

    Its name holds `export_info`; `jax.export.deserialize(...).fun_name` shows it.
    """
    names = tuple(input_shapes(model))

    def logits(*views: jax.Array) -> jax.Array:
        clips = dict(zip(names, views, strict=True))
        return clip_logits(model.module, model.config, model.params, clips)

    info = "_".join(f"{name}_{value}" for name, value in export_info().items())
    logits.__name__ = "logits_" + info.replace(".", "_").replace("-", "_")
    return logits


def input_shapes(model: trained_model.TrainedModel) -> dict[str, tuple[int, ...]]:
    """Return the input shapes of `build_serving_fn` by name, without the batch axis."""
    named = zip(("spatial", "temporal"), clip_shapes(model.config), strict=True)
    return {name: shape[1:] for name, shape in named if shape is not None}


def _write_stablehlo(
    model: trained_model.TrainedModel, out: pathlib.Path, batch_size: int | None
) -> None:
    """Write OUT/model.stablehlo."""
    batch = "b" if batch_size is None else str(batch_size)
    shapes = list(input_shapes(model).values())
    texts = [", ".join([batch, *map(str, shape)]) for shape in shapes]
    arguments = jax.export.symbolic_args_specs(
        [jax.ShapeDtypeStruct((1, *shape), np.uint8) for shape in shapes], texts
    )
    exported = jax.export.export(jax.jit(build_serving_fn(model)), platforms=PLATFORMS)(*arguments)
    with files.atomic_path(out / "model.stablehlo") as temporary:
        temporary.write_bytes(exported.serialize())


def _write_saved_model(
    model: trained_model.TrainedModel, out: pathlib.Path, batch_size: int | None
) -> None:
    """Write OUT/saved_model."""
    import tensorflow as tf
    from jax.experimental import jax2tf

    shapes = input_shapes(model)
    batch = "b" if batch_size is None else str(batch_size)
    function = jax2tf.convert(
        build_serving_fn(model),
        polymorphic_shapes=[", ".join([batch, *map(str, shape)]) for shape in shapes.values()],
        native_serialization_platforms=PLATFORMS,
        with_gradient=False,
    )
    module = tf.Module()
    info = json.dumps(export_info())
    module.export_info = tf.function(lambda: tf.constant(info), input_signature=[])
    module.logits = tf.function(
        lambda *views: {"logits": function(*views)},
        autograph=False,
        input_signature=[
            tf.TensorSpec((batch_size, *shape), tf.uint8, name=name)
            for name, shape in shapes.items()
        ],
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
        'jax.export.deserialize(open("model.stablehlo", "rb").read()).call({inputs})',
    ),
    "saved_model": (
        _write_saved_model,
        "`saved_model/`: a TensorFlow SavedModel",
        'tf.saved_model.load("saved_model").logits({inputs})["logits"]',
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
) -> None:
    """Write `model` in each of `formats`, with class_names.json and model_card.md.

    Args:
      model: a model from `trained_model.load`.
      out: local folder to write; it is created if it does not exist.
      formats: keys of `FORMATS`.
      batch_size: B of the exported function; None accepts any.
      results: content of the run's results.json for the model card; None if unknown.

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
    folder.mkdir(parents=True, exist_ok=True)
    for name in formats:
        FORMATS[name][0](model, folder, batch_size)
    files.write_text(folder / "class_names.json", json.dumps(model.class_names, indent=1) + "\n")
    card = format_model_card(model, formats, batch_size, results)
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
) -> str:
    """Return a Markdown text that explains how to use the exported model.

    Args:
      model: the exported model.
      formats: keys of `FORMATS` that were written.
      batch_size: B of the exported function; None for any.
      results: content of the run's results.json; None if unknown.
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
        *_format_inputs(model, batch_size),
        "",
        "## Files",
        "",
        *_format_files(model, formats),
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


def _format_inputs(model: trained_model.TrainedModel, batch_size: int | None) -> list[str]:
    """Return the model card's section on input and output."""
    config = model.config
    batch = "B" if batch_size is None else batch_size
    views = f"{config.eval.temporal_views} clips x {config.eval.spatial_crops} crops"
    return [
        "## Input and output",
        "",
        *(
            f"- `{name}`: uint8 [{batch}, {', '.join(map(str, shape))}], RGB, 0..255"
            for name, shape in input_shapes(model).items()
        ),
        f"- result: float32 [{batch}, {len(model.class_names)}], logits; `class_names.json` has "
        "the names of the classes in this order",
        "",
        f"One view of each video: {config.data.num_frames} frames, sampled by "
        f"`{config.data.sampling}`. Evaluation averages the probabilities (softmax) over {views}. "
        "The exported function normalizes by mean and standard deviation itself.",
    ]


def _format_files(model: trained_model.TrainedModel, formats: list[str]) -> list[str]:
    """Return the model card's list of files, each with the code that reads it."""
    inputs = ", ".join(input_shapes(model))
    lines = []
    for name in formats:
        _, description, code = FORMATS[name]
        lines += [f"- {description}", "", f"      {code.format(inputs=inputs)}", ""]
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
