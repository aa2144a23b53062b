"""AdaptFormer (ref. 11): an adapter at the MLP of each block.

Public: `AdaptFormerHooks`.
"""

from typing import ClassVar

import jax

from dualpath_jax.models.backbones.layers import BlockHooks
from dualpath_jax.models.methods.adapters import Adapter


class AdaptFormerHooks(BlockHooks):
    """Parallel: MLP(LN(z)) + s Adapter(LN(z)) (eq. 4). Serial: y + s Adapter(y), y = MLP(LN(z)).

    Attributes:
      adapter: its form, without skip.
      parallel: beside the MLP (Fig. 2b), or after it (Fig. 2c), with a skip of its own.
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
