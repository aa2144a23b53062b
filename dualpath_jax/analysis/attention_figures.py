"""Draws where a model looks in one clip: both paths, with and without adaptation (Fig. 4, A1)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import einops
import numpy as np
import scipy.ndimage
from PIL import Image

from dualpath_jax.analysis import attention_maps, image_grid
from dualpath_jax.data import frame_sampling

_WIDTH = 1040  # of the picture with all frames, in pixels
_TILE_SIZE = 256  # side of a frame in the animation
_MAX_COLUMNS = 8  # frames in a row
# Kind of map -> does the adapted model produce it?
_ADAPTED = {"without adaptation": False, "with adaptation": True}


@dataclasses.dataclass(frozen=True)
class ClipAttention:
    """Holds a clip, and the class token's attention to it.

    Attributes:
      images: input of each path, uint8 [n, H, W, 3]: n = S frames for "spatial", n = G framesets
        for "temporal".
      maps: kind ("without adaptation" or "with adaptation") -> path -> [n, H, W]; each image's map
        sums to 1.
      grid: number of frames of an image of the temporal path, (across, down).
      num_frames: T, the number of frames of the clip.
      patch_size: side of the backbone's patches in pixels.
    """

    images: dict[str, np.ndarray]
    maps: dict[str, dict[str, np.ndarray]]
    grid: tuple[int, int]
    num_frames: int
    patch_size: int

    def split_framesets(self) -> "ClipAttention":
        """Return a copy whose temporal path has T single frames, in time order, not framesets.

        The copy's temporal maps sum to 1 over the frames of a frameset, not over a frame.
        """

        def split(by_path: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if "temporal" not in by_path:
                return by_path
            framesets = by_path["temporal"][None]
            frames = attention_maps.split_framesets(framesets, self.grid)[0]
            return by_path | {"temporal": frames}

        maps = {kind: split(by_path) for kind, by_path in self.maps.items()}
        return dataclasses.replace(self, images=split(self.images), maps=maps, grid=(1, 1))

    def draw_overlays(self, path: str, kind: str, size: tuple[int, int]) -> list[np.ndarray]:
        """Draw the path's maps over its images, smoothly and on one color scale.

        Args:
          path: "spatial" or "temporal".
          kind: kind of map.
          size: (width, height) of the results in pixels.

        Returns:
          n images, uint8 [height, width, 3].
        """
        maps = self._smooth(path, self.maps[kind][path])
        images = self.resize_images(path, size)
        return [
            image_grid.overlay_heatmap(image, heatmap, maps.max())
            for image, heatmap in zip(images, maps, strict=True)
        ]

    def _smooth(self, path: str, maps: np.ndarray) -> np.ndarray:
        """Blur maps [n, H, W] by half a patch, each frame of a frameset by itself."""
        across, down = self.grid if path == "temporal" else (1, 1)
        frames = einops.rearrange(maps, "n (h r) (w c) -> n h w r c", h=down, w=across)
        sigma = self.patch_size / 2
        smooth = scipy.ndimage.gaussian_filter(frames, sigma, mode="nearest", axes=(-2, -1))
        return einops.rearrange(smooth, "n h w r c -> n (h r) (w c)")

    def resize_images(self, path: str, size: tuple[int, int]) -> list[np.ndarray]:
        """Return the path's images, uint8 [height, width, 3], at `size` (width, height)."""
        return [image_grid.upscale(image, size) for image in self.images[path]]


def middle_view_clips(batch: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """Pick the view in the middle of time and image from clips with all views.

    Args:
      batch: clips, [B, V, ...].
      config: of the model; gives the numbers of temporal views and spatial crops.

    Returns:
      "spatial" and "temporal", as far as the batch has them, [B, ...].
    """
    crops = config.eval.spatial_crops
    view = config.eval.temporal_views // 2 * crops + crops // 2
    return {key: batch[key][:, view] for key in ("spatial", "temporal") if key in batch}


def analyze_clip(
    model: Any,
    clips: dict[str, np.ndarray],
    rollout: bool = False,
    kinds: Sequence[str] = tuple(_ADAPTED),
) -> ClipAttention:
    """Compute the attention maps of one clip.

    Args:
      model: a `TrainedModel`, see `trained_model.load`.
      clips: uint8 "spatial" [1, S, H, W, 3] and "temporal" [1, G, H', W', 3].
      rollout: see `attention_maps.attention_rollout`; if False, the last block's attention is used.
      kinds: kinds of maps to compute, see `ClipAttention`.

    Raises:
      ValueError: the model has another method than dualpath, or no class token.
    """
    patch = model.module.config.patch_size
    maps = {}
    for kind in kinds:
        by_path = attention_maps.class_token_attention(model, clips, _ADAPTED[kind], rollout)
        maps[kind] = {
            path: attention_maps.upsample_to_pixels(m, patch)[0] for path, m in by_path.items()
        }
    return ClipAttention(
        images={path: clips[path][0] for path in model.module.paths},
        maps=maps,
        grid=tuple(model.config.data.grid),
        num_frames=model.config.data.num_frames,
        patch_size=patch,
    )


def draw_grid(view: ClipAttention, title: str) -> Image.Image:
    """Draw frames, framesets and the framesets' frames: plain, without and with adaptation."""
    rows = []
    for path in view.images:
        name = {"spatial": "spatial path", "temporal": "temporal path, frameset"}[path]
        rows += _build_rows(view, path, name)
    if "temporal" in view.images:
        rows += _build_rows(view.split_framesets(), "temporal", "temporal path, frames")
    heading = image_grid.Row(title, [np.full((1, _WIDTH, 3), 255, np.uint8)])
    return image_grid.draw_grid([heading, *rows])


def _build_rows(view: ClipAttention, path: str, name: str) -> list[image_grid.Row]:
    """Arrange a path's images: plain, without and with adaptation.

    The three are next to each other if they fit in one row; otherwise each has rows of its own.
    """
    count = len(view.images[path])
    in_one_row = count * (1 + len(_ADAPTED)) <= _MAX_COLUMNS
    columns = count * (1 + len(_ADAPTED)) if in_one_row else min(count, _MAX_COLUMNS)
    height, width = view.images[path].shape[1:3]
    tile = _WIDTH // columns - image_grid.GAP
    size = (tile, tile * height // width)
    series = {"as sampled": view.resize_images(path, size)}
    series |= {kind: view.draw_overlays(path, kind, size) for kind in _ADAPTED}
    if in_one_row:
        pictures = [picture for group in series.values() for picture in group]
        return [image_grid.Row([f"{name}, {kind}" for kind in series], pictures)]
    return [
        image_grid.Row(f"{name} {start + 1}-{min(start + _MAX_COLUMNS, count)}, {kind}", group)
        for kind, pictures in series.items()
        for start in range(0, count, _MAX_COLUMNS)
        for group in [pictures[start : start + _MAX_COLUMNS]]
    ]


def draw_animation(view: ClipAttention) -> list[Image.Image]:
    """Draw one picture for each of the T frames: both paths, without and with adaptation.

    The spatial path shows the sampled frame that is nearest in time.
    """
    view = view.split_framesets()
    size = (_TILE_SIZE, _TILE_SIZE)
    overlays = {
        (path, kind): view.draw_overlays(path, kind, size)
        for path in view.images
        for kind in _ADAPTED
    }
    sampled = np.arange(view.num_frames)
    if "spatial" in view.images:
        sampled = frame_sampling.spatial_subset(view.num_frames, len(view.images["spatial"]))
    pictures = []
    for t in range(view.num_frames):
        index = {"spatial": int(np.abs(sampled - t).argmin()), "temporal": t}
        rows = [
            image_grid.Row(
                [f"{path} path, {kind}" for path in view.images],
                [overlays[path, kind][index[path]] for path in view.images],
            )
            for kind in _ADAPTED
        ]
        pictures.append(image_grid.draw_grid(rows))
    return pictures
