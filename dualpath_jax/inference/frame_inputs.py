"""Makes the model's inputs from decoded frames on the device: samples, crops, scales, tiles.

`clips_from_arrays` does in JAX what `data.clip_assembly` does in TensorFlow with stored JPEG files,
so that an exported program takes frames as they are. Frames of files are stored as JPEG in between
and may be reduced by its decoder; those of arrays are not.
"""

from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.data import augment, frame_sampling
from dualpath_jax.data.clip_spec import ClipFormat
from dualpath_jax.models.forward import view_logits
from dualpath_jax.models.registry import clip_format

# As `data.frame_ops`, which imports TensorFlow: up to this reduction sampling is bilinear.
MAX_BILINEAR_REDUCTION = 1.15


def check_frames(frames: Any) -> np.ndarray:
    """Return the frames of one video as an array, after a check.

    Args:
      frames: uint8 [T, H, W, 3], RGB in 0..255.

    Raises:
      ValueError: dtype or shape are others; the message has the remedy.
    """
    array = np.asarray(frames)
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(
            f"frames of shape {array.shape} are not a video: pass [T, H, W, 3], at least one frame"
        )
    if array.dtype != np.uint8:
        raise ValueError(
            f"frames of dtype {array.dtype} are not uint8: pass RGB values in 0..255, such as "
            "(255 * frames).round().astype(np.uint8) for values in 0..1"
        )
    return array


def view_frames(config: Any, num_frames: int) -> np.ndarray:
    """Return which of a video's frames each clip of evaluation has.

    Args:
      config: of the run.
      num_frames: of the video.

    Returns:
      int64 [clips, T]; one clip if all are the same.
    """
    clip, views = clip_format(config), config.eval.temporal_views
    rows = [
        frame_sampling.sample_frames(
            clip.sampling,
            num_frames,
            clip.num_frames,
            clip.sampling_interval,
            view=view,
            num_views=views,
        )
        for view in range(views)
    ]
    rows = np.stack(rows)
    return rows[:1] if (rows == rows[0]).all() else rows


def clips_from_arrays(config: Any, frames: jax.Array) -> dict[str, jax.Array]:
    """Return the views of videos as `pipeline.eval_batches` makes them.

    Args:
      config: of the run.
      frames: uint8 [B, T, H, W, 3], RGB in 0..255: B videos of T frames.

    Returns:
      "spatial" uint8 [B, V, S, h, h, 3] and "temporal" uint8 [B, V, G, h', w', 3], or the one of
      them that the model takes.
    """
    clip = clip_format(config)
    height, width = frames.shape[2:4]
    views: dict[str, list[jax.Array]] = {}
    for indices in view_frames(config, frames.shape[1]):
        chosen = frames[:, indices]
        for k in range(config.eval.spatial_crops):
            crop = augment.eval_crop(height, width, k, config.eval.spatial_crops)
            rows = slice(crop.top, crop.top + crop.height)
            columns = slice(crop.left, crop.left + crop.width)
            for name, images in _make_inputs(chosen[:, :, rows, columns], clip).items():
                views.setdefault(name, []).append(images)
    return {name: jnp.stack(images, axis=1) for name, images in views.items()}


def _make_inputs(frames: jax.Array, clip: ClipFormat) -> dict[str, jax.Array]:
    """Scale the T cropped frames of clips [B, T, side, side, 3], and tile framesets."""
    inputs = {}
    if clip.num_spatial_frames:
        inputs["spatial"] = resize(frames[:, clip.spatial_frames], clip.image_size)
    if clip.framesets:
        across, down = clip.framesets.grid
        cells = resize(frames, clip.framesets.frame_size)
        form = "b (g y x) h w c -> b g (y h) (x w) c"
        inputs["temporal"] = einops.rearrange(cells, form, y=down, x=across)
    return inputs


def resize(images: jax.Array, size: int) -> jax.Array:
    """Scale uint8 [..., H, W, 3] to uint8 [..., size, size, 3], as `frame_ops.resize` does."""
    height, width = images.shape[-3:-1]
    if height == width == size:
        return images
    is_bilinear = max(height, width) <= int(MAX_BILINEAR_REDUCTION * size)
    matrix = _bilinear_matrix if is_bilinear else _area_matrix
    scaled = jnp.einsum(
        "ih,...hwc,jw->...ijc",
        matrix(height, size),
        images.astype(jnp.float32),
        matrix(width, size),
        precision="highest",
    )
    return jnp.round(scaled).astype(jnp.uint8)


def _bilinear_matrix(side: int, size: int) -> np.ndarray:
    """Return the weights float32 [size, side] of bilinear sampling at the centers of pixels."""
    position = (np.arange(size) + 0.5) * side / size - 0.5
    lower = np.floor(position).astype(int)
    share = position - lower
    matrix = np.zeros((size, side))
    np.add.at(matrix, (np.arange(size), lower.clip(0, side - 1)), 1 - share)
    np.add.at(matrix, (np.arange(size), (lower + 1).clip(0, side - 1)), share)
    return matrix.astype(np.float32)


def _area_matrix(side: int, size: int) -> np.ndarray:
    """Return the weights float32 [size, side] of means over areas."""
    edges = np.arange(size + 1) * side / size
    pixels = np.arange(side)
    start = np.maximum(edges[:-1, None], pixels[None])
    end = np.minimum(edges[1:, None], pixels[None] + 1)
    return ((end - start).clip(0) * size / side).astype(np.float32)


def frame_logits(module: Any, config: Any, params: Any, frames: jax.Array) -> jax.Array:
    """Compute logits [B, V, classes] float32 of all views of videos uint8 [B, T, H, W, 3]."""
    return view_logits(module, config, params, clips_from_arrays(config, frames))


def mean_logits(logits: jax.Array) -> jax.Array:
    """Return [B, classes] whose softmax is the mean of the probabilities of logits [B, V, classes].

    The logits of a single view stay as they are.
    """
    if logits.shape[1] == 1:
        return logits[:, 0]
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=1) - np.log(logits.shape[1])
