"""Defines what the backbones share: the transformer block and its hooks for tuning methods.

This file knows no tuning method. A method fills the hooks of a block (`BlockHooks`); an empty hook
does nothing. Axes: M images (frames or framesets, batch included), N tokens, D width, L blocks.
"""

import dataclasses
from typing import Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.models.backbones import kernels as kernels_lib
from dualpath_jax.models.backbones.block_loop import checkpoint_activation
from dualpath_jax.models.backbones.kernels import Kernels


def quick_gelu(x: jax.Array) -> jax.Array:
    """Compute CLIP's approximation of GELU, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Compute the exact (erf) GELU; the default of `jax.nn.gelu` is the tanh form."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_tanh": jax.nn.gelu,
    "silu": jax.nn.silu,
}


def check_activation(name: str) -> None:
    """Raise ValueError unless `name` is in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: known are {sorted(ACTIVATIONS)}")


def check_patches(config: Any) -> None:
    """Raise ValueError unless the config's `image_size` is a multiple of its `patch_size`."""
    if config.image_size % config.patch_size:
        raise ValueError(
            f"image_size {config.image_size} is not divisible by patch_size {config.patch_size} of "
            f"{config.name}: choose a multiple of {config.patch_size} for data.image_size"
        )


def check_image(images: jax.Array, patch_size: int) -> None:
    """Raise ValueError unless H and W of images [M, H, W, 3] are multiples of `patch_size`."""
    height, width = images.shape[-3:-1]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image of {height}x{width} pixels is not divisible by the patch size {patch_size}"
        )


class BlockHooks(nn.Module):
    """Lets a tuning method act inside a block; a method overrides the hooks that it fills.

    One instance describes one block; its parameters are stacked [L, ...] by the caller. `x`, `y`,
    `h` are [M, N, D] in the compute dtype; Swin's D and N are those of the block's stage, and its
    tokens are in the order of the map, row by row.

    Attributes:
      pointwise: True if no hook mixes the tokens of an image. The last block may then compute only
        the class token (token 0), and the GPU path may append a padding token.
      has_parameters: False if the hooks have no parameters.
      mergeable: True if the hooks only update weights, shift heads, and map each token by an affine
        function before and after attention and MLP; `merge.merge_hooks` computes such updates and
        functions into the weights of a block.
      shifts_heads: True if `shift_heads` does something.
      shifted_windows: in Swin, fill the hooks of the shifted-window blocks too, not only those of
        the window blocks. It has no effect in backbones without windows.
    """

    pointwise: ClassVar[bool] = False
    has_parameters: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    shifts_heads: ClassVar[bool] = False
    shifted_windows: bool = dataclasses.field(default=True, kw_only=True)

    def on_input(self, h: jax.Array, block: "Block") -> jax.Array:
        """Map the tokens h that enter the block; hooks may reuse the layers of `block`."""
        del block
        return h

    def before_attention(self, x: jax.Array) -> jax.Array:
        """Map x = LN(h) before attention reads it."""
        return x

    def parallel_to_attention(self, x: jax.Array) -> jax.Array | float:
        """Return a term computed from x = LN(h) that is added to attention's output."""
        del x
        return 0.0

    def after_attention(self, y: jax.Array) -> jax.Array:
        """Map attention's output y before it is added to the residual stream."""
        return y

    def weight_update(
        self, layer: str, in_features: int, out_features: int
    ) -> tuple[jax.Array, jax.Array] | None:
        """Return an update of a linear layer's kernel [I, O] as factors [I, r] and [r, O], or None.

        Args:
          layer: a name of `LINEAR_LAYERS`.
          in_features: I.
          out_features: O; for "qkv" the columns of queries, keys and values, in this order.
        """
        del layer, in_features, out_features
        return None

    def shift_heads(self, x: jax.Array) -> jax.Array:
        """Map the keys or the values of all images, x [M, ..., K, d], before attention."""
        return x

    def on_middle(self, z: jax.Array) -> jax.Array:
        """Map the tokens z between attention and the MLP."""
        return z

    def before_mlp(self, x: jax.Array) -> jax.Array:
        """Map x = LN(z) before the MLP reads it."""
        return x

    def parallel_to_mlp(self, x: jax.Array) -> jax.Array | float:
        """Return a term computed from x = LN(z) that is added to the MLP's output."""
        del x
        return 0.0

    def after_mlp(self, y: jax.Array) -> jax.Array:
        """Map the MLP's output y before it is added to the residual stream."""
        return y

    def on_output(self, h: jax.Array) -> jax.Array:
        """Map the block's output h."""
        return h


# The linear layers of a block, as `BlockHooks.weight_update` names them.
LINEAR_LAYERS = ("qkv", "out", "mlp_hidden", "mlp_output")


def add_weight_update(hooks: BlockHooks | None, layer: str, x: jax.Array, y: jax.Array) -> Any:
    """Add a hook's update of a linear layer to its output: x [..., I], y [..., O] -> [..., O]."""
    features = (x.shape[-1], y.shape[-1])
    update = None if hooks is None else hooks.weight_update(layer, *features)
    if update is None:
        return y
    down, up = update
    return y + checkpoint_activation(x @ down, "down") @ up


def full_precision() -> Any:
    """Return a context with full float32 products; TPUs would use bfloat16, GPUs TF32."""
    return jax.default_matmul_precision("highest")


class PatchEmbedding(nn.Module):
    """Embeds patches by a convolution whose stride is its size, computed as a matrix product.

    The result is that of `nn.Conv` with kernel [P, P, 3, D]; cuDNN's convolution is slower.

    Attributes:
      width: D.
      patch_size: P, pixels.
      use_bias: add a bias.
    """

    width: int
    patch_size: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Embed images [M, H, W, 3] as [M, H/P, W/P, D]."""
        shape = (self.patch_size, self.patch_size, images.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        patches = einops.rearrange(
            images.astype(self.dtype),
            "m (r p) (c q) x -> m r c (p q x)",
            p=self.patch_size,
            q=self.patch_size,
        )
        y = patches @ kernel.astype(self.dtype).reshape(-1, self.width)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.width,))
            y = y + bias.astype(self.dtype)
        return y


class Mlp(nn.Module):
    """Applies linear, activation, linear to all rows as one matrix, see `checkpoint_activation`.

    Attributes:
      hidden: width between the linear layers.
      activation: a name of `ACTIVATIONS`.
      gated: multiply the activation of the first half of a twice as wide layer by the second half.
      layer_scale: multiply the output by a parameter for each channel.
      kernels: how it is computed.
      dtype: of the computation.
    """

    hidden: int
    activation: str
    gated: bool = False
    layer_scale: bool = False
    kernels: Kernels = kernels_lib.DEFAULT
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, hooks: BlockHooks | None = None) -> jax.Array:
        """Map x [..., D] to [..., D], with the `weight_update` of `hooks`."""

        def linear(features, name, x):
            y = self.kernels.dense(features, dtype=self.dtype, name=name)(x)
            return add_weight_update(hooks, f"mlp_{name}", x, y)

        rows = x.reshape(-1, x.shape[-1])
        hidden = self.hidden * (2 if self.gated else 1)
        y = checkpoint_activation(linear(hidden, "hidden", rows), "hidden")
        activation = ACTIVATIONS[self.activation]
        if self.gated:
            gate, y = jnp.split(y, 2, axis=-1)
            y = activation(gate) * y
        else:
            y = activation(y)
        y = linear(x.shape[-1], "output", y)
        if self.layer_scale:
            y = y * self.param("layer_scale", nn.initializers.ones, y.shape[-1:]).astype(y.dtype)
        return y.reshape(x.shape)


class Block(nn.Module):
    """Applies a pre-LN transformer block (eq. 2) with the hooks of a tuning method.

    Each backbone has a subclass, which sets up `ln_1`, `attention`, `ln_2` and `mlp`.
    """

    def __call__(self, h: jax.Array, hooks: BlockHooks, cls_token_only: bool = False) -> jax.Array:
        """Map tokens h [M, N, D] to [M, N, D].

        Args:
          h: tokens that enter the block.
          hooks: bound to the method's parameters of this block.
          cls_token_only: return only the class token, [M, 1, D].
        """
        h, x, attended = self.attention_input(h, hooks)
        if cls_token_only:
            y = self.attention(attended, hooks, cls_token_only=True)
            h, x = h[:, :1], x[:, :1]
        else:
            y = self.attend(attended, hooks)
        z = checkpoint_activation(
            h + (hooks.after_attention(y) + hooks.parallel_to_attention(x)), "middle"
        )
        z = hooks.on_middle(z)
        x = self.ln_2(z)
        y = self.mlp(hooks.before_mlp(x), hooks)
        h = z + (hooks.after_mlp(y) + hooks.parallel_to_mlp(x))
        return hooks.on_output(h)

    def attend(self, x: jax.Array, hooks: BlockHooks | None = None) -> jax.Array:
        """Compute attention over the tokens of the block: x [M, N, D] -> [M, N, D]."""
        return self.attention(x, hooks)

    def attention_input(
        self, h: jax.Array, hooks: BlockHooks
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the block's tokens, their LayerNorm, and attention's input: each [M, N, D]."""
        h = hooks.on_input(h, self)
        x = self.ln_1(h)
        return h, x, hooks.before_attention(x)


def no_hooks() -> BlockHooks:
    """Return the hooks of a frozen block, which do nothing."""
    return BlockHooks(parent=None).bind({})


def bind_hooks(hooks: BlockHooks | None, params: Any, rng: jax.Array | None) -> BlockHooks:
    """Bind `hooks` to the method's parameters of one block; None: the frozen block."""
    if hooks is None:
        return no_hooks()
    variables = {} if params is None else {"params": params}
    return hooks.bind(variables, rngs=None if rng is None else {"dropout": rng})


def init_block_hooks(
    rng: jax.Array, block: Block, params: Any, h: jax.Array, hooks: BlockHooks
) -> Any:
    """Initialize a method's hooks in one `block` with `params` that h [M, N, D] enters."""
    run = nn.init(lambda bound: block.apply({"params": params}, h, bound), hooks)
    return run(rng).get("params", {})


# How publishers resize position tables, all bicubic: with antialiasing (open_clip, timm, DINOv2
# with registers), without it (Hugging Face's DINOv2), and as DINOv2's authors do without registers,
# whose scale factor is (new size + 0.1) / old size.
RESIZE_METHODS = ("antialias", "bicubic", "dinov2")


def check_resize_method(name: str) -> None:
    """Raise ValueError unless `name` is in `RESIZE_METHODS`."""
    if name not in RESIZE_METHODS:
        known = ", ".join(RESIZE_METHODS)
        raise ValueError(f"unknown way to resize positions {name!r}: known are {known}")


def resize_grid(table: jax.Array, size: tuple[int, int], method: str = "antialias") -> jax.Array:
    """Resize a table [rows, columns, D] to (rows, columns) = `size` by one of `RESIZE_METHODS`."""
    if method == "antialias":
        return jax.image.resize(table, (*size, table.shape[-1]), "bicubic", antialias=True)
    offset = 0.1 if method == "dinov2" else 0.0
    rows, columns = (
        _bicubic_weights(old, new, offset) for old, new in zip(table.shape, size, strict=False)
    )
    with full_precision():
        return jnp.einsum("ri,cj,ijd->rcd", rows, columns, table)


def _bicubic_weights(old: int, new: int, offset: float) -> np.ndarray:
    """Return torch's weights of bicubic interpolation without antialiasing: float32 [new, old].

    Its cubic convolution kernel has a = -0.75. Beyond an edge, the value at the edge is repeated.

    Args:
      old: length of the axis.
      new: its new length.
      offset: added to `new` in the scale factor.
    """
    places = (np.arange(new) + 0.5) * (old / (new + offset)) - 0.5
    first = np.floor(places).astype(int)
    weights, a = np.zeros((new, old)), -0.75
    for neighbor in range(-1, 3):
        distance = np.abs(places - (first + neighbor))
        inner = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        outer = (((distance - 5) * distance + 8) * distance - 4) * a
        index = np.clip(first + neighbor, 0, old - 1)
        np.add.at(weights, (np.arange(new), index), np.where(distance <= 1, inner, outer))
    return weights.astype(np.float32)


def relative_index(side: int, table_side: int) -> np.ndarray:
    """Return the rows of (query, key) in a table of relative positions: int [side^2, side^2].

    The offset (dr, dc) of query minus key is in row
    (dr + table_side - 1) (2 table_side - 1) + dc + table_side - 1. The table is for grids of
    `table_side` >= side.
    """
    place = np.stack(np.mgrid[:side, :side], axis=-1).reshape(-1, 2)
    offset = place[:, None] - place[None] + table_side - 1
    return offset[..., 0] * (2 * table_side - 1) + offset[..., 1]
