"""A run: configuration, data and weights checked and brought together, before any video is read.

Public: `Run`, `TrainState`, `build_run`, `divide`, `Outline`, `outline`, `abstract_inputs`,
`check_workdir`, `check_inputs`, `open_data`, `train_batches_of`, `state_shardings`,
`abstract_state`.
"""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from etils import epath

import dualpath_jax
from dualpath_jax import bar, cloud, convert, sharding
from dualpath_jax import params as params_lib
from dualpath_jax.config_ranges import check_ranges
from dualpath_jax.data import clips, hmdb51, pipeline, synthetic
from dualpath_jax.data.decode import FrameFormat
from dualpath_jax.data.records import VideoDataset
from dualpath_jax.models import backbones, tuning

Batch = dict[str, Any]
SYNTHETIC_VIDEOS = 1000


@flax.struct.dataclass
class TrainState:
    """What training changes. `trainable` has `optax.MaskedNode` in place of frozen leaves."""

    step: jax.Array  # int32 scalar, number of updates done
    trainable: Any  # float32
    opt_state: optax.OptState
    skipped: jax.Array  # int32 scalar, steps left out since loss or gradient was not finite


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """How a state lies on the devices: whole on each, but for the optimizer's along `fsdp`."""
    everywhere = jax.tree.map(lambda leaf: sharding.on_every_device(mesh), state)
    return everywhere.replace(opt_state=sharding.spread(state.opt_state, mesh))


@dataclasses.dataclass
class Run:
    """Everything a training or an evaluation needs, checked and on the devices."""

    config: Any
    workdir: str
    model: Any
    mesh: jax.sharding.Mesh
    class_names: list[str]
    frame_format: FrameFormat
    backbone: convert.BackboneInfo
    state: TrainState
    frozen: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    num_train_steps: int
    steps_per_epoch: float
    total_params: int
    trainable_params: int
    num_videos: int  # to train on
    eval_step: Any = None  # jitted, from the first evaluation on

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint of this run belongs to."""
        return {
            "method": self.config.model.method,
            "backbone_name": self.backbone.name,
            "backbone_sha256": self.backbone.sha256,
            "class_names": list(self.class_names),
            "frame_format": dataclasses.asdict(self.frame_format),
            "num_videos": self.num_videos,
            "config": json.loads(self.config.to_json_best_effort()),
            "version": dualpath_jax.__version__,
        }


def check_workdir(workdir: str) -> None:
    """Make the workdir; OSError with the remedy when it cannot be written."""
    cloud.check_installed(workdir, "--workdir")
    path = epath.Path(workdir)
    try:
        with cloud.reaching(workdir):
            path.mkdir(parents=True, exist_ok=True)
            (path / ".writable").write_text("")
            (path / ".writable").unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to --workdir={workdir}: {error}; choose another folder"
        ) from None


def divide(config: Any, workdir: str) -> list[tuple[Any, str]]:
    """The runs that `config.data.split` asks for: what it is in each, and the workdir of each.

    A data set that is divided in several ways has splits train1, test1, train2, ...; "2" stands for
    train2 and test2, "all" for the three runs of HMDB51, in workdir/split1 and so on.
    """
    split = config.data.split
    if split is None:
        return [(config, workdir)]
    runs = []
    for number in hmdb51.DIVISIONS if split == "all" else (split,):
        one = copy.deepcopy(config)
        one.data.split = None
        one.data.train_split = config.data.train_split.rstrip("0123456789") + number
        one.eval.split = config.eval.split.rstrip("0123456789") + number
        runs.append((one, f"{workdir}/split{number}" if split == "all" else workdir))
    return runs


def check_inputs(config: Any) -> None:
    """FileNotFoundError with the commands for whatever is missing, data and weights at once."""
    if config.data.synthetic:
        print(
            f"data.synthetic: one made-up batch at every step, random {config.backbone.name} "
            "weights; the device is timed, scores mean nothing",
            flush=True,
        )
        return
    data_dir, weights = config.data.dir, config.backbone.checkpoint
    if not data_dir:
        raise ValueError(
            "config.data.dir is not set: pass --config.data.dir=DIR, the --out of "
            "scripts/prepare_dataset.py"
        )
    if not weights:
        raise ValueError(
            "config.backbone.checkpoint is not set: pass "
            "--config.backbone.checkpoint=FILE, the --out of scripts/convert_clip.py"
        )
    missing, commands = [], []
    if not _exists(f"{data_dir}/dataset_info.json"):
        missing.append(f"prepared data in {data_dir}")
        # A folder that nobody prepared videos in may be that of the videos.
        theirs = _exists(data_dir) and not _exists(f"{data_dir}/prepare")
        videos, out = (data_dir, "NEW") if theirs else ("VIDEOS", data_dir)
        annotations = "" if config.data.source == "folder" else " --annotations=ANNOTATIONS"
        commands.append(
            f"python scripts/prepare_dataset.py --dataset={config.data.source} --videos={videos}"
            f"{annotations} --out={out}"
        )
    if not _exists(weights):
        missing.append(f"converted {config.backbone.name} weights in {weights}")
        commands.append(f"python scripts/convert_clip.py --checkpoint=FILE --out={weights}")
    if missing:
        raise FileNotFoundError(
            f"no {' and no '.join(missing)}. Run first:\n  " + "\n  ".join(commands)
        )


def _exists(path: str) -> bool:
    with cloud.reaching(path):
        return epath.Path(path).exists()


def open_data(config: Any) -> tuple[VideoDataset, VideoDataset]:
    """The splits to train on and to evaluate; with `data.synthetic` stand-ins, made in memory.

    A synthetic epoch has `SYNTHETIC_VIDEOS` videos, an evaluation one batch.
    """
    if config.data.synthetic:
        sizes = (SYNTHETIC_VIDEOS, config.eval.batch_size)
        return tuple(synthetic.synthetic_split(config.data, size) for size in sizes)
    splits = (config.data.train_split, config.eval.split)
    return tuple(VideoDataset(config.data.dir, split) for split in splits)


def facts(dataset: VideoDataset) -> list[Any]:
    """What decides which videos are seen when, and what is learnt of them, for JSON."""
    numbers = (dataset.labels.tolist(), dataset.num_frames.tolist())
    return [list(dataset.ids), *numbers, list(dataset.class_names)]


def train_batches_of(data: Any) -> Callable:
    """`train_batches` of the pipeline, or the one for `data.synthetic`."""
    return (synthetic if data.synthetic else pipeline).train_batches


def make_schedule(optimizer: Any, num_train_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Linear warm-up, for half of the steps at most, then cosine to zero at the last step."""
    warmup = min(round(optimizer.warmup_epochs * steps_per_epoch), num_train_steps // 2)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else optimizer.learning_rate,
        peak_value=optimizer.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(num_train_steps, 1),
    )


def make_optimizer(
    optimizer: Any, schedule: optax.Schedule, mask: Any
) -> optax.GradientTransformation:
    """AdamW on the leaves that `mask` names; weight decay on kernels alone."""
    adamw = optax.adamw(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        weight_decay=optimizer.weight_decay,
        mask=params_lib.decay_mask,
    )
    if optimizer.clip_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)
    return optax.masked(adamw, mask)


def clip_shapes(config: Any) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of `spatial` [1, S, H, W, 3] and `temporal` [1, G, H', W', 3] for one clip.

    For a method without framesets S is T and `temporal` None.
    """
    clip = clips.clip_format(config.data, tuning.takes_framesets(config.model.method))
    spatial = (1, clip.num_spatial_frames, clip.image_size, clip.image_size, 3)
    if clip.framesets is None:
        return spatial, None
    return spatial, (1, clip.framesets.num_framesets, *clip.framesets.size, 3)


def abstract_inputs(config: Any) -> tuple[jax.ShapeDtypeStruct | None, ...]:
    """`spatial` and `temporal` of one clip as the model takes them, without values."""
    return tuple(
        None if shape is None else jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in clip_shapes(config)
    )


def backbone_shape(config: Any) -> backbones.BackboneConfig:
    """The backbone that `config` names, at its image size."""
    return backbones.backbone_config(
        config.backbone.name,
        image_size=config.data.image_size,
        **{k: config.backbone[k] for k in config.backbone if k not in ("name", "checkpoint")},
    )


@dataclasses.dataclass(frozen=True)
class Outline:
    """A model without values: leaves of `params` are `jax.ShapeDtypeStruct`, of `mask` bool."""

    model: Any
    params: Any
    mask: Any


def outline(config: Any, num_classes: int) -> Outline:
    """The model that `config` describes, its parameters and which of them train."""
    model = tuning.build_model(config, backbone_shape(config), num_classes)
    inputs = abstract_inputs(config)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    mask = params_lib.trainable_mask(params, tuning.trains(config.model.method))
    return Outline(model, params, mask)


def abstract_state(
    model: Outline, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Any]:
    """A run's state and its frozen weights, both float32, without values."""
    trainable, frozen = params_lib.split(model.params, model.mask)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(optimizer.init, model.params)
    return TrainState(count, trainable, opt_state, count), frozen


def count_train_steps(config: Any, steps_per_epoch: float) -> int:
    """`num_train_steps`, or what `num_epochs` come to: a step at least, unless they are 0."""
    if config.num_train_steps is not None:
        return config.num_train_steps
    return max(round(config.num_epochs * steps_per_epoch), min(1, config.num_epochs))


def init_params(model: Any, config: Any, backbone: Any) -> Any:
    """Fresh parameters from `config.seed`, with the converted backbone in place unless it is None.

    What trains is float32; the rest has the compute dtype.
    """
    inputs = [None if x is None else jnp.zeros(x.shape) for x in abstract_inputs(config)]
    params = dict(jax.jit(model.init)(jax.random.key(config.seed), *inputs)["params"])
    if backbone is not None:
        params["backbone"] = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), backbone)
    params = model.start_from_backbone(params)
    mask = params_lib.trainable_mask(params, tuning.trains(config.model.method))
    dtype = tuning.compute_dtype(config)
    return jax.tree.map(lambda leaf, train: leaf if train else leaf.astype(dtype), params, mask)


def build_run(config: Any, workdir: str, dataset: VideoDataset) -> Run:
    """Check the configuration against data and backbone; build model and state. Reads no video."""
    check_ranges(config)
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_settings(config, mesh.size)
    predicate = tuning.trains(config.model.method)
    clip_shapes(config)
    backbone, shape = None, backbone_shape(config)
    if config.data.synthetic:
        info = convert.BackboneInfo(shape.name, *["random"] * 3)  # no real run resumes from it
    else:
        backbone, shape, info = convert.load_backbone(config.backbone.checkpoint, shape)
        if config.backbone.heads not in (None, shape.heads):
            raise ValueError(
                f"backbone.heads={config.backbone.heads}, but {config.backbone.checkpoint} has "
                f"{shape.heads} (scripts/convert_clip.py --heads): set it to that"
            )
    model = tuning.build_model(config, shape, len(dataset.class_names))
    params = init_params(model, config, backbone)
    mask = params_lib.trainable_mask(params, predicate)
    steps_per_epoch = len(dataset) / config.data.batch_size
    num_train_steps = count_train_steps(config, steps_per_epoch)
    schedule = make_schedule(config.optimizer, num_train_steps, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, mask)
    trainable, frozen = params_lib.split(params, mask)
    # Two arrays: one buffer in two places of a donated state is freed twice.
    step, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
    state = TrainState(step, trainable, optimizer.init(params), skipped)
    if not tuning.loops_blocks(config):
        frozen = params_lib.unstack(frozen)
    bar.tell(params_lib.parameter_table(params, mask))
    return Run(
        config=config,
        workdir=workdir,
        model=model,
        mesh=mesh,
        class_names=dataset.class_names,
        frame_format=dataset.frame_format,
        backbone=info,
        state=jax.device_put(state, state_shardings(state, mesh)),
        frozen=jax.device_put(frozen, sharding.spread(frozen, mesh)),
        optimizer=optimizer,
        schedule=schedule,
        num_train_steps=num_train_steps,
        steps_per_epoch=steps_per_epoch,
        total_params=params_lib.count(params),
        trainable_params=params_lib.count(trainable),
        num_videos=len(dataset),
    )
