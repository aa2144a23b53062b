"""Recognizes videos by their names: files, and folders of images. Needs no decoder."""

import os
from collections.abc import Iterable

# Suffixes of video files, where a folder may hold other files too.
VIDEO_SUFFIXES = frozenset(
    (
        *(".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts"),
        *(".webm", ".wmv"),
    )
)
IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp"))
IGNORED_FOLDERS = (".", "@")  # beginnings of the names of folders that are not searched
FRAME_RATE_HELP = "frames per second of folders of images; times are unknown without it"


def is_ignored(entry: os.DirEntry) -> bool:
    """Return whether an entry is hidden, or a folder of a network drive, such as @eaDir."""
    if entry.name.startswith("."):
        return True
    return entry.name.startswith(IGNORED_FOLDERS) and os.path.isdir(entry)


def is_image_folder(path: str) -> bool:
    """Return whether a path is a folder that holds images, and neither folders nor videos.

    Entries that `is_ignored` names do not count.
    """
    try:
        entries = [entry for entry in os.scandir(path) if not is_ignored(entry)]
        suffixes = {os.path.splitext(entry.name)[1].lower() for entry in entries}
        if suffixes.isdisjoint(IMAGE_SUFFIXES) or not suffixes.isdisjoint(VIDEO_SUFFIXES):
            return False
        return not any(entry.is_dir() for entry in entries)
    except OSError:  # no folder, or links that lead to themselves
        return False


def check_frame_rate(frame_rate: float | None, paths: Iterable[str]) -> None:
    """Raise ValueError if a frame rate is given, and none of the videos is a folder."""
    if frame_rate and not any(map(os.path.isdir, paths)):
        raise ValueError(
            f"--frame_rate={frame_rate:g} has no effect: none of the videos is a folder of images; "
            "leave it out"
        )
