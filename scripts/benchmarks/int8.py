"""Measures frozen weights in 8 bits: error, memory and the TPU compiler's estimates.

The package itself has no weights in 8 bits; docs/notes/int8.md says why. This file replaces, in the
process that imports it, the linear layers of the blocks (attention and MLP of a ViT) by
`Int8Dense`, and their frozen kernels by int8 values with a scale for each output channel.
The command line is scripts/int8_trial.py.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.inference.trained_model import TrainedModel
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones import kernels as kernels_lib
from dualpath_jax.models.backbones import vit
from dualpath_jax.training import experiment
from dualpath_jax.weights import convert
from scripts.benchmarks import tpu_aot

# XLA has no fast product of int8 on a CPU; float32 gives the same sums to within rounding.
FLOAT_PRODUCTS = False
MODES = ("weights", "activations")
_NUM_CLASSES = 174
_KERNELS = re.compile(r"backbone/blocks/(attention/(qkv|out)|mlp/(hidden|output))/kernel")


def quantize(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Quantize x symmetrically along `axis`: (int8 values, float32 scale with that axis of size 1).

    The value of x is values * scale; the largest magnitude along the axis becomes 127.
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis, keepdims=True), 1e-12) / 127
    return jnp.round(x / scale).astype(jnp.int8), scale


def dequantize(values: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """Return values * scale in `dtype`."""
    return values.astype(dtype) * scale.astype(dtype)


def _weight_only(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """Compute x [..., I] @ (values [I, O] * scale [1, O]); the product is one of x's dtype."""
    return (x @ values.astype(x.dtype)) * scale[0].astype(x.dtype)


@jax.custom_vjp
def _int8_product(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
    """Compute x [..., I] @ (values [I, O] * scale [1, O]) with the rows of x quantized to int8.

    The gradient of x is that of the product with x itself, in the dtype of x.
    """
    x_values, x_scale = quantize(x, -1)
    if FLOAT_PRODUCTS:
        y = x_values.astype(jnp.float32) @ values.astype(jnp.float32)
    else:
        y = jnp.matmul(x_values, values, preferred_element_type=jnp.int32)
    return (y.astype(jnp.float32) * (x_scale * scale[0])).astype(x.dtype)


def _int8_forward(x: jax.Array, values: jax.Array, scale: jax.Array) -> tuple[jax.Array, Any]:
    return _int8_product(x, values, scale), (values, scale)


def _int8_backward(saved: Any, dy: jax.Array) -> tuple[jax.Array | None, ...]:
    values, scale = saved
    dx = (dy * scale[0].astype(dy.dtype)) @ values.astype(dy.dtype).T
    return dx, None, None


_int8_product.defvjp(_int8_forward, _int8_backward)

PRODUCTS: dict[str, Callable[..., jax.Array]] = {
    "weights": _weight_only,
    "activations": _int8_product,
}


def _int8_dense(dense: Any, product: Callable[..., jax.Array]) -> Any:
    """Return a subclass of the layer `dense` that takes a kernel in 8 bits, see `quantize_tree`."""

    class Int8Dense(dense):
        def __call__(self, x: jax.Array) -> jax.Array:
            if not self.has_variable("params", "kernel_scale"):
                return super().__call__(x)  # an adapter, or while parameters are made
            values, scale, bias = (
                self.get_variable("params", name) for name in ("kernel", "kernel_scale", "bias")
            )
            return product(x.astype(self.dtype), values, scale) + bias.astype(self.dtype)

    return Int8Dense


def _qkv_weights(attention: Any) -> list[tuple[jax.Array, jax.Array]]:
    """Return `vit.Attention._qkv_weights` of a kernel in 8 bits, in the compute dtype."""
    qkv, dtype = attention.qkv.variables["params"], attention.dtype
    kernel = qkv["kernel"].astype(dtype)
    if "kernel_scale" in qkv:
        kernel = dequantize(qkv["kernel"], qkv["kernel_scale"], dtype)
    parts = jnp.split(kernel, 3, axis=-1), jnp.split(qkv["bias"].astype(dtype), 3)
    return list(zip(*parts, strict=True))


def _quantize_blocks(node: Any, path: str = "backbone/blocks") -> Any:
    """Return a tree of stacked block weights [L, I, O] whose kernels are int8 with a scale each."""
    if not isinstance(node, dict):
        return node
    result = {name: _quantize_blocks(child, f"{path}/{name}") for name, child in node.items()}
    if _KERNELS.fullmatch(f"{path}/kernel"):
        if "kernel_scale" in node:  # the int8 values had been cast to the compute dtype
            result["kernel"] = node["kernel"].astype(jnp.int8)
        else:
            result["kernel"], result["kernel_scale"] = quantize(node["kernel"], -2)
    return result


def _with_int8_blocks(params: Any) -> Any:
    """Return the parameters of a model with the blocks of its backbone in 8 bits."""
    backbone = params["backbone"]
    return {**params, "backbone": {**backbone, "blocks": _quantize_blocks(backbone["blocks"])}}


def use_int8(mode: str) -> None:
    """Make the runs that this process builds from now on have frozen weights in 8 bits.

    Patches the package. Only for a ViT whose blocks are all frozen.

    Args:
      mode: "weights" converts them to the compute dtype before each product; "activations" also
        quantizes the rows of the other factor, and multiplies in 8 bits.
    """
    choose, init_blocks = kernels_lib.choose_kernels, vit.ViT._init_blocks
    load_backbone = convert.load_backbone
    init_params, build_abstract = experiment.init_params, tpu_aot.build_abstract

    def choose_int8(scan_blocks: bool) -> kernels_lib.Kernels:
        chosen = choose(scan_blocks)
        return dataclasses.replace(chosen, dense=_int8_dense(chosen.dense, PRODUCTS[mode]))

    def build_abstract_int8(*args: Any, **kwargs: Any) -> experiment.AbstractExperiment:
        abstract = build_abstract(*args, **kwargs)
        frozen = jax.eval_shape(_with_int8_blocks, abstract.frozen)
        return dataclasses.replace(abstract, frozen=frozen)

    def init_int8_blocks(backbone: vit.ViT, rng: jax.Array) -> Any:
        return _quantize_blocks(init_blocks(backbone, rng))

    def load_float_backbone(*args: Any) -> Any:
        vit.ViT._init_blocks = init_blocks  # the file's shapes are compared with these
        try:
            return load_backbone(*args)
        finally:
            vit.ViT._init_blocks = init_int8_blocks

    kernels_lib.choose_kernels = choose_int8
    vit.Attention._qkv_weights = _qkv_weights
    vit.ViT._init_blocks = init_int8_blocks
    convert.load_backbone = load_float_backbone
    experiment.init_params = lambda *args: _with_int8_blocks(init_params(*args))
    tpu_aot.build_abstract = build_abstract_int8


def _cast(params: Any, mask: Any, dtype: Any) -> Any:
    """Return parameters whose frozen leaves have `dtype`, as a run has them."""
    return jax.tree.map(lambda leaf, train: leaf if train else leaf.astype(dtype), params, mask)


def measure_errors(config: Any, videos: Sequence[str]) -> dict[str, Any]:
    """Compare the logits of frozen weights in bfloat16 and in 8 bits with those in float32.

    Trained parameters are random and not zero. Frozen ones are random if `data.synthetic`, else
    those of `backbone.checkpoint`. With int8, all else is float32.

    Args:
      config: of a run with a ViT; its dtype and views are replaced.
      videos: files; the center view of each counts.

    Returns:
      {"range": largest minus smallest logit in float32; "bfloat16", "weights", "activations":
      largest error of a logit / range; "float32_bytes", "int8_bytes": of the frozen weights}.
    """
    config.eval.temporal_views = config.eval.spatial_crops = 1
    config.model.dtype = "float32"
    weights, backbone, _ = experiment.load_backbone(config)
    abstract = experiment.build_abstract(config, _NUM_CLASSES, 1.0, backbone).model
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x, train: x + 0.02 * rng.standard_normal(x.shape, np.float32) if train else x,
        experiment.init_params(abstract.module, config, weights),
        abstract.mask,
    )

    def model(params: Any, dtype: str) -> TrainedModel:
        config.model.dtype = dtype
        module = method_registry.build_model(config, backbone, _NUM_CLASSES)
        names = [str(i) for i in range(_NUM_CLASSES)]
        return TrainedModel(config.copy_and_resolve_references(), module, params, names, 0)

    reference = model(params, "float32")
    clips = [reference.clips(video) for video in videos]

    def logits(model: TrainedModel) -> np.ndarray:
        return np.concatenate([model.logits(clip) for clip in clips])

    exact = logits(reference)
    width = float(exact.max() - exact.min())
    result = {"range": width, "float32_bytes": _frozen_bytes(params["backbone"])}
    half = model(_cast(params, abstract.mask, jnp.bfloat16), "bfloat16")
    result["bfloat16"] = float(np.abs(logits(half) - exact).max()) / width
    quantized = _with_int8_blocks(params)
    result["int8_bytes"] = _frozen_bytes(quantized["backbone"])
    for mode in MODES:
        use_int8(mode)
        result[mode] = float(np.abs(logits(model(quantized, "float32")) - exact).max()) / width
    return result


def _frozen_bytes(backbone: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(backbone))
