"""Draws predictions, one PNG per video: frames above bars, or above a time line of windows."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dualpath_jax.analysis import image_grid
from dualpath_jax.runtime import files

MAX_FRAMES = 6  # frames of a video in its figure
MAX_POINTS = 2048  # points of a time line; more would not be visible


class _EvenSubsample:
    """Keeps at most 2 x `limit` evenly spaced items of a stream: all, then every second one, ..."""

    def __init__(self, limit: int):
        self._limit, self._stride, self._count = limit, 1, 0
        self.items: list[Any] = []

    def add(self, make: Callable[[], Any]) -> None:
        """Count the next item, and call `make` for it only if it is kept."""
        if self._count % self._stride == 0:
            self.items.append(make())
        self._count += 1
        if len(self.items) > 2 * self._limit:
            self.items = self.items[::2]
            self._stride *= 2


class PredictionFigures:
    """Draws a figure of each video as its predictions arrive.

    The windows of a video must arrive one after the other. Memory is bounded: a video keeps at most
    `2 * MAX_POINTS` rows of probabilities and a few frames.
    """

    def __init__(self, folder: str, class_names: Sequence[str], top_k: int):
        """Create the folder.

        Args:
          folder: folder of the figures, VIDEO.png.
          class_names: names of the model's classes.
          top_k: number of classes to draw: the most probable ones; for windows, those with the
            highest peaks.
        """
        self._folder, self._taken = pathlib.Path(folder), set()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._class_names, self._top_k = list(class_names), top_k
        self._number: int | None = None  # of the current video
        self._begin()

    def _begin(self) -> None:
        """Forget the frames and windows of the previous video."""
        self._frames, self._points = _EvenSubsample(4 * MAX_FRAMES), _EvenSubsample(MAX_POINTS)

    def add(self, number: int, result: Any, frames: Any, probabilities: np.ndarray) -> None:
        """Add a video or the next window of one; a new video completes the previous figure.

        Args:
          number: number of the video.
          result: the video's `predict_files.VideoResult`.
          frames: the video's or window's `trained_model.SingleVideo`.
          probabilities: [num_classes], 0..1.
        """
        if number != self._number:
            self.close()
            self._number = number
        self._result = result
        count = int(frames.num_frames[0])
        if result.start is None:
            for frame in np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int):
                self._frames.add(lambda frame=frame: ("", frames.image(frame)))
        else:
            middle = (result.start + result.end) / 2
            self._frames.add(lambda: (f"{middle:.1f} s", frames.image(count // 2)))
            self._points.add(lambda: (middle, probabilities))
        self._probabilities = probabilities

    def close(self) -> None:
        """Draw the last video; must be called at the end."""
        if self._number is not None:
            with matplotlib.rc_context({"text.parse_math": False}):  # dollar signs in names
                self._draw()
            self._number = None
            self._begin()

    def _draw(self) -> None:
        """Write the figure of the current video."""
        path = image_grid.unused_path(self._folder, self._result.video, self._taken)
        height = max(4.8, 3.3 + 0.3 * min(self._top_k, len(self._class_names)))
        figure = Figure(figsize=(9, height), layout="constrained")
        note = image_grid.replace_unprintable(self._result.note)
        title = path.name + (f"\n{note}" if note else "")
        figure.suptitle(title, fontsize=10, wrap=True)
        above, below = figure.subfigures(2, 1, height_ratios=[1.5, height - 1.5])
        last = len(self._frames.items) - 1
        chosen = np.unique(np.linspace(0, last, MAX_FRAMES).round().astype(int))
        for axis, i in zip(
            above.subplots(1, MAX_FRAMES), [*chosen, *[None] * MAX_FRAMES], strict=False
        ):
            axis.axis("off")
            if i is not None:
                text, image = self._frames.items[i]
                axis.imshow(image)
                axis.set_title(text, fontsize=8)
        if self._result.start is None:
            self._draw_bars(below.subplots())
        else:
            self._draw_timeline(below.subplots())
            below.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        with files.atomic_path(f"{path}.png") as temporary:
            figure.savefig(temporary, dpi=110)

    def _top_classes(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the indices of the most probable classes, in descending order."""
        return np.argsort(-probabilities, kind="stable")[: self._top_k]

    def _draw_bars(self, axis: Any) -> None:
        """Draw a bar for the probability of each of the most probable classes."""
        best = self._top_classes(self._probabilities)
        values = self._probabilities[best]
        bars = axis.barh([self._class_names[i] for i in best], values)
        axis.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.08)
        axis.set_xlabel("probability")

    def _draw_timeline(self, axis: Any) -> None:
        """Draw the probability over time of the classes with the highest peaks."""
        times, rows = map(np.array, zip(*self._points.items, strict=True))
        for i in self._top_classes(rows.max(axis=0)):
            axis.plot(times, rows[:, i], marker=".", label=self._class_names[i])
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("middle of the window, seconds")
        axis.set_ylabel("probability")
