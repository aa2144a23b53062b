"""Reads a data set whose folders are its classes."""

import collections
import os

from dualpath_jax.data.datasets.annotations import SPLIT_NAMES, DatasetIndex, Video


def read_folder(videos_dir: str, annotations: str | None) -> DatasetIndex:
    """List the videos in class folders.

    Args:
      videos_dir: folder that holds the class folders, either directly or inside split folders
        (train, validation or val, test, and other spellings: `SPLIT_NAMES`, in any case).
      annotations: not used.

    Returns:
      The data set. A video's id is its path relative to `videos_dir`; classes are sorted by name.

    Raises:
      ValueError: there are no class folders, a class has no videos, two folders name the same
        split, or there are other folders next to split folders.
    """
    del annotations  # the folders are the annotations
    folders, notices = _list_visible(videos_dir, "", want_folders=True)
    if not folders:
        raise ValueError(f"{videos_dir!r} holds no class folders; expected VIDEOS/<class>/<file>")
    class_folders, more = _find_class_folders(videos_dir, folders)
    notices += more
    class_names = sorted({name for _, name, _ in class_folders})
    index = {name: i for i, name in enumerate(class_names)}
    splits = collections.defaultdict(list)
    for split, name, folder in class_folders:
        files, more = _list_visible(videos_dir, folder, want_folders=False)
        notices += more
        paths = [f"{folder}/{file}" for file in files]
        splits[split] += [Video(path, path, index[name]) for path in paths]
    used = {video.label for videos in splits.values() for video in videos}
    for _, name, folder in class_folders:
        if index[name] not in used:
            inside, _ = _list_visible(videos_dir, folder, want_folders=True)
            found = f"no file, but {_list_some(inside)}" if inside else "no file"
            raise ValueError(
                f"class folder {folder!r} in {videos_dir!r} holds {found}; the videos of a class "
                "are expected directly in its folder"
            )
    if "" in splits:
        return DatasetIndex(class_names, {"train": splits[""]}, notices, has_splits=False)
    return DatasetIndex(class_names, dict(splits), notices)


def _find_class_folders(
    videos_dir: str, folders: list[str]
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Return (split or "", class name, path) of each class folder, and notices.

    Raises:
      ValueError: two folders name the same split, or there are others next to split folders.
    """
    split_folders = [name for name in folders if _is_split_folder(videos_dir, name)]
    if all(name.casefold() in SPLIT_NAMES for name in folders):
        split_folders = folders
    if not split_folders:
        return [("", name, name) for name in folders], []
    if others := [name for name in folders if name not in split_folders]:
        raise ValueError(
            f"{videos_dir!r} holds the split folders {', '.join(split_folders)}, and also "
            f"{_list_some(others)}: name a folder that holds either split folders or class "
            "folders alone"
        )
    if len({SPLIT_NAMES[name.casefold()] for name in folders}) < len(folders):
        raise ValueError(
            f"{videos_dir!r} has {', '.join(folders)}: two are the same split; keep one of them"
        )
    class_folders, notices = [], []
    for folder in folders:
        classes, more = _list_visible(videos_dir, folder, want_folders=True)
        notices += more
        split = SPLIT_NAMES[folder.casefold()]
        class_folders += [(split, name, f"{folder}/{name}") for name in classes]
    return class_folders, notices


def _is_split_folder(videos_dir: str, name: str) -> bool:
    """Return whether a folder has the name of a split, and holds folders but no files."""
    if name.casefold() not in SPLIT_NAMES:
        return False
    if _list_visible(videos_dir, name, want_folders=False)[0]:
        return False  # a class of this name
    return bool(_list_visible(videos_dir, name, want_folders=True)[0])


def _list_some(folders: list[str]) -> str:
    """Return "the folder 'a'", or "3 folders such as 'a'"."""
    if len(folders) == 1:
        return f"the folder {folders[0]!r}"
    return f"{len(folders)} folders such as {folders[0]!r}"


def _list_visible(root: str, folder: str, want_folders: bool) -> tuple[list[str], list[str]]:
    """List the folders (or else the files) in root/folder that are not hidden.

    Returns:
      (names, sorted; a notice of entries of the other kind, if there are any).
    """
    entries = [e for e in os.scandir(os.path.join(root, folder)) if not e.name.startswith(".")]
    wanted = sorted(entry.name for entry in entries if _is_folder(entry) == want_folders)
    others = sorted(entry.name for entry in entries if _is_folder(entry) != want_folders)
    if not others:
        return wanted, []
    kind = "files outside class folders" if want_folders else "folders inside a class folder"
    place = os.path.join(root, folder) if folder else root
    return wanted, [f"{len(others)} {kind} in {place} are ignored, such as {others[0]!r}"]


def _is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder; a link that leads to itself counts as a file."""
    try:
        return entry.is_dir()
    except OSError:
        return False
