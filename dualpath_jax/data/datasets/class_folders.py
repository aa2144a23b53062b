"""Reads a data set whose folders are its classes."""

import collections
import os

from dualpath_jax.data.datasets.annotations import SPLIT_NAMES, DatasetIndex, Video
from dualpath_jax.data.preparation.video_names import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    is_ignored,
    is_image_folder,
)

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
        folders, a class folder itself holds images, or a folder in it holds images and also
        folders or videos.
    """
    del annotations  # the folders are the annotations
    tree = _Tree(videos_dir)
    folders = tree.list_folders("")
    if not folders:
        raise ValueError(f"{videos_dir!r} holds no class folders; expected VIDEOS/<class>/<file>")
    class_folders = _find_class_folders(tree, folders, class_level)
    class_names = sorted({name for _, name, _ in class_folders})
    index = {name: i for i, name in enumerate(class_names)}
    splits = collections.defaultdict(list)
    nested = []  # (class folder, a folder in it, number of videos) without a file of its own
    for split, name, folder in class_folders:
        paths = _list_videos(tree, folder)
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
    notices = tree.all_notices()
    if nested:
        folder, inner, count = nested[0]
        notices.append(
            f"the {count} videos in the folders of {folder!r}, such as {inner!r}, all count as one "
            f"class; if these folders are the classes, pass --class_level={class_level + 1}"
        )
    if "" in splits:
        return DatasetIndex(class_names, {"train": splits[""]}, notices, has_splits=False)
    return DatasetIndex(class_names, dict(splits), notices)


class _Tree:
    """Lists the folders and files below a folder of videos, and notes what is ignored.

    Attributes:
      root: the folder of videos.
      notices: of what is ignored, without the folders that `is_ignored` names.
    """

    def __init__(self, root: str):
        self.root = root
        self.notices: list[str] = []
        self._ignored: dict[str, None] = {}  # folders, each once

    def list_entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the files in a folder, sorted.

        Hidden entries, and folders whose names begin with @, are left out.
        """
        folders, files = [], []
        for entry in sorted(os.scandir(os.path.join(self.root, folder)), key=lambda e: e.name):
            if not is_ignored(entry):
                (folders if _is_folder(entry) else files).append(entry.name)
            elif not entry.name.startswith("."):
                self._ignored[os.path.join(folder, entry.name)] = None
        return folders, files

    def list_folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder outside of class folders; note its files."""
        folders, files = self.list_entries(folder)
        if files:
            place = os.path.join(self.root, folder) if folder else self.root
            one, many = (f"{noun} outside class folders in {place}" for noun in ("file", "files"))
            self.notices.append(_describe_ignored(one, many, files))
        return folders

    def all_notices(self) -> list[str]:
        """Return the notices, with one of all ignored folders."""
        if not self._ignored:
            return self.notices
        one, many = "folder whose name begins with @", "folders whose names begin with @"
        return [*self.notices, _describe_ignored(one, many, list(self._ignored))]


def _describe_ignored(one: str, many: str, names: list[str]) -> str:
    """Return a sentence on ignored entries; `one` and `many` say what they are."""
    if len(names) == 1:
        return f"1 {one} is ignored: {names[0]!r}"
    return f"{len(names)} {many} are ignored, such as {names[0]!r}"


def _list_videos(tree: _Tree, folder: str, depth: int = 0) -> list[str]:
    """Return the paths of all videos in a class folder, sorted.

    Args:
      tree: of the folder of videos.
      folder: path of the class folder, or of a folder in it, relative to the root.
      depth: folders between the class folder and this one.

    Raises:
      ValueError: the class folder holds images or split folders, a folder in it holds images and
        also folders or videos, or folders are nested too deep.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(
            f"{folder!r} in {tree.root!r} is nested more than {_MAX_DEPTH} folders deep; is one of "
            "them a link to a folder above it?"
        )
    folders, files = tree.list_entries(folder)
    if not depth:
        _check_class_folder(tree, folder, folders)
    elif is_image_folder(os.path.join(tree.root, folder)):
        return [folder]
    elif not files and not folders:
        return [folder]  # images are missing: the ledger of bad videos names it
    else:
        files = _leave_out_image(tree, folder, folders, files)
    paths = [f"{folder}/{name}" for name in files]
    for name in folders:
        paths += _list_videos(tree, f"{folder}/{name}", depth + 1)
    return sorted(paths)


def _leave_out_image(tree: _Tree, folder: str, folders: list[str], files: list[str]) -> list[str]:
    """Return the files of a folder that is no video, without an image among them, which is noted.

    Raises:
      ValueError: there are several images, which look like those of a video.
    """
    images = [name for name in files if _has_suffix(name, IMAGE_SUFFIXES)]
    videos = [name for name in files if _has_suffix(name, VIDEO_SUFFIXES)]
    if not images or not folders + videos:
        return files
    what = _list_some(folders) if folders else f"the video {videos[0]!r}"
    if len(images) > 1:
        raise ValueError(
            f"{folder!r} in {tree.root!r} holds images and also {what}: keep only the images in "
            "the folder of a video"
        )
    tree.notices.append(f"the image {images[0]!r} next to {what} in {folder!r} is ignored")
    return [name for name in files if name not in images]


def _has_suffix(name: str, suffixes: frozenset[str]) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes


def _check_class_folder(tree: _Tree, folder: str, inside: list[str]) -> None:
    """Raise ValueError if a class folder holds the images of a video, or split folders."""
    if splits := [name for name in inside if name.casefold() in SPLIT_NAMES]:
        raise _inner_splits_error(tree, folder, splits)
    if is_image_folder(os.path.join(tree.root, folder)):
        raise ValueError(
            f"class folder {folder!r} in {tree.root!r} holds images: put the images of each video "
            f"into a folder of its own, {folder}/<video>/img_00001.jpg"
        )


def _inner_splits_error(tree: _Tree, folder: str, splits: list[str]) -> ValueError:
    """Return the error of split folders inside of a class folder."""
    return ValueError(
        f"class folder {folder!r} in {tree.root!r} holds {_list_some(splits)}, the name of a "
        "split: split folders are expected outside of class folders, as in train/<class>/<file>"
    )


def _find_class_folders(
    tree: _Tree, folders: list[str], class_level: int
) -> list[tuple[str, str, str]]:
    """Return (split or "", class name, path) of each class folder.

    Raises:
      ValueError: two folders name the same split, or there are others next to split folders.
    """
    split_folders = [name for name in folders if _is_split_folder(tree, name)]
    if all(name.casefold() in SPLIT_NAMES for name in folders):
        split_folders = folders
    if not split_folders:
        return _descend(tree, [("", name, name) for name in folders], class_level)
    if others := [name for name in folders if name not in split_folders]:
        raise ValueError(
            f"{tree.root!r} holds the split folders {', '.join(split_folders)}, and also "
            f"{_list_some(others)}: name a folder that holds either split folders or class "
            "folders alone"
        )
    if len({SPLIT_NAMES[name.casefold()] for name in folders}) < len(folders):
        raise ValueError(
            f"{tree.root!r} has {', '.join(folders)}: two are the same split; keep one of them"
        )
    class_folders = []
    for folder in folders:
        split = SPLIT_NAMES[folder.casefold()]
        class_folders += [(split, name, f"{folder}/{name}") for name in tree.list_folders(folder)]
    return _descend(tree, class_folders, class_level)


def _descend(
    tree: _Tree, folders: list[tuple[str, str, str]], class_level: int
) -> list[tuple[str, str, str]]:
    """Replace folders of level 1 by those of `class_level` inside of them.

    Raises:
      ValueError: there is no folder at that level, or folders there are splits.
    """
    for level in range(2, class_level + 1):
        inside = {folder: tree.list_folders(folder) for _, _, folder in folders}
        if not any(inside.values()):
            raise ValueError(
                f"--class_level={class_level}: {tree.root!r} has no folders at level {level}, such "
                f"as in {folders[0][2]!r}"
            )
        tree.notices += [
            f"{folder!r} holds no folders at level {level} and is ignored"
            for folder, names in inside.items()
            if not names
        ]
        _check_groups(tree, inside)
        folders = [
            (split, name, f"{folder}/{name}")
            for split, _, folder in folders
            for name in inside[folder]
        ]
    return folders


def _check_groups(tree: _Tree, inside: dict[str, list[str]]) -> None:
    """Raise ValueError if the folders in groups are splits.

    A single one may be a class of that name, such as vehicles/train next to vehicles/car.

    Args:
      tree: of the folder of videos.
      inside: folder -> the names of the folders in it.
    """
    splits = {
        folder: [name for name in names if name.casefold() in SPLIT_NAMES]
        for folder, names in inside.items()
    }
    are_all = all(splits[folder] == names for folder, names in inside.items())
    for folder, names in splits.items():
        if len(names) > 1 or (names and are_all):
            raise _inner_splits_error(tree, folder, names)


def _is_split_folder(tree: _Tree, name: str) -> bool:
    """Return whether a folder has the name of a split, and holds folders but no files."""
    if name.casefold() not in SPLIT_NAMES:
        return False
    folders, files = tree.list_entries(name)
    return bool(folders) and not files  # with files it is a class of this name


def _list_some(folders: list[str]) -> str:
    """Return "the folder 'a'", or "3 folders such as 'a'"."""
    if len(folders) == 1:
        return f"the folder {folders[0]!r}"
    return f"{len(folders)} folders such as {folders[0]!r}"


def _is_folder(entry: os.DirEntry) -> bool:
    """Return whether an entry is a folder; a link that leads to itself counts as a file."""
    try:
        return entry.is_dir()
    except OSError:
        return False
