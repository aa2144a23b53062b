"""The embedded data set: an object moves over photographs; only order tells its classes apart.

Public: `CLASSES`, `PHOTOS`, `SIZES`, `Scene`, `render_clip`, `render_demo`, `find_scene`,
`class_names`.

Reversing a clip of one class of a pair gives a clip of the other, so neither one frame nor an
unordered set of frames can do better than chance between the two: 0.5 overall, 0.125 with nothing.
The photographs come with scikit-image and are in the public domain or CC0.
"""

import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import pathlib
from collections.abc import Iterator

import av
import numpy as np
from PIL import Image

from dualpath_jax.runtime.cpu_count import num_cores
from dualpath_jax.runtime.progress_bar import ProgressBar

# Something-Something-v2's kind of templates; a pair of opposite actions stands together.
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

# Backgrounds by split. Those of the test videos are seen neither in training and validation nor in
# the pretraining of the backbone.
_TRAIN_PHOTOS = (
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
PHOTOS = {"train": _TRAIN_PHOTOS, "validation": _TRAIN_PHOTOS, "test": ("coffee", "rocket")}
# CLIP's, as for any backbone of its kind (PAPER: Recipe).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# Clips by split, NUM_FRAMES frames of FRAME_SIZE x FRAME_SIZE pixels each.
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
    """A scikit-image photograph as RGB, short side at most 192 pixels."""
    import skimage.data

    photo = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
    scale = min(1.0, 192 / min(photo.size))
    return photo.resize([round(side * scale) for side in photo.size], Image.Resampling.LANCZOS)


def crop_photo(photo: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random square of the photograph, turned, mirrored and graded: uint8 [size, size, 3].

    The colour grade (order of the channels, a gain and a gamma for each) makes many backgrounds out
    of few photographs.
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
    """Distance-like function of a shape of radius 1 about the origin: below 1 inside."""
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
    """Where the object is: centre and radius as parts of the frame, opacity; each [frames]."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    opacity: np.ndarray

    def places(self) -> Iterator[tuple[float, float, float, float]]:
        """(x, y, radius, opacity) of each frame."""
        return zip(self.x, self.y, self.radius, self.opacity, strict=True)


def draw_track(label: int, num_frames: int, rng: np.random.Generator) -> Track:
    """A random track of class `label`; the odd class of a pair is the even one reversed in time."""
    time = np.linspace(0, 1, num_frames)
    still = np.ones(num_frames)
    x, y, radius, opacity = 0.5 * still, 0.5 * still, rng.uniform(0.16, 0.26) * still, still
    pair, backwards = divmod(label, 2)
    if pair in (0, 1):  # a straight line, right to left or bottom to top, with a little drift
        length = rng.uniform(0.48, 0.66)
        start = rng.uniform(0.17 + length, 0.83)
        along = start - length * time
        across = rng.uniform(0.25, 0.75) + rng.uniform(-0.08, 0.08) * (time - 0.5)
        x, y = (along, across) if pair == 0 else (across, along)
    else:
        x, y = rng.uniform(0.3, 0.7) * still, rng.uniform(0.3, 0.7) * still
    if pair == 2:
        small = rng.uniform(0.07, 0.11)
        radius = small * rng.uniform(2.4, 3.5) ** time
    if pair == 3:
        opacity = np.clip((time - rng.uniform(0.3, 0.7)) * num_frames / 2 + 0.5, 0, 1)
    track = Track(x, y, radius, opacity)
    if backwards:
        track = Track(*(getattr(track, f.name)[::-1] for f in dataclasses.fields(track)))
    return track


def _cover(
    shape: str, x: float, y: float, radius: float, opacity: float, size: int
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """The object in a frame of `size` x `size` pixels: its window, distance and alpha, both [h, w].

    The window is the square that the object can reach (a diamond's tips are the farthest); for the
    distance see `shape_distance`; alpha, 0..1, is how much of each pixel is object.
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
    alpha *= np.float32(opacity)  # one pixel of antialiasing at the edge
    return (rows, columns), distance, alpha


def paint(
    background: np.ndarray, track: Track, shape: str, colour: tuple[int, int, int]
) -> np.ndarray:
    """The object over a photograph: uint8 [size, size, 3] -> uint8 [frames, size, size, 3]."""
    frames = np.repeat(background[None], len(track.x), axis=0)
    for frame, place in zip(frames, track.places(), strict=True):
        window, distance, alpha = _cover(shape, *place, background.shape[0])
        shade = np.clip(1.15 - 0.45 * distance, 0.6, 1.1)[..., None]
        thing = np.minimum(np.asarray(colour, np.float32) * shade, 255)
        behind = frame[window]
        frame[window] = (behind + (thing - behind) * alpha[..., None] + 0.5).astype(np.uint8)
    return frames


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a clip shows: a photograph, uint8 [size, size, 3], and the object before it."""

    background: np.ndarray
    track: Track
    shape: str
    colour: tuple[int, int, int]

    def frames(self) -> np.ndarray:
        """The clip: uint8 [frames, size, size, 3]."""
        return paint(self.background, self.track, self.shape, self.colour)

    def masks(self) -> np.ndarray:
        """How much of each pixel is object: float32 [frames, size, size], 0..1."""
        size = self.background.shape[0]
        masks = np.zeros((len(self.track.x), size, size), np.float32)
        for mask, place in zip(masks, self.track.places(), strict=True):
            window, _, alpha = _cover(self.shape, *place, size)
            mask[window] = alpha
        return masks


def draw_scene(
    photo: Image.Image, label: int, num_frames: int, size: int, rng: np.random.Generator
) -> Scene:
    """A random scene of class `label` over `photo`."""
    background = crop_photo(photo, size, rng)
    track = draw_track(label, num_frames, rng)
    shape = SHAPES[rng.integers(len(SHAPES))]
    mean = background.mean(axis=(0, 1))
    contrast = sorted(COLORS.values(), key=lambda colour: -np.abs(colour - mean).sum())
    colour = contrast[rng.integers(len(contrast) // 2)]  # of those far from the background's mean
    return Scene(background, track, shape, colour)


def render_clip(
    photo: Image.Image, label: int, num_frames: int, size: int, rng: np.random.Generator
) -> np.ndarray:
    """A clip of class `label` over `photo`: uint8 [num_frames, size, size, 3]."""
    return draw_scene(photo, label, num_frames, size, rng).frames()


def find_scene(split: str, number: int) -> Scene:
    """What video `number` of a split of the demo shows; class `number` modulo 8."""
    rng = np.random.default_rng([list(SIZES).index(split), number])
    photo = load_photo(PHOTOS[split][rng.integers(len(PHOTOS[split]))])
    return draw_scene(photo, number % len(CLASSES), NUM_FRAMES, FRAME_SIZE, rng)


def class_names() -> list[str]:
    """The classes as the annotations name them, without brackets."""
    return [_template_key(template) for template in CLASSES]


def write_video(frames: np.ndarray, path: pathlib.Path, fps: int = 12) -> None:
    """H.264 in an .mp4: frames uint8 [frames, height, width, 3], even height and width."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "preset": "veryfast",
            "crf": "18",
            "threads": "1",
            # With a lookahead thread a frame's type depends on which thread was faster.
            "x264-params": "sync-lookahead=0:rc-lookahead=0",
        }
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _render_range(videos: pathlib.Path, split: str, first: int, numbers: range) -> int:
    for number in numbers:
        frames = find_scene(split, number).frames()
        write_video(frames, videos / f"{first + number}.mp4")
    return len(numbers)


def render_demo(out: str, sizes: dict[str, int] | None = None, progress: bool = True) -> None:
    """Write the demo set as Something-Something-v2 ships: `videos/{id}.mp4` and JSON `labels/`.

    Args:
      out: folder; complete when `labels/labels.json` is there, which is written last.
      sizes: clips by split; default `SIZES`. One version of the encoder gives the same bytes every
        time.
      progress: show how far it is, see `bar`.
    """
    out = pathlib.Path(out)
    if (out / "labels" / "labels.json").exists():
        return
    sizes = SIZES if sizes is None else sizes
    videos, labels = out / "videos", out / "labels"
    videos.mkdir(parents=True, exist_ok=True)
    labels.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")  # the parent may hold threads of JAX
    with (
        concurrent.futures.ProcessPoolExecutor(num_cores(), mp_context=context) as pool,
        ProgressBar(sum(sizes.values()), "render", "videos", shown=progress) as shown,
    ):
        jobs, first = [], 0
        for split, size in sizes.items():
            for start in range(0, size, 100):
                numbers = range(start, min(start + 100, size))
                jobs.append(pool.submit(_render_range, videos, split, first, numbers))
            first += size
        for job in concurrent.futures.as_completed(jobs):
            shown.update(job.result())
    first = 0
    for split, size in sizes.items():
        entries = [_annotation(first + number, number % len(CLASSES)) for number in range(size)]
        (labels / f"{split}.json").write_text(json.dumps(entries, indent=0))
        first += size
    names = {name: str(i) for i, name in enumerate(class_names())}
    (labels / "labels.json").write_text(json.dumps(names, indent=0))


def _template_key(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _annotation(video: int, label: int) -> dict:
    template = CLASSES[label]
    return {
        "id": str(video),
        "label": _template_key(template).lower().replace("something", "an object"),
        "template": template,
        "placeholders": ["an object"],
    }
