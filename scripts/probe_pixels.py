"""Shows how well pixels alone predict the classes of a generated data set: two linear probes.

    python scripts/probe_pixels.py --set=paths

The first probe sees the average of a video's frames, without order; the second one sees each frame
minus that average, as absolute values, in order. Frames are reduced to 16 x 16 pixels, and 16 of
them are used. A probe is a ridge regression onto the classes whose strength is chosen on the
validation videos. It prints top-1 on the test videos with a 95% interval (Wilson).
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import numpy as np

from dualpath_jax.analysis.confidence import confidence_interval
from dualpath_jax.cli import build_parser
from dualpath_jax.demo import paths, render
from dualpath_jax.runtime import console
from dualpath_jax.runtime.cpu_count import num_cores

SETS = {
    "demo": (render.render_frames, render.SIZES, render.CLASSES),
    "paths": (paths.render_frames, paths.SIZES, paths.CLASSES),
    "paths_large": (paths.render_frames, paths.LARGE_SIZES, paths.CLASSES),
}
NUM_FRAMES, SIDE = 16, 16
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of the ridge, relative to the mean variance


def reduce_video(name: str, clip: tuple[str, int]) -> np.ndarray:
    """Render a video and reduce it: float32 [NUM_FRAMES, SIDE, SIDE, 3]."""
    frames = SETS[name][0](*clip)
    frames = frames[np.linspace(0, len(frames) - 1, NUM_FRAMES).round().astype(int)]
    cell = frames.shape[1] // SIDE
    frames = frames[:, : cell * SIDE, : cell * SIDE].astype(np.float32)
    return frames.reshape(NUM_FRAMES, SIDE, cell, SIDE, cell, 3).mean(axis=(2, 4))


def average_features(videos: np.ndarray) -> np.ndarray:
    """Return the average frame of videos [n, T, h, w, 3] as rows."""
    return videos.mean(axis=1).reshape(len(videos), -1)


def ordered_features(videos: np.ndarray) -> np.ndarray:
    """Return the frames of videos [n, T, h, w, 3] minus their average, absolute, gray, as rows."""
    differences = np.abs(videos - videos.mean(axis=1, keepdims=True)).mean(axis=-1)
    return differences.reshape(len(videos), -1)


def predict(train: np.ndarray, targets: np.ndarray, others: np.ndarray, strength: float):
    """Return the ridge regression's classes of the rows `others`, by the kernel of the rows."""
    mean = train.mean(axis=0)
    train, others = train - mean, others - mean
    kernel = train @ train.T
    ridge = strength * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
    return (others @ (train.T @ np.linalg.solve(kernel + ridge, targets))).argmax(axis=1)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    arg_parser.add_argument("--set", default="paths", choices=list(SETS), help="data set (paths)")
    return arg_parser


def main() -> None:
    """Print both probes of the set that the command line names."""
    name = parser().parse_args().set
    _, sizes, classes = SETS[name]
    videos, labels = {}, {}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_cores(), mp_context=context) as pool:
        for split, size in sizes.items():
            clips = [(split, number) for number in range(size)]
            reduced = pool.map(functools.partial(reduce_video, name), clips, chunksize=20)
            videos[split] = np.stack(list(reduced))
            labels[split] = np.arange(size) % len(classes)
    targets = np.eye(len(classes))[labels["train"]] - 1 / len(classes)
    probes = {
        "average of the frames": average_features,
        "ordered differences from it": ordered_features,
    }
    for title, features in probes.items():
        rows = {split: features(values) for split, values in videos.items()}
        scores = {}
        for strength in STRENGTHS:
            classes_found = predict(rows["train"], targets, rows["validation"], strength)
            scores[strength] = (classes_found == labels["validation"]).mean()
        best = max(scores, key=scores.get)
        correct = predict(rows["train"], targets, rows["test"], best) == labels["test"]
        low, high = confidence_interval(correct.mean(), len(correct))
        print(
            f"{name}: {title:28} test top-1 {correct.mean():.3f} [{low:.3f}, {high:.3f}]  "
            f"validation {scores[best]:.3f}  chance {1 / len(classes):.3f}"
        )


if __name__ == "__main__":
    console.run(main)
