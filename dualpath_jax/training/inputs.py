"""Checks the workdir, data and weights of a run, and opens its data sets."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from dualpath_jax.config import schema
from dualpath_jax.data import pipeline, synthetic
from dualpath_jax.data.datasets.annotations import DIVISIONS
from dualpath_jax.data.few_shots import FewShots
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.data.video_source import VideoSource
from dualpath_jax.models.backbones import registry
from dualpath_jax.runtime import distributed, file_lock, files, gcs
from dualpath_jax.runtime.command_line import command_line
from dualpath_jax.runtime.safe_read import truncated_repr
from dualpath_jax.weights import convert

# Files and folders that runs write in their workdirs, as patterns of `fnmatch`.
WORKDIR_ENTRIES = (
    *(".lock", ".setup.lock", ".shared", "config.json", "environment.json", "results*.json"),
    *("metrics.jsonl", "events.out.tfevents.*", "predictions", "checkpoints"),
    *("probe.json", "probe_features", "probe_*.safetensors", "tune.json", "tune"),
    *("old_checkpoints", "damaged_checkpoints", "compiled_programs", "split[1-9]"),
)
_NUM_SYNTHETIC_VIDEOS = 1000


def check_workdir(workdir: str) -> None:
    """Make the workdir and check that it can be written.

    Raises:
      OSError: it cannot be written.
      ValueError: it is in Cloud Storage, and the client library is not installed; or what a run
        writes there is a link.
    """
    gcs.check_gcs_installed(workdir, "--workdir")
    files.check_no_links(workdir, WORKDIR_ENTRIES)
    try:
        with gcs.gcs_errors(workdir):
            files.check_writable(workdir)
    except OSError as error:
        raise OSError(
            f"cannot write to --workdir={workdir}: {error}; choose another folder"
        ) from None


@contextlib.contextmanager
def lock_workdir(workdir: str, option: str = "--workdir") -> Iterator[None]:
    """Make a folder for a run, lock it, and remove what killed writers left; in process 0.

    Args:
      workdir: the folder.
      option: the command-line option that names it, for messages.

    Raises:
      OSError, ValueError: see `check_workdir`, or another program has the lock.
    """
    if not distributed.is_main_process():
        yield
        return
    check_workdir(workdir)
    with file_lock.exclusive_lock(workdir, option):
        files.remove_incomplete(workdir)
        yield


def expand_splits(config: Any, workdir: str) -> list[tuple[Any, str]]:
    """Return the config and the workdir of each run that `config.data.split` asks for.

    A data set with several divisions has the splits train1, test1, train2, ... The value "2"
    selects train2 and test2. "all" selects the three divisions of HMDB51 or UCF101; each has a run
    of its own, in workdir/split1, workdir/split2 and workdir/split3.

    Raises:
      ValueError: a value of `config` is not allowed.
    """
    schema.check_values(config)  # `data.split` is None in what is returned
    split = config.data.split
    if split is None:
        return [(config, workdir)]
    runs = []
    for number in DIVISIONS if split == "all" else (split,):
        split_config = copy.deepcopy(config)
        split_config.data.split = None
        split_config.data.train_split = config.data.train_split.rstrip("0123456789") + number
        split_config.eval.split = config.eval.split.rstrip("0123456789") + number
        runs.append((split_config, f"{workdir}/split{number}" if split == "all" else workdir))
    return runs


def check_inputs(config: Any) -> None:
    """Check that prepared data and converted weights are there.

    Raises:
      ValueError: the config does not name them.
      FileNotFoundError: files are missing; the message has the commands that make them.
    """
    if config.data.synthetic:
        name = config.backbone.name or registry.DEFAULT
        print(
            f"data.synthetic: the same made-up batch at every step, random {name} weights; the "
            "device is timed, scores mean nothing",
            flush=True,
        )
        return
    data_dir, weights = config.data.dir, config.backbone.checkpoint
    if not data_dir:
        raise ValueError(
            "config.data.dir is not set: pass --config.data.dir=DIR, the --out of "
            f"`{command_line('prepare')}`"
        )
    if not weights:
        raise ValueError(
            "config.backbone.checkpoint is not set: pass --config.backbone.checkpoint=FILE, the "
            f"--out of `{command_line('convert')}`"
        )
    missing, commands = [], []
    if not _exists(f"{data_dir}/dataset_info.json"):
        missing.append(f"prepared data in {data_dir}")
        # An existing folder where no preparation began is probably the folder of the videos.
        has_videos = _exists(data_dir) and not _exists(f"{data_dir}/prepare")
        videos, out = (data_dir, "NEW") if has_videos else ("VIDEOS", data_dir)
        annotations = "" if config.data.source == "folder" else " --annotations=ANNOTATIONS"
        commands.append(
            f"{command_line('prepare')} --dataset={config.data.source} --videos={videos}"
            f"{annotations} --out={out}"
        )
    if not _exists(weights):
        name = "" if config.backbone.name is None else f"{config.backbone.name} "
        missing.append(f"converted {name}weights in {weights}")
        commands.append(f"{command_line('convert')} --checkpoint=FILE --out={weights}")
    if missing:
        raise FileNotFoundError(
            f"no {' and no '.join(missing)}. Run first:\n  " + "\n  ".join(commands)
        )


def _exists(path: str) -> bool:
    with gcs.gcs_errors(path):
        return epath.Path(path).exists()


def open_training_split(config: Any) -> VideoSource:
    """Open the prepared videos to train on: all, or `data.shots` of each class."""
    dataset = VideoDataset(config.data.dir, config.data.train_split)
    return dataset if config.data.shots is None else FewShots(dataset, config.data.shots)


def open_datasets(config: Any) -> tuple[VideoSource, VideoSource]:
    """Open the splits to train on and to evaluate; synthetic ones for `data.synthetic`.

    The synthetic training split has `_NUM_SYNTHETIC_VIDEOS` videos, the other one a batch.
    """
    if config.data.synthetic:
        sizes = (_NUM_SYNTHETIC_VIDEOS, config.eval.batch_size)
        return tuple(synthetic.make_synthetic_split(config.data, size) for size in sizes)
    return open_training_split(config), VideoDataset(config.data.dir, config.eval.split)


def report_untrained_classes(dataset: VideoSource) -> None:
    """Print the classes that have no video in the training split, unless all have one."""
    labels = set(dataset.labels.tolist())
    missing = [name for label, name in enumerate(dataset.class_names) if label not in labels]
    if missing:
        names = ", ".join(map(truncated_repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        print(
            f"{len(missing)} of {len(dataset.class_names)} classes have no training video and "
            f"cannot be learned: {names}",
            flush=True,
        )


def dataset_fingerprint(dataset: VideoSource) -> list[Any]:
    """Return, for JSON, what must be the same on all hosts: ids, labels, lengths, frames."""
    numbers = (dataset.labels.tolist(), dataset.num_frames.tolist())
    return [list(dataset.ids), *numbers, list(dataset.class_names), dataset.identity]


def input_digests(config: Any, splits: Iterable[str]) -> dict[str, str]:
    """Return digests of the backbone and of splits, by their names in messages; "" if unknown.

    Raises:
      ValueError, OSError: the file of the backbone or the data cannot be read.
    """
    digests = {"the backbone": convert.read_sha256(config.backbone.checkpoint)}
    for split in dict.fromkeys(splits):
        identity = VideoDataset(config.data.dir, split).identity
        digests[f"the list of {split} videos"] = identity["videos"]
        digests[f"the frames of {split} videos"] = identity["frames"]
    return digests


def changed_inputs(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """Return the names of `input_digests` that differ, as far as both are known."""
    return [
        name
        for name, digest in current.items()
        if digest and saved.get(name) not in (None, "", digest)
    ]


def choose_train_batches(data: Any) -> Callable:
    """Return `pipeline.train_batches`, or `synthetic.train_batches` for `data.synthetic`."""
    return (synthetic if data.synthetic else pipeline).train_batches
