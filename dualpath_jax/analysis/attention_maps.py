"""Computes where the class token looks: maps of the last block, or rolled out over all blocks.

Axes: B clips, n images of a clip (S frames or G framesets), h, w patches down and across an image,
H, W its pixels. A map is the class token's attention to the patches, divided by their sum. Its
attention to itself and to registers is left out; therefore uniform attention gives every pixel the
same value.
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
    """Compute the maps of both paths (Fig. 4, A1), averaged over the heads.

    Args:
      model: a `TrainedModel`, see `trained_model.load`; its method is dualpath on a ViT.
      clips: uint8 "spatial" [B, S, H, W, 3] and "temporal" [B, G, H', W', 3].
      adapted: use the tuned model; if False, use the frozen backbone with the same position
        embeddings (eq. 2).
      rollout: see `attention_rollout`; if False, use only the last block's attention.

    Returns:
      "spatial" [B, S, h, w] and "temporal" [B, G, h, w], as far as the model has these paths, in
      float32. The map of each image sums to 1.

    Raises:
      ValueError: the model has another method, or its backbone has no class token.
    """
    if not isinstance(model.module, DualPath):
        raise ValueError(
            "attention maps need model.method=dualpath, but this model was tuned with "
            f"{model.config.model.method!r}"
        )
    dtype = method_registry.compute_dtype(model.config)
    inputs = preprocess.model_inputs(clips, model.config.data, dtype)
    maps = _build_map_fn(model.module, adapted, rollout)(model.params, *inputs)
    patch = model.module.config.patch_size
    return {
        name: np.asarray(rows).reshape(*rows.shape[:2], clips[name].shape[2] // patch, -1)
        for name, rows in maps.items()
    }


@functools.lru_cache(maxsize=8)
def _build_map_fn(module: DualPath, adapted: bool, rollout: bool) -> Any:
    """Build the compiled function (params, spatial, temporal) -> path -> [B, n, patches]."""
    # Where the classifier reads all patch tokens, their mean takes the place of the class token.
    # The same holds for backbones that do not read out the class token.
    no_class = module.config.readout != "class"
    reads_patches = {"spatial": no_class, "temporal": no_class or module.readout_width > 0}
    first = module.config.num_leading_tokens

    def maps(params, spatial, temporal):
        weights = module.apply(
            {"params": params}, spatial, temporal, adapted, rollout, method=DualPath.attention
        )
        rows = {name: attention_rollout(w) if rollout else w[-1] for name, w in weights.items()}
        patches = {
            name: w[..., first:, first:].mean(axis=-2) if reads_patches[name] else w[..., 0, first:]
            for name, w in rows.items()
        }
        return {name: row / row.sum(axis=-1, keepdims=True) for name, row in patches.items()}

    return jax.jit(maps)


def attention_rollout(weights: jax.Array) -> jax.Array:
    """Compute attention rollout (Abnar and Zuidema 2020): attention through all blocks.

    It is the product of (attention + identity) / 2 over the blocks: the residual connection counts
    as half of a block.

    Args:
      weights: attention of each block, [L, ..., N, N], block 0 first; rows sum to 1.

    Returns:
      [..., N, N], rows sum to 1.
    """
    identity = jnp.eye(weights.shape[-1])
    return functools.reduce(lambda below, block: (block + identity) / 2 @ below, weights, identity)


def upsample_to_pixels(maps: np.ndarray, patch_size: int) -> np.ndarray:
    """Spread each patch's share evenly over its pixels: [..., h, w] -> [..., H, W]."""
    pixels = maps.repeat(patch_size, axis=-2).repeat(patch_size, axis=-1)
    return pixels / patch_size**2


def split_framesets(framesets: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Split framesets into their frames: the inverse of `framesets.tile_framesets`.

    Args:
      framesets: [B, G, down * fh, across * fw, ...]; a frame has fh x fw pixels.
      grid: number of frames of a frameset, (across, down).

    Returns:
      The frames in time order, [B, T, fh, fw, ...].
    """
    across, down = grid
    pattern = "b g (down h) (across w) ... -> b (g down across) h w ..."
    return einops.rearrange(framesets, pattern, across=across, down=down)


def patch_coverage(masks: np.ndarray, patch_size: int) -> np.ndarray:
    """Compute the share of each patch that an object covers.

    Args:
      masks: the object's share of each pixel, 0..1, [B, n, H, W].
      patch_size: side of a patch in pixels.

    Returns:
      [B, n, h, w], 0..1.
    """
    pattern = "b n (h p) (w q) -> b n h w"
    return einops.reduce(masks, pattern, "mean", p=patch_size, q=patch_size)


def mean_attention_share(maps: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Compute the share of attention that falls on an object, averaged over a clip's images.

    A patch's attention is assumed to be spread evenly over its pixels.

    Args:
      maps: [B, n, h, w]; the map of each image sums to 1.
      coverage: result of `patch_coverage`, [B, n, h, w].

    Returns:
      [B], 0..1. For uniform maps it is the object's share of the area.
    """
    return (maps * coverage).sum(axis=(-2, -1)).mean(axis=-1)
