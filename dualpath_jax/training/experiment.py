"""A run: configuration, data and weights checked and brought together, before any video is read.

Public: `Experiment`, `TrainState`, `build_experiment`, `divide`, `Outline`, `outline`, `abstract_inputs`,
`check_workdir`, `check_inputs`, `open_data`, `train_batches_of`, `state_shardings`,
`abstract_state`.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dualpath_jax.config.ranges import check_ranges
from dualpath_jax.data.preparation.video_decoder import FrameFormat
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.abstract import abstract_inputs, build_backbone_config, clip_shapes
from dualpath_jax.runtime import progress_bar
from dualpath_jax.training import sharding
from dualpath_jax.training.optimizer import count_train_steps, make_optimizer, make_schedule
from dualpath_jax.training.state import TrainState, state_shardings
from dualpath_jax.version import __version__
from dualpath_jax.weights import convert


@dataclasses.dataclass
class Experiment:
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
            "version": __version__,
        }


def init_params(model: Any, config: Any, backbone: Any) -> Any:
    """Fresh parameters from `config.seed`, with the converted backbone in place unless it is None.

    What trains is float32; the rest has the compute dtype.
    """
    inputs = [None if x is None else jnp.zeros(x.shape) for x in abstract_inputs(config)]
    params = dict(jax.jit(model.init)(jax.random.key(config.seed), *inputs)["params"])
    if backbone is not None:
        params["backbone"] = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), backbone)
    params = model.start_from_backbone(params)
    mask = param_tree.trainable_mask(params, method_registry.is_trainable_fn(config.model.method))
    dtype = method_registry.compute_dtype(config)
    return jax.tree.map(lambda leaf, train: leaf if train else leaf.astype(dtype), params, mask)


def build_experiment(config: Any, workdir: str, dataset: VideoDataset) -> Experiment:
    """Check the configuration against data and backbone; build model and state. Reads no video."""
    check_ranges(config)
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch_sizes(config, mesh.size)
    predicate = method_registry.is_trainable_fn(config.model.method)
    clip_shapes(config)
    backbone, shape = None, build_backbone_config(config)
    if config.data.synthetic:
        info = convert.BackboneInfo(shape.name, *["random"] * 3)  # no real run resumes from it
    else:
        backbone, shape, info = convert.load_backbone(config.backbone.checkpoint, shape)
        if config.backbone.heads not in (None, shape.heads):
            raise ValueError(
                f"backbone.heads={config.backbone.heads}, but {config.backbone.checkpoint} has "
                f"{shape.heads} (scripts/convert_clip.py --heads): set it to that"
            )
    model = method_registry.build_model(config, shape, len(dataset.class_names))
    params = init_params(model, config, backbone)
    mask = param_tree.trainable_mask(params, predicate)
    steps_per_epoch = len(dataset) / config.data.batch_size
    num_train_steps = count_train_steps(config, steps_per_epoch)
    schedule = make_schedule(config.optimizer, num_train_steps, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, mask)
    trainable, frozen = param_tree.split(params, mask)
    # Two arrays: one buffer in two places of a donated state is freed twice.
    step, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
    state = TrainState(step, trainable, optimizer.init(params), skipped)
    if not method_registry.resolve_scan_blocks(config):
        frozen = param_tree.unstack_blocks(frozen)
    progress_bar.print_above_bar(param_tree.parameter_table(params, mask))
    return Experiment(
        config=config,
        workdir=workdir,
        model=model,
        mesh=mesh,
        class_names=dataset.class_names,
        frame_format=dataset.frame_format,
        backbone=info,
        state=jax.device_put(state, state_shardings(state, mesh)),
        frozen=jax.device_put(frozen, sharding.fsdp_sharding(frozen, mesh)),
        optimizer=optimizer,
        schedule=schedule,
        num_train_steps=num_train_steps,
        steps_per_epoch=steps_per_epoch,
        total_params=param_tree.count_params(params),
        trainable_params=param_tree.count_params(trainable),
        num_videos=len(dataset),
    )
