"""What the backbones share: the transformer block and its named hooks for tuning methods.

Public: `BlockHooks`, `Block`, `Mlp`, `dense`, `norm`, `ACTIVATIONS`, `gelu`, `quick_gelu`, `REMAT`,
`keep`, `use_cpu_kernels`. The rest is for the modules of the backbones.

The file knows no tuning method. A method fills the hooks of a block (see `BlockHooks`); an empty hook
does nothing. Axes: M images (frames or framesets, batch included), N tokens, D width, L blocks.
"""

import dataclasses
from typing import Any, ClassVar

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.models.backbones import cpu_kernels
from dualpath_jax.models.backbones.block_loop import checkpoint_activation


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation of GELU, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU; `jax.nn.gelu` is the tanh form unless told."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def use_cpu_kernels(scan_blocks: bool) -> bool:
    """Whether to compute in the forms that are fastest on a CPU, where blocks are written out."""
    return not scan_blocks and jax.default_backend() == "cpu"


def check_activation(name: str) -> None:
    """ValueError unless `name` is in `ACTIVATIONS`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: known are {sorted(ACTIVATIONS)}")


def check_patches(config: Any) -> None:
    """ValueError unless the config's `image_size` is a multiple of its `patch_size`."""
    if config.image_size % config.patch_size:
        raise ValueError(
            f"image_size {config.image_size} is not divisible by patch_size {config.patch_size} of "
            f"{config.name}: choose a multiple of {config.patch_size} for data.image_size"
        )


def check_image(images: jax.Array, patch_size: int) -> None:
    """ValueError unless H and W of images [M, H, W, 3] are multiples of `patch_size`."""
    height, width = images.shape[-3:-1]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"image of {height}x{width} pixels is not divisible by the patch size {patch_size}"
        )


class BlockHooks(nn.Module):
    """What a tuning method may do inside a block. Override the hooks that the method fills.

    One instance describes one block; its parameters are stacked [L, ...] by the caller. `x`, `y`,
    `h` are [M, N, D] in the compute dtype; Swin's D and N are those of the block's stage, and its
    tokens are in the order of the map, row by row.

    Attributes:
      pointwise: every hook acts on each token by itself, and the class token is the first; then
        the last block need not compute the other tokens, and a training step on a GPU may have one
        more, which is none.
      shifted_windows: in Swin, fill the hooks of the shifted-window blocks too, not only those of
        the window blocks. Without effect in backbones that have no windows.
    """

    pointwise: ClassVar[bool] = False
    shifted_windows: bool = dataclasses.field(default=True, kw_only=True)

    def on_input(self, h: jax.Array, block: "Block") -> jax.Array:
        """On the tokens that enter the block, which is given so that its layers may be reused."""
        del block
        return h

    def before_attention(self, x: jax.Array) -> jax.Array:
        """On LN(h), before attention reads it."""
        return x

    def parallel_to_attention(self, x: jax.Array) -> jax.Array | float:
        """Parallel to attention: a term computed from LN(h), added to the residual stream."""
        del x
        return 0.0

    def after_attention(self, y: jax.Array) -> jax.Array:
        """On attention's output, before it joins the residual stream."""
        return y

    def parallel_to_mlp(self, x: jax.Array) -> jax.Array | float:
        """Parallel to the MLP: a term computed from LN(z), added to the residual stream."""
        del x
        return 0.0

    def after_mlp(self, y: jax.Array) -> jax.Array:
        """On the MLP's output, before it joins the residual stream."""
        return y

    def on_output(self, h: jax.Array) -> jax.Array:
        """On the block's output."""
        return h


def full_precision() -> Any:
    """A context in which float32 products are float32: else TPUs take bfloat16, GPUs TF32."""
    return jax.default_matmul_precision("highest")


def dense(features: int, dtype: Any, for_cpu: bool = False, **options: Any) -> nn.Dense:
    """`nn.Dense`, computed as `cpu_forms.Dense` if `for_cpu`."""
    return (cpu_kernels.Dense if for_cpu else nn.Dense)(features, dtype=dtype, **options)


def norm(epsilon: float, dtype: Any, for_cpu: bool = False) -> nn.LayerNorm:
    """`nn.LayerNorm`, computed as `cpu_forms.LayerNorm` if `for_cpu`."""
    return (cpu_kernels.LayerNorm if for_cpu else nn.LayerNorm)(epsilon, dtype=dtype)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its size, as a matrix product.

    As `nn.Conv` with kernel [P, P, 3, D]. cuDNN's convolution takes 1.7 ms of 27 that a forward
    pass of 32 clips takes on a GPU (H200).

    Attributes:
      width: D.
      patch_size: P, pixels.
      use_bias: add one.
    """

    width: int
    patch_size: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """images [M, H, W, 3] -> [M, H/P, W/P, D]."""
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
    """Linear, activation, Linear; all rows as one matrix, see `keep`."""

    hidden: int
    activation: str
    for_cpu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        y = checkpoint_activation(
            dense(self.hidden, self.dtype, self.for_cpu, name="hidden")(rows), "hidden"
        )
        y = ACTIVATIONS[self.activation](y)
        return dense(x.shape[-1], self.dtype, self.for_cpu, name="output")(y).reshape(x.shape)


class Block(nn.Module):
    """A pre-LN transformer block (eq. 2) that passes through the hooks of a tuning method.

    Each backbone has its own, which sets up `ln_1`, `attention`, `ln_2` and `mlp`.
    """

    def __call__(self, h: jax.Array, hooks: BlockHooks, cls_token_only: bool = False) -> jax.Array:
        """h [M, N, D] -> [M, N, D], or the class token alone [M, 1, D].

        `hooks` is bound to this block's parameters of the method.
        """
        h, x, attended = self.attention_input(h, hooks)
        if cls_token_only:
            y = self.attention(attended, cls_token_only=True)
            h, x = h[:, :1], x[:, :1]
        else:
            y = self.attend(attended)
        z = checkpoint_activation(
            h + (hooks.after_attention(y) + hooks.parallel_to_attention(x)), "middle"
        )
        x = self.ln_2(z)
        h = z + (hooks.after_mlp(self.mlp(x)) + hooks.parallel_to_mlp(x))
        return hooks.on_output(h)

    def attend(self, x: jax.Array) -> jax.Array:
        """Attention over the tokens of the block: x [M, N, D] -> [M, N, D]."""
        return self.attention(x)

    def attention_input(
        self, h: jax.Array, hooks: BlockHooks
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The block's tokens h [M, N, D], LN(h), and what attention reads: each [M, N, D]."""
        h = hooks.on_input(h, self)
        x = self.ln_1(h)
        return h, x, hooks.before_attention(x)


def no_hooks() -> BlockHooks:
    """The hooks of a frozen block."""
    return BlockHooks(parent=None).bind({})


def bind_hooks(hooks: BlockHooks | None, params: Any, rng: jax.Array | None) -> BlockHooks:
    """`hooks` with one block's parameters of the method; None: the frozen block."""
    if hooks is None:
        return no_hooks()
    variables = {} if params is None else {"params": params}
    return hooks.bind(variables, rngs=None if rng is None else {"dropout": rng})


def init_block_hooks(
    rng: jax.Array, block: Block, params: Any, h: jax.Array, hooks: BlockHooks
) -> Any:
    """Parameters of a method's hooks in one `block` with `params` that h [M, N, D] enters."""
    run = nn.init(lambda bound: block.apply({"params": params}, h, bound), hooks)
    return run(rng).get("params", {})


def resize_grid(table: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Table [rows, columns, D] to (rows, columns) = `size`: bicubic with antialiasing."""
    return jax.image.resize(table, (*size, table.shape[-1]), "bicubic", antialias=True)


def relative_index(side: int, table_side: int) -> np.ndarray:
    """Rows of a table of relative positions: int [side^2, side^2], of (query, key) on a grid.

    Row (dr + table_side - 1) (2 table_side - 1) + dc + table_side - 1 for the offset (dr, dc) of
    query minus key; the table is for grids of `table_side` >= side.
    """
    place = np.stack(np.mgrid[:side, :side], axis=-1).reshape(-1, 2)
    offset = place[:, None] - place[None] + table_side - 1
    return offset[..., 0] * (2 * table_side - 1) + offset[..., 1]
