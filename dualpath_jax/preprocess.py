"""What happens to a uint8 batch on the device before the model sees it.

Public: `normalise`, `model_inputs`.
"""

from typing import Any

import jax
import jax.numpy as jnp


def normalise(images: jax.Array, data: Any, dtype: Any) -> jax.Array:
    """uint8 [..., H, W, 3], 0..255 -> [..., H, W, 3] of `dtype`, by `data.mean` and `data.std`."""
    mean = jnp.asarray(data.mean, jnp.float32)
    std = jnp.asarray(data.std, jnp.float32)
    return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def model_inputs(
    batch: dict[str, Any], data: Any, dtype: Any
) -> tuple[jax.Array, jax.Array | None]:
    """(spatial, temporal) of a batch, normalised; temporal is None in a batch without framesets."""
    spatial = normalise(batch["spatial"], data, dtype)
    return spatial, normalise(batch["temporal"], data, dtype) if "temporal" in batch else None
