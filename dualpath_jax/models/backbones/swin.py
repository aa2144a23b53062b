"""Defines the Swin transformer (Liu et al. 2021) with the hooks of `layers.py` in its blocks.

Axes: M images, R x C map of tokens (rows, columns), N = R C, D width of a stage, K heads of a
stage, L blocks of a stage, w side of a window, U windows of a map.
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

from dualpath_jax.models.backbones import block_loop, layers
from dualpath_jax.models.backbones.kernels import choose_kernels
from dualpath_jax.models.backbones.layers import BlockHooks, Mlp


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Describes the shape of a Swin transformer.

    Width, heads and mlp_dim double from stage to stage.

    Attributes:
      name: for messages and checkpoints.
      image_size: side of the image, pixels; no parameter depends on it.
      patch_size: side of a patch, pixels.
      width, heads, mlp_dim: D, K and the width of the MLP's hidden layer, in the first stage.
      depths: L of each stage, even, because blocks come in pairs: windows and shifted windows.
      window_size: w, in tokens; on a smaller map, windows are as large as the map.
      activation: a name of `layers.ACTIVATIONS`.
      eps: LayerNorm's epsilon.
    """

    name: str
    image_size: int
    patch_size: int
    width: int
    depths: tuple[int, ...]
    heads: int
    mlp_dim: int
    window_size: int
    activation: str = "gelu"
    eps: float = 1e-5

    def __post_init__(self):
        object.__setattr__(self, "depths", tuple(self.depths))  # JSON gives a list
        layers.check_patches(self)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if not self.depths or any(depth < 2 or depth % 2 for depth in self.depths):
            raise ValueError(f"depths {self.depths} of {self.name} must be even numbers above 0")
        layers.check_activation(self.activation)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], stated: Mapping[str, Any]) -> Any:
        """Return the config of converted weights.

        Args:
          arrays: by flat name of the parameter tree.
          stated: "activation"; "eps" and "image_size" if known.
        """
        stages = [name for name in arrays if name.endswith("/mlp/hidden/kernel")]
        _, width, mlp_dim = arrays["blocks_0/mlp/hidden/kernel"].shape
        _, table, heads = arrays["blocks_0/attention/relative_position_bias"].shape
        return cls(
            name="custom-swin",
            image_size=int(stated.get("image_size", 224)),
            patch_size=arrays["patch_embedding/kernel"].shape[0],
            width=width,
            depths=tuple(
                arrays[f"blocks_{s}/mlp/hidden/kernel"].shape[0] for s in range(len(stages))
            ),
            heads=heads,
            mlp_dim=mlp_dim,
            window_size=(math.isqrt(table) + 1) // 2,
            activation=stated["activation"],
            eps=float(stated.get("eps", 1e-5)),
        )

    @property
    def grid(self) -> int:
        """Return the number of patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Return N in the first stage."""
        return self.grid**2

    @property
    def feature_dim(self) -> int:
        """Return the width of the last stage, which is that of the features of `Swin.pool`."""
        return self.width * 2 ** (len(self.depths) - 1)

    @property
    def has_class_token(self) -> bool:
        """Return False: it has no class token."""
        return False

    @property
    def num_leading_tokens(self) -> int:
        """Return 0: there are only patches."""
        return 0

    @property
    def has_position_table(self) -> bool:
        """Return False: its positions are relative."""
        return False

    @property
    def has_global_attention(self) -> bool:
        """Return False: tokens attend to those of their window."""
        return False

    @property
    def readout(self) -> str:
        """Return "mean": the features are the average over the last map."""
        return "mean"

    @property
    def architecture(self) -> dict[str, Any]:
        """Return the fields in which weights must agree with this config."""
        return {f: getattr(self, f) for f in ("width", "depths", "patch_size", "mlp_dim")}

    @property
    def position_size(self) -> str:
        """Return the size of the relative position tables, for messages."""
        return f"windows of {self.window_size}x{self.window_size} tokens"

    def resize_position_tables(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return `arrays`, by flat name, with position tables resized to this config's window."""
        side = 2 * self.window_size - 1

        def resize(table):
            grids = table.reshape(len(table), math.isqrt(table.shape[1]), -1, table.shape[2])
            resized = [layers.resize_grid(grid, (side, side)) for grid in grids.astype(np.float32)]
            return np.stack(resized).reshape(len(table), side**2, -1).astype(table.dtype)

        tables = {n: resize(a) for n, a in arrays.items() if n.endswith("relative_position_bias")}
        return {**arrays, **tables}


# Liu et al. 2021, sec. 3.3; head width is 32 throughout, MLP ratio 4.
MODELS = {
    config.name: config
    for config in (
        SwinConfig("Swin-T", 224, 4, 96, (2, 2, 6, 2), 3, 384, 7),
        SwinConfig("Swin-S", 224, 4, 96, (2, 2, 18, 2), 3, 384, 7),
        SwinConfig("Swin-B", 224, 4, 128, (2, 2, 18, 2), 4, 512, 7),
    )
}


def _same_region(size: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """Return which pairs of tokens of a window were adjacent before the cyclic shift of a map.

    Args:
      size: rows and columns of the map, multiples of `window`.
      window: w.
      shift: number of tokens by which the map was shifted.

    Returns:
      bool [U, 1, w w, w w].
    """
    rows, columns = (
        (np.arange(n) >= n - window).astype(int) + (np.arange(n) >= n - shift) for n in size
    )
    region = rows[:, None] * 3 + columns[None]
    region = einops.rearrange(region, "(r a) (c b) -> (r c) (a b)", a=window, b=window)
    return region[:, None, :, None] == region[:, None, None, :]


class WindowAttention(nn.Module):
    """Applies self-attention inside the windows of a map (Liu et al. 2021, sec. 3.2).

    It follows the original code: if the map's shorter side is at most the window's, the window
    shrinks to it and is not shifted. A map that the window does not divide is padded with zeros
    below and on the right, before the shift, and the zeros are attended to. (timm pads after the
    shift.)

    Attributes:
      heads: K.
      window_size: w that the table of relative positions covers.
      grid: (R, C) of the map.
      shifted: shift the windows by half their size.
      dtype: of the computation.
    """

    heads: int
    window_size: int
    grid: tuple[int, int]
    shifted: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, hooks: BlockHooks | None = None) -> jax.Array:
        """Map x [M, R C, D] to [M, R C, D], with updates of the weights and shifts by `hooks`."""
        (rows, columns), width = self.grid, x.shape[-1]
        window = min(self.window_size, rows, columns)
        shift = window // 2 if self.shifted and self.window_size < min(rows, columns) else 0
        table = self.param(
            "relative_position_bias",
            nn.initializers.truncated_normal(0.02),
            ((2 * self.window_size - 1) ** 2, self.heads),
        )
        bias = table[layers.relative_index(window, self.window_size)]
        bias = einops.rearrange(bias, "query key k -> 1 k query key").astype(self.dtype)

        x = einops.rearrange(x, "m (r c) d -> m r c d", r=rows)
        x = jnp.pad(x, ((0, 0), (0, -rows % window), (0, -columns % window), (0, 0)))
        padded = x.shape[1:3]
        x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
        x = einops.rearrange(x, "m (r a) (c b) d -> m (r c) (a b) d", a=window, b=window)
        qkv = nn.Dense(3 * width, dtype=self.dtype, name="qkv")(x)
        qkv = layers.add_weight_update(hooks, "qkv", x, qkv)
        q, k, v = einops.rearrange(
            block_loop.checkpoint_activation(qkv, "qkv"),
            "m u n (three k d) -> three m u n k d",
            three=3,
            k=self.heads,
        )
        if hooks is not None:
            k, v = hooks.shift_heads(k), hooks.shift_heads(v)
        mask = jnp.asarray(_same_region(padded, window, shift)) if shift else None
        # All images have the same bias: vmap over them does not repeat it in memory.
        y = jax.vmap(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, bias, mask))(q, k, v)
        x = einops.rearrange(y, "m u n k d -> m u n (k d)")
        y = nn.Dense(width, dtype=self.dtype, name="out")(x)
        y = layers.add_weight_update(hooks, "out", x, y)
        y = einops.rearrange(
            y, "m (r c) (a b) d -> m (r a) (c b) d", r=padded[0] // window, a=window
        )
        y = jnp.roll(y, (shift, shift), axis=(1, 2))[:, :rows, :columns]
        return einops.rearrange(y, "m r c d -> m (r c) d")


class Block(layers.Block):
    """Applies a block of this backbone.

    Attributes:
      config: the backbone's shape.
      stage: index of the stage, from 0.
      grid, shifted: see `WindowAttention`.
      dtype: of the computation.
    """

    config: SwinConfig
    stage: int
    grid: tuple[int, int]
    shifted: bool
    dtype: Any = jnp.float32

    def setup(self):
        config, scale = self.config, 2**self.stage
        self.ln_1 = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)
        self.attention = WindowAttention(
            scale * config.heads, config.window_size, self.grid, self.shifted, dtype=self.dtype
        )
        self.ln_2 = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)
        self.mlp = Mlp(scale * config.mlp_dim, config.activation, dtype=self.dtype)


class PatchMerging(nn.Module):
    """Merges 2 x 2 tokens into one of twice the width, between two stages."""

    eps: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: jax.Array) -> jax.Array:
        """Map h [M, R, C, D] to [M, ceil(R/2), ceil(C/2), 2D]; odd maps are padded with zeros."""
        h = jnp.pad(h, ((0, 0), (0, h.shape[1] % 2), (0, h.shape[2] % 2), (0, 0)))
        h = einops.rearrange(h, "m (r a) (c b) d -> m r c (b a d)", a=2, b=2)  # column by column
        h = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm")(h)
        width = h.shape[-1] // 2
        return nn.Dense(width, use_bias=False, dtype=self.dtype, name="reduction")(h)


def _pair_blocks(tree: Any) -> Any:
    """Reshape leaves [L, ...] to pairs of blocks [L/2, 2, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, 2, *leaf.shape[1:]), tree)


def _index_leaves(tree: Any, index: int) -> Any:
    """Return the tree of leaf[index] of each leaf."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


class Swin(nn.Module):
    """Implements the image tower with the methods of `vit.ViT`; its tokens are a map [M, R, C, D].

    Parameters of the blocks of stage s are `blocks_<s>`, stacked [L, ...]; those of the merging
    after stage s are `merge_<s>`.

    Attributes:
      config: its shape.
      dtype: dtype of the computation; parameters keep the dtype they are given in.
      scan_blocks: scan over the pairs of blocks of a stage; False unrolls them.
      remat: what a pair of blocks saves for the backward pass, a name of `block_loop.REMAT`.
    """

    config: SwinConfig
    dtype: Any = jnp.float32
    scan_blocks: bool = False
    remat: str = "none"

    def setup(self):
        config = self.config
        self.patch_embedding = layers.PatchEmbedding(
            config.width, config.patch_size, dtype=self.dtype
        )
        self.patch_norm = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)
        self.blocks = [
            self.param(f"blocks_{stage}", self._init_blocks, stage)
            for stage in range(len(config.depths))
        ]
        self.merge = [
            PatchMerging(config.eps, dtype=self.dtype) for _ in range(len(config.depths) - 1)
        ]
        self.norm = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)

    def _block(self, stage: int, grid: tuple[int, int], shifted: bool) -> Block:
        return Block(self.config, stage, grid, shifted, dtype=self.dtype, parent=None)

    def _init_blocks(self, rng: jax.Array, stage: int) -> Any:
        def init(rng):
            h = jnp.zeros((1, 1, self.config.width * 2**stage))
            block = self._block(stage, (1, 1), shifted=False)
            return block.init(rng, h, layers.no_hooks())["params"]

        return block_loop.init_stacked(init, rng, self.config.depths[stage])

    def init_hooks(
        self, rng: jax.Array, hooks: BlockHooks, num_images: int, num_tokens: int
    ) -> Any:
        """Initialize the parameters of a method's hooks.

        Args:
          rng: of their initial values.
          hooks: their `shifted_windows` decides if every block has hooks or every other one.
          num_images: M.
          num_tokens: R C of a square map that enters the first stage.

        Returns:
          {"stage_<s>": stacked [L, ...], or [L/2, ...] without the shifted-window blocks}.
        """
        side, params = math.isqrt(num_tokens), {}
        for stage, depth in enumerate(self.config.depths):
            h = jnp.zeros((num_images, side**2, self.config.width * 2**stage), self.dtype)
            block = self._block(stage, (side, side), shifted=False)
            block_params = jax.tree.map(lambda leaf: leaf[0], self.blocks[stage])

            def init(rng, block=block, block_params=block_params, h=h):
                return layers.init_block_hooks(rng, block, block_params, h, hooks)

            length = depth if hooks.shifted_windows else depth // 2
            params[f"stage_{stage}"] = block_loop.init_stacked(
                init, jax.random.fold_in(rng, stage), length
            )
            side = -(-side // 2)
        return params

    def embed(
        self, images: jax.Array, class_token: None = None, position: jax.Array | None = None
    ) -> jax.Array:
        """Embed images as the map that enters the first block.

        Args:
          images: [M, H, W, 3], normalized as the weights expect; H, W multiples of the patch.
          class_token: must be None, because Swin has no class token.
          position: [R C, D] or [M, R C, D], added after the norm of the patch embedding, where the
            original has its optional position table; None adds nothing.

        Returns:
          [M, R, C, D] in the compute dtype.
        """
        if class_token is not None:
            raise ValueError(f"{self.config.name} has no class token: pass None")
        layers.check_image(images, self.config.patch_size)
        h = self.patch_norm(self.patch_embedding(images))
        if position is None:
            return h
        return h + position.reshape(-1, *h.shape[1:]).astype(self.dtype)

    def encode(
        self,
        h: jax.Array,
        hooks: BlockHooks | None = None,
        hook_params: Any = None,
        dropout_rng: jax.Array | None = None,
        cls_token_only: bool = False,
    ) -> jax.Array:
        """Apply all stages to h [M, R, C, D].

        Args:
          h: the map that enters the first block.
          hooks: what a tuning method does inside the blocks; None for the frozen backbone.
          hook_params: its parameters, as `init_hooks` returns them.
          dropout_rng: switches on the method's dropout; None unless in training.
          cls_token_only: has no effect; it is for backbones with a class token.

        Returns:
          [M, R', C', feature_dim], the map of the last stage.
        """
        del cls_token_only
        for stage in range(len(self.config.depths)):
            params = None if hook_params is None else hook_params[f"stage_{stage}"]
            rng = None if dropout_rng is None else jax.random.fold_in(dropout_rng, stage)
            h = self.stage(stage, h, hooks, params, rng)
        return h

    def stage(
        self, stage: int, h: jax.Array, hooks: BlockHooks | None, hook_params: Any, rng: Any
    ) -> jax.Array:
        """Apply one stage and its merging: h [M, R, C, D] -> [M, ceil(R/2), ceil(C/2), 2D].

        The last stage has no merging and returns [M, R, C, D].
        """
        rows, columns = h.shape[1:3]
        hooks_in_every_block = hooks is None or hooks.shifted_windows
        rngs = None if rng is None else jax.random.split(rng, self.config.depths[stage])

        def body(h, pair):
            """Apply a pair of blocks: windows, then shifted windows."""
            blocks, hook_params, rngs = pair
            if hooks_in_every_block:
                params = [_index_leaves(hook_params, i) for i in (0, 1)]
                bound = [
                    layers.bind_hooks(hooks, params[i], _index_leaves(rngs, i)) for i in (0, 1)
                ]
            else:
                bound = [
                    layers.bind_hooks(hooks, hook_params, _index_leaves(rngs, 0)),
                    layers.no_hooks(),
                ]
            for i in (0, 1):
                block = self._block(stage, (rows, columns), shifted=i == 1)
                h = block.apply(
                    {"params": block_loop.gather_fsdp(_index_leaves(blocks, i))}, h, bound[i]
                )
            return h

        pairs = (
            _pair_blocks(self.blocks[stage]),
            _pair_blocks(hook_params) if hooks_in_every_block else hook_params,
            _pair_blocks(rngs),
        )
        h = einops.rearrange(h, "m r c d -> m (r c) d")
        saved = choose_kernels(self.scan_blocks).saved_activations
        h = block_loop.loop_blocks(body, h, pairs, self.scan_blocks, self.remat, saved)
        h = einops.rearrange(h, "m (r c) d -> m r c d", r=rows)
        return self.merge[stage](h) if stage < len(self.merge) else h

    def pool(self, h: jax.Array, project: bool = True) -> jax.Array:
        """Apply the final norm to h [M, R, C, D] and average over the map: [M, D].

        `project` has no effect; it is for backbones with a projection.
        """
        del project
        return self.norm(h).mean(axis=(1, 2))

    def token_features(self, h: jax.Array) -> jax.Array:
        """Apply the final norm to h [M, R, C, D] and return its tokens row by row: [M, R C, D]."""
        return einops.rearrange(self.norm(h), "m r c d -> m (r c) d")

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Run the frozen backbone: images [M, H, W, 3] -> (map [M, R, C, D], features [M, D])."""
        h = self.encode(self.embed(images))
        return h, self.pool(h)
