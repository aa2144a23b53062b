"""Defines AdaptFormer (ref. 11): an adapter parallel to or after the MLP of each block."""

from typing import ClassVar

import jax

from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.methods.adapters import Adapter


class AdaptFormerHooks(BlockHooks):
    """Adds an adapter to the MLP of each block.

    Parallel: MLP(LN(z)) + s Adapter(LN(z)) (eq. 4). Serial: y + s Adapter(y) with y = MLP(LN(z)).

    Attributes:
      adapter: template of the adapter, without skip; its scale is s.
      parallel: place the adapter parallel to the MLP (Fig. 2b); otherwise after the MLP, with a
        skip connection around the adapter (Fig. 2c).
    """

    pointwise: ClassVar[bool] = True
    adapter: Adapter
    parallel: bool = True

    def setup(self):
        self.mlp = self.adapter.clone(skip=not self.parallel)

    def parallel_to_mlp(self, x: jax.Array) -> jax.Array | float:
        return self.mlp(x) if self.parallel else 0.0

    def after_mlp(self, y: jax.Array) -> jax.Array:
        return y if self.parallel else self.mlp(y)
