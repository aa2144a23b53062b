"""Defines the vision transformers of CLIP (Radford et al. 2021) and ImageNet-21K.

Those of ImageNet-21K are by Dosovitskiy et al. 2021. The hooks of tuning methods are in
`layers.py`, attention's products in `attention.py`.

Axes: M images (frames or framesets, batch included), N tokens (class token first), D width, K
heads, L blocks, e projected width.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.models.backbones import attention, block_loop, layers
from dualpath_jax.models.backbones import kernels as kernels_lib
from dualpath_jax.models.backbones.block_loop import checkpoint_activation
from dualpath_jax.models.backbones.kernels import Kernels
from dualpath_jax.models.backbones.layers import BlockHooks, Mlp


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Describes the shape of a vision transformer; the defaults are CLIP's.

    Attributes:
      name: for messages and checkpoints.
      image_size: side of the square image that the position table covers, pixels.
      patch_size: side of a patch, pixels.
      width, depth, heads, mlp_dim: D, L, K and the width of the MLP's hidden layer.
      projection_dim: e, the width of CLIP's joint space; None: no projection, features of width D.
      activation: "quick_gelu" (OpenAI's weights) or "gelu" (exact; LAION's, ImageNet's and others).
      eps: LayerNorm's epsilon (CLIP: 1e-5; ImageNet-21K and Flax's own default: 1e-6).
      pre_norm: a LayerNorm between the embeddings and the first block (CLIP).
      patch_bias: a bias in the patch embedding (ImageNet-21K).
    """

    name: str
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    projection_dim: int | None = None
    activation: str = "quick_gelu"
    eps: float = 1e-5
    pre_norm: bool = True
    patch_bias: bool = False

    def __post_init__(self):
        layers.check_patches(self)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        layers.check_activation(self.activation)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], stated: Mapping[str, Any]) -> Any:
        """Return the config of converted weights.

        Args:
          arrays: by flat name of the parameter tree.
          stated: "activation"; "heads" (default: one per 64 of width, Radford et al. 2021, table
            19) and "eps" if known.
        """
        depth, width, mlp_dim = arrays["blocks/mlp/hidden/kernel"].shape
        patch = arrays["patch_embedding/kernel"].shape[0]
        heads = int(stated.get("heads", max(1, width // 64)))
        if heads < 1:
            raise ValueError(f"heads is {heads}: pass --heads with the number of attention heads")
        return cls(
            name="custom",
            image_size=math.isqrt(arrays["position_embedding"].shape[0] - 1) * patch,
            patch_size=patch,
            width=width,
            depth=depth,
            heads=heads,
            mlp_dim=mlp_dim,
            projection_dim=arrays["projection"].shape[-1] if "projection" in arrays else None,
            activation=stated["activation"],
            eps=float(stated.get("eps", 1e-5)),
            pre_norm="ln_pre/scale" in arrays,
            patch_bias="patch_embedding/bias" in arrays,
        )

    @property
    def grid(self) -> int:
        """Return the number of patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Return N, including the class token."""
        return self.grid**2 + 1

    @property
    def feature_dim(self) -> int:
        """Return the width of the features of `ViT.pool`: e, or D without a projection."""
        return self.projection_dim or self.width

    @property
    def has_class_token(self) -> bool:
        """Return True: it has a class token and a position table."""
        return True

    @property
    def architecture(self) -> dict[str, Any]:
        """Return the fields in which weights must agree with this config."""
        fields = ("width", "depth", "patch_size", "mlp_dim", "projection_dim")
        return {field: getattr(self, field) for field in (*fields, "pre_norm", "patch_bias")}

    @property
    def position_size(self) -> str:
        """Return the size of the position table, for messages."""
        return f"{self.grid}x{self.grid} patches ({self.image_size} pixels)"

    def resize_position_tables(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return `arrays`, by flat name, with the position table resized to this config's size."""
        table = arrays["position_embedding"]
        resized = resize_positions(table.astype(np.float32), (self.grid, self.grid))
        return {**arrays, "position_embedding": np.asarray(resized).astype(table.dtype)}


# Radford et al. 2021, table 19; head width is 64 throughout. Dosovitskiy et al. 2021, table 1.
_IN21K = {"activation": "gelu", "eps": 1e-6, "pre_norm": False, "patch_bias": True}
MODELS = {
    config.name: config
    for config in (
        ViTConfig("ViT-B/32", 224, 32, 768, 12, 12, 3072, 512),
        ViTConfig("ViT-B/16", 224, 16, 768, 12, 12, 3072, 512),
        ViTConfig("ViT-L/14", 224, 14, 1024, 24, 16, 4096, 768),
        ViTConfig("ViT-L/14@336", 336, 14, 1024, 24, 16, 4096, 768),
        ViTConfig("ViT-B/16-IN21K", 224, 16, 768, 12, 12, 3072, **_IN21K),
        ViTConfig("ViT-L/16-IN21K", 224, 16, 1024, 24, 16, 4096, **_IN21K),
    )
}


class Attention(nn.Module):
    """Applies multi-head self-attention with one fused projection for queries, keys and values.

    Attributes:
      width: D.
      heads: K.
      kernels: how it is computed.
      dtype: of the computation.
    """

    width: int
    heads: int
    kernels: Kernels = kernels_lib.DEFAULT
    dtype: Any = jnp.float32

    def setup(self):
        self.qkv = self.kernels.dense(3 * self.width, dtype=self.dtype)
        self.out = self.kernels.dense(self.width, dtype=self.dtype)

    def project(self, x: jax.Array) -> list[jax.Array]:
        """Project x [M, N, D] to queries, keys and values, each [M, N, K, D/K]."""
        rows = x.reshape(-1, x.shape[-1])
        if self.kernels.separate_qkv and not self.is_initializing():
            # Three products, as cuDNN reads each from an array of its own.
            weights = self._qkv_weights()
            parts = [checkpoint_activation(rows @ kernel + bias, "qkv") for kernel, bias in weights]
        else:
            qkv = self.qkv(rows if self.kernels.as_matrix else x)
            if self.kernels.saves_qkv:
                qkv = checkpoint_activation(qkv, "qkv")
            # The gradient of a split is one concatenation, which that of slices is not.
            parts = jnp.split(qkv, 3, axis=-1)
        return [y.reshape(*x.shape[:2], self.heads, -1) for y in parts]

    def _qkv_weights(self) -> list[tuple[jax.Array, jax.Array]]:
        """Return kernel [D, D] and bias [D] of queries, keys and values, in the compute dtype."""
        qkv = self.qkv.variables["params"]
        kernel, bias = (qkv[name].astype(self.dtype) for name in ("kernel", "bias"))
        return list(zip(jnp.split(kernel, 3, axis=-1), jnp.split(bias, 3), strict=True))

    def __call__(
        self, x: jax.Array, cls_token_only: bool = False, num_padding: int = 0
    ) -> jax.Array:
        """Map x [M, N, D] to [M, N, D], or to the class token's row [M, 1, D].

        Args:
          x: tokens; in a hook they may also be frames.
          cls_token_only: compute only the class token's row.
          num_padding: no token attends to the last `num_padding` ones.
        """
        if cls_token_only:
            y = self._attend_class_token(x)
        else:
            y = self.kernels.attention(*self.project(x), num_padding)
        return self.out(einops.rearrange(y, "m n k d -> m n (k d)"))

    def _attend_class_token(self, x: jax.Array) -> jax.Array:
        """Return attention's output for the class token of x [M, N, D]: [M, 1, K, D/K]."""
        (q_kernel, q_bias), (k_kernel, _), (v_kernel, v_bias) = self._qkv_weights()

        def split_heads(y):
            return y.reshape(*y.shape[:-1], self.heads, -1)

        q = split_heads(x[:, 0] @ q_kernel + q_bias)
        weights = map(split_heads, (k_kernel, v_kernel, v_bias))
        return attention.single_query_attention(q, x, *weights)[:, None]


class Block(layers.Block):
    """Applies a block of this backbone.

    Attributes:
      config: the backbone's shape.
      kernels: how it is computed.
      dtype: of the computation.
    """

    config: ViTConfig
    kernels: Kernels = kernels_lib.DEFAULT
    dtype: Any = jnp.float32

    def setup(self):
        config, kernels = self.config, self.kernels
        self.ln_1 = kernels.norm(config.eps, dtype=self.dtype)
        self.attention = Attention(config.width, config.heads, kernels, dtype=self.dtype)
        self.ln_2 = kernels.norm(config.eps, dtype=self.dtype)
        self.mlp = Mlp(config.mlp_dim, config.activation, kernels, dtype=self.dtype)

    def attend(self, x: jax.Array) -> jax.Array:
        """Compute attention over the block's tokens, of which the last may be padding."""
        return self.attention(x, num_padding=self.kernels.num_padding)

    def queries_and_keys(self, h: jax.Array, hooks: BlockHooks) -> tuple[jax.Array, jax.Array]:
        """Return the queries and keys, each [M, N, K, D/K], of a block that h [M, N, D] enters."""
        _, _, x = self.attention_input(h, hooks)
        q, k, _ = self.attention.project(x)
        return q, k


class ViT(nn.Module):
    """Implements the image tower; `__call__` is the frozen backbone, methods compose the parts.

    Attributes:
      config: its shape.
      dtype: dtype of the computation; parameters keep the dtype they are given in.
      scan_blocks: loop over the blocks in the compiled program, which makes it small; False
        unrolls them. Parameters are the same, stacked [L, ...].
      remat: what a block saves for the backward pass, a name of `block_loop.REMAT`.
    """

    config: ViTConfig
    dtype: Any = jnp.float32
    scan_blocks: bool = False
    remat: str = "none"

    def setup(self):
        config = self.config
        self.kernels = kernels_lib.choose_kernels(self.scan_blocks)
        embedding = nn.initializers.normal(config.width**-0.5)  # CLIP's own scale
        self.patch_embedding = layers.PatchEmbedding(
            config.width, config.patch_size, config.patch_bias, dtype=self.dtype
        )
        self.class_embedding = self.param("class_embedding", embedding, (config.width,))
        self.position_embedding = self.param(
            "position_embedding", embedding, (config.num_tokens, config.width)
        )
        if config.pre_norm:
            self.ln_pre = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)
        self.blocks = self.param("blocks", self._init_blocks)
        self.ln_post = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)
        if config.projection_dim is not None:
            self.projection = self.param(
                "projection", embedding, (config.width, config.projection_dim)
            )

    def _block(self, kernels: Kernels | None = None) -> Block:
        return Block(self.config, kernels or self.kernels, dtype=self.dtype, parent=None)

    def _init_blocks(self, rng: jax.Array) -> Any:
        def init(rng):
            h = jnp.zeros((1, 2, self.config.width))
            return self._block().init(rng, h, layers.no_hooks())["params"]

        return block_loop.init_stacked(init, rng, self.config.depth)

    def init_hooks(
        self, rng: jax.Array, hooks: BlockHooks, num_images: int, num_tokens: int
    ) -> Any:
        """Initialize a method's hooks, stacked [L, ...], for h [num_images, num_tokens, D]."""
        h = jnp.zeros((num_images, num_tokens, self.config.width), self.dtype)
        block = jax.tree.map(lambda leaf: leaf[0], self.blocks)
        return block_loop.init_stacked(
            lambda rng: layers.init_block_hooks(rng, self._block(), block, h, hooks),
            rng,
            self.config.depth,
        )

    def embed(
        self,
        images: jax.Array,
        class_token: jax.Array | None = None,
        position: jax.Array | None = None,
    ) -> jax.Array:
        """Embed images as the tokens that enter the first block (eq. 1, then CLIP's `ln_pre`).

        Args:
          images: [M, H, W, 3], normalized as the weights expect; H, W multiples of the patch.
          class_token: [D]; None: the backbone's own.
          position: [N, D], or [M, N, D] if images differ in position; None: the backbone's own.

        Returns:
          [M, N, D] in the compute dtype.
        """
        layers.check_image(images, self.config.patch_size)
        class_token = self.class_embedding if class_token is None else class_token
        position = self.position_embedding if position is None else position
        patches = einops.rearrange(self.patch_embedding(images), "m h w d -> m (h w) d")
        class_token = jnp.broadcast_to(class_token, (images.shape[0], 1, patches.shape[-1]))
        h = jnp.concatenate([class_token.astype(self.dtype), patches], axis=1)
        h = h + position.astype(self.dtype)
        return self.ln_pre(h) if self.config.pre_norm else h

    def encode(
        self,
        h: jax.Array,
        hooks: BlockHooks | None = None,
        hook_params: Any = None,
        dropout_rng: jax.Array | None = None,
        cls_token_only: bool = False,
        blocks: slice = slice(None),
    ) -> jax.Array:
        """Apply the L blocks, or some of them, to tokens h [M, N, D].

        Args:
          h: tokens that enter the first block.
          hooks: what a tuning method does inside each block; None for the frozen backbone.
          hook_params: its parameters, stacked [L, ...].
          dropout_rng: switches on the method's dropout; None unless in training.
          cls_token_only: return only the class token, [M, 1, D], if the hooks allow it; the last
            block then does not compute the others.
          blocks: which blocks to run, of 0 ... L - 1.

        Returns:
          [M, N, D], or [M, 1, D].
        """
        rngs, kernels = None, self.kernels
        pointwise = hooks is None or hooks.pointwise
        if dropout_rng is not None:
            rngs = jax.random.split(dropout_rng, self.config.depth)
            kernels = kernels.for_training(h.shape[1], h.dtype, pointwise)

        def body(h, layer, cls_token_only=False):
            block, hook_params, rng = layer
            bound = layers.bind_hooks(hooks, hook_params, rng)
            block_params = {"params": block_loop.gather_fsdp(block)}
            return self._block(kernels).apply(block_params, h, bound, cls_token_only)

        def loop(h, layer_params):
            # Padding once is cheaper than padding what the attention of each block reads.
            padded = jnp.pad(h, ((0, 0), (0, kernels.num_padding), (0, 0)))
            y = block_loop.loop_blocks(
                body,
                padded,
                layer_params,
                self.scan_blocks,
                self.remat,
                kernels.saved_activations,
            )
            return y[:, : h.shape[1]]

        layer_params = jax.tree.map(lambda leaf: leaf[blocks], (self.blocks, hook_params, rngs))
        if not (cls_token_only and pointwise):
            return loop(h, layer_params)
        first = jax.tree.map(lambda leaf: leaf[:-1], layer_params)
        last = jax.tree.map(lambda leaf: leaf[-1], layer_params)
        return body(loop(h, first), last, cls_token_only=True)

    def queries_and_keys(
        self, h: jax.Array, index: int, hooks: BlockHooks | None = None, hook_params: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """Return queries and keys, [M, N, K, D/K], of block `index` that h [M, N, D] enters."""
        block, params = jax.tree.map(lambda leaf: leaf[index], (self.blocks, hook_params))
        bound = layers.bind_hooks(hooks, params, None)
        variables = {"params": block_loop.gather_fsdp(block)}
        return self._block().apply(variables, h, bound, method=Block.queries_and_keys)

    def attention(
        self, h: jax.Array, hooks: BlockHooks | None = None, hook_params: Any = None, first: int = 0
    ) -> jax.Array:
        """Return the attention weights of blocks `first` ... L - 1, averaged over heads.

        Args:
          h: tokens that enter block 0, [M, N, D].
          hooks: see `encode`.
          hook_params: see `encode`.
          first: the first block whose attention is returned.

        Returns:
          [L - first, M, N, N] float32; rows (queries) sum to 1 over the last axis (keys).
        """
        if first:
            h = self.encode(h, hooks, hook_params, blocks=slice(0, first))
        weights = []
        for i in range(first, self.config.depth):
            q, k = self.queries_and_keys(h, i, hooks, hook_params)
            weights.append(attention.attention_weights(q, k).mean(axis=1))
            h = self.encode(h, hooks, hook_params, blocks=slice(i, i + 1))
        return jnp.stack(weights)

    def pool(self, h: jax.Array, project: bool = True) -> jax.Array:
        """Apply `ln_post` to the class token of h [M, N, D], then CLIP's visual projection.

        Returns:
          [M, e]; [M, D] if `project` is False or the backbone has no projection.
        """
        y = self.ln_post(h[:, 0])
        if project and self.config.projection_dim is not None:
            y = y @ self.projection.astype(self.dtype)
        return y

    def token_features(self, h: jax.Array) -> jax.Array:
        """Apply `ln_post` to all tokens of h [M, N, D]."""
        return self.ln_post(h)

    def patch_features(self, h: jax.Array) -> jax.Array:
        """Apply `ln_post` to the patch tokens of h [M, N, D]: [M, N - 1, D]."""
        return self.ln_post(h[:, 1:])

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Run the frozen backbone: images [M, H, W, 3] -> (tokens [M, N, D], features [M, e])."""
        h = self.encode(self.embed(images))
        return h, self.pool(h)


def resize_positions(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Resize a position table [N, D], class token first, to a grid (rows, columns) of patches.

    It is bicubic with antialiasing, as in open_clip; the class token's row is unchanged.
    """
    side = round((table.shape[0] - 1) ** 0.5)
    if side * side + 1 != table.shape[0]:
        raise ValueError(f"position table of {table.shape[0]} rows is not a square plus one")
    if (side, side) == tuple(grid):
        return table
    patches = layers.resize_grid(table[1:].reshape(side, side, -1), grid)
    return jnp.concatenate([table[:1], patches.reshape(grid[0] * grid[1], -1)])
