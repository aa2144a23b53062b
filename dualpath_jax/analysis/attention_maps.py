"""Where the class token looks: heat maps of the last block, or rolled out over all blocks.

Public: `class_token_attention`, `attention_rollout`, `upsample_to_pixels`, `split_framesets`, `patch_coverage`,
`mean_attention_share`.

Axes: B clips, n images of a clip (S frames or G framesets), h, w patches down and across an image,
H, W its pixels. A map is the class token's attention to the patches, divided by their sum: its
attention to itself is left out, so that uniform attention gives every pixel the same.
"""

import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.models import preprocess
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.methods.dualpath import DualPath


def class_token_attention(
    model: Any, clips: dict[str, np.ndarray], adapted: bool = True, rollout: bool = False
) -> dict[str, np.ndarray]:
    """Maps of both paths (Fig. 4, A1), heads averaged.

    Args:
      model: of `trained.load`, tuned by dualpath on a ViT.
      clips: uint8 "spatial" [B, S, H, W, 3] and "temporal" [B, G, H', W', 3].
      adapted: the tuned model; otherwise the frozen backbone at the same positions (eq. 2).
      rollout: see `attention_rollout`; otherwise the attention of the last block alone.

    Returns:
      "spatial" [B, S, h, w] and "temporal" [B, G, h, w], of the paths that the model has: float32,
      the sum over each image is 1.

    Raises:
      ValueError: another method, or a backbone without a class token.
    """
    if not isinstance(model.module, DualPath):
        raise ValueError(
            f"attention is shown of model.method=dualpath, and this model is of "
            f"{model.config.model.method!r}"
        )
    dtype = method_registry.compute_dtype(model.config)
    inputs = preprocess.model_inputs(clips, model.config.data, dtype)
    maps = _maps(model.module, adapted, rollout)(model.params, *inputs)
    patch = model.module.config.patch_size
    return {
        name: np.asarray(rows).reshape(*rows.shape[:2], clips[name].shape[2] // patch, -1)
        for name, rows in maps.items()
    }


@functools.lru_cache(maxsize=8)
def _maps(module: DualPath, adapted: bool, rollout: bool) -> Any:
    """The compiled function (params, spatial, temporal) -> path -> [B, n, patches]."""

    def maps(params, spatial, temporal):
        weights = module.apply(
            {"params": params}, spatial, temporal, adapted, rollout, method=DualPath.attention
        )
        rows = {name: attention_rollout(w) if rollout else w[-1] for name, w in weights.items()}
        patches = {name: w[..., 0, 1:] for name, w in rows.items()}
        return {name: row / row.sum(axis=-1, keepdims=True) for name, row in patches.items()}

    return jax.jit(maps)


def attention_rollout(weights: jax.Array) -> jax.Array:
    """Attention rollout (Abnar and Zuidema 2020): what reaches the tokens through all blocks.

    The residual connection counts as half of a block: the product of (attention + identity) / 2.

    Args:
      weights: [L, ..., N, N], rows sum to 1; block 0 first.

    Returns:
      [..., N, N], rows sum to 1.
    """
    identity = jnp.eye(weights.shape[-1])
    return functools.reduce(lambda below, block: (block + identity) / 2 @ below, weights, identity)


def upsample_to_pixels(maps: np.ndarray, patch_size: int) -> np.ndarray:
    """Maps [..., h, w] -> [..., H, W]: each patch's share, spread evenly over its pixels."""
    pixels = maps.repeat(patch_size, axis=-2).repeat(patch_size, axis=-1)
    return pixels / patch_size**2


def split_framesets(framesets: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Framesets taken apart, undoing `tile_framesets`.

    Args:
      framesets: [B, G, down fh, across fw, ...].
      grid: (across, down).

    Returns:
      [B, T, fh, fw, ...], in time order.
    """
    across, down = grid
    pattern = "b g (down h) (across w) ... -> b (g down across) h w ..."
    return einops.rearrange(framesets, pattern, across=across, down=down)


def patch_coverage(masks: np.ndarray, patch_size: int) -> np.ndarray:
    """How much of each patch is object: masks [B, n, H, W], 0..1, of its pixels -> [B, n, h, w]."""
    pattern = "b n (h p) (w q) -> b n h w"
    return einops.reduce(masks, pattern, "mean", p=patch_size, q=patch_size)


def mean_attention_share(maps: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """The share of each map that falls on an object, averaged over the images of a clip.

    A patch's attention counts as spread evenly over its pixels.

    Args:
      maps: [B, n, h, w], the sum over each image is 1.
      covered: [B, n, h, w], of `patch_coverage`.

    Returns:
      [B] in 0..1; of uniform maps, the object's share of the area.
    """
    return (maps * covered).sum(axis=(-2, -1)).mean(axis=-1)
