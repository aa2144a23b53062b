"""Turns a uint8 batch into the model's inputs on the device: color augmentation, normalization."""

from typing import Any

import dm_pix as pix
import einops
import jax
import jax.numpy as jnp

from dualpath_jax.data.clip_spec import normalization
from dualpath_jax.data.randaugment_ops import OPS

Batch = dict[str, Any]  # see `data.pipeline`; jax or numpy arrays


def _apply_tables(table: jax.Array, images: jax.Array) -> jax.Array:
    """Look up images [..., 3] in one table per channel [3, 256], both uint8 -> uint8 [..., 3]."""
    return jax.lax.platform_dependent(
        table, images, cpu=_apply_tables_by_gather, default=_apply_tables_by_select
    )


def _apply_tables_by_gather(table: jax.Array, images: jax.Array) -> jax.Array:
    """Implement `_apply_tables` for CPUs."""
    return jax.vmap(lambda t, x: t[x], in_axes=(0, -1), out_axes=-1)(table, images)


def _apply_tables_by_select(table: jax.Array, images: jax.Array) -> jax.Array:
    """Implement `_apply_tables` for accelerators by 256 selections, in 8 iterations of 32.

    Accelerators process a gather one element after the other.
    """

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        table_slice = jax.lax.dynamic_slice_in_dim(table, 32 * i, 32, axis=1)
        for j in range(32):
            out = jnp.where(images == 32 * i + j, table_slice[:, j], out)
        return out

    return jax.lax.fori_loop(0, 8, body, jnp.zeros_like(images))


def _apply_op(images: jax.Array, op: jax.Array, value: jax.Array, gray: jax.Array) -> jax.Array:
    """Apply one operation to one clip and return images like `images`.

    Args:
      images: float32 [n, H, W, 3], 0..1.
      op: index into `OPS`; all operations but the color operations leave the images unchanged.
      value: strength of the operation, see `randaugment_ops.compute_op_value`.
      gray: the clip's mean gray value, 0..1.
    """

    def blend(other: jax.Array | float) -> jax.Array:
        """Scale the distance of the images from `other` by `value`, as PIL does."""
        return jnp.clip(other + value * (images - other), 0, 1)

    results = {
        "solarize": pix.solarize(images, (value - 0.5) / 255),
        "color": blend(pix.rgb_to_grayscale(images)),
        "contrast": blend(gray),
        "brightness": blend(0.0),
    }
    conditions = [op == OPS.index(name) for name in results]
    return jnp.select(conditions, list(results.values()), images)


def augment_color(
    inputs: list[jax.Array], ops: jax.Array, values: jax.Array, tables: jax.Array
) -> list[jax.Array]:
    """Apply RandAugment's color operations, the same ones to all images of a clip.

    Args:
      inputs: arrays uint8 [B, n, H, W, 3]; "contrast" uses the mean of the last array.
      ops: int32 [B, layers], indices into `OPS`.
      values: float32 [B, layers], strengths of the operations.
      tables: uint8 [B, 3, 256], lookup tables that are applied first; see `data.pipeline`.

    Returns:
      `inputs` as float32, 0..255.
    """
    inputs = [
        jax.vmap(_apply_tables)(tables, images).astype(jnp.float32) / 255 for images in inputs
    ]
    for op, value in zip(ops.T, values.T, strict=True):
        gray = pix.rgb_to_grayscale(inputs[-1]).mean(axis=(1, 2, 3, 4))
        inputs = [jax.vmap(_apply_op)(images, op, value, gray) for images in inputs]
    return [255 * images for images in inputs]


def normalize(images: jax.Array, data_config: Any, dtype: Any) -> jax.Array:
    """Normalize images [..., H, W, 3], 0..255, with the config's mean and std (of 0..1).

    Returns:
      [..., H, W, 3] of `dtype`.
    """
    mean, std = (jnp.asarray(x, jnp.float32) for x in normalization(data_config))
    return ((images.astype(jnp.float32) / 255 - mean) / std).astype(dtype)


def model_inputs(
    batch: Batch, data_config: Any, dtype: Any
) -> tuple[jax.Array | None, jax.Array | None]:
    """Return the normalized inputs (spatial, temporal) of a batch from `data.pipeline`.

    If the batch holds RandAugment operations, their color part is applied first.

    Args:
      batch: "spatial" uint8 [B, S, H, W, 3] and "temporal" uint8 [B, G, H', W', 3], or the one of
        them that the model takes.
      data_config: `config.data`.
      dtype: of the result.

    Returns:
      Arrays of the same shapes; None for one that the batch does not have.
    """
    keys = [key for key in ("spatial", "temporal") if key in batch]
    images = [batch[key] for key in keys]
    if "ops" in batch:
        images = augment_color(images, batch["ops"], batch["op_values"], batch["tables"])
    inputs = dict(zip(keys, images, strict=True))
    spatial, temporal = inputs.get("spatial"), inputs.get("temporal")
    if spatial is not None:
        spatial = normalize(spatial, data_config, dtype)
    if temporal is not None:
        temporal = normalize(temporal, data_config, jnp.float32)
        temporal = subtract_static(temporal, data_config).astype(dtype)
    return spatial, temporal


def subtract_static(framesets: jax.Array, data_config: Any) -> jax.Array:
    """Subtract from each frame of framesets what `data_config.frameset_input` says.

    Args:
      framesets: float32 [B, G, H', W', 3], normalized.
      data_config: `config.data`.

    Returns:
      The same shape. "rgb": `framesets`; "minus_mean": each frame minus the mean of the clip's
      frames; "abs_minus_mean": its absolute value; "minus_previous": each frame minus the one
      before it, the first one 0. As the mean of the colors cancels out, differences are in units of
      `data.std`. "motion": see `_stack_motion`.
    """
    kind = data_config.frameset_input
    if kind == "rgb":
        return framesets
    across, down = data_config.grid
    sizes = {"h": down, "w": across, "g": framesets.shape[1]}
    frames = einops.rearrange(framesets, "b g (h r) (w c) k -> b (g h w) r c k", **sizes)
    if kind == "motion":
        frames = _stack_motion(frames)
    elif kind == "minus_previous":
        frames = jnp.diff(frames, axis=1, prepend=frames[:, :1])
    else:
        frames = frames - frames.mean(axis=1, keepdims=True)
        frames = jnp.abs(frames) if kind == "abs_minus_mean" else frames
    return einops.rearrange(frames, "b (g h w) r c k -> b g (h r) (w c) k", **sizes)


def _stack_motion(frames: jax.Array) -> jax.Array:
    """Turn the frames of a clip [B, T, h, w, 3] into pictures of motion.

    What a frame differs from the clip's background, averaged over colors, is red in the next frame,
    green in the frame itself and blue in the frame before; the first and last frame have themselves
    as neighbors. So whatever moves has fringes of color that show its direction. The background is
    each pixel's median over time. From each frame's differences their median is subtracted, which
    is a change of exposure. Each clip is divided by its root mean square, so that faint motion
    looks like strong motion.
    """
    differences = frames - jnp.median(frames, axis=1, keepdims=True)
    differences = differences - jnp.median(differences, axis=(2, 3), keepdims=True)
    gray = jnp.abs(differences).mean(axis=-1, keepdims=True)
    gray = gray / (jnp.sqrt(jnp.square(gray).mean(axis=(1, 2, 3, 4), keepdims=True)) + 1e-3)
    before = jnp.concatenate([gray[:, :1], gray[:, :-1]], axis=1)
    after = jnp.concatenate([gray[:, 1:], gray[:, -1:]], axis=1)
    return jnp.concatenate([before, gray, after], axis=-1)
