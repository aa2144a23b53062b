"""Splits the videos of each class into training and validation, with recordings kept whole."""

import collections
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterable

from dualpath_jax.data.datasets.annotations import Video
from dualpath_jax.runtime.safe_read import truncated_repr

# Forms of file names, without extension, of segments of one recording; the first that fits counts.
_SEGMENT_NAMES = (
    r"(.+?)[_-]\d{4,}[_-]\d{4,}$",  # start and end, x_000010_000020
    r"(.+?)[_-]?(?:clip|segment|seg|part|chunk|shot|scene)[_-]?\d+$",  # video_clip3
    r"(.+)[_-][a-z]?\d+$",  # abc_001
)


@dataclasses.dataclass(frozen=True)
class GroupBy:
    """Decides which videos are of one recording: those for which `group_of` is equal.

    Attributes:
      kind: "folder", "name" or "column".
      value: the folder's level above the file, from 1; a regular expression of the file's name
        without extension; or the name of a column of the list.
    """

    kind: str
    value: str

    @classmethod
    def parse(cls, text: str) -> "GroupBy":
        """Parse "folder:1", "name:REGEX" or "column:NAME".

        Raises:
          ValueError: the text is none of these.
        """
        kind, _, value = text.partition(":")
        valid = kind in ("folder", "name", "column") and value != ""
        if kind == "folder":
            valid = value.isdecimal() and int(value) > 0
        if not valid:
            raise ValueError(
                f"--group_by={text} is not folder:LEVEL, name:REGEX or column:NAME, such as "
                "folder:1, 'name:(.+)_' or column:recording"
            )
        if kind == "name":
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(
                    f"--group_by={text} is not a regular expression: {error}"
                ) from None
        return cls(kind, value)

    def __str__(self) -> str:
        return f"--group_by={self.kind}:{self.value}"

    def group_of(self, video: Video) -> str | None:
        """Return the name of a video's group; None for a file name that does not match.

        Raises:
          ValueError: the video's path does not have so many folders.
        """
        if self.kind == "column":
            return video.group
        if self.kind == "name":
            match = re.search(self.value, _stem(video))
            return match and (match.group(1) if match.re.groups else match.group())
        folders = [part for part in video.path.replace(os.sep, "/").split("/")[:-1] if part]
        if len(folders) < int(self.value):
            raise ValueError(
                f"{self}: video {truncated_repr(video.path)} has {len(folders)} folders in its "
                "path; level 1 is the folder that holds the file"
            )
        return folders[-int(self.value)]


def group_videos(videos: list[Video], group_by: GroupBy) -> tuple[dict[str, str], list[str]]:
    """Return the group of each video by its id, and notices.

    A video whose file name does not match is a group of its own.

    Raises:
      ValueError: the grouping has no effect, or puts all videos into one group.
    """
    found = {video.id: group_by.group_of(video) for video in videos}
    sizes = collections.Counter(group for group in found.values() if group is not None)
    alone = [id_ for id_, group in found.items() if group is None]
    if not sizes or max(sizes.values()) == 1:
        raise ValueError(
            f"{group_by} has no effect: no two of the {len(found)} videos, such as "
            f"{truncated_repr(videos[0].path)}, are in one group; correct it, or leave it out"
        )
    if len(sizes) + len(alone) == 1:
        raise ValueError(
            f"{group_by} puts all {len(found)} videos into one group, {next(iter(sizes))!r}: "
            "nothing would be left to validate on; correct it, or leave it out"
        )
    name, size = sizes.most_common(1)[0]
    notices = [
        f"{group_by} makes {len(sizes) + len(alone)} groups of {len(found)} videos; the largest, "
        f"{name!r}, has {size}"
    ]
    if alone:
        notices.append(
            f"{len(alone)} file names do not match {group_by}, such as {alone[0]!r}; each is a "
            "group of its own"
        )
    # The two kinds of names must not meet.
    return {i: f"video:{i}" if g is None else f"group:{g}" for i, g in found.items()}, notices


def split_by_hash(
    videos: Iterable[Video], validation_fraction: float, groups: dict[str, str] | None = None
) -> dict[str, list[Video]]:
    """Split each class into train and validation by a hash of the ids, the same on every machine.

    A class with two or more videos gets at least one in each split, unless the fraction is 0. The
    only video of a class goes into train. Each split keeps the order of `videos`.

    With `groups`, all videos of a group are in one split, also those of different classes. The
    number of validation videos of each class is then as near to the fraction as its groups allow,
    and a class of a single group goes into train.

    Args:
      videos: all videos of the data set.
      validation_fraction: fraction of each class for validation, 0 <= fraction < 1.
      groups: group of each video by its id; None: each video is one.

    Returns:
      The videos of the splits "train" and "validation".
    """
    videos = list(videos)
    group_of = groups or {video.id: video.id for video in videos}
    classes = collections.defaultdict(collections.Counter)
    for video in videos:
        classes[video.label][group_of[video.id]] += 1
    chosen: dict[str, bool] = {}  # group -> whether it is for validation
    for sizes in classes.values() if validation_fraction else ():
        _choose_groups(sizes, validation_fraction, chosen)
    return {
        split: [v for v in videos if chosen.get(group_of[v.id], False) == (split == "validation")]
        for split in ("train", "validation")
    }


def _choose_groups(sizes: dict[str, int], fraction: float, chosen: dict[str, bool]) -> None:
    """Choose which groups of a class are for validation; those of earlier classes stay.

    Args:
      sizes: number of the class's videos in each of its groups.
      fraction: of the class for validation, above 0.
      chosen: group -> whether it is for validation; receives the groups that it lacks.
    """
    total = sum(sizes.values())
    fixed = sum(size for group, size in sizes.items() if chosen.get(group))
    by_size = collections.defaultdict(list)
    for group in sorted(sizes.keys() - chosen.keys(), key=hash_name):
        by_size[sizes[group]].append(group)
    order = sorted(by_size, reverse=True)
    # Bit n of reachable[i] is set if groups of the sizes order[i:] can have n videos together.
    reachable = [1]
    for size in reversed(order):
        reachable.insert(0, _add_multiples(reachable[0], size, len(by_size[size])))
    target = min(max(round(fraction * total), 1), total - 1) - fixed
    sums = [n for n, bit in enumerate(reversed(f"{reachable[0]:b}")) if bit == "1"]
    # Each split gets a video of the class if there is a way.
    both = [n for n in sums if 0 < fixed + n < total]
    rest = min(both or [0], key=lambda n: (abs(n - target), n))
    for i, size in enumerate(order):
        groups, wanted = by_size[size], fraction * len(by_size[size])
        possible = [
            n
            for n in range(min(len(groups), rest // size) + 1)
            if reachable[i + 1] >> (rest - n * size) & 1
        ]
        count = min(possible, key=lambda n: (abs(n - wanted), n))
        rest -= count * size
        chosen.update({group: place < count for place, group in enumerate(groups)})


def _add_multiples(sums: int, size: int, count: int) -> int:
    """Return the bits of `sums` and of each sum plus 1 to `count` times `size`."""
    step = 1
    while count:
        step = min(step, count)
        sums |= sums << step * size
        count, step = count - step, 2 * step
    return sums


def hash_name(name: str) -> bytes:
    """Return a digest that orders names at random, alike on every machine."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def find_segments(videos: Iterable[Video]) -> tuple[str, str, str] | None:
    """Look for names of files that suggest segments of one recording.

    If the names of a class differ only in their numbers, the class counts as numbered, not as one
    recording. Some of its files must therefore share the part before the number, and others must
    have another one.

    Returns:
      The regular expression that groups them, and two names as an example; None without such names.
    """
    classes = collections.defaultdict(list)
    for video in videos:
        classes[video.label].append(video)
    for pattern in _SEGMENT_NAMES:
        for members in classes.values():
            recordings = collections.defaultdict(list)
            for video in members:
                if match := re.search(pattern, _stem(video)):
                    recordings[match.group(1)].append(os.path.basename(video.path))
            largest = max(recordings.values(), key=len, default=[])
            if len(recordings) > 1 and len(largest) > 1:
                return pattern, *sorted(largest)[:2]
    return None


def describe_segments(videos: Iterable[Video]) -> list[str]:
    """Return a notice if names of files suggest segments of one recording, otherwise nothing."""
    if not (found := find_segments(videos)):
        return []
    pattern, first, second = found
    return [
        f"names such as {first!r} and {second!r} suggest segments of one recording; where train "
        "and validation share recordings, validation scores mean little. Keep them together with "
        f"--group_by='name:{pattern}' (see --help)"
    ]


def _stem(video: Video) -> str:
    """Return the name of a video's file without folders and extension."""
    return os.path.splitext(os.path.basename(video.path))[0]
