"""Draws where a model looks in one clip: both paths, with and without adaptation (Fig. 4, A1)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dualpath_jax.analysis import attention_maps, image_grid
from dualpath_jax.data import frame_sampling

_TILE_SIZE = 96  # shortest side of a drawn frame, in pixels
_MAX_COLUMNS = 16  # frames in a row of the grid
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
      grid: number of frames of a frameset, (across, down).
      num_frames: T, the number of frames of the clip.
    """

    images: dict[str, np.ndarray]
    maps: dict[str, dict[str, np.ndarray]]
    grid: tuple[int, int]
    num_frames: int

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
        return dataclasses.replace(self, images=split(self.images), maps=maps)

    def draw_overlays(self, path: str, kind: str, size: tuple[int, int]) -> list[np.ndarray]:
        """Draw the path's maps over its images, on one color scale.

        Args:
          path: "spatial" or "temporal".
          kind: kind of map.
          size: (width, height) of the results in pixels.

        Returns:
          n images, uint8 [height, width, 3].
        """
        maps = self.maps[kind][path]
        images = self.resize_images(path, size)
        return [
            image_grid.overlay_heatmap(image, heatmap, maps.max())
            for image, heatmap in zip(images, maps, strict=True)
        ]

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
    )


def _scale_size(image: np.ndarray, side: int) -> tuple[int, int]:
    """Scale (width, height) by the least integer that makes both at least `side` pixels."""
    height, width = image.shape[:2]
    factor = max(1, -(-side // min(height, width)))
    return width * factor, height * factor


def draw_grid(view: ClipAttention, title: str) -> Image.Image:
    """Draw frames, framesets and the framesets' frames: plain, without and with adaptation."""
    rows = []
    names = {"spatial": "spatial path, sampled frames", "temporal": "temporal path, framesets"}
    for path, images in view.images.items():
        size = _scale_size(images[0], _TILE_SIZE if path == "spatial" else 2 * _TILE_SIZE)
        rows += _build_rows(view, path, names[path], size)
    if "temporal" in view.images:
        frames = view.split_framesets()
        size = _scale_size(frames.images["temporal"][0], _TILE_SIZE)
        rows += _build_rows(frames, "temporal", "temporal path, frames of the framesets", size)
    first = dataclasses.replace(rows[0], title=f"{title}    {rows[0].title}")
    return image_grid.draw_grid([first, *rows[1:]])


def _build_rows(
    view: ClipAttention, path: str, name: str, size: tuple[int, int]
) -> list[image_grid.Row]:
    """Arrange a path's images: plain, without and with adaptation.

    The three are next to each other if they fit in one row; otherwise each has rows of its own.
    """
    series = {"as sampled": view.resize_images(path, size)}
    series |= {kind: view.draw_overlays(path, kind, size) for kind in _ADAPTED}
    count = len(view.images[path])
    if count * len(series) <= 6:
        pictures = [picture for group in series.values() for picture in group]
        return [image_grid.Row(f"{name}: {' | '.join(series)}", pictures)]
    return [
        image_grid.Row(f"{name} {start + 1}-{min(start + _MAX_COLUMNS, count)}: {kind}", group)
        for start in range(0, count, _MAX_COLUMNS)
        for kind, pictures in series.items()
        for group in [pictures[start : start + _MAX_COLUMNS]]
    ]


def draw_animation(view: ClipAttention) -> list[Image.Image]:
    """Draw one picture for each of the T frames: both paths, without and with adaptation.

    The spatial path shows the sampled frame that is nearest in time.
    """
    view = view.split_framesets()
    size = (2 * _TILE_SIZE, 2 * _TILE_SIZE)
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
                f"{' | '.join(view.images)} path, {kind}",
                [overlays[path, kind][index[path]] for path in view.images],
            )
            for kind in _ADAPTED
        ]
        pictures.append(image_grid.draw_grid(rows))
    return pictures
