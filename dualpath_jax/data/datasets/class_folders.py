"""Reads a data set whose folders are its classes."""

import collections
import os

from dualpath_jax.data.datasets.annotations import SPLIT_NAMES, DatasetIndex, Video
from dualpath_jax.data.preparation.image_folder import is_image_folder

CLASS_LEVEL_HELP = (
    "level of the folders that are classes, below VIDEOS or its split folders: 2 for group/class/. "
    "Everything inside of a class folder is of its class (1)"
)
_MAX_DEPTH = 10  # folders in a class folder


def read_folder(videos_dir: str, annotations: str | None, class_level: int = 1) -> DatasetIndex:
    """List the videos in class folders.

    All videos below a class folder are of its class, at any depth. A folder of images is a video.

    Args:
      videos_dir: folder that holds the class folders, either directly or inside split folders
        (train, validation or val, test, and other spellings: `SPLIT_NAMES`, in any case).
      annotations: not used.
      class_level: level of the folders that are classes, from 1, counted from `videos_dir` or from
        the split folders. Folders of the same name at a level above 1 are one class.

    Returns:
      The data set. A video's id is its path relative to `videos_dir`; classes are sorted by name.

    Raises:
      ValueError: there are no class folders, a class has no videos, two folders name the same
        split, there are other folders next to split folders, split folders are inside of class
        folders, or a class folder itself holds images.
    """
    del annotations  # the folders are the annotations
    folders, notices = _list_visible(videos_dir, "", want_folders=True)
    if not folders:
        raise ValueError(f"{videos_dir!r} holds no class folders; expected VIDEOS/<class>/<file>")
    class_folders, more = _find_class_folders(videos_dir, folders, class_level)
    notices += more
    class_names = sorted({name for _, name, _ in class_folders})
    index = {name: i for i, name in enumerate(class_names)}
    splits = collections.defaultdict(list)
    nested = []  # (class folder, a folder in it, number of videos) without a file of its own
    for split, name, folder in class_folders:
        paths, more = _list_videos(videos_dir, folder)
        notices += more
        splits[split] += [Video(path, path, index[name]) for path in paths]
        deeper = [path.removeprefix(f"{folder}/").rpartition("/")[0] for path in paths]
        if paths and all(deeper):
            nested.append((folder, deeper[0].split("/")[0], len(paths)))
    used = {video.label for videos in splits.values() for video in videos}
    for _, name, folder in class_folders:
        if index[name] not in used:
            raise ValueError(
                f"class folder {folder!r} in {videos_dir!r} holds no video; fill or remove it, or "
                "name another folder of videos"
            )
    if nested:
        folder, inner, count = nested[0]
        notices.append(
            f"the {count} videos in the folders of {folder!r}, such as {inner!r}, all count as one "
            f"class; if these folders are the classes, pass --class_level={class_level + 1}"
        )
    if "" in splits:
        return DatasetIndex(class_names, {"train": splits[""]}, notices, has_splits=False)
    return DatasetIndex(class_names, dict(splits), notices)


def _list_videos(root: str, folder: str, depth: int = 0) -> tuple[list[str], list[str]]:
    """Return the paths of all videos in a class folder, sorted, and notices.

    Args:
      root: the folder of videos.
      folder: path of the class folder, or of a folder in it, relative to `root`.
      depth: folders between the class folder and this one.

    Raises:
      ValueError: the class folder holds images or split folders, or folders are nested too deep.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(
            f"{folder!r} in {root!r} is nested more than {_MAX_DEPTH} folders deep; is one of them "
            "a link to a folder above it?"
        )
    if depth and is_image_folder(os.path.join(root, folder)):
        return [folder], []
    files, _ = _list_visible(root, folder, want_folders=False)
    folders, _ = _list_visible(root, folder, want_folders=True)
    ignored = [name for name in folders if name.startswith("@")]  # made by network drives
    folders = [name for name in folders if name not in ignored]
    if not depth:
        _check_class_folder(root, folder, folders)
    elif not files and not folders and not ignored:
        return [folder], []  # images are missing: the ledger of bad videos names it
    notices = []
    if ignored:
        notices = [f"folders in {folder!r} whose names begin with @ are ignored: {ignored[0]!r}"]
    paths = [f"{folder}/{name}" for name in files]
    for name in folders:
        more, others = _list_videos(root, f"{folder}/{name}", depth + 1)
        paths += more
        notices += others
    return sorted(paths), notices


def _check_class_folder(root: str, folder: str, inside: list[str]) -> None:
    """Raise ValueError if a class folder holds the images of a video, or split folders."""
    if splits := [name for name in inside if name.casefold() in SPLIT_NAMES]:
        raise ValueError(
            f"class folder {folder!r} in {root!r} holds {_list_some(splits)}, the name of a split: "
            "split folders are expected outside of class folders, as in train/<class>/<file>"
        )
    if is_image_folder(os.path.join(root, folder)):
        raise ValueError(
            f"class folder {folder!r} in {root!r} holds images: put the images of each video into "
            f"a folder of its own, {folder}/<video>/img_00001.jpg"
        )


def _find_class_folders(
    videos_dir: str, folders: list[str], class_level: int
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Return (split or "", class name, path) of each class folder, and notices.

    Raises:
      ValueError: two folders name the same split, or there are others next to split folders.
    """
    split_folders = [name for name in folders if _is_split_folder(videos_dir, name)]
    if all(name.casefold() in SPLIT_NAMES for name in folders):
        split_folders = folders
    if not split_folders:
        return _descend(videos_dir, [("", name, name) for name in folders], class_level)
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
    class_folders, more = _descend(videos_dir, class_folders, class_level)
    return class_folders, notices + more


def _descend(
    root: str, folders: list[tuple[str, str, str]], class_level: int
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Replace folders of level 1 by those of `class_level` inside of them; return notices too.

    Raises:
      ValueError: there is no folder at that level.
    """
    notices: list[str] = []
    for level in range(2, class_level + 1):
        deeper = []
        for split, _, folder in folders:
            names, more = _list_visible(root, folder, want_folders=True)
            deeper += [(split, name, f"{folder}/{name}") for name in names]
            notices += more
        if not deeper:
            raise ValueError(
                f"--class_level={class_level}: {root!r} has no folders at level {level}, such as "
                f"in {folders[0][2]!r}"
            )
        folders = deeper
    return folders, notices


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
    kind = "files outside class folders" if want_folders else "folders"
    place = os.path.join(root, folder) if folder else root
    return wanted, [f"{len(others)} {kind} in {place} are ignored, such as {others[0]!r}"]


def _is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder; a link that leads to itself counts as a file."""
    try:
        return entry.is_dir()
    except OSError:
        return False
