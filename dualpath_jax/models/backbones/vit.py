"""Defines the plain vision transformers: CLIP, SigLIP, DINOv2 and those of ImageNet-21K.

The hooks of tuning methods are in `layers.py`, attention's products in `attention.py`.

Axes: M images (frames or framesets, batch included), N tokens (class token first, then R registers,
then patches), D width, K heads, L blocks, e projected width.
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

READOUTS = ("class", "mean", "attention")


# Fields of a `ViTConfig` in which CLIP's towers do not differ.
RARE_FIELDS = ("class_token", "num_register_tokens", "readout", "layer_scale", "gated_mlp")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Describes the shape of a vision transformer; the defaults are CLIP's.

    Attributes:
      name: for messages and checkpoints.
      image_size: side of the square image that the position table covers, pixels.
      patch_size: side of a patch, pixels.
      width, depth, heads, mlp_dim: D, L, K and the width of the MLP's hidden layer.
      projection_dim: e, the width of CLIP's joint space; None: no projection, features of width D.
      activation: a name of `layers.ACTIVATIONS`: "quick_gelu" (OpenAI's weights), "gelu" (exact;
        LAION's, ImageNet's and others), "gelu_tanh" (SigLIP), "silu" (DINOv2-g, with `gated_mlp`).
      eps: LayerNorm's epsilon (CLIP: 1e-5; most others and Flax's own default: 1e-6).
      pre_norm: a LayerNorm between the embeddings and the first block (CLIP).
      patch_bias: a bias in the patch embedding (all but CLIP).
      class_token: a class token before the patches (all but SigLIP).
      num_register_tokens: R, tokens without a position after the class token (DINOv2).
      readout: a name of `READOUTS`, what `ViT.pool` reads: "class" token, "mean" of the patches, or
        "attention" pooling of all tokens (SigLIP).
      layer_scale: a factor for each channel of a branch before it is added (DINOv2).
      gated_mlp: the MLP multiplies activation(x W_1) by x W_2; with "silu", SwiGLU (DINOv2-g).
      position_resize: a name of `layers.RESIZE_METHODS`, by which the weights' publisher resizes
        the position table.
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
    class_token: bool = True
    num_register_tokens: int = 0
    readout: str = "class"
    layer_scale: bool = False
    gated_mlp: bool = False
    position_resize: str = "antialias"

    def __post_init__(self):
        layers.check_patches(self)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        layers.check_activation(self.activation)
        layers.check_resize_method(self.position_resize)
        if self.readout not in READOUTS:
            raise ValueError(f"unknown readout {self.readout!r}: known are {', '.join(READOUTS)}")
        if self.readout == "class" and not self.class_token:
            raise ValueError(
                f"readout 'class' of {self.name} needs class_token=True: choose readout 'mean' or "
                "'attention'"
            )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], stated: Mapping[str, Any]) -> Any:
        """Return the config of converted weights.

        Args:
          arrays: by flat name of the parameter tree.
          stated: "activation"; "heads" (default: one per 64 of width, Radford et al. 2021, table
            19), "eps" and "position_resize" if known.
        """
        depth, width, hidden = arrays["blocks/mlp/hidden/kernel"].shape
        output = arrays.get("blocks/mlp/output/kernel")
        gated = output is not None and hidden == 2 * output.shape[1]
        patch = arrays["patch_embedding/kernel"].shape[0]
        heads = int(stated.get("heads", max(1, width // 64)))
        if heads < 1:
            raise ValueError(f"heads is {heads}: pass --heads with the number of attention heads")
        rows = arrays["position_embedding"].shape[0]
        class_token = math.isqrt(rows) ** 2 != rows  # one row more than a square of patches
        without_class_token = "attention" if "attention_pool/probe" in arrays else "mean"
        return cls(
            name="custom",
            image_size=math.isqrt(rows - int(class_token)) * patch,
            patch_size=patch,
            width=width,
            depth=depth,
            heads=heads,
            mlp_dim=hidden // 2 if gated else hidden,
            projection_dim=arrays["projection"].shape[-1] if "projection" in arrays else None,
            activation="silu" if gated else stated["activation"],
            eps=float(stated.get("eps", 1e-5)),
            pre_norm="ln_pre/scale" in arrays,
            patch_bias="patch_embedding/bias" in arrays,
            class_token=class_token,
            num_register_tokens=len(arrays.get("register_tokens", ())),
            readout="class" if class_token else without_class_token,
            layer_scale="blocks/mlp/layer_scale" in arrays,
            gated_mlp=gated,
            position_resize=stated.get("position_resize", "antialias"),
        )

    @property
    def grid(self) -> int:
        """Return the number of patches along a side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Return N, including class token and registers."""
        return self.grid**2 + self.num_leading_tokens

    @property
    def num_leading_tokens(self) -> int:
        """Return the number of tokens before the patches: class token and registers."""
        return int(self.class_token) + self.num_register_tokens

    @property
    def feature_dim(self) -> int:
        """Return the width of the features of `ViT.pool`: e, or D without a projection."""
        return self.projection_dim or self.width

    @property
    def has_class_token(self) -> bool:
        """Return whether token 0 is a class token."""
        return self.class_token

    @property
    def has_position_table(self) -> bool:
        """Return True: the table has a row for the class token, if any, and for each patch."""
        return True

    @property
    def has_global_attention(self) -> bool:
        """Return True: in all blocks, all tokens attend to all."""
        return True

    @property
    def architecture(self) -> dict[str, Any]:
        """Return the fields in which weights must agree with this config.

        Of the fields that CLIP does not have, only those that differ from CLIP's are listed.
        """
        fields = ("width", "depth", "patch_size", "mlp_dim", "projection_dim")
        always = {field: getattr(self, field) for field in (*fields, "pre_norm", "patch_bias")}
        return always | {
            f: getattr(self, f) for f in RARE_FIELDS if getattr(self, f) != getattr(ViTConfig, f)
        }

    @property
    def position_size(self) -> str:
        """Return the size of the position table, for messages."""
        return f"{self.grid}x{self.grid} patches ({self.image_size} pixels)"

    def resize_position_tables(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return `arrays`, by flat name, with the position table resized to this config's size."""
        table = arrays["position_embedding"]
        resized = self.resize_positions(table.astype(np.float32), (self.grid, self.grid))
        return {**arrays, "position_embedding": np.asarray(resized).astype(table.dtype)}

    def resize_positions(self, table: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Resize a position table to a grid (rows, columns) of patches, as `position_resize` says.

        A class token's row, the first, is unchanged.
        """
        first = int(self.class_token)
        side = _square_side(table, first)
        if (side, side) == tuple(grid):
            return table
        patches = table[first:].reshape(side, side, -1)
        patches = layers.resize_grid(patches, grid, self.position_resize)
        return jnp.concatenate([table[:first], patches.reshape(grid[0] * grid[1], -1)])


def _square_side(table: Any, first: int) -> int:
    """Return the side of the square grid of a position table [N, D] with `first` other rows."""
    patches = table.shape[0] - first
    side = math.isqrt(max(patches, 0))
    if side < 1 or side * side != patches:
        rest = " plus one for the class token" if first else ""
        raise ValueError(f"position table of {table.shape[0]} rows is not a square{rest}")
    return side


# Radford et al. 2021, table 19; open_clip's model configs. Dosovitskiy et al. 2021, table 1. Oquab
# et al. 2024, table 17, at the image size of the published tables. Zhai et al. 2023 (B, L, So400m)
# and Tschannen et al. 2025 (g), at the smallest image size of a release. SigLIP 2 has the shapes of
# SigLIP.
_GELU = {"activation": "gelu"}
_IN21K = {**_GELU, "eps": 1e-6, "pre_norm": False, "patch_bias": True}
_DINOV2 = {**_IN21K, "layer_scale": True}
_SWIGLU = {**_DINOV2, "gated_mlp": True, "activation": "silu"}
_REGISTERS = {"num_register_tokens": 4}
_SIGLIP = {**_IN21K, "activation": "gelu_tanh", "class_token": False, "readout": "attention"}
MODELS = {
    config.name: config
    for config in (
        ViTConfig("ViT-B/32", 224, 32, 768, 12, 12, 3072, 512),
        ViTConfig("ViT-B/16", 224, 16, 768, 12, 12, 3072, 512),
        ViTConfig("ViT-L/14", 224, 14, 1024, 24, 16, 4096, 768),
        ViTConfig("ViT-L/14@336", 336, 14, 1024, 24, 16, 4096, 768),
        ViTConfig("ViT-H/14", 224, 14, 1280, 32, 16, 5120, 1024, **_GELU),
        ViTConfig("ViT-g/14", 224, 14, 1408, 40, 16, 6144, 1024, **_GELU),
        ViTConfig("ViT-bigG/14", 224, 14, 1664, 48, 16, 8192, 1280, **_GELU),
        ViTConfig("ViT-B/16-IN21K", 224, 16, 768, 12, 12, 3072, **_IN21K),
        ViTConfig("ViT-L/16-IN21K", 224, 16, 1024, 24, 16, 4096, **_IN21K),
        ViTConfig("DINOv2-S/14", 518, 14, 384, 12, 6, 1536, **_DINOV2),
        ViTConfig("DINOv2-B/14", 518, 14, 768, 12, 12, 3072, **_DINOV2),
        ViTConfig("DINOv2-L/14", 518, 14, 1024, 24, 16, 4096, **_DINOV2),
        ViTConfig("DINOv2-g/14", 518, 14, 1536, 40, 24, 4096, **_SWIGLU),
        ViTConfig("DINOv2-S/14-reg", 518, 14, 384, 12, 6, 1536, **_DINOV2, **_REGISTERS),
        ViTConfig("DINOv2-B/14-reg", 518, 14, 768, 12, 12, 3072, **_DINOV2, **_REGISTERS),
        ViTConfig("DINOv2-L/14-reg", 518, 14, 1024, 24, 16, 4096, **_DINOV2, **_REGISTERS),
        ViTConfig("DINOv2-g/14-reg", 518, 14, 1536, 40, 24, 4096, **_SWIGLU, **_REGISTERS),
        ViTConfig("SigLIP-B/32", 256, 32, 768, 12, 12, 3072, **_SIGLIP),
        ViTConfig("SigLIP-B/16", 224, 16, 768, 12, 12, 3072, **_SIGLIP),
        ViTConfig("SigLIP-L/16", 256, 16, 1024, 24, 16, 4096, **_SIGLIP),
        ViTConfig("SigLIP-So400m/14", 224, 14, 1152, 27, 16, 4304, **_SIGLIP),
        ViTConfig("SigLIP-So400m/16", 256, 16, 1152, 27, 16, 4304, **_SIGLIP),
        ViTConfig("SigLIP-g/16", 256, 16, 1536, 40, 16, 6144, **_SIGLIP),
    )
}


class Attention(nn.Module):
    """Applies multi-head self-attention with one fused projection for queries, keys and values.

    Attributes:
      width: D.
      heads: K.
      layer_scale: multiply the output by a parameter, see `ViTConfig.layer_scale`.
      kernels: how it is computed.
      dtype: of the computation.
    """

    width: int
    heads: int
    layer_scale: bool = False
    kernels: Kernels = kernels_lib.DEFAULT
    dtype: Any = jnp.float32

    def setup(self):
        self.qkv = self.kernels.dense(3 * self.width, dtype=self.dtype)
        self.out = self.kernels.dense(self.width, dtype=self.dtype)
        if self.layer_scale:
            self.scale = self.param("layer_scale", nn.initializers.ones, (self.width,))

    def project(self, x: jax.Array, hooks: BlockHooks | None = None) -> list[jax.Array]:
        """Project x [M, N, D] to queries, keys and values, each [M, N, K, D/K]."""
        rows = x.reshape(-1, x.shape[-1])
        if self.kernels.separate_qkv and not self.is_initializing():
            parts = self._project_separately(rows, hooks)
        else:
            x_or_rows = rows if self.kernels.as_matrix else x
            qkv = layers.add_weight_update(hooks, "qkv", x_or_rows, self.qkv(x_or_rows))
            if self.kernels.saves_qkv:
                qkv = checkpoint_activation(qkv, "qkv")
            # The gradient of a split is one concatenation, which that of slices is not.
            parts = jnp.split(qkv, 3, axis=-1)
        q, k, v = (y.reshape(*x.shape[:2], self.heads, -1) for y in parts)
        return [q, k, v] if hooks is None else [q, hooks.shift_heads(k), hooks.shift_heads(v)]

    def _project_separately(self, rows: jax.Array, hooks: BlockHooks | None) -> list[jax.Array]:
        """Project rows [M N, D] by three products; cuDNN reads each from an array of its own."""
        parts = [rows @ kernel + bias for kernel, bias in self._qkv_weights()]
        update = None if hooks is None else hooks.weight_update("qkv", self.width, 3 * self.width)
        if update is not None:
            low_rank = checkpoint_activation(rows @ update[0], "down")
            factors = jnp.split(update[1], 3, axis=-1)
            parts = [y + low_rank @ up for y, up in zip(parts, factors, strict=True)]
        return [checkpoint_activation(y, "qkv") for y in parts]

    def _qkv_weights(self, hooks: BlockHooks | None = None) -> list[tuple[jax.Array, jax.Array]]:
        """Return kernel [D, D] and bias [D] of queries, keys and values, in the compute dtype.

        The kernels include the update of `hooks`.
        """
        qkv = self.qkv.variables["params"]
        kernel, bias = (qkv[name].astype(self.dtype) for name in ("kernel", "bias"))
        update = None if hooks is None else hooks.weight_update("qkv", *kernel.shape)
        if update is not None:
            kernel = kernel + update[0] @ update[1]
        return list(zip(jnp.split(kernel, 3, axis=-1), jnp.split(bias, 3), strict=True))

    def __call__(
        self,
        x: jax.Array,
        hooks: BlockHooks | None = None,
        cls_token_only: bool = False,
        num_padding: int = 0,
    ) -> jax.Array:
        """Map x [M, N, D] to [M, N, D], or to the class token's row [M, 1, D].

        Args:
          x: tokens; in a hook they may also be frames.
          hooks: their `weight_update` and `shift_heads` are applied; None: the frozen layer.
          cls_token_only: compute only the class token's row.
          num_padding: no token attends to the last `num_padding` ones.
        """
        if cls_token_only:
            return self.attend_query(x[:, 0], x, hooks)
        y = self.kernels.attention(*self.project(x, hooks), num_padding)
        return self._project_out(y, hooks)

    def attend_query(
        self, query: jax.Array, x: jax.Array, hooks: BlockHooks | None = None
    ) -> jax.Array:
        """Return attention's output [M, 1, D] for one query [M, D] over the keys of x [M, N, D].

        With `hooks` that shift heads, the query must be that of token 0 of x.
        """
        if self.is_initializing():
            self.qkv(x)  # creates the weights
        if hooks is not None and hooks.shifts_heads:
            q, k, v = self.project(x, hooks)  # keys of other images need a product of their own
            return self._project_out(attention.dot_product_attention(q[:, :1], k, v), hooks)
        (q_kernel, q_bias), (k_kernel, _), (v_kernel, v_bias) = self._qkv_weights(hooks)

        def split_heads(y):
            return y.reshape(*y.shape[:-1], self.heads, -1)

        q = split_heads(query @ q_kernel + q_bias)
        weights = map(split_heads, (k_kernel, v_kernel, v_bias))
        y = attention.single_query_attention(q, x, *weights)[:, None]
        return self._project_out(y, hooks)

    def _project_out(self, y: jax.Array, hooks: BlockHooks | None) -> jax.Array:
        """Map the heads' results y [M, N, K, D/K] to [M, N, D]."""
        x = einops.rearrange(y, "m n k d -> m n (k d)")
        y = layers.add_weight_update(hooks, "out", x, self.out(x))
        return y * self.scale.astype(y.dtype) if self.layer_scale else y


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
        self.attention = Attention(
            config.width, config.heads, config.layer_scale, kernels, dtype=self.dtype
        )
        self.ln_2 = kernels.norm(config.eps, dtype=self.dtype)
        self.mlp = Mlp(
            config.mlp_dim,
            config.activation,
            config.gated_mlp,
            config.layer_scale,
            kernels,
            dtype=self.dtype,
        )

    def attend(self, x: jax.Array, hooks: BlockHooks | None = None) -> jax.Array:
        """Compute attention over the block's tokens, of which the last may be padding."""
        return self.attention(x, hooks, num_padding=self.kernels.num_padding)

    def queries_and_keys(self, h: jax.Array, hooks: BlockHooks) -> tuple[jax.Array, jax.Array]:
        """Return the queries and keys, each [M, N, K, D/K], of a block that h [M, N, D] enters."""
        _, _, x = self.attention_input(h, hooks)
        q, k, _ = self.attention.project(x, hooks)
        return q, k


class AttentionPool(nn.Module):
    """Pools tokens by attention of one learned query, then an MLP (Zhai et al. 2022, "MAP").

    Attributes:
      config: the backbone's shape.
      dtype: of the computation.
    """

    config: ViTConfig
    dtype: Any = jnp.float32

    def setup(self):
        config, dtype = self.config, self.dtype
        init = nn.initializers.normal(config.width**-0.5)
        self.probe = self.param("probe", init, (config.width,))
        self.attention = Attention(config.width, config.heads, dtype=dtype)
        self.ln = nn.LayerNorm(epsilon=config.eps, dtype=dtype)
        self.mlp = Mlp(config.mlp_dim, config.activation, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens x [M, N, D] to [M, D]."""
        query = jnp.broadcast_to(self.probe.astype(self.dtype), (x.shape[0], x.shape[-1]))
        y = self.attention.attend_query(query, x)[:, 0]
        return y + self.mlp(self.ln(y))


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
        if config.class_token:
            self.class_embedding = self.param("class_embedding", embedding, (config.width,))
        positions = (config.num_tokens - config.num_register_tokens, config.width)
        self.position_embedding = self.param("position_embedding", embedding, positions)
        if config.num_register_tokens:
            registers = (config.num_register_tokens, config.width)
            self.register_tokens = self.param("register_tokens", embedding, registers)
        if config.pre_norm:
            self.ln_pre = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)
        self.blocks = self.param("blocks", self._init_blocks)
        self.ln_post = nn.LayerNorm(epsilon=config.eps, dtype=self.dtype)
        if config.readout == "attention":
            self.attention_pool = AttentionPool(config, dtype=self.dtype)
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
          class_token: [D]; None: the backbone's own, if it has one.
          position: [N - R, D], or [M, N - R, D] if images differ in position; registers have none.
            None: the backbone's own.

        Returns:
          [M, N, D] in the compute dtype.
        """
        config = self.config
        if class_token is not None and not config.class_token:
            raise ValueError(f"{config.name} has no class token: pass None")
        layers.check_image(images, config.patch_size)
        position = self.position_embedding if position is None else position

        def repeat(tokens):
            return jnp.broadcast_to(tokens.astype(self.dtype), (images.shape[0], *tokens.shape))

        h = einops.rearrange(self.patch_embedding(images), "m h w d -> m (h w) d")
        if config.class_token:
            class_token = self.class_embedding if class_token is None else class_token
            h = jnp.concatenate([repeat(class_token[None]), h], axis=1)
        h = h + position.astype(self.dtype)
        if config.num_register_tokens:
            first = int(config.class_token)
            h = jnp.concatenate([h[:, :first], repeat(self.register_tokens), h[:, first:]], axis=1)
        return self.ln_pre(h) if config.pre_norm else h

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
          cls_token_only: return only the class token, [M, 1, D], if the hooks allow it and `pool`
            reads nothing else; the last block then does not compute the others.
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
        if not (cls_token_only and pointwise and self.config.readout == "class"):
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
        """Apply `ln_post` to tokens h [M, N, D], read them out, then apply CLIP's projection.

        Returns:
          [M, e]; [M, D] if `project` is False or the backbone has no projection.
        """
        if self.config.readout == "class":
            y = self.ln_post(h[:, 0])
        elif self.config.readout == "mean":
            y = self.patch_features(h).mean(axis=1)
        else:
            y = self.attention_pool(self.ln_post(h))
        if project and self.config.projection_dim is not None:
            y = y @ self.projection.astype(self.dtype)
        return y

    def token_features(self, h: jax.Array) -> jax.Array:
        """Apply `ln_post` to all tokens of h [M, N, D]."""
        return self.ln_post(h)

    def patch_features(self, h: jax.Array) -> jax.Array:
        """Apply `ln_post` to the patch tokens of h [M, N, D]: [M, patches, D]."""
        return self.ln_post(h[:, self.config.num_leading_tokens :])

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Run the frozen backbone: images [M, H, W, 3] -> (tokens [M, N, D], features [M, e])."""
        h = self.encode(self.embed(images))
        return h, self.pool(h)
