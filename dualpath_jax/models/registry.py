"""Registers the tuning methods: how each is built and which of its parameters are trained.

To add a method, write its module and add it to `METHODS` with a rule for each of its parameters.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from dualpath_jax.data.clip_spec import ClipFormat, ClipInputs, build_clip_format
from dualpath_jax.models.backbones.block_loop import check_remat
from dualpath_jax.models.backbones.contract import BackboneConfig
from dualpath_jax.models.backbones.kernels import choose_kernels, prefers_scan
from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.frame_model import (
    AverageClassifier,
    FrameModel,
    TemporalPositionModel,
)
from dualpath_jax.models.methods.adapters import Adapter
from dualpath_jax.models.methods.adaptformer import AdaptFormerHooks
from dualpath_jax.models.methods.aim import AIMHooks
from dualpath_jax.models.methods.dualpath import DualPath
from dualpath_jax.models.methods.evl import EVLDecoder, EVLModel
from dualpath_jax.models.methods.lora import LoRAHooks, LoRAModel
from dualpath_jax.models.methods.probe import ProbeModel, build_head
from dualpath_jax.models.methods.protuning import ProTuningHooks
from dualpath_jax.models.methods.st_adapter import (
    ReleasedSTAdapter,
    ReleasedSTAdapterHooks,
    ReleasedSTAdapterModel,
    STAdapterHooks,
)
from dualpath_jax.models.methods.vpt import DeepPromptHooks, ShallowPromptModel
from dualpath_jax.models.methods.zeroi2v import FrameShiftHooks, ZeroI2VHooks
from dualpath_jax.models.temporal_head import TemporalClassifier

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Method:
    """Describes a way to tune a frozen backbone.

    Attributes:
      build: (config, backbone shape, number of classes) -> module. Every module is called as
        `module(spatial, temporal, dropout_rng)` -> logits [B, classes] float32, where
          spatial: [B, S, H, W, 3] normalized frames; S is T with `ClipInputs.ALL_FRAMES`.
          temporal: [B, G, H', W', 3] normalized framesets.
          An input that the model does not take is None.
          dropout_rng: jax key that switches on the method's training-time randomness, or None.
        Its parameters hold those of the backbone under "backbone".
        `module.start_from_backbone(params)` returns `params` after copying the values of the
        backbone to those parameters of the method that start there.
      rules: (regular expression of the whole parameter path, whether it is trained); the first
        match decides.
      needs: why it only works with backbones of global attention, such as ViTs, and not with Swin;
        None if it works with all.
      clip_inputs: config -> what the model of the configuration takes.
      merged: keys and values that turn a configuration of the method into that of the same model
        on a merged backbone (`merge.merge_backbone`); None if it cannot be merged.
    """

    build: Callable[[Any, BackboneConfig, int], nn.Module]
    rules: tuple[tuple[str, bool], ...]
    needs: str | None = None
    clip_inputs: Callable[[Any], ClipInputs] = lambda config: ClipInputs.ALL_FRAMES
    merged: Mapping[str, Any] | None = None


def _dualpath_inputs(config: Any) -> ClipInputs:
    """Return the inputs of the paths that are on."""
    paths = (config.model.spatial_path, config.model.temporal_path)
    if not any(paths):
        raise ValueError(
            "model.spatial_path and model.temporal_path are both False: there is nothing to train"
        )
    return {
        (True, True): ClipInputs.BOTH_PATHS,
        (True, False): ClipInputs.SPATIAL_PATH,
        (False, True): ClipInputs.TEMPORAL_PATH,
    }[paths]


def _temporal_path_options(config: Any, backbone: BackboneConfig) -> dict[str, Any]:
    """Return the attributes of `DualPath` that only its temporal path uses.

    Raises:
      ValueError: the patches do not fit the framesets.
    """
    data, model = config.data, config.model
    frame_size = data.image_size // data.frame_scale
    for side, name in zip(data.grid, ("width", "height"), strict=True):
        if side * frame_size % backbone.patch_size:
            raise ValueError(
                f"frameset {name} of {side} frames x {frame_size} pixels is not divisible by the "
                f"patch size {backbone.patch_size} of {backbone.name}: change "
                f"data.grid={tuple(data.grid)}, data.frame_scale={data.frame_scale} or "
                f"data.image_size={data.image_size}"
            )
    return {
        "grid": tuple(data.grid),
        "frame_size": frame_size,
        "num_framesets": data.num_frames // (data.grid[0] * data.grid[1]),
        "serial_skip": model.serial_skip,
        "pre_attention_adapter": model.pre_attention_adapter,
        "pre_attention_residual": model.pre_attention_adapter and model.pre_attention_residual,
        "temporal_position": model.temporal_position,
        "time_kernel_size": model.time_kernel_size,
        "readout_width": model.readout_width,
        "readout_frame_width": model.readout_frame_width,
    }


def _build_dualpath(config: Any, backbone: BackboneConfig, num_classes: int) -> DualPath:
    """Build DualPath: adapters on a spatial path (frames) and a temporal path (framesets)."""
    model = config.model
    adapter = Adapter(
        bottleneck=model.adapter_bottleneck,
        scale=model.adapter_scale,
        dropout=model.adapter_dropout,
        layer_norm=model.adapter_layer_norm,
        kernels=choose_kernels(resolve_scan_blocks(config)),
        parent=None,
    )
    both = model.spatial_path and model.temporal_path
    # Keys that have no effect are not read, so that they are found (`config.unread_keys`).
    options = _temporal_path_options(config, backbone) if model.temporal_path else {}
    return DualPath(
        config=backbone,
        num_classes=num_classes,
        spatial_path=model.spatial_path,
        temporal_path=model.temporal_path,
        adapter=adapter,
        spatial_dropout=model.spatial_dropout if both else 0.0,
        train_tokens=model.train_tokens,
        adapt_shifted_windows=not backbone.has_global_attention and model.adapt_shifted_windows,
        dtype=compute_dtype(config),
        scan_blocks=resolve_scan_blocks(config),
        remat=model.remat,
        cls_token_only=model.cls_token_only,
        **options,
    )


def _build_frame_model(
    config: Any,
    backbone: BackboneConfig,
    head: nn.Module,
    hooks: BlockHooks | None = None,
    kind: type[FrameModel] = FrameModel,
    **options: Any,
) -> FrameModel:
    """Build a model that runs the backbone with `hooks` on each frame, then `head` on all."""
    return kind(
        config=backbone,
        num_frames=config.data.num_frames,
        head=head,
        hooks=hooks,
        dtype=compute_dtype(config),
        scan_blocks=resolve_scan_blocks(config),
        remat=config.model.remat,
        cls_token_only=config.model.cls_token_only,
        **options,
    )


def _temporal_head(
    backbone: BackboneConfig, num_classes: int, num_prompts: int = 0
) -> TemporalClassifier:
    return TemporalClassifier(backbone, num_classes, num_prompts, parent=None)


def _build_average(config: Any, backbone: BackboneConfig, num_classes: int) -> FrameModel:
    """Build `full` and `linear`, which differ only in which parameters are trained."""
    return _build_frame_model(config, backbone, AverageClassifier(num_classes, parent=None))


def _build_vpt(config: Any, backbone: BackboneConfig, num_classes: int) -> FrameModel:
    head, prompts = _temporal_head(backbone, num_classes), config.model.vpt.num_prompts
    if not config.model.vpt.deep:
        return _build_frame_model(
            config, backbone, head, kind=ShallowPromptModel, num_prompts=prompts
        )
    return _build_frame_model(
        config, backbone, head, DeepPromptHooks(prompts, backbone.patch_size, parent=None)
    )


def _build_adaptformer(config: Any, backbone: BackboneConfig, num_classes: int) -> FrameModel:
    options = config.model.adaptformer
    adapter = Adapter(options.bottleneck, options.scale, dtype=compute_dtype(config), parent=None)
    hooks = AdaptFormerHooks(adapter, options.parallel, parent=None)
    return _build_frame_model(config, backbone, _temporal_head(backbone, num_classes), hooks)


def _build_protuning(config: Any, backbone: BackboneConfig, num_classes: int) -> FrameModel:
    hooks = ProTuningHooks(
        width=config.model.protuning.width,
        leading_tokens=backbone.num_leading_tokens,
        dtype=compute_dtype(config),
        parent=None,
    )
    return _build_frame_model(config, backbone, _temporal_head(backbone, num_classes), hooks)


def _build_st_adapter(config: Any, backbone: BackboneConfig, num_classes: int) -> FrameModel:
    options = config.model.st_adapter
    kernel_size = tuple(options.kernel_size)
    if len(kernel_size) != 3 or any(size < 1 or size % 2 == 0 for size in kernel_size):
        raise ValueError(
            f"model.st_adapter.kernel_size={kernel_size} must be three odd numbers: frames, rows, "
            "columns"
        )
    fields = {
        "num_frames": config.data.num_frames,
        "width": options.width,
        "kernel_size": kernel_size,
        "scale": options.scale,
        "leading_tokens": backbone.num_leading_tokens,
        "dtype": compute_dtype(config),
        "parent": None,
    }
    head = AverageClassifier(num_classes, parent=None)
    if options.form == "paper":
        return _build_frame_model(config, backbone, head, STAdapterHooks(**fields))
    places = ("attention", "mlp") if options.places == "both" else (options.places,)
    hooks = ReleasedSTAdapterHooks(ReleasedSTAdapter(**fields), places, parent=None)
    return _build_frame_model(config, backbone, head, hooks, kind=ReleasedSTAdapterModel)


def _build_videoprompt(config: Any, backbone: BackboneConfig, num_classes: int) -> FrameModel:
    prompts = config.model.videoprompt.num_prompts
    return _build_frame_model(config, backbone, _temporal_head(backbone, num_classes, prompts))


def _build_aim(config: Any, backbone: BackboneConfig, num_classes: int) -> TemporalPositionModel:
    options = config.model.aim
    bottleneck = backbone.width // 4 if options.bottleneck is None else options.bottleneck
    hooks = AIMHooks(
        Adapter(bottleneck, dtype=compute_dtype(config), parent=None),
        num_frames=config.data.num_frames,
        scale=options.scale,
        num_temporal_adapters=options.num_temporal_adapters,
        drop_path=options.drop_path,
        parent=None,
    )
    head = AverageClassifier(num_classes, options.dropout, parent=None)
    return _build_frame_model(config, backbone, head, hooks, kind=TemporalPositionModel)


def _build_lora(config: Any, backbone: BackboneConfig, num_classes: int) -> FrameModel:
    head = _temporal_head(backbone, num_classes)
    if config.model.merged:
        return _build_frame_model(config, backbone, head)
    options = config.model.lora
    targets = tuple(options.targets)
    if not targets or len(set(targets)) < len(targets):
        raise ValueError(f"model.lora.targets={targets} must be different names, at least one")
    alpha = options.rank if options.alpha is None else options.alpha
    hooks = LoRAHooks(
        targets, options.rank, alpha / options.rank, dtype=compute_dtype(config), parent=None
    )
    return _build_frame_model(config, backbone, head, hooks, kind=LoRAModel)


def _check_offsets(config: Any, backbone: BackboneConfig) -> None:
    """Raise ValueError unless the clips and heads suffice for the offsets of ZeroI2V."""
    options, num_frames = config.model.zeroi2v, config.data.num_frames
    offsets, heads = tuple(options.offsets), options.heads_per_offset
    if not offsets or 0 in offsets or len(set(offsets)) < len(offsets):
        raise ValueError(
            f"model.zeroi2v.offsets={offsets} must be different numbers of frames, at least one, "
            "none of them 0"
        )
    if max(map(abs, offsets)) >= num_frames:
        raise ValueError(
            f"model.zeroi2v.offsets={offsets} need more than {max(map(abs, offsets))} frames, but "
            f"data.num_frames={num_frames}: use more frames or smaller offsets"
        )
    if len(offsets) * heads > backbone.heads:
        raise ValueError(
            f"model.zeroi2v.offsets={offsets} with heads_per_offset={heads} need "
            f"{len(offsets) * heads} heads, but {backbone.name} has {backbone.heads}: use fewer "
            "offsets or heads"
        )


def _build_zeroi2v(
    config: Any, backbone: BackboneConfig, num_classes: int
) -> TemporalPositionModel:
    options = config.model.zeroi2v
    _check_offsets(config, backbone)
    shift = (config.data.num_frames, tuple(options.offsets), options.heads_per_offset)
    if config.model.merged:
        hooks = FrameShiftHooks(*shift, parent=None)
    else:
        adapter = Adapter(
            bottleneck=backbone.width // 4 if options.bottleneck is None else options.bottleneck,
            scale=options.scale,
            dropout=options.adapter_dropout,
            skip=True,
            kernels=choose_kernels(resolve_scan_blocks(config)),
            activation=lambda x: x,
            down_init=nn.initializers.normal(0.02),
            dtype=compute_dtype(config),
            parent=None,
        )
        hooks = ZeroI2VHooks(*shift, adapter=adapter, parent=None)
    head = AverageClassifier(num_classes, options.dropout, parent=None)
    return _build_frame_model(config, backbone, head, hooks, kind=TemporalPositionModel)


def _build_evl(config: Any, backbone: BackboneConfig, num_classes: int) -> EVLModel:
    options = config.model.evl
    if not 1 <= options.num_blocks <= backbone.depth:
        raise ValueError(
            f"model.evl.num_blocks={options.num_blocks} must be between 1 and the {backbone.depth} "
            f"blocks of {backbone.name}"
        )
    head = EVLDecoder(
        backbone,
        num_classes,
        mlp_dropout=options.mlp_dropout,
        dropout=options.dropout,
        kernels=choose_kernels(resolve_scan_blocks(config)),
        dtype=compute_dtype(config),
        parent=None,
    )
    return _build_frame_model(config, backbone, head, kind=EVLModel, num_blocks=options.num_blocks)


def _build_probe(config: Any, backbone: BackboneConfig, num_classes: int) -> ProbeModel:
    head = build_head(config.model.probe, backbone, num_classes)
    return _build_frame_model(config, backbone, head, kind=ProbeModel)


_FROZEN, _ADAPTERS, _HEAD = ("backbone/.*", False), ("adapters/.*", True), ("head/.*", True)

METHODS = {
    "dualpath": Method(
        build=_build_dualpath,
        rules=(
            _FROZEN,
            ("(spatial|temporal)/adapters/.*", True),
            ("(spatial|temporal)/(class_token|position)", True),
            ("(readout|classifier)/.*", True),
        ),
        clip_inputs=_dualpath_inputs,
    ),
    # The projection to CLIP's joint space is not used.
    "full": Method(
        _build_average,
        (("backbone/projection", False), ("backbone/.*", True), _HEAD),
        merged={"model.method": "linear"},
    ),
    "linear": Method(_build_average, (_FROZEN, _HEAD)),
    "vpt": Method(
        _build_vpt,
        (_FROZEN, ("(adapters/)?prompts", True), _HEAD),
        needs="prompts between the tokens, which a map of patches has no place for",
    ),
    "adaptformer": Method(_build_adaptformer, (_FROZEN, _ADAPTERS, _HEAD)),
    "protuning": Method(_build_protuning, (_FROZEN, _ADAPTERS, _HEAD)),
    "st_adapter": Method(_build_st_adapter, (_FROZEN, _ADAPTERS, _HEAD)),
    "videoprompt": Method(_build_videoprompt, (_FROZEN, _HEAD)),
    "aim": Method(
        _build_aim,
        (_FROZEN, _ADAPTERS, ("temporal_position", True), _HEAD),
        needs="a position table, and blocks whose attention also runs over time",
    ),
    "evl": Method(
        _build_evl,
        (_FROZEN, _HEAD),
        needs="queries, keys and outputs of the same patches in several blocks",
    ),
    "lora": Method(_build_lora, (_FROZEN, _ADAPTERS, _HEAD), merged={"model.merged": True}),
    "zeroi2v": Method(
        _build_zeroi2v,
        (_FROZEN, _ADAPTERS, ("temporal_position", True), _HEAD),
        needs="a position table, and attention to the same tokens of other frames",
        merged={"model.merged": True},
    ),
    "probe": Method(_build_probe, (_FROZEN, _HEAD)),
}


def compute_dtype(config: Any) -> Any:
    """Return the dtype that `config.model.dtype` names."""
    return DTYPES[config.model.dtype]


def resolve_scan_blocks(config: Any) -> bool:
    """Return whether to scan over the blocks of the backbone.

    If `config.model.scan_blocks` is None, blocks are unrolled on GPUs, where a scan copies the
    activations that it saves for the backward pass; elsewhere they are scanned. With
    `config.mesh.fsdp` they are scanned on GPUs too, because it divides the weights of scanned
    blocks.
    """
    if config.model.scan_blocks is not None:
        return config.model.scan_blocks
    return prefers_scan() or config.mesh.fsdp > 1


def build_model(config: Any, backbone: BackboneConfig, num_classes: int) -> nn.Module:
    """Build the module of `config.model.method`.

    Args:
      config: the whole configuration, which `schema.check_values` accepts.
      backbone: shape of the backbone.
      num_classes: of the data set.

    Raises:
      ValueError: the method does not work with this backbone, or its settings contradict each
        other.
    """
    name = config.model.method
    check_remat(config.model.remat)
    method = METHODS[name]
    if method.needs is not None and not backbone.has_global_attention:
        raise ValueError(
            f"model.method {name!r} does not work with backbone {backbone.name!r}, which lacks "
            f"global attention: it needs {method.needs}; choose another method or a ViT"
        )
    return method.build(config, backbone, num_classes)


def clip_inputs(config: Any) -> ClipInputs:
    """Return what the model of a configuration takes of a clip.

    Raises:
      ValueError: the configuration switches all of its inputs off.
    """
    return METHODS[config.model.method].clip_inputs(config)


def clip_format(config: Any) -> ClipFormat:
    """Return what a clip of the model of a configuration is."""
    return build_clip_format(config.data, clip_inputs(config))


def is_trainable_fn(method: str) -> Callable[[str], bool]:
    """Return the function that decides by path ("spatial/class_token") if a parameter is trained.

    The function raises ValueError for a path that no rule of `method` matches.
    """
    rules = METHODS[method].rules

    def is_trainable(path: str) -> bool:
        for pattern, trained in rules:
            if re.fullmatch(pattern, path):
                return trained
        raise ValueError(f"no rule of method {method!r} matches parameter {path!r}: add one")

    return is_trainable
