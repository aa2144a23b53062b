"""Class folders as annotations: `read_folder`."""

import collections
import os

from dualpath_jax.data.datasets.annotations import SPLIT_NAMES, DatasetIndex, Video, split_by_hash


def read_folder(
    videos_dir: str, annotations: str | None, validation_fraction: float
) -> DatasetIndex:
    """Class folders with videos in them, perhaps inside train, validation (or val) and test."""
    del annotations  # the folders say all
    folders, notices = _visible(videos_dir, "", want_folders=True)
    if not folders:
        raise ValueError(f"{videos_dir!r} holds no class folders; expected VIDEOS/<class>/<file>")
    if set(folders) <= set(SPLIT_NAMES):
        if len({SPLIT_NAMES[name] for name in folders}) < len(folders):
            raise ValueError(
                f"{videos_dir!r} has {', '.join(folders)}: two are the same split; keep one of them"
            )
        found = []
        for folder in folders:
            classes, more = _visible(videos_dir, folder, want_folders=True)
            notices += more
            found += [(SPLIT_NAMES[folder], name, f"{folder}/{name}") for name in classes]
    else:
        found = [("", name, name) for name in folders]
    class_names = sorted({name for _, name, _ in found})
    index = {name: i for i, name in enumerate(class_names)}
    splits = collections.defaultdict(list)
    for split, name, folder in found:
        files, more = _visible(videos_dir, folder, want_folders=False)
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


def _visible(root: str, folder: str, want_folders: bool) -> tuple[list[str], list[str]]:
    """Sorted names of the folders (or files) in root/folder without hidden ones, and notices."""
    entries = [e for e in os.scandir(os.path.join(root, folder)) if not e.name.startswith(".")]
    wanted = sorted(entry.name for entry in entries if entry.is_dir() == want_folders)
    others = sorted(entry.name for entry in entries if entry.is_dir() != want_folders)
    if not others:
        return wanted, []
    kind = "files outside class folders" if want_folders else "folders inside a class folder"
    place = os.path.join(root, folder) if folder else root
    return wanted, [f"{len(others)} {kind} in {place} are ignored, such as {others[0]!r}"]
