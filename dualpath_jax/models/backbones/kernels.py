"""Chooses how the heavy operations of a backbone are computed on the hardware at hand.

Other modules do not ask for the kind of device. The choice changes no parameter and, except for
rounding, no result.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from dualpath_jax.models.backbones import attention, cpu_kernels
from dualpath_jax.models.backbones.block_loop import SAVED_ACTIVATIONS


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Holds the implementations that the blocks of a backbone use.

    Attributes:
      dense: class of the large linear layers, called as `nn.Dense`.
      norm: class of the LayerNorms, called as `nn.LayerNorm`.
      attention: (q, k, v, num_padding) -> y, see `attention.dot_product_attention`; no query
        attends to the last `num_padding` keys.
      separate_qkv: compute queries, keys and values by three products of the fused weights.
      saves_qkv: activation checkpointing saves the projection's output; False if `attention` saves
        its inputs in its own layout.
      as_matrix: split queries, keys and values of all images as one matrix.
      dense_offsets: sum relative positions as a product with a mostly zero matrix, instead of
        gathering a table of all pairs.
      saved_activations: names that `remat="save_matmuls"` saves, see `checkpoint_activation`.
      num_padding: padding tokens after those of an image.
      pads_odd: add a padding token to odd numbers of tokens in training, where the fused attention
        fits; it takes only even numbers with a backward pass.
    """

    dense: Callable[..., nn.Module] = nn.Dense
    norm: Callable[..., nn.Module] = nn.LayerNorm
    attention: Callable[..., jax.Array] = attention.plain_attention
    separate_qkv: bool = False
    saves_qkv: bool = True
    as_matrix: bool = False
    dense_offsets: bool = False
    saved_activations: tuple[str, ...] = SAVED_ACTIVATIONS
    num_padding: int = 0
    pads_odd: bool = False

    def for_training(self, num_tokens: int, dtype: Any, pointwise: bool) -> "Kernels":
        """Return these kernels for a training step on images of `num_tokens` tokens.

        Args:
          num_tokens: N, of an image.
          dtype: of the computation.
          pointwise: True if the hooks allow padding tokens, see `BlockHooks.pointwise`.
        """
        fits = self.pads_odd and attention.can_use_flash_attention(num_tokens, dtype)
        padding = num_tokens % 2 if fits and pointwise else 0
        return dataclasses.replace(self, num_padding=padding, as_matrix=True)


DEFAULT = Kernels()
CPU = Kernels(
    dense=cpu_kernels.Dense,
    norm=cpu_kernels.LayerNorm,
    attention=attention.cpu_attention,
    saves_qkv=False,
    dense_offsets=True,
    # The residual stream after attention, the adapters' first products, and what the backward pass
    # of attention reads.
    saved_activations=(*SAVED_ACTIVATIONS, "middle", "down", "heads", "weights"),
)
GPU_SCANNED = Kernels(attention=attention.gpu_attention, separate_qkv=True, pads_odd=True)
GPU = dataclasses.replace(
    GPU_SCANNED, saved_activations=(*SAVED_ACTIVATIONS, "middle", "down", "attended")
)


def prefers_scan() -> bool:
    """Return False on GPUs, where a scan over blocks copies the saved activations."""
    return jax.default_backend() != "gpu"


def choose_kernels(scan_blocks: bool) -> Kernels:
    """Return the kernels for JAX's default backend.

    Args:
      scan_blocks: True if the compiled program scans over the blocks. The CPU kernels are for
        unrolled programs, where XLA fuses across blocks.
    """
    backend = jax.default_backend()
    if backend == "gpu":
        return GPU_SCANNED if scan_blocks else GPU
    if backend == "cpu" and not scan_blocks:
        return CPU
    return DEFAULT
