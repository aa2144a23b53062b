"""CLIP's vision transformer (Radford et al. 2021, sec. 2.4) with named sites for tuning methods.

Public: `ViTConfig`, `MODELS`, `vit_config`, `ViT`, `Block`, `Sites`, `resize_positions`.

The file knows no tuning method. A method fills the sites of a block (see `Sites`); an empty site
does nothing. Axes: M images (frames or framesets, batch included), N tokens (class token first),
D width, K heads, L blocks, e projected width.
"""

import dataclasses
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Shape of a CLIP vision transformer.

    Attributes:
      name: what the user calls it, for messages and checkpoints.
      image_size: side of the square image that the position table covers, pixels.
      patch_size: side of a patch, pixels.
      width, depth, heads, mlp_dim: D, L, K and the width of the MLP's hidden layer.
      projection_dim: e, the width of CLIP's joint space.
      activation: "quick_gelu" (OpenAI's weights) or "gelu" (exact; LAION's and others).
      eps: LayerNorm's epsilon (CLIP: 1e-5; Flax's own default is 1e-6).
    """

    name: str
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    projection_dim: int
    activation: str = "quick_gelu"
    eps: float = 1e-5

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size} of "
                f"{self.name}: choose a multiple of {self.patch_size} for data.image_size"
            )
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}: known are {sorted(ACTIVATIONS)}"
            )

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """N, the class token included."""
        return self.grid**2 + 1


def quick_gelu(x: jax.Array) -> jax.Array:
    """CLIP's approximation of GELU, x * sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """Exact (erf) GELU; `jax.nn.gelu` is the tanh form unless told."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}

# Radford et al. 2021, table 19; head width is 64 throughout.
MODELS = {
    "ViT-B/16": ViTConfig("ViT-B/16", 224, 16, 768, 12, 12, 3072, 512),
    "ViT-L/14": ViTConfig("ViT-L/14", 224, 14, 1024, 24, 16, 4096, 768),
}


def vit_config(name: str, **overrides: Any) -> ViTConfig:
    """The shape called `name`, or with name "custom" the one that `overrides` spell out.

    Overrides that are None are ignored. Raises ValueError for an unknown name or a missing value.
    """
    overrides = {k: v for k, v in overrides.items() if v is not None}
    if name in MODELS:
        return dataclasses.replace(MODELS[name], **overrides)
    if name != "custom":
        raise ValueError(f"unknown backbone {name!r}: known are {sorted(MODELS)} and 'custom'")
    try:
        return ViTConfig(name=name, **overrides)
    except TypeError as error:
        raise ValueError(f"backbone 'custom' needs its shape in config.backbone: {error}") from None


class Sites(nn.Module):
    """What a tuning method may do inside a block. Override the sites that the method fills.

    One instance describes one block; its parameters are stacked [L, ...] by the caller. `x`, `y`,
    `h` are [M, N, D] in the compute dtype.
    """

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


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    width: int
    heads: int
    dtype: Any = jnp.float32

    def setup(self):
        self.qkv = nn.Dense(3 * self.width, dtype=self.dtype)
        self.out = nn.Dense(self.width, dtype=self.dtype)

    def project(self, x: jax.Array) -> jax.Array:
        """x [M, N, D] -> queries, keys and values [3, M, N, K, D/K]."""
        return einops.rearrange(
            self.qkv(x), "m n (three k d) -> three m n k d", three=3, k=self.heads
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jax.nn.dot_product_attention(*self.project(x))  # float32 softmax, scale 1/sqrt(D/K)
        return self.out(einops.rearrange(y, "m n k d -> m n (k d)"))


class Mlp(nn.Module):
    """Linear, activation, Linear."""

    hidden: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x)
        y = ACTIVATIONS[self.activation](y)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="output")(y)


class Block(nn.Module):
    """A pre-LN transformer block (eq. 2) that passes through the sites of a tuning method."""

    config: ViTConfig
    dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        self.ln_1 = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)
        self.attention = Attention(config.width, config.heads, dtype=self.dtype)
        self.ln_2 = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)
        self.mlp = Mlp(config.mlp_dim, config.activation, dtype=self.dtype)

    def __call__(self, h: jax.Array, sites: Sites) -> jax.Array:
        """h [M, N, D] -> [M, N, D]. `sites` is bound to this block's parameters of the method."""
        h = sites.tokens(h, self)
        x = self.ln_1(h)
        y = self.attention(sites.before_attention(x))
        z = h + sites.after_attention(y) + sites.beside_attention(x)
        x = self.ln_2(z)
        h = z + sites.after_mlp(self.mlp(x)) + sites.beside_mlp(x)
        return sites.output(h)

    def queries_and_keys(self, h: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of the attention on h [M, N, D], without sites: two of [M, N, K, D/K]."""
        q, k, _ = self.attention.project(self.ln_1(h))
        return q, k


class ViT(nn.Module):
    """CLIP's image tower. `__call__` is the frozen backbone; tuning methods compose the parts.

    Attributes:
      config: its shape.
      dtype: dtype of the computation; parameters keep the dtype they are given in.
      scan_blocks: loop over the blocks in the compiled program (small program, for accelerators)
        instead of writing them out (faster on CPU). Parameters are the same, stacked [L, ...].
    """

    config: ViTConfig
    dtype: Any = jnp.float32
    scan_blocks: bool = False

    def setup(self):
        config = self.config
        patch = (config.patch_size, config.patch_size)
        embedding = nn.initializers.normal(config.width**-0.5)  # CLIP's own scale
        self.patch_embedding = nn.Conv(
            config.width, patch, strides=patch, padding="VALID", use_bias=False, dtype=self.dtype
        )
        self.class_embedding = self.param("class_embedding", embedding, (config.width,))
        self.position_embedding = self.param(
            "position_embedding", embedding, (config.num_tokens, config.width)
        )
        self.ln_pre = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)
        self.blocks = self.param("blocks", self._init_blocks)
        self.ln_post = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)
        self.projection = self.param("projection", embedding, (config.width, config.projection_dim))

    def _block(self) -> Block:
        return Block(self.config, dtype=self.dtype, parent=None)

    def _init_blocks(self, rng: jax.Array) -> Any:
        def init(rng):
            h = jnp.zeros((1, 2, self.config.width))
            return self._block().init(rng, h, Sites(parent=None).bind({}))["params"]

        return jax.vmap(init)(jax.random.split(rng, self.config.depth))

    def init_sites(self, rng: jax.Array, sites: Sites, num_images: int, num_tokens: int) -> Any:
        """Parameters of a method's sites, stacked [L, ...], for h [num_images, num_tokens, D]."""
        h = jnp.zeros((num_images, num_tokens, self.config.width), self.dtype)
        block = jax.tree.map(lambda leaf: leaf[0], self.blocks)

        def init(rng):
            run = nn.init(lambda bound: self._block().apply({"params": block}, h, bound), sites)
            return run(rng).get("params", {})

        return jax.vmap(init)(jax.random.split(rng, self.config.depth))

    def embed(self, images: jax.Array, class_token: jax.Array, position: jax.Array) -> jax.Array:
        """Images to the tokens that enter the first block (eq. 1, then CLIP's `ln_pre`).

        Args:
          images: [M, H, W, 3] normalised with CLIP's mean and std; H, W multiples of the patch.
          class_token: [D].
          position: [N, D], or [M, N, D] where images differ in position.

        Returns:
          [M, N, D] in the compute dtype.
        """
        size = self.config.patch_size
        if images.shape[-3] % size or images.shape[-2] % size:
            raise ValueError(
                f"image of {images.shape[-3]}x{images.shape[-2]} pixels is not divisible by the "
                f"patch size {size}"
            )
        patches = einops.rearrange(self.patch_embedding(images), "m h w d -> m (h w) d")
        class_token = jnp.broadcast_to(class_token, (images.shape[0], 1, patches.shape[-1]))
        h = jnp.concatenate([class_token.astype(self.dtype), patches], axis=1)
        return self.ln_pre(h + position.astype(self.dtype))

    def encode(
        self,
        h: jax.Array,
        sites: Sites | None = None,
        site_params: Any = None,
        dropout_rng: jax.Array | None = None,
        blocks: slice = slice(None),
    ) -> jax.Array:
        """The L blocks, or some of them: h [M, N, D] -> [M, N, D].

        Args:
          h: tokens that enter the first block.
          sites: what a tuning method does inside each block; None for the frozen backbone.
          site_params: its parameters, stacked [L, ...].
          dropout_rng: switches on the method's dropout.
          blocks: which blocks to run, of 0 ... L - 1.
        """
        sites = Sites(parent=None) if sites is None else sites
        rngs = None
        if dropout_rng is not None:
            rngs = jax.random.split(dropout_rng, self.config.depth)

        def body(h, layer):
            block_params, site_params, rng = layer
            variables = {} if site_params is None else {"params": site_params}
            bound = sites.bind(variables, rngs=None if rng is None else {"dropout": rng})
            return self._block().apply({"params": block_params}, h, bound), None

        layers = jax.tree.map(lambda leaf: leaf[blocks], (self.blocks, site_params, rngs))
        if self.scan_blocks:
            return jax.lax.scan(body, h, layers)[0]
        # Not scan(unroll=True): that still copies what the backward pass needs into stacked arrays.
        for i in range(len(range(self.config.depth)[blocks])):
            h, _ = body(h, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
        return h

    def queries_and_keys(self, h: jax.Array, index: int) -> tuple[jax.Array, jax.Array]:
        """Of block `index`, which h [M, N, D] enters: two of [M, N, K, D/K]."""
        block = jax.tree.map(lambda leaf: leaf[index], self.blocks)
        return self._block().apply({"params": block}, h, method=Block.queries_and_keys)

    def pool(self, h: jax.Array, project: bool = True) -> jax.Array:
        """Class token through `ln_post` and, if asked, CLIP's visual projection.

        h [M, N, D] -> [M, e], or [M, D] without the projection.
        """
        y = self.ln_post(h[:, 0])
        return y @ self.projection.astype(self.dtype) if project else y

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Frozen CLIP: images [M, H, W, 3], normalised -> (tokens [M, N, D], features [M, e])."""
        h = self.encode(self.embed(images, self.class_embedding, self.position_embedding))
        return h, self.pool(h)


def resize_positions(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Position table [N, D], class token first, resized to a grid (rows, columns) of patches.

    Bicubic with antialiasing, as open_clip does; the class token's row is kept.
    """
    side = round((table.shape[0] - 1) ** 0.5)
    if side * side + 1 != table.shape[0]:
        raise ValueError(f"position table of {table.shape[0]} rows is not a square plus one")
    if (side, side) == tuple(grid):
        return table
    patches = table[1:].reshape(side, side, -1)
    patches = jax.image.resize(patches, (*grid, table.shape[1]), "bicubic", antialias=True)
    return jnp.concatenate([table[:1], patches.reshape(grid[0] * grid[1], -1)])
