"""Pictures of some evaluated videos: frames, and where both paths of the model look in them.

Public: `Strip`, `mistake_strips`.
"""

import base64
import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence

import einops
import numpy as np
import tensorflow as tf
from PIL import Image

from dualpath_jax.analysis import attention_figures
from dualpath_jax.data.dataset_metadata import DECODE_ERRORS
from dualpath_jax.data.video_dataset import FRAME_FEATURES, VideoDataset
from dualpath_jax.inference import trained_model
from dualpath_jax.report.run_reader import RunRecord
from dualpath_jax.runtime import progress_bar

TILES = 4  # pictures side by side
HEIGHT = 112  # pixels of such a picture
SMALL_TILES, SMALL_ROWS = 8, 2  # of the frames of framesets, which are small
_QUALITY = 80  # of the JPEG
_KIND = "with adaptation"  # of the maps of attention


@dataclasses.dataclass(frozen=True)
class Strip:
    """Pictures side by side, in one row or more.

    Attributes:
      title: what they are.
      url: "data:image/jpeg;base64,...".
      width, height: pixels.
      percent: of the room there is, so that pictures are equally large in strips of fewer.
    """

    title: str
    url: str
    width: int
    height: int
    percent: int


class _One:
    """One video of a data set in the place of the whole, for `pipeline.EvalClips`."""

    def __init__(self, dataset: VideoDataset, row: int):
        self._dataset, self._row = dataset, row
        self.class_names, self.ids = dataset.class_names, [dataset.ids[row]]
        for name in ("labels", "num_frames", "heights", "widths"):
            setattr(self, name, getattr(dataset, name)[row : row + 1])

    def __len__(self) -> int:
        return 1

    def read_frames(self, video_index: int, frame_indices: Sequence[int]) -> list[bytes]:
        """See `VideoDataset.read_frames`."""
        del video_index
        return self._dataset.read_frames(self._row, frame_indices)


def mistake_strips(
    run: RunRecord, ids: Sequence[str], data_dir: str | None = None, backbone: str | None = None
) -> dict[str, list[Strip]]:
    """Pictures of the videos `ids` by id; what cannot be shown is added to `run.missing`.

    Args:
      run: evaluated, with predictions.
      ids: videos of the split that was evaluated.
      data_dir: of the prepared data, where they are not where the run had them.
      backbone: likewise, file of the converted backbone.
    """
    if not ids:
        return {}
    folder = data_dir or run.results.get("dataset")
    if not isinstance(folder, str) or run.results.get("synthetic"):
        run.report_missing("no pictures of mistakes: the videos were made up (data.synthetic)")
        return {}
    try:
        dataset = VideoDataset(folder, str(run.results.get("split")))
    except FileNotFoundError:
        what = f"no pictures of mistakes: no prepared videos in {folder}"
        run.report_missing(
            f"{what}; --data_dir=DIR tells where they are now", _preparation(run, folder)
        )
        return {}
    except (ValueError, OSError) as problem:
        run.report_missing(f"no pictures of mistakes: {_line(problem)}")
        return {}
    place = {name: row for row, name in enumerate(dataset.ids)}
    rows = [place[name] for name in ids if name in place]
    if len(rows) < len(ids):
        run.report_missing(
            f"no pictures of {len(ids) - len(rows)} of {len(ids)} mistakes: {folder} has no "
            f"videos of these names, so it was prepared anew since the evaluation",
            run.command("eval"),
        )
    found: dict[str, list[Strip]] = {}
    with progress_bar.ProgressBar(len(rows), "pictures of mistakes", "videos") as progress:
        maps = _attention(run, dataset, rows, backbone) if rows else iter(())
        for row in rows:
            name = dataset.ids[row]
            try:
                found[name] = [_frames(dataset, row), *next(maps, [])]
            except (ValueError, OSError, *DECODE_ERRORS) as problem:
                run.report_missing(f"no pictures of {name!r} and what follows: {_line(problem)}")
                break
            progress.update()
    return found


def _preparation(run: RunRecord, folder: str) -> str:
    """The command that prepares the videos of a run."""
    source = run.settings.get("data.source", "DATASET")
    if source == "demo":
        return run.command("eval")  # renders it anew
    return (
        f"python scripts/prepare_dataset.py --dataset={source} --videos=VIDEOS "
        f"--annotations=ANNOTATIONS --out={folder}"
    )


def _attention(
    run: RunRecord, dataset: VideoDataset, rows: Sequence[int], backbone: str | None
) -> Iterator[list[Strip]]:
    """For each video the strips of the paths; ends early where the model cannot show them."""
    try:
        model = _model(run, backbone)
    except (ValueError, OSError, KeyError, AttributeError) as problem:
        run.report_missing(
            f"no maps of attention: {_line(problem)}. Where its backbone is, is told by",
            f"python scripts/report.py --workdir={run.workdir} --backbone=FILE --out=report.html",
        )
        return
    for row in rows:
        clip = attention_figures.middle_view_clips(
            model.clips_from_frames(_One(dataset, row)), model.config
        )
        try:
            view = attention_figures.analyze_clip(model, clip, kinds=[_KIND])
        except ValueError as problem:  # another method, or no class token
            run.report_missing(f"no maps of attention: {_line(problem)}")
            return
        yield _paths(view)


def _model(run: RunRecord, backbone: str | None) -> trained_model.TrainedModel:
    """The model that was evaluated: the newest checkpoint, or else the best."""
    model, step = trained_model.load(run.workdir, backbone), run.results["step"]
    if model.step != step:
        with contextlib.suppress(ValueError):  # there is no best one
            model = trained_model.load(run.workdir, backbone, "best")
    if model.step != step:
        raise ValueError(f"the checkpoint of step {step}, which was evaluated, is gone")
    return model


def _paths(view: attention_figures.ClipAttention) -> list[Strip]:
    """Attention of the tuned model over spatial frames, and over the frames of the framesets."""
    apart, found = view.taken_apart(), []
    for path, images in apart.images.items():
        tiles, rows = (TILES, 1) if path == "spatial" else (SMALL_TILES, SMALL_ROWS)
        down = HEIGHT * TILES // tiles
        across = round(down * images.shape[2] / images.shape[1])
        over = apart.overlays(path, _KIND, (across, down))
        chosen = [over[i] for i in _spread(len(over), tiles * rows)]
        found.append(_strip(f"where the {path} path looks", chosen, tiles))
    return found


def _frames(dataset: VideoDataset, row: int) -> Strip:
    """Frames of a video, evenly spaced."""
    records = dataset.read_frames(row, _spread(int(dataset.num_frames[row]), TILES))
    pictures = []
    for record in records:
        jpeg = tf.io.parse_single_example(record, FRAME_FEATURES)["image"].numpy()
        with Image.open(io.BytesIO(jpeg)) as image:
            width = max(1, round(HEIGHT * image.width / image.height))
            pictures.append(np.asarray(image.convert("RGB").resize((width, HEIGHT))))
    return _strip("frames", pictures, TILES)


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of `count` places, evenly spaced, the middles of equal parts."""
    number = min(count, most)
    return [int((k + 0.5) * count / number) for k in range(number)]


def _strip(title: str, pictures: Sequence[np.ndarray], tiles: int) -> Strip:
    """Pictures of one size, `tiles` in a row; what is left over of the last row is not shown."""
    columns = min(len(pictures), tiles)
    rows = len(pictures) // columns
    grid = np.stack(pictures[: rows * columns]).reshape(rows, columns, *pictures[0].shape)
    image = Image.fromarray(einops.rearrange(grid, "r c h w rgb -> (r h) (c w) rgb"))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Strip(title, url, image.width, image.height, 100 * columns // tiles)


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:300]
