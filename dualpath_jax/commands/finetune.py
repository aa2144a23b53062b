"""Trains a model on your own videos: from a folder to a report, in one command.

    dualpath finetune VIDEOS --backbone=ViT-B-16.pt
    dualpath finetune VIDEOS --backbone=demo --out=runs/mine --tune

VIDEOS is a folder of class folders, VIDEOS/<class>/<file> (or the same inside train, validation and
test folders), or a CSV file with lines path,label. A video is a file, or a folder of images. The
command looks at the videos, prints what it found and what the training will take, prepares the
videos, trains probes on the frozen backbone (dualpath probe), chooses settings by the number of
videos, trains, keeps the best checkpoint by validation, stops when validation does not rise any
more, evaluates, and writes a report. With --tune it first tries three or four learning rates in
short trainings, which validation videos judge. Everything lies in the folder --out; its config.json
has all settings. Interrupted, the same command continues. --config.KEY=VALUE changes a setting.

docs/finetuning.md explains the choices and what to do when the result is bad.

In a checkout, python scripts/finetune.py is the same command.
"""

import argparse
import os
import pathlib
import shlex
import shutil
import tempfile
from typing import Any

from dualpath_jax import cli
from dualpath_jax.config import loading, schema, small_sets
from dualpath_jax.data.datasets.class_folders import CLASS_LEVEL_HELP
from dualpath_jax.data.preparation.video_names import FRAME_RATE_HELP, check_frame_rate
from dualpath_jax.runtime import environment, files, progress_bar
from dualpath_jax.runtime.command_line import command_line

_LONG_SECONDS = 2 * 3600  # a training that takes longer gets a hint


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = cli.build_parser(__doc__)
    add = arg_parser.add_argument
    add("videos", metavar="VIDEOS", help="folder of class folders, or CSV file of path,label")
    add("--annotations", metavar="LIST", help="CSV file, or folder with train.csv, of these videos")
    help_ = (
        "converted backbone, or a checkpoint to convert (dualpath convert --help); demo: the small "
        "one that comes with this package"
    )
    add("--backbone", metavar="FILE|demo", help=help_)
    add("--out", metavar="RUN", help="folder to write (default: runs/NAME, the name of VIDEOS)")
    methods = ", ".join(schema.choices("model.method"))
    add("--method", metavar="METHOD", help=f"method instead of the recommended one: {methods}")
    help_ = "pixels of the shorter side of stored frames (256)"
    add("--short_side", type=cli.positive(int), default=256, help=help_)
    help_ = "choose the learning rate on validation videos, by short trainings before the long one"
    add("--tune", action="store_true", help=help_)
    add("--frame_rate", type=cli.positive(float), help=FRAME_RATE_HELP)
    add("--class_level", type=cli.positive(int), default=1, help=CLASS_LEVEL_HELP)
    add("--plan", action="store_true", help="look at the videos, print the plan, and stop")
    progress_bar.add_quiet_option(arg_parser)
    return arg_parser


def main() -> None:
    """Run the command line; exit with the status of `dualpath train`."""
    cli.run_resumable(parser(), finetune)


def finetune(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Do what the command line asks for.

    Raises:
      ValueError, OSError: the user can fix the problem; the message has the remedy.
      Preempted: a signal stopped the training; its state is saved.
    """
    from absl import logging

    from dualpath_jax import launch
    from dualpath_jax.commands import report, tuning
    from dualpath_jax.data.preparation import prepare, survey

    logging.set_verbosity(logging.ERROR)
    environment.disable_async_dispatch()
    _check_backbone_option(arguments.backbone)
    methods = schema.choices("model.method")
    if arguments.method not in (None, *methods):
        raise ValueError(f"unknown --method={arguments.method}: known are {', '.join(methods)}")
    name = pathlib.Path(arguments.videos).resolve().name.removesuffix(".csv")
    run = arguments.out or f"runs/{name}"
    if arguments.tune:
        _check_tune(run)

    # What is there, and what will be done.
    index, videos_dir, lines = survey.list_own_videos(
        arguments.videos, arguments.annotations, arguments.class_level
    )
    check_frame_rate(arguments.frame_rate, index.file_paths(videos_dir))
    options = prepare.PrepareOptions(
        short_side=arguments.short_side, frame_rate=arguments.frame_rate
    )
    _print_section("videos", [*survey.describe_classes(index), *lines, *index.notices])
    begun = os.path.exists(os.path.join(run, "data", "prepare", "settings.json"))
    found = None
    if begun:
        _print_section("found", [f"their preparation in {run}/data has begun: it is not repeated"])
    else:
        found = survey.survey_videos(index, videos_dir, options)
        _print_section("found", survey.describe_survey(found))
    uneven = survey.class_ratio(index) >= small_sets.UNEVEN
    config = make_config(arguments, overrides, len(index.splits["train"]), run, uneven)
    estimate = _estimate(config, index, found, run, arguments.tune)
    _print_section("plan", _describe_plan(config, run, arguments, index))
    _print_section("estimate", estimate)
    if arguments.plan:
        return

    # Frames, the probe, the training, the report.
    prepare.prepare_dataset(index, videos_dir, config.data.dir, options)
    _run_probe(config, run)
    if arguments.tune:
        tuning.choose_learning_rate(config, run, len(index.splits["train"]))
    launch.train_and_evaluate(config, run, training=True)
    if "test" in index.splits:
        _evaluate_test(config, run)
    namespace = report.parser().parse_args([f"--workdir={run}", f"--out={run}/report.html"])
    report.make_report(namespace)
    _print_section("next", _next_commands(run))


def _print_section(title: str, lines: list[str]) -> None:
    print("\n".join([title, *(f"  {line}" for line in lines)]), flush=True)


def _check_backbone_option(backbone: str | None) -> None:
    """Raise ValueError with the ways to get a backbone if none is named."""
    if not backbone:
        raise ValueError(
            "--backbone is missing, the pretrained image model that is tuned. Pass a checkpoint of "
            "CLIP ViT-B/16, --backbone=ViT-B-16.pt (docs/converting.md says where to get it; "
            "hf:openai/clip-vit-base-patch16 downloads one), or --backbone=demo, a tiny one that "
            "comes with this package, to try the command out"
        )


def _check_tune(run: str) -> None:
    """Raise ValueError if the training began without tries: its learning rate cannot change."""
    from dualpath_jax.commands import tuning

    begun, tried = (
        os.path.exists(os.path.join(run, name)) for name in ("checkpoints", tuning.FILE)
    )
    if begun and not tried:
        raise ValueError(
            f"the training in {run} has begun without --tune: choose another --out, or leave "
            "--tune out"
        )


def make_config(
    arguments: argparse.Namespace,
    overrides: list[str],
    num_clips: int,
    run: str,
    uneven: bool = False,
) -> Any:
    """Return the configuration of the training.

    Converts the backbone into the folder of the run if it is no backbone file yet.

    Args:
      arguments: of `parser`.
      overrides: --config.KEY=VALUE of the command line.
      num_clips: listed training videos.
      run: folder of the run.
      uneven: some classes have many times more videos than others.

    Raises:
      ValueError, OSError: the backbone cannot be read, or an override is wrong.
    """
    import jax

    from dualpath_jax.training.sharding import round_up
    from dualpath_jax.weights import convert
    from dualpath_jax.weights.backbone_keys import fill_backbone_keys

    path = _find_backbone(arguments.backbone, run)
    backbone, _ = convert.read_description(path)
    config = small_sets.make_config(num_clips, backbone, arguments.method)
    config.data.dir = os.path.abspath(os.path.join(run, "data"))
    config.backbone.checkpoint = os.path.abspath(path)
    config.data.image_size = backbone.image_size
    for key in config.backbone:
        if key != "checkpoint":
            config.backbone[key] = None
    config.data.mean = config.data.std = None
    if uneven:
        small_sets.set_uneven_classes(config)
    if jax.default_backend() == "cpu":  # faster there
        config.model.dtype, config.model.scan_blocks = "float32", False
    devices = jax.device_count()
    for section in (config.data, config.eval):
        section.batch_size = round_up(section.batch_size, devices)
    steps = config.num_epochs * num_clips / config.data.batch_size
    config.log_every_steps = max(1, round(steps / 100))
    config = _apply_overrides(config, overrides)
    fill_backbone_keys(config)
    return config


def _find_backbone(backbone: str, run: str) -> str:
    """Return the file of a backbone, which is converted into the folder `run` if necessary."""
    from dualpath_jax.demo.setup import BACKBONE
    from dualpath_jax.weights import convert

    path = str(BACKBONE) if backbone == "demo" else backbone
    if not path.startswith("hf:") and not os.path.exists(path):
        raise FileNotFoundError(
            f"there is no --backbone={backbone}: name a file of weights, or demo"
        )
    if convert.is_converted(path):
        return path
    name = pathlib.PurePath(path.removeprefix("hf:")).name.split(".")[0]
    converted = os.path.join(run, f"{name}.safetensors")
    if not os.path.exists(converted):
        os.makedirs(run, exist_ok=True)
        convert.convert_checkpoint(path, converted)
        print(f"converted the backbone to {converted}", flush=True)
    return converted


def _apply_overrides(config: Any, overrides: list[str]) -> Any:
    """Return the configuration with --config.KEY=VALUE of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "finetune.json")
        files.write_text(path, config.to_json_best_effort())
        return loading.load_config(path, overrides)


def _describe_plan(config: Any, run: str, arguments: argparse.Namespace, index: Any) -> list[str]:
    """Return lines with the chosen settings and the reasons for them."""
    from dualpath_jax.commands import tuning

    optimizer, data = config.optimizer, config.data
    chosen = "by --method" if arguments.method else "recommended by docs/comparison.md"
    length = f"at most {config.num_epochs} epochs"
    if config.num_train_steps is not None:
        length = f"at most {config.num_train_steps} steps"
    weights = []
    if data.class_weights != "none":
        weights = [f"uneven classes: {data.class_weights} weights; {config.eval.criterion} decides"]
    tries = [tuning.describe_plan(config, len(index.splits["train"]))] if arguments.tune else []
    return [
        f"backbone {arguments.backbone} ({config.backbone.name}), {data.num_frames} frames of "
        f"{data.image_size} pixels",
        f"method {config.model.method}, {chosen}",
        f"learning rate {optimizer.learning_rate:g}, warm-up {optimizer.warmup_epochs:g} epochs, "
        f"{data.batch_size} clips per step, {length}",
        f"augmentation: crops of {data.crop_scale[0]:g} to {data.crop_scale[1]:g} of the area, "
        f"{data.randaugment_layers} RandAugment operations, "
        + ("mirrored clips" if data.flip else "no mirrored clips (--config.data.flip=True)"),
        f"validation every {config.eval.every_epochs} epochs; the best checkpoint counts; the end "
        f"after {config.early_stopping_evaluations} validations without a new best",
        *weights,
        *tries,
        f"all settings will be in {run}/config.json; `{command_line('train')} "
        f"--config={run}/config.json --workdir=NEW` trains with them again",
    ]


def _estimate(config: Any, index: Any, found: Any, run: str, tune: bool) -> list[str]:
    """Return lines with time, memory and disk; set `optimizer.accumulation_steps`.

    Raises:
      OSError: the disk is too small.
    """
    from dualpath_jax.analysis import cost_estimate
    from dualpath_jax.commands import tuning
    from dualpath_jax.data.preparation.summary import format_bytes
    from dualpath_jax.training.optimizer import count_train_steps

    cost = cost_estimate.estimate_cost(config, len(index.class_names))
    clips, memory = config.data.batch_size, cost_estimate.available_memory()
    accumulation = cost_estimate.fit_accumulation(config, cost, memory)
    needed = cost_estimate.training_bytes(cost, clips // accumulation)
    num_clips, num_validation = (len(index.splits[split]) for split in ("train", "validation"))

    def training_seconds(steps: int, evaluations: int) -> float:
        return steps * clips * cost.clip_seconds + evaluations * num_validation * cost.eval_seconds

    steps = count_train_steps(config, num_clips / clips)
    epochs = steps * clips / num_clips
    evaluations = max(1, round(epochs / (config.eval.every_epochs or epochs)))
    train_seconds = seconds = training_seconds(steps, evaluations)
    lines = []
    if found:
        frames = format_bytes(found.num_bytes)
        lines.append(f"preparing: {_format_seconds(found.seconds)}, {frames}")
    if tune:
        tried = tuning.MAX_TRIES * training_seconds(tuning.count_try_steps(config, num_clips), 1)
        lines.append(f"tuning: at most {tuning.MAX_TRIES} tries, {_format_seconds(tried)} together")
        seconds += tried
    total = f"; together {_format_seconds(seconds)}" if tune else ""
    lines.append(
        f"training: {steps:,} steps at most, about {_format_seconds(cost.clip_seconds)} a clip: "
        f"{_format_seconds(train_seconds)}, good to a factor of two{total}; "
        "often it stops earlier"
    )
    parts = f", in {accumulation} parts of a batch" if accumulation > 1 else ""
    lines.append(f"memory: about {format_bytes(needed)} of {format_bytes(memory)}{parts}")
    checkpoints = (4 + tune * 2 * tuning.MAX_TRIES) * cost.checkpoint_bytes
    lines.append(_check_disk(config, index, found.num_bytes if found else 0, checkpoints, run))
    if needed > memory:
        lines.append(
            "this may not fit: choose a smaller backbone or fewer --config.data.num_frames"
        )
    if seconds > _LONG_SECONDS:
        lines.append("that is long: a GPU is many times faster; --method=linear trains less")
    return lines


def _check_disk(
    config: Any, index: Any, frame_bytes: float, checkpoint_bytes: float, run: str
) -> str:
    """Return a line with the disk that a run needs.

    Args:
      config: of the training.
      index: the listed videos.
      frame_bytes: of the frames that are still to be stored.
      checkpoint_bytes: of all checkpoints.
      run: folder of the run.

    Raises:
      OSError: the disk is too small.
    """
    from dualpath_jax.data.preparation.summary import format_bytes
    from dualpath_jax.probing.run import estimate_bytes

    features = 0
    begun = (os.path.join(run, name) for name in ("probe.json", "probe_features"))
    if not any(map(os.path.exists, begun)):
        features = estimate_bytes(config, *(len(index.splits[s]) for s in ("train", "validation")))
    disk = 1.1 * frame_bytes + features + checkpoint_bytes
    free = shutil.disk_usage(_existing_folder(run)).free
    if disk > free:
        raise OSError(
            f"the disk of {run} is too small: frames ({format_bytes(frame_bytes)}), features of "
            f"the probes ({format_bytes(features)}) and checkpoints take about "
            f"{format_bytes(disk)}, and {format_bytes(free)} are free; make room, choose another "
            "--out, or a smaller --short_side"
        )
    return f"disk: about {format_bytes(disk)} of {format_bytes(free)} in {run}"


def _existing_folder(path: str) -> pathlib.Path:
    """Return the nearest folder above a path, or the path itself, that exists."""
    absolute = pathlib.Path(path).absolute()
    return next(folder for folder in (absolute, *absolute.parents) if folder.is_dir())


def _format_seconds(seconds: float) -> str:
    """Format a duration roughly: "0.02 s", "40 s", "7 min", "3.1 h"."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _run_probe(config: Any, run: str) -> None:
    """Train probes on the frozen features, unless that is done."""
    from dualpath_jax.probing.run import run_probe
    from dualpath_jax.training.inputs import lock_workdir

    if os.path.exists(os.path.join(run, "probe.json")):
        return
    with lock_workdir(run, "--out"):
        run_probe(config, run)


def _evaluate_test(config: Any, run: str) -> None:
    """Evaluate the best checkpoint on the test videos, also for `dualpath eval` later."""
    from dualpath_jax import launch
    from dualpath_jax.train import write_config

    config.eval.split = "test"
    write_config(config, run)
    launch.train_and_evaluate(config, run, training=False)


def _next_commands(run: str) -> list[str]:
    """Return the commands that come next, and what they are for."""
    run = shlex.quote(run)
    return [
        f"look at {run}/report.html in a browser",
        f"{command_line('predict')} --workdir={run} --checkpoint=best NEW_VIDEOS",
        f"{command_line('export')} --workdir={run} --checkpoint=best --out=exported",
        f"tensorboard --logdir={run}",
    ]
