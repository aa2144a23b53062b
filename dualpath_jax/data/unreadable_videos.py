"""Replaces videos that cannot be read during training, logs them and limits their number."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from absl import logging

from dualpath_jax.data.video_dataset import UnreadableVideo

_Clip = TypeVar("_Clip")


class UnreadableVideos:
    """Records the videos that this process could not read, and replaces their clips.

    If a frame of a clip cannot be read or decoded, a clip of the next video of the split replaces
    it, as drawn for the same epoch. If that one fails too, the video after it is next; the first
    video follows the last. The replacement therefore depends only on the stored data, and not on
    when the damage was noticed.

    Args:
      ids: names of the split's videos.
      limit: `config.data.max_broken_videos`; more unreadable videos are an error.

    Attributes:
      videos: reason of the failure, by the video's index in the split.
    """

    def __init__(self, ids: Sequence[str], limit: int):
        self._ids = ids
        self._limit = limit
        self.videos: dict[int, str] = {}
        self._clips: set[tuple[int, int]] = set()

    def record_video(self, example: int, reason: str) -> None:
        """Record that video `example` cannot be read.

        Args:
          example: index of the video in the split.
          reason: text of the error.

        Raises:
          ValueError: more than `limit` videos cannot be read; the message lists them.
        """
        if example in self.videos:
            return
        self.videos[example] = reason
        logging.warning(
            "video %r cannot be read; the next one replaces it: %s", self._ids[example], reason
        )
        if len(self.videos) > self._limit:
            names = ", ".join(repr(self._ids[i]) for i in self.videos)
            raise ValueError(
                f"{len(self.videos)} training videos cannot be read, more than "
                f"data.max_broken_videos={self._limit}: {names}. The last: {reason}. Check the "
                "disk and prepare the data set again with another --out, or allow more"
            )

    def record_clip(self, example: int, epoch: int, reason: str) -> None:
        """Record that the clip of `example` in `epoch` was read but cannot be decoded.

        Raises:
          ValueError: more than `limit` videos cannot be read.
        """
        self._clips.add((example, epoch))
        self.record_video(example, reason)

    def make_or_replace(self, example: int, epoch: int, make: Callable[[int, int], _Clip]) -> _Clip:
        """Make the clip of `example`, or of the first video after it that can be read.

        Args:
          example: index of the video in the split.
          epoch: epoch of the clip.
          make: returns the clip of a video in an epoch; raises UnreadableVideo if it fails.

        Raises:
          ValueError: more than `limit` videos, or all of them, cannot be read.
        """
        for candidate in (*range(example, len(self._ids)), *range(example)):
            if (candidate, epoch) in self._clips:
                continue
            try:
                return make(candidate, epoch)
            except UnreadableVideo as problem:
                self.record_video(candidate, str(problem))
        raise ValueError("no video of the split can be read")
