"""Videos that turn out unreadable while training: counted, told, replaced, and limited.

Public: `UnreadableVideos`.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from absl import logging

from dualpath_jax.data.video_dataset import UnreadableVideo

Element = TypeVar("Element")


class UnreadableVideos:
    """Which videos could not be read so far in this process.

    A clip of which a frame cannot be read or decoded gives its place to a clip of the next video of
    the split (after the last comes the first), as that would be in the same epoch; if that fails
    too, of the one after it. So what takes whose place follows from the stored data alone, and not
    from when the damage was found.

    Attributes:
      videos: why, by the video's place in the split.

    Args:
      ids: names of the split's videos.
      limit: `config.data.max_broken_videos`, more are an error.
    """

    def __init__(self, ids: Sequence[str], limit: int):
        self._ids = ids
        self._limit = limit
        self.videos: dict[int, str] = {}
        self._clips: set[tuple[int, int]] = set()

    def note(self, example: int, reason: str) -> None:
        """Video `example` cannot be read. ValueError with the list when it is one too many."""
        if example in self.videos:
            return
        self.videos[example] = reason
        logging.warning(
            "video %r cannot be read, the next one takes its place: %s", self._ids[example], reason
        )
        if len(self.videos) > self._limit:
            names = ", ".join(repr(self._ids[i]) for i in self.videos)
            raise ValueError(
                f"{len(self.videos)} training videos cannot be read, more than "
                f"data.max_broken_videos={self._limit}: {names}. The last: {reason}. Check the "
                "disk and prepare the data set again with another --out, or allow more"
            )

    def note_clip(self, example: int, epoch: int, reason: str) -> None:
        """The clip of `example` in `epoch` was read, but holds what cannot be decoded."""
        self._clips.add((example, epoch))
        self.note(example, reason)

    def replace(self, example: int, epoch: int, make: Callable[[int, int], Element]) -> Element:
        """make(example, epoch), or the same of the first video after it that can be read.

        `make` raises UnreadableVideo where it cannot read.
        """
        for candidate in (*range(example, len(self._ids)), *range(example)):
            if (candidate, epoch) in self._clips:
                continue
            try:
                return make(candidate, epoch)
            except UnreadableVideo as problem:
                self.note(candidate, str(problem))
        raise ValueError("no video of the split can be read")
