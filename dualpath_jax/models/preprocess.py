"""What happens to a uint8 batch on the device before the model sees it.

Public: `augment_color`, `normalize`, `model_inputs`.
"""

from typing import Any

import dm_pix as pix
import jax
import jax.numpy as jnp

from dualpath_jax.data.randaugment_ops import OPS

Batch = dict[str, Any]  # see `data.pipeline`; jax or numpy arrays


def _look_up(table: jax.Array, images: jax.Array) -> jax.Array:
    """table [3, 256], images [..., 3], both uint8 -> [..., 3]."""
    return jax.lax.platform_dependent(table, images, cpu=_gather, default=_select)


def _gather(table: jax.Array, images: jax.Array) -> jax.Array:
    return jax.vmap(lambda t, x: t[x], in_axes=(0, -1), out_axes=-1)(table, images)


def _select(table: jax.Array, images: jax.Array) -> jax.Array:
    """Without a gather, which accelerators do one element after the other: 8 times 32 choices."""

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(table, 32 * i, 32, axis=1)
        for j in range(32):
            out = jnp.where(images == 32 * i + j, part[:, j], out)
        return out

    return jax.lax.fori_loop(0, 8, body, jnp.zeros_like(images))


def _apply(images: jax.Array, op: jax.Array, value: jax.Array, grey: jax.Array) -> jax.Array:
    """One operation on one clip.

    Args:
      images: float32 [n, H, W, 3], 0..1.
      op, value: place in `OPS`, and see `randaugment_ops.value_of`.
      grey: the clip's mean, as grey.
    """

    def blend(other: jax.Array | float) -> jax.Array:  # factor `value` away from it, as PIL does
        return jnp.clip(other + value * (images - other), 0, 1)

    results = {
        "solarize": pix.solarize(images, (value - 0.5) / 255),
        "color": blend(pix.rgb_to_grayscale(images)),
        "contrast": blend(grey),
        "brightness": blend(0.0),
    }
    conditions = [op == OPS.index(name) for name in results]
    return jnp.select(conditions, list(results.values()), images)


def augment_color(
    inputs: list[jax.Array], ops: jax.Array, values: jax.Array, tables: jax.Array
) -> list[jax.Array]:
    """RandAugment's colour operations, the same on all images of a clip.

    Args:
      inputs: uint8 [B, n, H, W, 3] each; Contrast goes by the mean of the last.
      ops, values, tables: of the batch, see `data.pipeline`.

    Returns:
      `inputs` as float32, 0..255.
    """
    inputs = [jax.vmap(_look_up)(tables, images).astype(jnp.float32) / 255 for images in inputs]
    for op, value in zip(ops.T, values.T, strict=True):
        grey = pix.rgb_to_grayscale(inputs[-1]).mean(axis=(1, 2, 3, 4))
        inputs = [jax.vmap(_apply)(images, op, value, grey) for images in inputs]
    return [255 * images for images in inputs]


def normalize(images: jax.Array, data: Any, dtype: Any) -> jax.Array:
    """[..., H, W, 3], 0..255 -> [..., H, W, 3] of `dtype`, by `data.mean` and `data.std`."""
    mean = jnp.asarray(data.mean, jnp.float32)
    std = jnp.asarray(data.std, jnp.float32)
    return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def model_inputs(
    batch: dict[str, Any], data: Any, dtype: Any
) -> tuple[jax.Array, jax.Array | None]:
    """(spatial, temporal) of a batch, normalised; temporal is None in a batch without framesets.

    A batch with RandAugment has its colour operations done first.
    """
    inputs = [batch[key] for key in ("spatial", "temporal") if key in batch]
    if "ops" in batch:
        inputs = augment_color(inputs, batch["ops"], batch["op_values"], batch["tables"])
    spatial, *temporal = [normalize(images, data, dtype) for images in inputs]
    return spatial, temporal[0] if temporal else None
