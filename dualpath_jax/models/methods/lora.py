"""Defines LoRA (Hu et al. 2021): low-rank updates of the linear layers of each block."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.frame_model import FrameModel

# The matrices in the columns of each linear layer, see `layers.LINEAR_LAYERS`.
_MATRICES = {
    "qkv": ("query", "key", "value"),
    "out": ("output",),
    "mlp_hidden": ("mlp_hidden",),
    "mlp_output": ("mlp_output",),
}
# The matrices that a name in `model.lora.targets` stands for.
_TARGETS = {
    "query": ("query",),
    "key": ("key",),
    "value": ("value",),
    "output": ("output",),
    "mlp": ("mlp_hidden", "mlp_output"),
}


class LowRank(nn.Module):
    """Holds the factors A and B of an update; B starts at zero.

    Attributes:
      rank: r.
    """

    rank: int

    @nn.compact
    def __call__(self, in_features: int, out_features: int) -> tuple[jax.Array, jax.Array]:
        """Return A [I, r] and B [r, O], float32."""
        normal = nn.initializers.normal(in_features**-0.5)
        down = self.param("down_kernel", normal, (in_features, self.rank))
        up = self.param("up_kernel", nn.initializers.zeros, (self.rank, out_features))
        return down, up


class LoRAHooks(BlockHooks):
    """Updates matrices of each block: x W becomes x W + s (x A) B.

    Attributes:
      targets: names of `_TARGETS`.
      rank: r, columns of A and rows of B.
      scale: s.
      dtype: compute dtype.
    """

    pointwise: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    targets: tuple[str, ...]
    rank: int = 8
    scale: float = 1.0
    dtype: Any = jnp.float32

    def setup(self):
        for target in self.targets:
            for name in _TARGETS[target]:
                setattr(self, name, LowRank(self.rank))

    def weight_update(
        self, layer: str, in_features: int, out_features: int
    ) -> tuple[jax.Array, jax.Array] | None:
        matrices = _MATRICES[layer]
        chosen = [name for target in self.targets for name in _TARGETS[target]]
        width, downs, ups = out_features // len(matrices), [], []
        for i, name in enumerate(matrices):
            if name in chosen:
                down, up = getattr(self, name)(in_features, width)
                columns = (i * width, out_features - (i + 1) * width)
                downs.append(down)
                ups.append(jnp.pad(up, ((0, 0), columns)))
        if not downs:
            return None
        down, up = jnp.concatenate(downs, axis=1), self.scale * jnp.concatenate(ups)
        return down.astype(self.dtype), up.astype(self.dtype)


class LoRAModel(FrameModel):
    """Checks that the backbone has the matrices that are to be updated."""

    def _init_adapters(self, rng: jax.Array) -> Any:
        params = super()._init_adapters(rng)
        names = {key.key for path, _ in jax.tree.leaves_with_path(params) for key in path}
        missing = [name for name in self.hooks.targets if not names.issuperset(_TARGETS[name])]
        if missing:
            raise ValueError(
                f"model.lora.targets has {', '.join(missing)}, but the blocks of "
                f"{self.config.name} have no such matrices: leave them out"
            )
        return params
