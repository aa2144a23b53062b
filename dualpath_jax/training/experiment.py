"""Builds a run from its configuration: model, optimizer, initial state and frozen weights.

`build_abstract` describes a run by shapes only. Training, --mode=check and compilation for TPUs
all begin there; `build_experiment` adds the values.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dualpath_jax.config.schema import check_values
from dualpath_jax.config.unread_keys import RecordedReads, describe_unread_model_keys
from dualpath_jax.data.video_source import FrameFormat, VideoSource
from dualpath_jax.models import param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.abstract import (
    AbstractModel,
    abstract_inputs,
    abstract_model,
    build_backbone_config,
)
from dualpath_jax.models.backbones.registry import BackboneConfig
from dualpath_jax.runtime import environment, progress_bar
from dualpath_jax.runtime.command_line import command_line
from dualpath_jax.training import sharding
from dualpath_jax.training.optimizer import count_train_steps, make_optimizer, make_schedule
from dualpath_jax.training.state import TrainState, abstract_state, state_shardings
from dualpath_jax.version import __version__
from dualpath_jax.weights import convert


@dataclasses.dataclass(frozen=True)
class AbstractExperiment:
    """Describes a run by shapes: its arrays are `jax.ShapeDtypeStruct`.

    Attributes:
      model: the module, its parameters and which of them train.
      num_train_steps: length of the training.
      schedule: learning rate by step.
      optimizer: AdamW on the trainable parameters.
      state: the initial state, float32.
      frozen: the frozen weights in the compute dtype; `optax.MaskedNode` where a parameter trains.
    """

    model: AbstractModel
    num_train_steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: Any


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Holds what a training or an evaluation needs and does not change; see `TrainState`.

    Attributes:
      config: the whole configuration.
      workdir: folder of checkpoints and results, local or gs://.
      model: the Flax module.
      mesh: all devices, see `sharding.make_mesh`.
      class_names: one per class.
      frame_format: how the training frames are stored.
      backbone: where the frozen weights come from.
      frozen: the frozen weights, on the devices.
      optimizer, schedule: AdamW on the trainable parameters, and its learning rate by step.
      num_train_steps: length of the training.
      steps_per_epoch: training videos / batch size.
      total_params, trainable_params: numbers of parameters.
      num_videos: number of training videos.
      data_identity: of the training split, see `VideoDataset.identity`.
    """

    config: Any
    workdir: str
    model: nn.Module
    mesh: jax.sharding.Mesh
    class_names: list[str]
    frame_format: FrameFormat
    backbone: convert.BackboneInfo
    frozen: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    num_train_steps: int
    steps_per_epoch: float
    total_params: int
    trainable_params: int
    num_videos: int
    data_identity: dict[str, str]

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint of this run belongs to, for JSON."""
        return describe_trained(self.config, self.backbone, self.class_names) | {
            "frame_format": dataclasses.asdict(self.frame_format),
            "num_videos": self.num_videos,
            "data_identity": self.data_identity,
            "machine": environment.describe_machine(),
        }


def describe_trained(
    config: Any, backbone: convert.BackboneInfo, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return what trained parameters belong to, for the metadata of their file."""
    return {
        "method": config.model.method,
        "backbone_name": backbone.name,
        "backbone_sha256": backbone.sha256,
        "class_names": list(class_names),
        "config": json.loads(config.to_json_best_effort()),
        "version": __version__,
    }


def build_abstract(
    config: Any,
    num_classes: int,
    steps_per_epoch: float,
    backbone: BackboneConfig | None = None,
) -> AbstractExperiment:
    """Describe the run of `config` by shapes; compute nothing and read no file.

    Args:
      config: the whole configuration.
      num_classes: of the data set.
      steps_per_epoch: training videos / batch size.
      backbone: shape of the loaded weights; None: the one that `config` names, or
        `registry.DEFAULT`.
    """
    model = abstract_model(config, num_classes, backbone)
    num_train_steps = count_train_steps(config, steps_per_epoch)
    schedule = make_schedule(config.optimizer, num_train_steps, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, model.mask)
    state, frozen = abstract_state(model, optimizer)
    dtype = method_registry.compute_dtype(config)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), frozen)
    return AbstractExperiment(model, num_train_steps, schedule, optimizer, state, frozen)


def init_params(model: nn.Module, config: Any, backbone: Any) -> Any:
    """Return fresh parameters from `config.seed`.

    Args:
      model: of `method_registry.build_model`.
      config: the whole configuration.
      backbone: the converted backbone's parameters, which take the place of the fresh ones; None
        keeps random ones.

    Returns:
      The parameter tree: trainable parameters in float32, frozen ones in the compute dtype.
    """
    inputs = [None if x is None else jnp.zeros(x.shape) for x in abstract_inputs(config)]

    @jax.jit
    def init(key: jax.Array, *inputs: jax.Array | None) -> dict[str, Any]:
        # Random values that are not returned are not computed either.
        params = model.init(key, *inputs)["params"]
        return {k: v for k, v in params.items() if backbone is None or k != "backbone"}

    params = init(jax.random.key(config.seed), *inputs)
    if backbone is not None:
        frozen = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), backbone)
        params = dict(sorted((params | {"backbone": frozen}).items()))
    params = model.start_from_backbone(params)
    is_trainable = method_registry.is_trainable_fn(config.model.method)
    mask = param_tree.trainable_mask(params, is_trainable)
    dtype = method_registry.compute_dtype(config)
    return jax.tree.map(lambda leaf, train: leaf if train else leaf.astype(dtype), params, mask)


def build_experiment(
    config: Any, workdir: str, dataset: VideoSource
) -> tuple[Experiment, TrainState]:
    """Check the configuration against data and backbone, and build model and initial state.

    Args:
      config: the whole configuration.
      workdir: of the run; nothing is written there.
      dataset: the training split; none of its videos is read.

    Raises:
      ValueError, OSError: the user can fix the problem; the message has the remedy.
    """
    # The configuration by itself.
    check_values(config)
    mesh = sharding.make_mesh(config.mesh.fsdp)
    sharding.check_batch_sizes(config, mesh.size)
    abstract_inputs(config)

    # The frozen weights and the model that they fit.
    weights, backbone, info = load_backbone(config)
    num_classes, steps_per_epoch = len(dataset.class_names), len(dataset) / config.data.batch_size
    log = RecordedReads(config)
    abstract = build_abstract(log, num_classes, steps_per_epoch, backbone)
    if (warning := describe_unread_model_keys(config, log.seen)) and jax.process_index() == 0:
        print(warning, flush=True)
    if weights is not None:  # a method may leave out parts, such as EVL the last norm
        weights = param_tree.select(weights, abstract.model.params["backbone"])
    params = init_params(abstract.model.module, config, weights)
    progress_bar.print_above_bar(param_tree.parameter_table(params, abstract.model.mask))

    # The state, which training changes, and the frozen weights.
    trainable, frozen = param_tree.split(params, abstract.model.mask)
    # Two arrays: one buffer in two places of a donated state would be freed twice.
    step, skipped = (jnp.zeros((), jnp.int32) for _ in range(2))
    state = TrainState(step, trainable, abstract.optimizer.init(params), skipped)
    if not method_registry.resolve_scan_blocks(config):
        frozen = param_tree.unstack_blocks(frozen)
    experiment = Experiment(
        config=config,
        workdir=workdir,
        model=abstract.model.module,
        mesh=mesh,
        class_names=dataset.class_names,
        frame_format=dataset.frame_format,
        backbone=info,
        frozen=jax.device_put(frozen, sharding.fsdp_sharding(frozen, mesh)),
        optimizer=abstract.optimizer,
        schedule=abstract.schedule,
        num_train_steps=abstract.num_train_steps,
        steps_per_epoch=steps_per_epoch,
        total_params=param_tree.count_params(params),
        trainable_params=param_tree.count_params(trainable),
        num_videos=len(dataset),
        data_identity=dataset.identity,
    )
    return experiment, jax.device_put(state, state_shardings(state, mesh))


def load_backbone(config: Any) -> tuple[Any, BackboneConfig, convert.BackboneInfo]:
    """Return the frozen weights, their shape and their source.

    The weights are None for synthetic data, which has random ones.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is damaged, or does not fit the configuration.
    """
    backbone = build_backbone_config(config)
    if config.data.synthetic:
        # No real run resumes from a source of this name.
        return None, backbone, convert.BackboneInfo(backbone.name, *["random"] * 3)
    weights, backbone, info = convert.load_backbone(config.backbone.checkpoint, backbone)
    convert.check_normalization(config.backbone.checkpoint, info, config.data)
    convert.check_merged(config.backbone.checkpoint, info, config.model)
    if config.backbone.heads not in (None, backbone.heads):
        raise ValueError(
            f"backbone.heads={config.backbone.heads}, but {config.backbone.checkpoint} has "
            f"{backbone.heads}, set by `{command_line('convert')} --heads`: use the same number"
        )
    return weights, backbone, info
