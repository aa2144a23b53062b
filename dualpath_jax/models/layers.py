"""What the backbones share: the transformer block and its named sites for tuning methods.

Public: `Sites`, `Block`, `Mlp`, `dense`, `product`, `ACTIVATIONS`, `gelu`, `quick_gelu`, `REMAT`,
`keep`, `written_for_cpu`. The rest is for the modules of the backbones.

The file knows no tuning method. A method fills the sites of a block (see `Sites`); an empty site
does nothing. Axes: M images (frames or framesets, batch included), N tokens, D width, L blocks.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation of GELU, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU; `jax.nn.gelu` is the tanh form unless told."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}

# What a block keeps for its backward pass besides its input; the rest is computed again there.
# A frozen matrix product needs no kept input. "cheap" keeps the outputs of the large ones that
# something else reads; it repeats softmax, activations, norms, attention's output and adapters.
_KEPT = ("qkv", "hidden", "branch")
# Where blocks are written out on a CPU, it also keeps the residual stream after attention and the
# adapters' first products: a step of 16 frames takes 4% less CPU time and 9% more memory (B/16).
# And attention's weights: 1% less time, and no more memory at the peak.
_KEPT_ON_CPU = (*_KEPT, "middle", "down", "weights")
REMAT = ("none", "cheap", "full")


def written_for_cpu(scan_blocks: bool) -> bool:
    """Whether to compute in the forms that are fastest on a CPU, where blocks are written out."""
    return not scan_blocks and jax.default_backend() == "cpu"


def _policy(remat: str, scan: bool) -> Any:
    """What `jax.checkpoint` keeps under a name of `REMAT` other than "none"."""
    if remat == "full":
        return jax.checkpoint_policies.nothing_saveable
    names = _KEPT_ON_CPU if written_for_cpu(scan) else _KEPT
    return jax.checkpoint_policies.save_only_these_names(*names)


def keep(x: jax.Array, name: str) -> jax.Array:
    """x, named so that `remat="cheap"` keeps it for the backward pass."""
    if name not in _KEPT_ON_CPU:
        raise ValueError(f"{name!r} is not kept: known are {', '.join(_KEPT_ON_CPU)}")
    # As a matrix: TPUs store the last two axes in tiles, and pad the 197 tokens of an image.
    rows = checkpoint_name(x.reshape(-1, x.shape[-1]), name)
    return rows.reshape(x.shape)


def check_remat(name: str) -> None:
    """ValueError unless `name` is in `REMAT`."""
    if name not in REMAT:
        raise ValueError(f"unknown model.remat={name!r}: known are {', '.join(REMAT)}")


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


class Sites(nn.Module):
    """What a tuning method may do inside a block. Override the sites that the method fills.

    One instance describes one block; its parameters are stacked [L, ...] by the caller. `x`, `y`,
    `h` are [M, N, D] in the compute dtype; Swin's D and N are those of the block's stage, and its
    tokens are in the order of the map, row by row.

    Attributes:
      token_wise: every site after attention acts on each token by itself, and the class token is
        the first; then the last block need not compute the other tokens.
      shifted_windows: in Swin, fill the sites of the shifted-window blocks too, not only those of
        the window blocks. Without effect in backbones that have no windows.
    """

    token_wise: ClassVar[bool] = False
    shifted_windows: bool = dataclasses.field(default=True, kw_only=True)

    def tokens(self, h: jax.Array, block: "Block") -> jax.Array:
        """On the tokens that enter the block, which is given so that its layers may be reused."""
        del block
        return h

    def before_attention(self, x: jax.Array) -> jax.Array:
        """On LN(h), before attention reads it."""
        return x

    def beside_attention(self, x: jax.Array) -> jax.Array | float:
        """Parallel to attention: a term computed from LN(h), added to the residual stream."""
        del x
        return 0.0

    def after_attention(self, y: jax.Array) -> jax.Array:
        """On attention's output, before it joins the residual stream."""
        return y

    def beside_mlp(self, x: jax.Array) -> jax.Array | float:
        """Parallel to the MLP: a term computed from LN(z), added to the residual stream."""
        del x
        return 0.0

    def after_mlp(self, y: jax.Array) -> jax.Array:
        """On the MLP's output, before it joins the residual stream."""
        return y

    def output(self, h: jax.Array) -> jax.Array:
        """On the block's output."""
        return h


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] @ kernel [I, O], with gradients in the forms that XLA computes fastest on a CPU.

    A product with a transposed factor takes up to twice as long where that is the larger one. Then
    the barriers make XLA turn round the smaller one, and what comes out.
    """
    return x @ kernel


def _product_forward(x: Any, kernel: Any) -> tuple[jax.Array, Any]:
    kept = x.value if kernel.perturbed else None  # a frozen kernel needs no gradient
    return product(x.value, kernel.value), (kept, kernel.value)


def _product_backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    x, kernel = kept
    d_rows = dy.reshape(-1, dy.shape[-1])
    barrier = jax.lax.optimization_barrier
    if len(d_rows) < min(kernel.shape):
        dx = barrier(kernel @ barrier(d_rows.T)).T
    else:
        dx = d_rows @ kernel.T
    d_kernel = None
    if x is not None:
        rows = x.reshape(-1, x.shape[-1])
        tall = kernel.shape[0] > kernel.shape[1]
        d_kernel = barrier(d_rows.T @ rows).T if tall else rows.T @ d_rows
    return dx.reshape(*dy.shape[:-1], -1), d_kernel


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def dense(features: int, dtype: Any, for_cpu: bool = False, **options: Any) -> nn.Dense:
    """`nn.Dense`, computed by `product` if `for_cpu`."""
    if for_cpu:  # Dense contracts the last axis of x with the first of the kernel
        options["dot_general"] = lambda x, kernel, *_, **__: product(x, kernel)
    return nn.Dense(features, dtype=dtype, **options)


class Mlp(nn.Module):
    """Linear, activation, Linear."""

    hidden: int
    activation: str
    for_cpu: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = keep(dense(self.hidden, self.dtype, self.for_cpu, name="hidden")(x), "hidden")
        y = ACTIVATIONS[self.activation](y)
        return dense(x.shape[-1], self.dtype, self.for_cpu, name="output")(y)


class Block(nn.Module):
    """A pre-LN transformer block (eq. 2) that passes through the sites of a tuning method.

    Each backbone has its own, which sets up `ln_1`, `attention`, `ln_2` and `mlp`.
    """

    def __call__(self, h: jax.Array, sites: Sites, class_only: bool = False) -> jax.Array:
        """h [M, N, D] -> [M, N, D], or the class token alone [M, 1, D].

        `sites` is bound to this block's parameters of the method.
        """
        h, x, attended = self.attention_input(h, sites)
        if class_only:
            y = self.attention(attended, class_only=True)
            h, x = h[:, :1], x[:, :1]
        else:
            y = self.attention(attended)
        z = keep(h + sites.after_attention(y) + sites.beside_attention(x), "middle")
        x = self.ln_2(z)
        h = z + sites.after_mlp(self.mlp(x)) + sites.beside_mlp(x)
        return sites.output(h)

    def attention_input(self, h: jax.Array, sites: Sites) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The block's tokens h [M, N, D], LN(h), and what attention reads: each [M, N, D]."""
        h = sites.tokens(h, self)
        x = self.ln_1(h)
        return h, x, sites.before_attention(x)


def no_sites() -> Sites:
    """The sites of a frozen block."""
    return Sites(parent=None).bind({})


def bind_sites(sites: Sites | None, params: Any, rng: jax.Array | None) -> Sites:
    """`sites` with one block's parameters of the method; None: the frozen block."""
    if sites is None:
        return no_sites()
    variables = {} if params is None else {"params": params}
    return sites.bind(variables, rngs=None if rng is None else {"dropout": rng})


def init_block_sites(rng: jax.Array, block: Block, params: Any, h: jax.Array, sites: Sites) -> Any:
    """Parameters of a method's sites in one `block` with `params` that h [M, N, D] enters."""
    run = nn.init(lambda bound: block.apply({"params": params}, h, bound), sites)
    return run(rng).get("params", {})


def init_stacked(init: Callable[[jax.Array], Any], rng: jax.Array, length: int) -> Any:
    """`init(rng)` for `length` blocks, each with its own rng: leaves [length, ...]."""
    return jax.vmap(init)(jax.random.split(rng, length))


def divided_by_fsdp() -> bool:
    """Whether, where this is traced, a mesh axis `fsdp` divides the frozen weights."""
    return jax.sharding.get_abstract_mesh().shape.get("fsdp", 1) > 1


def gathered(params: Any) -> Any:
    """Parameters of a block, whole on each device where a mesh axis `fsdp` divides them.

    Without it XLA may divide the computation as the weights are, and send activations round.
    """
    if not divided_by_fsdp():
        return params
    everywhere = jax.sharding.PartitionSpec()
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, everywhere), params)


def loop_blocks(
    body: Callable[[jax.Array, Any], jax.Array],
    h: jax.Array,
    layers: Any,
    scan: bool,
    remat: str,
) -> jax.Array:
    """h through body(h, layer) for each layer of `layers`, a tree with leaves [L, ...].

    `scan` loops in the compiled program; otherwise the layers are written out. `remat` is a name of
    `REMAT`.
    """
    if remat != "none":
        # The barrier is needed where the compiler sees both passes: it would join them again.
        body = jax.checkpoint(body, policy=_policy(remat, scan), prevent_cse=not scan)
    if scan:
        return jax.lax.scan(lambda h, layer: (body(h, layer), None), h, layers)[0]
    # Not scan(unroll=True): that still copies what the backward pass needs into stacked arrays.
    for i in range(jax.tree.leaves(layers)[0].shape[0]):
        h = body(h, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
    return h


def resize_grid(table: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Table [rows, columns, D] to (rows, columns) = `size`: bicubic with antialiasing."""
    return jax.image.resize(table, (*size, table.shape[-1]), "bicubic", antialias=True)
