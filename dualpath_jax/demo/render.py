"""Renders the embedded data set: an object moves over a photograph.

The eight classes are four pairs of opposite actions. A clip of one class of a pair, reversed, is a
clip of the other. Therefore a model that ignores the order of frames cannot distinguish the two,
and its accuracy is at most 0.5 (chance is 0.125). The photographs come with scikit-image and are in
the public domain or CC0.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

from dualpath_jax.demo.video_files import write_videos
from dualpath_jax.runtime import files

# Templates as in Something-Something-v2; classes 2 i and 2 i + 1 are opposite actions.
CLASSES = (
    "Moving [something] to the left",
    "Moving [something] to the right",
    "Moving [something] up",
    "Moving [something] down",
    "Moving [something] closer to the camera",
    "Moving [something] away from the camera",
    "[Something] appears",
    "[Something] disappears",
)

# Backgrounds by split. Those of the test videos occur neither in training and validation nor in the
# pretraining of the backbone.
TRAIN_PHOTOS = (
    "astronaut",
    "chelsea",
    "camera",
    "clock",
    "coins",
    "hubble_deep_field",
    "retina",
    "grass",
    "gravel",
    "brick",
)
PHOTOS = {"train": TRAIN_PHOTOS, "validation": TRAIN_PHOTOS, "test": ("coffee", "rocket")}
# CLIP's normalization of RGB in 0..1, as for any CLIP backbone (PAPER: Recipe).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Number of clips by split; each has NUM_FRAMES frames of FRAME_SIZE x FRAME_SIZE pixels.
SIZES = {"train": 8000, "validation": 160, "test": 400}
NUM_FRAMES = 16
FRAME_SIZE = 72
SHAPES = ("disc", "square", "diamond", "cross")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "magenta": (220, 60, 210),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}


@functools.cache
def load_photo(name: str) -> Image.Image:
    """Load a scikit-image photograph as RGB, short side at most 192 pixels."""
    import skimage.data

    photo = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    scale = min(1.0, 192 / min(photo.size))
    return photo.resize([round(side * scale) for side in photo.size], Image.Resampling.LANCZOS)


def crop_photo(photo: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """Crop a random square, then rotate, mirror and grade it: uint8 [size, size, 3].

    The color grade (a permutation of the channels, and a gain and a gamma for each) makes many
    backgrounds out of few photographs.
    """
    side = np.exp(rng.uniform(np.log(0.2), 0)) * min(photo.size)
    left, top = (rng.uniform(0, extent - side) for extent in photo.size)
    box = (left, top, left + side, top + side)
    crop = np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, box=box))
    crop = np.rot90(crop, rng.integers(4))
    crop = crop[:, ::-1] if rng.random() < 0.5 else crop
    gain, gamma = np.exp(rng.uniform(-0.4, 0.4, (2, 3)))
    graded = 255 * gain * (np.arange(256)[:, None] / 255) ** gamma
    table = np.minimum(graded, 255).astype(np.uint8)
    return table[crop[..., rng.permutation(3)], np.arange(3)]


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return a distance-like function of a shape of radius 1 at the origin: below 1 inside.

    Args:
      shape: one of `SHAPES`.
      x, y: coordinates of any shapes that broadcast.
    """
    x, y = np.abs(x), np.abs(y)
    if shape == "disc":
        return np.sqrt(x * x + y * y)
    if shape == "square":
        return np.maximum(x, y) * 1.15
    if shape == "diamond":
        return (x + y) * 0.85
    return np.minimum(np.maximum(x, 2.6 * y), np.maximum(2.6 * x, y))  # cross


@dataclasses.dataclass(frozen=True)
class Track:
    """Describes the motion of the object over the frames.

    Attributes:
      x, y: center of the object, [frames], in 0..1 of the frame's side.
      radius: [frames], in 0..1 of the frame's side.
      opacity: [frames], in 0..1.
    """

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    opacity: np.ndarray

    def states(self) -> Iterator[tuple[float, float, float, float]]:
        """Return an iterator over (x, y, radius, opacity) of each frame."""
        return zip(self.x, self.y, self.radius, self.opacity, strict=True)


def draw_track(label: int, num_frames: int, rng: np.random.Generator) -> Track:
    """Draw a random track of class `label`; an odd class is the even one reversed in time."""
    time = np.linspace(0, 1, num_frames)
    constant = np.ones(num_frames)
    radius, opacity = rng.uniform(0.16, 0.26) * constant, constant
    pair, backwards = divmod(label, 2)
    if pair in (0, 1):  # a straight line, right to left or bottom to top, with a slight drift
        length = rng.uniform(0.48, 0.66)
        start = rng.uniform(0.17 + length, 0.83)
        along = start - length * time
        across = rng.uniform(0.25, 0.75) + rng.uniform(-0.08, 0.08) * (time - 0.5)
        x, y = (along, across) if pair == 0 else (across, along)
    else:
        x, y = rng.uniform(0.3, 0.7) * constant, rng.uniform(0.3, 0.7) * constant
    if pair == 2:
        small = rng.uniform(0.07, 0.11)
        radius = small * rng.uniform(2.4, 3.5) ** time
    if pair == 3:
        opacity = np.clip((time - rng.uniform(0.3, 0.7)) * num_frames / 2 + 0.5, 0, 1)
    track = Track(x, y, radius, opacity)
    if backwards:
        track = Track(*(getattr(track, f.name)[::-1] for f in dataclasses.fields(track)))
    return track


def _rasterize_object(
    shape: str, x: float, y: float, radius: float, opacity: float, size: int
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Rasterize the object in a frame of `size` x `size` pixels.

    Returns:
      (window, distance, alpha). The window is the pair of slices (rows, columns) that covers the
      object; a diamond's tips are the farthest. In the window, distance [h, w] is
      `shape_distance`, and alpha [h, w] in 0..1 is the object's share of each pixel.
    """
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    reach = 1.3 * radius + 1 / size
    rows, columns = (
        slice(max(int((c - reach) * size), 0), int((c + reach) * size) + 1) for c in (y, x)
    )
    across = (pixels[columns] - np.float32(x)) / np.float32(radius)
    down = (pixels[rows] - np.float32(y)) / np.float32(radius)
    distance = shape_distance(shape, across[None, :], down[:, None])
    alpha = np.clip((1 - distance) * np.float32(radius * size) + 0.5, 0, 1)
    alpha *= np.float32(opacity)  # the edge is antialiased over one pixel
    return (rows, columns), distance, alpha


def paint_object(
    background: np.ndarray, track: Track, shape: str, color: tuple[int, int, int]
) -> np.ndarray:
    """Paint the object over a photograph.

    Args:
      background: uint8 [size, size, 3].
      track: motion of the object.
      shape: one of `SHAPES`.
      color: RGB, 0..255.

    Returns:
      uint8 [frames, size, size, 3].
    """
    frames = np.repeat(background[None], len(track.x), axis=0)
    for frame, state in zip(frames, track.states(), strict=True):
        window, distance, alpha = _rasterize_object(shape, *state, background.shape[0])
        shade = np.clip(1.15 - 0.45 * distance, 0.6, 1.1)[..., None]
        painted = np.minimum(np.asarray(color, np.float32) * shade, 255)
        behind = frame[window]
        frame[window] = (behind + (painted - behind) * alpha[..., None] + 0.5).astype(np.uint8)
    return frames


@dataclasses.dataclass(frozen=True)
class Scene:
    """Describes the content of a clip.

    Attributes:
      background: photograph, uint8 [size, size, 3].
      track: motion of the object in front of it.
      shape: one of `SHAPES`.
      color: of the object, RGB, 0..255.
    """

    background: np.ndarray
    track: Track
    shape: str
    color: tuple[int, int, int]

    def frames(self) -> np.ndarray:
        """Render the clip: uint8 [frames, size, size, 3]."""
        return paint_object(self.background, self.track, self.shape, self.color)

    def masks(self) -> np.ndarray:
        """Return the object's share of each pixel: float32 [frames, size, size] in 0..1."""
        size = self.background.shape[0]
        masks = np.zeros((len(self.track.x), size, size), np.float32)
        for mask, state in zip(masks, self.track.states(), strict=True):
            window, _, alpha = _rasterize_object(self.shape, *state, size)
            mask[window] = alpha
        return masks


def draw_scene(
    photo: Image.Image, label: int, num_frames: int, size: int, rng: np.random.Generator
) -> Scene:
    """Draw a random scene of class `label` over `photo`.

    Args:
      photo: background, see `load_photo`.
      label: class, an index into `CLASSES`.
      num_frames: length of the clip.
      size: side of a frame, pixels.
      rng: source of all random choices.
    """
    background = crop_photo(photo, size, rng)
    track = draw_track(label, num_frames, rng)
    shape = SHAPES[rng.integers(len(SHAPES))]
    mean = background.mean(axis=(0, 1))
    # Choose among the half of the colors that differ most from the background's mean.
    by_contrast = sorted(COLORS.values(), key=lambda color: -np.abs(color - mean).sum())
    color = by_contrast[rng.integers(len(by_contrast) // 2)]
    return Scene(background, track, shape, color)


def render_clip(
    photo: Image.Image, label: int, num_frames: int, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Render a random clip, uint8 [num_frames, size, size, 3]; see `draw_scene`."""
    return draw_scene(photo, label, num_frames, size, rng).frames()


def find_scene(split: str, number: int) -> Scene:
    """Return the scene of video `number` of a split of the demo; its class is `number` % 8."""
    rng = np.random.default_rng([list(SIZES).index(split), number])
    photo = load_photo(PHOTOS[split][rng.integers(len(PHOTOS[split]))])
    return draw_scene(photo, number % len(CLASSES), NUM_FRAMES, FRAME_SIZE, rng)


def class_names() -> list[str]:
    """Return the classes as the annotations name them, without brackets."""
    return [_template_key(template) for template in CLASSES]


def render_frames(split: str, number: int) -> np.ndarray:
    """Render video `number` of a split: uint8 [NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 3]."""
    return find_scene(split, number).frames()


def render_demo(out: str, sizes: dict[str, int] | None = None, progress: bool = True) -> None:
    """Write the demo in the layout of Something-Something-v2: `videos/{id}.mp4`, JSON `labels/`.

    The same version of the encoder writes the same bytes every time.

    Args:
      out: folder to write. It is complete once it has `labels/labels.json`, which is written last;
        a complete folder is left as it is.
      sizes: number of clips by split; None for `SIZES`.
      progress: True shows a progress bar, see `ProgressBar`.
    """
    out = pathlib.Path(out)
    if (out / "labels" / "labels.json").exists():
        return
    sizes = SIZES if sizes is None else sizes
    labels = out / "labels"
    labels.mkdir(parents=True, exist_ok=True)
    clips = [(split, number) for split, size in sizes.items() for number in range(size)]
    paths = [out / "videos" / f"{id_}.mp4" for id_ in range(len(clips))]
    write_videos(render_frames, clips, paths, progress)
    first = 0
    for split, size in sizes.items():
        entries = [
            _make_annotation(first + number, number % len(CLASSES)) for number in range(size)
        ]
        files.write_text(labels / f"{split}.json", json.dumps(entries, indent=0))
        first += size
    names = {name: str(i) for i, name in enumerate(class_names())}
    files.write_text(labels / "labels.json", json.dumps(names, indent=0))


def _template_key(template: str) -> str:
    """Remove the brackets of a template."""
    return template.replace("[", "").replace("]", "")


def _make_annotation(video: int, label: int) -> dict:
    """Return an entry of the annotations of a split."""
    template = CLASSES[label]
    return {
        "id": str(video),
        "label": _template_key(template).lower().replace("something", "an object"),
        "template": template,
        "placeholders": ["an object"],
    }
