"""Shows whether a configuration trains: it fits 32 clips and prints losses and gradient norms.

    python scripts/trainability.py --config=configs/finetune.py --config.data.dir=DIR --rates 1e-3

The clips are center crops of training videos of all classes; nothing is augmented, and labels are
not smoothed, because smoothed labels keep the loss above 0.1. For each learning rate a fresh model
takes STEPS steps. At steps 0, 10 and 100 a table gives the loss and, for each path and block, the
norm of the gradient. A rate ends early once the mean loss of ten steps is below 0.05. Its last line
gives the mean loss over all clips at the end; a configuration that trains ends below 0.1.

`--backbone=random` takes random weights of the backbone's shape instead of the file. Some
pretrained backbones add far larger values to the residual stream than random ones;
`--branch_scale=30` multiplies what attention and MLPs add by 30.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from dualpath_jax.cli import build_parser, parse_with_overrides, positive, user_errors
from dualpath_jax.runtime import console, environment

SHOWN_STEPS = (0, 10, 100)
_OWN_KEYS = {
    "optimizer.learning_rate": "use --rates",
    "num_train_steps": "use --steps",
    "num_epochs": "use --steps",
    "data.synthetic": "use --backbone=random",
    "optimizer.label_smoothing": "labels are not smoothed",
}


def block_norms(gradients) -> dict:
    """Return the norms of the gradient by path; of adapters one for each block."""
    import jax
    import numpy as np

    from dualpath_jax.models import param_tree

    squares: dict = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = param_tree.path_name(path)
        parts = name.split("/")
        group = parts[0]
        if group in ("spatial", "temporal"):  # a Swin's adapters are stacked by stage
            group = "/".join(parts[: 3 if "/stage_" in name else 2])
        values = np.square(np.asarray(leaf, np.float64))
        values = values.reshape(len(values) if "/adapters" in group else 1, -1).sum(axis=1)
        squares[group] = squares.get(group, 0.0) + values
    return {group: np.sqrt(values).tolist() for group, values in squares.items()}


def load_clips(config, count: int):
    """Return (data set, batch) of `count` training videos, as evaluation sees them.

    The videos are spread over the classes: a class has at most one more than another one, unless it
    has too few. The data set consists of these videos and at most one more of each class.
    """
    import numpy as np

    from dualpath_jax.data import pipeline
    from dualpath_jax.data.clip_spec import Views
    from dualpath_jax.data.few_shots import FewShots
    from dualpath_jax.data.video_dataset import VideoDataset
    from dualpath_jax.models import registry as method_registry

    videos = VideoDataset(config.data.dir, config.data.train_split)
    shots = -(-count // len(videos.class_names))
    dataset = FewShots(videos, min(shots, config.data.shots or shots))
    size = len(dataset) if shots > 1 else min(count, len(dataset))
    inputs = method_registry.clip_inputs(config)
    batch = next(pipeline.eval_batches(dataset, config.data, Views(1, 1), size, inputs=inputs))
    labels = batch["label"].tolist()
    earlier = [labels[:row].count(label) for row, label in enumerate(labels)]
    rows = np.argsort(earlier, kind="stable")[:count]
    clips = {key: batch[key][rows, 0] for key in ("spatial", "temporal") if key in batch}
    return dataset, clips | {key: batch[key][rows] for key in ("label", "mask")}


def scale_branches(frozen, scale: float):
    """Multiply the outputs of attention and MLP of all frozen blocks, biases included."""
    import jax

    from dualpath_jax.models import param_tree

    def scaled(path, leaf):
        outputs = ("attention/out/", "mlp/output/")
        return leaf * scale if any(name in param_tree.path_name(path) for name in outputs) else leaf

    return jax.tree_util.tree_map_with_path(scaled, frozen)


def fit(config, dataset, clips: dict, steps: int, branch_scale: float = 1.0) -> dict:
    """Train on the clips; print the tables and return the result of one learning rate."""
    import jax
    import numpy as np

    from dualpath_jax.models import param_tree
    from dualpath_jax.training.experiment import build_experiment
    from dualpath_jax.training.step import loss_fn, make_train_step

    experiment, state = build_experiment(config, "", dataset)
    model, frozen = experiment.model, scale_branches(experiment.frozen, branch_scale)

    def compute_loss(trainable, batch):
        return loss_fn(model, config, param_tree.merge(trainable, frozen), batch, None)

    loss_of, gradients = jax.jit(compute_loss), jax.jit(jax.grad(compute_loss, has_aux=True))
    step_fn = jax.jit(make_train_step(model, config, experiment.optimizer), donate_argnums=0)
    size, rng = min(config.data.batch_size, len(clips["label"])), np.random.default_rng(config.seed)
    order, history = [], []
    for step in range(steps):
        if len(order) < size:
            order = rng.permutation(len(clips["label"])).tolist()
        rows = [order.pop() for _ in range(size)]
        batch = {key: value[rows] for key, value in clips.items()}
        if step in SHOWN_STEPS:
            grads, metrics = gradients(state.trainable, batch)
            print(f"step {step}: loss {float(metrics['loss']):.3f}; gradient norms:")
            for group, norms in block_norms(grads).items():
                print(f"  {group:20} {' '.join(f'{norm:.2g}' for norm in norms)}")
        state, metrics = step_fn(state, frozen, batch)
        history.append(float(metrics["loss"]))
        recent = np.mean(history[-10:])
        if step % 50 == 49:
            print(f"step {step + 1}: mean loss of the last 10 steps {recent:.3f}", flush=True)
        if step >= 9 and recent < 0.05:
            break
    losses = []
    for start in range(0, len(clips["label"]), size):
        batch = {key: value[start : start + size] for key, value in clips.items()}
        losses.append(float(loss_of(state.trainable, batch)[0]))
    result = {"learning_rate": config.optimizer.learning_rate, "steps": len(history)}
    first_below = next((s for s, loss in enumerate(history) if loss < 0.1), None)
    return result | {"loss": float(np.mean(losses)), "first_step_below_0.1": first_below}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    add = arg_parser.add_argument
    add("--config", default="configs/finetune.py", help="config file (configs/finetune.py)")
    add("--rates", type=float, nargs="+", default=[1e-3], help="learning rates to try (0.001)")
    add("--steps", type=positive(int), default=300, help="training steps (300)")
    add("--clips", type=positive(int), default=32, help="number of clips (32)")
    help_ = "factor on what attention and MLPs of the backbone add (1)"
    add("--branch_scale", type=float, default=1.0, help=help_)
    help_ = "weights of the backbone: its file, or random ones (file)"
    add("--backbone", choices=["file", "random"], default="file", help=help_)
    return arg_parser


def main() -> None:
    args, overrides = parse_with_overrides(parser())
    import contextlib
    import os

    from dualpath_jax.config import loading, schema
    from dualpath_jax.demo import setup
    from dualpath_jax.training.inputs import check_inputs
    from dualpath_jax.weights.backbone_keys import fill_backbone_keys

    with user_errors():
        for key in loading.find_overridden_keys(overrides):
            if key in _OWN_KEYS:
                raise ValueError(f"--config.{key} is set by the script: {_OWN_KEYS[key]}")
        config = loading.load_config(args.config, overrides)
        schema.check_values(config)
        setup.ensure_generated(config)
        if args.backbone == "file":
            check_inputs(config)
            fill_backbone_keys(config)
        dataset, clips = load_clips(config, args.clips)
        config.data.synthetic = args.backbone == "random"  # it has random weights
        config.num_train_steps, config.optimizer.label_smoothing = args.steps, 0.0
        for rate in args.rates:
            config.optimizer.learning_rate = rate
            print(f"learning rate {rate:g}")
            with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):
                result = fit(config, dataset, clips, args.steps, args.branch_scale)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    environment.configure_environment()
    console.run(main)
