"""Reads a data set whose folders are its classes."""

import collections
import os

from dualpath_jax.data.datasets.annotations import SPLIT_NAMES, DatasetIndex, Video, split_by_hash


def read_folder(
    videos_dir: str, annotations: str | None, validation_fraction: float
) -> DatasetIndex:
    """List the videos in class folders.

    Args:
      videos_dir: folder that holds the class folders, either directly or inside split folders
        (train, validation or val, test).
      annotations: not used.
      validation_fraction: fraction of each class for validation, used without split folders.

    Returns:
      The data set. A video's id is its path relative to `videos_dir`; classes are sorted by name.

    Raises:
      ValueError: there are no class folders, a class has no videos, or two folders name the same
        split.
    """
    del annotations  # the folders are the annotations
    folders, notices = _list_visible(videos_dir, "", want_folders=True)
    if not folders:
        raise ValueError(f"{videos_dir!r} holds no class folders; expected VIDEOS/<class>/<file>")
    if set(folders) <= set(SPLIT_NAMES):
        if len({SPLIT_NAMES[name] for name in folders}) < len(folders):
            raise ValueError(
                f"{videos_dir!r} has {', '.join(folders)}: two are the same split; keep one of them"
            )
        class_folders = []
        for folder in folders:
            classes, more = _list_visible(videos_dir, folder, want_folders=True)
            notices += more
            class_folders += [(SPLIT_NAMES[folder], name, f"{folder}/{name}") for name in classes]
    else:
        class_folders = [("", name, name) for name in folders]
    class_names = sorted({name for _, name, _ in class_folders})
    index = {name: i for i, name in enumerate(class_names)}
    splits = collections.defaultdict(list)
    for split, name, folder in class_folders:
        files, more = _list_visible(videos_dir, folder, want_folders=False)
        notices += more
        paths = [f"{folder}/{file}" for file in files]
        splits[split] += [Video(path, path, index[name]) for path in paths]
    used = {video.label for videos in splits.values() for video in videos}
    if empty := [name for name in class_names if index[name] not in used]:
        raise ValueError(
            f"class folder {empty[0]!r} in {videos_dir!r} has no videos (one of {len(empty)} such "
            "folders); fill or remove it"
        )
    if "" in splits:
        splits = split_by_hash(splits[""], validation_fraction)
    return DatasetIndex(class_names, dict(splits), notices)


def _list_visible(root: str, folder: str, want_folders: bool) -> tuple[list[str], list[str]]:
    """List the folders (or else the files) in root/folder that are not hidden.

    Returns:
      (names, sorted; a notice of entries of the other kind, if there are any).
    """
    entries = [e for e in os.scandir(os.path.join(root, folder)) if not e.name.startswith(".")]
    wanted = sorted(entry.name for entry in entries if entry.is_dir() == want_folders)
    others = sorted(entry.name for entry in entries if entry.is_dir() != want_folders)
    if not others:
        return wanted, []
    kind = "files outside class folders" if want_folders else "folders inside a class folder"
    place = os.path.join(root, folder) if folder else root
    return wanted, [f"{len(others)} {kind} in {place} are ignored, such as {others[0]!r}"]
