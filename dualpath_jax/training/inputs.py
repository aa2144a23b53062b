"""Checks what a run reads and writes, and opens its data: workdir, prepared videos, weights."""

import copy
from collections.abc import Callable
from typing import Any

from etils import epath

from dualpath_jax.data import pipeline, synthetic
from dualpath_jax.data.datasets import hmdb51
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.runtime import gcs

SYNTHETIC_VIDEOS = 1000


def check_workdir(workdir: str) -> None:
    """Make the workdir; OSError with the remedy when it cannot be written."""
    gcs.check_gcs_installed(workdir, "--workdir")
    path = epath.Path(workdir)
    try:
        with gcs.gcs_errors(workdir):
            path.mkdir(parents=True, exist_ok=True)
            (path / ".writable").write_text("")
            (path / ".writable").unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to --workdir={workdir}: {error}; choose another folder"
        ) from None


def expand_splits(config: Any, workdir: str) -> list[tuple[Any, str]]:
    """The runs that `config.data.split` asks for: what it is in each, and the workdir of each.

    A data set that is divided in several ways has splits train1, test1, train2, ...; "2" stands for
    train2 and test2, "all" for the three runs of HMDB51, in workdir/split1 and so on.
    """
    split = config.data.split
    if split is None:
        return [(config, workdir)]
    runs = []
    for number in hmdb51.DIVISIONS if split == "all" else (split,):
        one = copy.deepcopy(config)
        one.data.split = None
        one.data.train_split = config.data.train_split.rstrip("0123456789") + number
        one.eval.split = config.eval.split.rstrip("0123456789") + number
        runs.append((one, f"{workdir}/split{number}" if split == "all" else workdir))
    return runs


def check_inputs(config: Any) -> None:
    """FileNotFoundError with the commands for whatever is missing, data and weights at once."""
    if config.data.synthetic:
        print(
            f"data.synthetic: one made-up batch at every step, random {config.backbone.name} "
            "weights; the device is timed, scores mean nothing",
            flush=True,
        )
        return
    data_dir, weights = config.data.dir, config.backbone.checkpoint
    if not data_dir:
        raise ValueError(
            "config.data.dir is not set: pass --config.data.dir=DIR, the --out of "
            "scripts/prepare_dataset.py"
        )
    if not weights:
        raise ValueError(
            "config.backbone.checkpoint is not set: pass "
            "--config.backbone.checkpoint=FILE, the --out of scripts/convert_clip.py"
        )
    missing, commands = [], []
    if not _exists(f"{data_dir}/dataset_info.json"):
        missing.append(f"prepared data in {data_dir}")
        # A folder that nobody prepared videos in may be that of the videos.
        theirs = _exists(data_dir) and not _exists(f"{data_dir}/prepare")
        videos, out = (data_dir, "NEW") if theirs else ("VIDEOS", data_dir)
        annotations = "" if config.data.source == "folder" else " --annotations=ANNOTATIONS"
        commands.append(
            f"python scripts/prepare_dataset.py --dataset={config.data.source} --videos={videos}"
            f"{annotations} --out={out}"
        )
    if not _exists(weights):
        missing.append(f"converted {config.backbone.name} weights in {weights}")
        commands.append(f"python scripts/convert_clip.py --checkpoint=FILE --out={weights}")
    if missing:
        raise FileNotFoundError(
            f"no {' and no '.join(missing)}. Run first:\n  " + "\n  ".join(commands)
        )


def _exists(path: str) -> bool:
    with gcs.gcs_errors(path):
        return epath.Path(path).exists()


def open_datasets(config: Any) -> tuple[VideoDataset, VideoDataset]:
    """The splits to train on and to evaluate; with `data.synthetic` stand-ins, made in memory.

    A synthetic epoch has `SYNTHETIC_VIDEOS` videos, an evaluation one batch.
    """
    if config.data.synthetic:
        sizes = (SYNTHETIC_VIDEOS, config.eval.batch_size)
        return tuple(synthetic.make_synthetic_split(config.data, size) for size in sizes)
    splits = (config.data.train_split, config.eval.split)
    return tuple(VideoDataset(config.data.dir, split) for split in splits)


def dataset_fingerprint(dataset: VideoDataset) -> list[Any]:
    """What decides which videos are seen when, and what is learnt of them, for JSON."""
    numbers = (dataset.labels.tolist(), dataset.num_frames.tolist())
    return [list(dataset.ids), *numbers, list(dataset.class_names)]


def choose_train_batches(data: Any) -> Callable:
    """`train_batches` of the pipeline, or the one for `data.synthetic`."""
    return (synthetic if data.synthetic else pipeline).train_batches
