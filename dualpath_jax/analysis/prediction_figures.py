"""Pictures of predictions, a PNG for each video: frames over bars, or over a time line of windows.

Public: `Pictures`.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dualpath_jax.analysis import image_grid

FRAMES = 6  # of a video, side by side
POINTS = 2048  # of a time line at most: more are not seen


class _Evenly:
    """Of any number of items at most 2 x `limit`, evenly spread: every one, every second, ..."""

    def __init__(self, limit: int):
        self._limit, self._every, self._count = limit, 1, 0
        self.items: list[Any] = []

    def add(self, make: Callable[[], Any]) -> None:
        if self._count % self._every == 0:
            self.items.append(make())
        self._count += 1
        if len(self.items) > 2 * self._limit:
            self.items = self.items[::2]
            self._every *= 2


class Pictures:
    """Draws videos as their predictions come in, those of one video one after the other.

    What it keeps of a video is bounded: `2 * POINTS` rows of probabilities and a few frames.

    Args:
      folder: gets VIDEO.png of each; is made.
      class_names: of the model.
      top_k: classes to draw: the most probable ones, in windows those with the highest peaks.
    """

    def __init__(self, folder: str, class_names: Sequence[str], top_k: int):
        self._folder, self._taken = pathlib.Path(folder), set()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._class_names, self._top_k = list(class_names), top_k
        self._number: int | None = None  # of the video that is under way
        self._begin()

    def _begin(self) -> None:
        self._frames, self._points = _Evenly(4 * FRAMES), _Evenly(POINTS)

    def add(self, number: int, found: Any, frames: Any, probabilities: np.ndarray) -> None:
        """A video, or the next window of one.

        Args:
          number: of the video.
          found: `predict.Found`.
          frames: `trained.Frames`.
          probabilities: [classes], in 0..1.
        """
        if number != self._number:
            self.close()
            self._number = number
        self._found = found
        count = int(frames.num_frames[0])
        if found.start is None:
            for frame in np.linspace(0, count - 1, min(count, FRAMES)).round().astype(int):
                self._frames.add(lambda frame=frame: ("", frames.image(frame)))
        else:
            middle = (found.start + found.end) / 2
            self._frames.add(lambda: (f"{middle:.1f} s", frames.image(count // 2)))
            self._points.add(lambda: (middle, probabilities))
        self._probabilities = probabilities

    def close(self) -> None:
        """Draw what is not drawn yet."""
        if self._number is not None:
            with matplotlib.rc_context({"text.parse_math": False}):  # names may have dollar signs
                self._draw()
            self._number = None
            self._begin()

    def _draw(self) -> None:
        name = image_grid.unused_path(self._folder, self._found.video, self._taken)
        height = max(4.8, 3.3 + 0.3 * min(self._top_k, len(self._class_names)))
        figure = Figure(figsize=(9, height), layout="constrained")
        title = name.name + (f"\n{self._found.note}" if self._found.note else "")
        figure.suptitle(title, fontsize=10, wrap=True)
        above, below = figure.subfigures(2, 1, height_ratios=[1.5, height - 1.5])
        last = len(self._frames.items) - 1
        chosen = np.unique(np.linspace(0, last, FRAMES).round().astype(int))
        for axis, i in zip(above.subplots(1, FRAMES), [*chosen, *[None] * FRAMES], strict=False):
            axis.axis("off")
            if i is not None:
                text, image = self._frames.items[i]
                axis.imshow(image)
                axis.set_title(text, fontsize=8)
        if self._found.start is None:
            self._bars(below.subplots())
        else:
            self._time_line(below.subplots())
            below.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        figure.savefig(f"{name}.png", dpi=110)

    def _best(self, probabilities: np.ndarray) -> np.ndarray:
        return np.argsort(-probabilities, kind="stable")[: self._top_k]

    def _bars(self, axis: Any) -> None:
        best = self._best(self._probabilities)
        values = self._probabilities[best]
        bars = axis.barh([self._class_names[i] for i in best], values)
        axis.bar_label(bars, [f"{value:.3f}" for value in values], padding=3, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.08)
        axis.set_xlabel("probability")

    def _time_line(self, axis: Any) -> None:
        times, rows = map(np.array, zip(*self._points.items, strict=True))
        for i in self._best(rows.max(axis=0)):
            axis.plot(times, rows[:, i], marker=".", label=self._class_names[i])
        axis.set_ylim(0, 1.02)
        axis.set_xlabel("middle of the window, seconds")
        axis.set_ylabel("probability")
