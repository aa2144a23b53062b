"""What a model looks at in one clip, drawn: both paths, with and without adaptation (Fig. 4, A1).

Public: `ClipAttention`, `middle_view_clips`, `analyze_clip`, `draw_grid`, `draw_animation`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from dualpath_jax.analysis import attention_maps, image_grid
from dualpath_jax.data import frame_sampling

TILE = 96  # pixels along a frame, at least
COLUMNS = 16  # frames in a row of the grid
_KINDS = {"without adaptation": False, "with adaptation": True}


@dataclasses.dataclass(frozen=True)
class ClipAttention:
    """A clip and where the class token looks in it.

    Attributes:
      images: path -> uint8 [n, H, W, 3] that it sees, "spatial" S frames, "temporal" G framesets.
      maps: kind ("without adaptation", "with adaptation") -> path -> [n, H, W], sum 1 per image.
      grid: (across, down) frames of a frameset.
      num_frames: T.
    """

    images: dict[str, np.ndarray]
    maps: dict[str, dict[str, np.ndarray]]
    grid: tuple[int, int]
    num_frames: int

    def taken_apart(self) -> "ClipAttention":
        """With the T frames of the framesets, in time order, in their place."""

        def apart(path: str, images: np.ndarray) -> np.ndarray:
            return (
                attention_maps.split_framesets(images[None], self.grid)[0]
                if path == "temporal"
                else images
            )

        def all_apart(by_path: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {path: apart(path, images) for path, images in by_path.items()}

        maps = {kind: all_apart(by_path) for kind, by_path in self.maps.items()}
        return dataclasses.replace(self, images=all_apart(self.images), maps=maps)

    def overlays(self, path: str, kind: str, size: tuple[int, int]) -> list[np.ndarray]:
        """The path's images under its maps, at `size` (width, height); the hottest is of them."""
        maps = self.maps[kind][path]
        plain = self.plain(path, size)
        return [
            image_grid.overlay_heatmap(x, m, maps.max()) for x, m in zip(plain, maps, strict=True)
        ]

    def plain(self, path: str, size: tuple[int, int]) -> list[np.ndarray]:
        """The path's images at `size` (width, height)."""
        return [image_grid.upscale(image, size) for image in self.images[path]]


def middle_view_clips(batch: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """Of clips with all views [B, V, ...], the one in the middle of time and picture [B, ...]."""
    crops = config.eval.spatial_crops
    view = config.eval.temporal_views // 2 * crops + crops // 2
    return {key: batch[key][:, view] for key in ("spatial", "temporal") if key in batch}


def analyze_clip(
    model: Any,
    clips: dict[str, np.ndarray],
    rollout: bool = False,
    kinds: Sequence[str] = tuple(_KINDS),
) -> ClipAttention:
    """The maps of one clip.

    Args:
      model: of `trained.load`.
      clips: uint8 "spatial" [1, S, H, W, 3] and "temporal" [1, G, H', W', 3].
      rollout: see `attention.roll_out`.
      kinds: of the maps, see `ClipAttention`.
    """
    patch = model.module.config.patch_size
    maps = {}
    for kind in kinds:
        by_path = attention_maps.class_token_attention(model, clips, _KINDS[kind], rollout)
        maps[kind] = {
            path: attention_maps.upsample_to_pixels(m, patch)[0] for path, m in by_path.items()
        }
    return ClipAttention(
        images={path: clips[path][0] for path in model.module.paths},
        maps=maps,
        grid=tuple(model.config.data.grid),
        num_frames=model.config.data.num_frames,
    )


def _scaled(image: np.ndarray, side: int) -> tuple[int, int]:
    """(width, height) of the image, a whole number of times larger until `side` is reached."""
    height, width = image.shape[:2]
    factor = max(1, -(-side // min(height, width)))
    return width * factor, height * factor


def draw_grid(view: ClipAttention, title: str) -> Image.Image:
    """Frames, framesets, and these taken apart: plain, without and with adaptation."""
    rows = []
    names = {"spatial": "spatial path, sampled frames", "temporal": "temporal path, framesets"}
    for path, images in view.images.items():
        size = _scaled(images[0], TILE if path == "spatial" else 2 * TILE)
        rows += _rows(view, path, names[path], size)
    if "temporal" in view.images:
        apart = view.taken_apart()
        size = _scaled(apart.images["temporal"][0], TILE)
        rows += _rows(apart, "temporal", "temporal path, framesets taken apart, frames", size)
    first = dataclasses.replace(rows[0], title=f"{title}    {rows[0].title}")
    return image_grid.draw_grid([first, *rows[1:]])


def _rows(view: ClipAttention, path: str, name: str, size: tuple[int, int]) -> list[image_grid.Row]:
    """Plain, without, with: side by side where there is room for it, else under one another."""
    series = {"as sampled": view.plain(path, size)}
    series |= {kind: view.overlays(path, kind, size) for kind in _KINDS}
    count = len(view.images[path])
    if count * len(series) <= 6:
        beside = [picture for group in series.values() for picture in group]
        return [image_grid.Row(f"{name}: {' | '.join(series)}", beside)]
    return [
        image_grid.Row(f"{name} {start + 1}-{min(start + COLUMNS, count)}: {kind}", group)
        for start in range(0, count, COLUMNS)
        for kind, whole in series.items()
        for group in [whole[start : start + COLUMNS]]
    ]


def draw_animation(view: ClipAttention) -> list[Image.Image]:
    """The clip, a picture for each of T frames: without and with adaptation, both paths.

    The spatial path shows the sampled frame that is nearest in time.
    """
    apart = view.taken_apart()
    size = (2 * TILE, 2 * TILE)
    shown = {}
    for path in apart.images:
        for kind in _KINDS:
            shown[path, kind] = apart.overlays(path, kind, size)
    chosen = np.arange(view.num_frames)
    if "spatial" in view.images:
        chosen = frame_sampling.spatial_subset(view.num_frames, len(view.images["spatial"]))
    frames = []
    for t in range(view.num_frames):
        place = {"spatial": int(np.abs(chosen - t).argmin()), "temporal": t}
        rows = [
            image_grid.Row(
                f"{' | '.join(apart.images)} path, {kind}",
                [shown[path, kind][place[path]] for path in apart.images],
            )
            for kind in _KINDS
        ]
        frames.append(image_grid.draw_grid(rows))
    return frames
