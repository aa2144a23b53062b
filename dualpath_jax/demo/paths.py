"""Draws the scenes of the generated sets `paths`: a hand on an arm draws a path in the air.

The ten classes are paths. A video shows a textured hand whose arm reaches to the border of the
frame, in front of a photograph. The camera shakes and drifts, the exposure changes, frames are
noisy, and other patches wander through the picture. Place, size, speed and start of a path are
random, so that a single frame or the average of all frames says almost nothing about the class.
Photographs and textures of the three splits are disjoint.
"""

import dataclasses
import pathlib

import numpy as np
from PIL import Image, ImageDraw

from dualpath_jax.demo.render import TRAIN_PHOTOS, crop_photo, load_photo
from dualpath_jax.demo.video_files import write_videos

CLASSES = (
    "caret",
    "circle",
    "cross",
    "down",
    "left",
    "right",
    "square",
    "star",
    "tick",
    "up",
)
PHOTOS = {
    "train": TRAIN_PHOTOS,
    "validation": ("moon", "immunohistochemistry", "cell"),
    "test": ("coffee", "rocket"),
}
# Number of videos by split. The large set shares validation and test videos with the small one.
SIZES = {"train": 180, "validation": 200, "test": 1000}
LARGE_SIZES = SIZES | {"train": 5000}
NUM_FRAMES = 32
FRAME_SIZE = 128  # pixels
_MARGIN = 16  # pixels around the frame, which camera shake and drift uncover
_HAND_SIZE = 128  # side of the hand's picture, pixels, before it is scaled


def _corners(count: int, first: float, stride: int = 1) -> np.ndarray:
    """Return a closed polygon's corners on the unit circle: [count + 1, 2]; `first` in turns."""
    turns = first + stride * np.arange(count + 1) / count
    return np.stack([np.cos(2 * np.pi * turns), np.sin(2 * np.pi * turns)], axis=1)


def draw_outline(name: str, rng: np.random.Generator) -> np.ndarray:
    """Draw a path of class `name` as the corners of a polyline: float64 [points, 2], x and y.

    Coordinates are in -1..1; y points down. Circle, square and star start anywhere and turn either
    way.
    """
    if name in ("circle", "square", "star"):
        if name == "circle":
            outline = _corners(48, rng.random())
        elif name == "square":
            outline = _corners(4, 0.125 + rng.integers(4) / 4)
        else:  # a pentagram with one tip up
            outline = _corners(5, 0.75 + rng.integers(5) / 5, stride=2)
        return outline * ((-1, 1) if rng.random() < 0.5 else (1, 1))
    outlines = {
        "tick": [(-0.8, 0.1), (-0.3, 0.8), (0.8, -0.8)],
        "caret": [(-0.7, 0.7), (0.0, -0.7), (0.7, 0.7)],
        "cross": [(-0.8, -0.8), (0.8, 0.8), (0.8, -0.8), (-0.8, 0.8)],
        "left": [(0.9, 0.0), (-0.9, 0.0)],
        "right": [(-0.9, 0.0), (0.9, 0.0)],
        "up": [(0.0, 0.9), (0.0, -0.9)],
        "down": [(0.0, -0.9), (0.0, 0.9)],
    }
    return np.array(outlines[name], np.float64)


def draw_track(name: str, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the centers of a hand that follows a path of class `name`.

    The path is turned by up to 10 degrees, scaled unevenly and moved. The hand rests before and
    after it, changes its speed on the way and trembles.

    Returns:
      float64 [num_frames, 2], x and y in 0..1 of the frame's side.
    """
    outline = draw_outline(name, rng)
    angle = np.deg2rad(rng.uniform(-10, 10))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    radius = rng.uniform(0.26, 0.38) * rng.uniform(0.9, 1.1, 2)
    outline = outline @ turn.T * radius
    outline = outline + rng.uniform(0.42, 0.58, 2)
    # Distance along the path over time: rest, a path with uneven speed, rest.
    first, last = rng.uniform(0, 0.15), 1 - rng.uniform(0, 0.15)
    time = np.clip((np.linspace(0, 1, num_frames) - first) / (last - first), 0, 1)
    bend, phase = rng.uniform(0, 0.08), rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * time + phase) - np.sin(phase)
    time = np.clip(time + bend * wave, 0, 1)
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(outline, axis=0), axis=1))])
    track = np.stack(
        [np.interp(time * lengths[-1], lengths, outline[:, axis]) for axis in range(2)], axis=1
    )
    return track + rng.normal(0, 0.006, track.shape)


def _wander(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the track of a distractor, a sum of two slow waves: float64 [num_frames, 2], 0..1."""
    time = np.linspace(0, 1, num_frames)[:, None]
    waves = sum(
        rng.uniform(0.02, 0.2, 2)
        * np.sin(2 * np.pi * (rng.uniform(0.2, 1.6, 2) * time + rng.random(2)))
        for _ in range(2)
    )
    return rng.uniform(0.1, 0.9, 2) + waves


def _camera_offsets(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the camera's shake and drift: float64 [num_frames, 2], pixels, within the margin."""
    drift = np.linspace(-0.5, 0.5, num_frames)[:, None] * rng.uniform(-5, 5, 2)
    shake = np.cumsum(rng.normal(0, 0.3, (num_frames, 2)), axis=0)
    jitter = rng.normal(0, rng.uniform(0, 0.6), (num_frames, 2))
    return np.clip(drift + shake + jitter, 1 - _MARGIN, _MARGIN - 1)


def draw_hand(texture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """Draw a palm with one to four fingers, filled with a texture: RGBA, transparent outside."""
    size = _HAND_SIZE
    mask = Image.new("L", (size, size))
    pen = ImageDraw.Draw(mask)
    palm = size * rng.uniform(0.19, 0.24)
    middle = size / 2
    pen.ellipse([middle - palm, middle - palm, middle + palm, middle + palm], fill=255)
    spread = rng.uniform(0.25, 0.55)
    count = rng.integers(1, 5)
    for finger in range(count):
        angle = -np.pi / 2 + spread * (finger - (count - 1) / 2) + rng.normal(0, 0.06)
        length = size * rng.uniform(0.34, 0.46)
        tip = middle + length * np.cos(angle), middle + length * np.sin(angle)
        width = round(size * rng.uniform(0.08, 0.11))
        pen.line([(middle, middle), tip], fill=255, width=width)
        pen.ellipse([t + s * width / 2 for s in (-1, 1) for t in tip], fill=255)
    hand = Image.fromarray(texture).resize((size, size), Image.Resampling.BILINEAR)
    hand.putalpha(mask)
    return hand


def _soften(texture: np.ndarray, level: float) -> np.ndarray:
    """Reduce the contrast of a texture around a brightness of `level`: uint8, same shape."""
    values = texture.astype(np.float32)
    return np.clip(level + 0.6 * (values - values.mean()), 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class PathScene:
    """Describes a video of the sets `paths`.

    Attributes:
      background: uint8 [side, side, 3]; the side is the frame's and a margin on both sides.
      camera: float64 [frames, 2], x and y of the camera's offset, pixels.
      patches: RGBA pictures of the distractors, then of the hand.
      tracks: of the patches, float64 [frames, 2] each, x and y of the center in 0..1 of the frame.
      elbow: float64 [2], point on the border or beyond it to which the arm reaches, in 0..1.
      arm: RGB picture of the arm's texture, at least as large as a frame.
      arm_width: pixels.
      exposure: float32 [frames], factor on all pixels.
      noise: standard deviation of the noise of pixels, of 255.
      noise_seed: of the noise.
    """

    background: np.ndarray
    camera: np.ndarray
    patches: list[Image.Image]
    tracks: list[np.ndarray]
    elbow: np.ndarray
    arm: Image.Image
    arm_width: float
    exposure: np.ndarray
    noise: float
    noise_seed: int

    def frames(self) -> np.ndarray:
        """Render the video: uint8 [frames, FRAME_SIZE, FRAME_SIZE, 3]."""
        rng = np.random.default_rng(self.noise_seed)
        background, size = Image.fromarray(self.background), FRAME_SIZE
        frames = []
        for index, (dx, dy) in enumerate(self.camera):
            shift = (1, 0, _MARGIN + dx, 0, 1, _MARGIN + dy)
            frame = background.transform(
                (size, size), Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR
            )
            centers = [track[index] * size - (dx, dy) for track in self.tracks]
            for patch, center in zip(self.patches[:-1], centers[:-1], strict=True):
                _paste(frame, patch, center)
            self._paste_arm(frame, centers[-1])
            _paste(frame, self.patches[-1], centers[-1])
            values = np.asarray(frame, np.float32) * self.exposure[index]
            values += rng.normal(0, self.noise, values.shape)
            frames.append(np.clip(values + 0.5, 0, 255).astype(np.uint8))
        return np.stack(frames)

    def _paste_arm(self, frame: Image.Image, hand: np.ndarray) -> None:
        """Draw the arm from the hand's center, in pixels, to the elbow."""
        mask = Image.new("L", frame.size)
        ends = [tuple(hand), tuple(self.elbow * FRAME_SIZE)]
        ImageDraw.Draw(mask).line(ends, fill=255, width=round(self.arm_width))
        left, top = (int(c) % 32 for c in hand)  # the texture moves with the hand
        window = (32 - left, 32 - top, 32 - left + frame.width, 32 - top + frame.height)
        frame.paste(self.arm.crop(window), (0, 0), mask)


def _paste(frame: Image.Image, patch: Image.Image, center: np.ndarray) -> None:
    """Paste a patch with its transparency; `center` is in pixels."""
    corner = [round(c - side / 2) for c, side in zip(center, patch.size, strict=True)]
    frame.paste(patch, corner, patch)


def find_scene(split: str, number: int) -> PathScene:
    """Return the scene of video `number` of a split; its class is `number` % 10.

    Args:
      split: "train", "validation" or "test".
      number: of the video, 0 or more. The first videos of a large set are those of a small one.
    """
    rng = np.random.default_rng([7, list(PHOTOS).index(split), number])
    photos = PHOTOS[split]
    behind, in_front = rng.permutation(len(photos))[:2]
    background = crop_photo(load_photo(photos[behind]), FRAME_SIZE + 2 * _MARGIN, rng)
    level = float(background.mean())
    level += rng.choice([-1, 1]) * rng.uniform(35, 90)
    if not 30 < level < 225:
        level = 255 - level
    texture = _soften(crop_photo(load_photo(photos[in_front]), 2 * FRAME_SIZE, rng), level)
    hand = draw_hand(texture, rng).rotate(rng.uniform(-40, 40), Image.Resampling.BILINEAR)
    hand_size = round(FRAME_SIZE * rng.uniform(0.26, 0.4))
    patches = [hand.resize((hand_size, hand_size), Image.Resampling.BILINEAR)]
    tracks = [draw_track(CLASSES[number % len(CLASSES)], NUM_FRAMES, rng)]
    for _ in range(rng.integers(0, 2)):
        size = round(FRAME_SIZE * rng.uniform(0.1, 0.2))
        other = Image.fromarray(
            crop_photo(load_photo(photos[rng.integers(len(photos))]), size, rng)
        )
        mask = Image.new("L", (size, size))
        ImageDraw.Draw(mask).ellipse([0, 0, size - 1, size - 1], fill=255)
        other.putalpha(mask)
        patches.insert(0, other)
        tracks.insert(0, _wander(NUM_FRAMES, rng))
    side = rng.choice(["left", "right", "bottom", "bottom", "bottom"])
    along = rng.uniform(-0.1, 1.1)
    elbow = {"left": (-0.1, along), "right": (1.1, along), "bottom": (along, 1.1)}[side]
    time = np.linspace(0, 1, NUM_FRAMES)
    wave = np.sin(2 * np.pi * (rng.uniform(0.3, 1.5) * time + rng.random()))
    exposure = 1 + rng.uniform(0, 0.15) * wave + rng.normal(0, 0.01, NUM_FRAMES)
    return PathScene(
        background=background,
        camera=_camera_offsets(NUM_FRAMES, rng),
        patches=patches,
        tracks=tracks,
        elbow=np.array(elbow),
        arm=Image.fromarray(texture),
        arm_width=hand_size * rng.uniform(0.22, 0.34),
        exposure=exposure.astype(np.float32),
        noise=rng.uniform(1, 7),
        noise_seed=int(rng.integers(2**31)),
    )


def render_frames(split: str, number: int) -> np.ndarray:
    """Render video `number` of a split: uint8 [NUM_FRAMES, FRAME_SIZE, FRAME_SIZE, 3]."""
    return find_scene(split, number).frames()


def render_paths(out: str, sizes: dict[str, int] | None = None, progress: bool = True) -> None:
    """Write the videos into class folders: `{split}/{class}/{number}.mp4`.

    Args:
      out: folder to write; videos that are there are left as they are.
      sizes: number of videos by split; None for `SIZES`.
      progress: True shows a progress bar, see `ProgressBar`.
    """
    out = pathlib.Path(out)
    sizes = SIZES if sizes is None else sizes
    clips = [(split, number) for split, size in sizes.items() for number in range(size)]
    files = {
        (split, number): out / split / CLASSES[number % len(CLASSES)] / f"{number:05d}.mp4"
        for split, number in clips
    }
    missing = [clip for clip in clips if not files[clip].exists()]
    if missing:
        write_videos(render_frames, missing, [files[clip] for clip in missing], progress)
