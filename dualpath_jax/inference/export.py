"""The forward pass of a trained model for programs that do not have this package.

Public: `build_serving_fn`, `export_model`, `FORMATS`, `model_card`; the command line is scripts/export_model.py.

The exported function takes one view of each video as evaluation crops it, and has normalisation and
weights inside:

    spatial   [B, S, H, W, 3] uint8, RGB, 0..255
    temporal  [B, G, H', W', 3] uint8: framesets (dualpath alone)
    result    [B, classes] float32: logits
"""

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

PLATFORMS = ("cpu", "cuda", "tpu")


def build_serving_fn(model: trained_model.TrainedModel) -> Callable[..., jax.Array]:
    """(spatial) or (spatial, temporal) -> logits, see the module."""

    def logits(*views: jax.Array) -> jax.Array:
        clips = dict(zip(("spatial", "temporal"), views, strict=False))
        return clip_logits(model.module, model.config, model.params, clips)

    return logits


def input_shapes(model: trained_model.TrainedModel) -> dict[str, tuple[int, ...]]:
    """Shapes of what `build_serving_fn` takes, without the batch."""
    named = zip(("spatial", "temporal"), clip_shapes(model.config), strict=True)
    return {name: shape[1:] for name, shape in named if shape is not None}


def _stablehlo(
    model: trained_model.TrainedModel, out: pathlib.Path, batch_size: int | None
) -> None:
    batch = "b" if batch_size is None else str(batch_size)
    shapes = list(input_shapes(model).values())
    texts = [", ".join([batch, *map(str, shape)]) for shape in shapes]
    arguments = jax.export.symbolic_args_specs(
        [jax.ShapeDtypeStruct((1, *shape), np.uint8) for shape in shapes], texts
    )
    exported = jax.export.export(jax.jit(build_serving_fn(model)), platforms=PLATFORMS)(*arguments)
    temporary = out / "model.stablehlo.tmp"
    temporary.write_bytes(exported.serialize())
    temporary.replace(out / "model.stablehlo")


def _saved_model(
    model: trained_model.TrainedModel, out: pathlib.Path, batch_size: int | None
) -> None:
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
    tf.saved_model.save(module, str(temporary), signatures=module.logits)
    shutil.rmtree(out / "saved_model", ignore_errors=True)
    temporary.rename(out / "saved_model")


# How each format is written; what it is called and how it is read again, for the card.
FORMATS = {
    "stablehlo": (
        _stablehlo,
        "`model.stablehlo`: a `jax.export` artifact for CPU, CUDA and TPU",
        'jax.export.deserialize(open("model.stablehlo", "rb").read()).call({inputs})',
    ),
    "saved_model": (
        _saved_model,
        "`saved_model/`: a TensorFlow SavedModel",
        'tf.saved_model.load("saved_model").logits({inputs})["logits"]',
    ),
}


def export_model(
    model: trained_model.TrainedModel,
    out: str,
    formats: list[str],
    batch_size: int | None = None,
    results: dict[str, Any] | None = None,
) -> None:
    """Write `model` in each of `formats`, and `model_card.md` beside them.

    Args:
      model: of `trained.load`.
      out: folder, local; made if it is not there.
      formats: names of `FORMATS`.
      batch_size: B; None: any.
      results: of the run's results.json, for the card.

    Raises:
      ValueError: an unknown format or a batch size below 1.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise ValueError(f"unknown format {unknown[0]!r}: known are {', '.join(FORMATS)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch_size={batch_size} must be at least 1")
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in formats:
        FORMATS[name][0](model, folder, batch_size)
    (folder / "class_names.json").write_text(json.dumps(model.class_names, indent=1) + "\n")
    (folder / "model_card.md").write_text(model_card(model, formats, batch_size, results))


def read_results(workdir: str) -> dict[str, Any] | None:
    """What results.json of a run holds, None if there is none."""
    path = epath.Path(workdir) / "results.json"
    return json.loads(path.read_text()) if path.exists() else None


def model_card(
    model: trained_model.TrainedModel,
    formats: list[str],
    batch_size: int | None,
    results: dict[str, Any] | None,
) -> str:
    """What a stranger needs to know to use the exported model, as Markdown."""
    config, shapes = model.config, input_shapes(model)
    batch = "B" if batch_size is None else batch_size
    views = f"{config.eval.temporal_views} clips x {config.eval.spatial_crops} crops"
    trainable = param_tree.count_params(model.params) - param_tree.count_params(
        model.params["backbone"]
    )
    lines = [
        f"# {config.model.method} on {config.backbone.name}, {len(model.class_names)} classes",
        "",
        f"Action recognition in video, trained for {model.step} steps with dualpath_jax on "
        f"`{config.data.source}` data.",
        "",
        "## Input and output",
        "",
        *(
            f"- `{name}`: uint8 [{batch}, {', '.join(map(str, shape))}], RGB, 0..255"
            for name, shape in shapes.items()
        ),
        f"- result: float32 [{batch}, {len(model.class_names)}], logits; names of the classes, in "
        "order, in `class_names.json`",
        "",
        f"One view of each video: {config.data.num_frames} frames, sampled by "
        f"`{config.data.sampling}`. Evaluation averages the probabilities (softmax) over {views}. "
        "Normalisation by mean and standard deviation is inside.",
        "",
        "## Files",
        "",
    ]
    for name in formats:
        _, what, code = FORMATS[name]
        lines += [f"- {what}", "", f"      {code.format(inputs=', '.join(shapes))}", ""]
    lines += [
        "## Parameters",
        "",
        f"{param_tree.count_params(model.params):,}, of which {trainable:,} outside the backbone.",
        "",
        "## Scores",
        "",
    ]
    if results is None or "top1" not in results or results.get("step") != model.step:
        lines.append("None: at this step the run has not been evaluated.")
    else:
        lines.append(
            f"Top-1 {results['top1']:.4f}, top-5 {results.get('top5', float('nan')):.4f} on "
            f"{results.get('num_videos', 'the')} videos of split `{results.get('split')}`, views "
            f"{results.get('views')} (step {results.get('step')})."
        )
    lines += [
        "",
        "## Licence",
        "",
        "The weights of the backbone and the videos it was adapted to have licences of their own, "
        "which go on to what was made of them; this card does not know them.",
        "",
    ]
    return "\n".join(lines)
