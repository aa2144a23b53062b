"""Draws evaluated videos: their frames, and the attention of the model's paths over them."""

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
from dualpath_jax.config.schema import GENERATED_SOURCES
from dualpath_jax.data.dataset_metadata import DECODE_ERRORS
from dualpath_jax.data.video_dataset import FRAME_FEATURES, VideoDataset
from dualpath_jax.inference import trained_model
from dualpath_jax.report.run_reader import RunRecord
from dualpath_jax.runtime import progress_bar
from dualpath_jax.runtime.command_line import command_line

_TILES_PER_ROW = 4  # images side by side
TILE_HEIGHT = 112  # pixels of such an image
_SMALL_TILES_PER_ROW, _SMALL_ROWS = 8, 2  # for frames of framesets, which are small
_JPEG_QUALITY = 80
_ATTENTION_KIND = "with adaptation"  # kind of the attention maps, see `ClipAttention`


@dataclasses.dataclass(frozen=True)
class Strip:
    """Holds a JPEG of images of one size, side by side in one row or more.

    Attributes:
      title: caption.
      url: "data:image/jpeg;base64,...".
      width, height: pixels.
      percent: share of the available width, 1..100. A strip with fewer images gets less of it,
        so that images are equally large in all strips.
    """

    title: str
    url: str
    width: int
    height: int
    percent: int


class _SingleVideoDataset:
    """Presents one video of a data set as a data set of its own, for `pipeline.EvalClips`."""

    def __init__(self, dataset: VideoDataset, row: int):
        self._dataset, self._row = dataset, row
        self.class_names, self.ids = dataset.class_names, [dataset.ids[row]]
        for name in ("labels", "num_frames", "heights", "widths"):
            setattr(self, name, getattr(dataset, name)[row : row + 1])

    def __len__(self) -> int:
        return 1

    def read_frames(self, video_index: int, frame_indices: Sequence[int]) -> list[bytes]:
        """Return records of frames; see `VideoDataset.read_frames`."""
        del video_index
        return self._dataset.read_frames(self._row, frame_indices)


def mistake_strips(
    run: RunRecord, ids: Sequence[str], data_dir: str | None = None, backbone: str | None = None
) -> dict[str, list[Strip]]:
    """Draw the videos `ids`: their frames, and attention over them if the model allows it.

    Anything that cannot be drawn is added to `run.missing`.

    Args:
      run: an evaluated run.
      ids: ids of videos in the split that was evaluated.
      data_dir: folder of the prepared data; None for the run's own.
      backbone: file of the converted backbone; None for the run's own.

    Returns:
      The strips of each video, by id.
    """
    if not ids:
        return {}
    folder = data_dir or run.results.get("dataset")
    if not isinstance(folder, str) or run.results.get("synthetic"):
        run.report_missing("no images of mistakes: the videos are synthetic (data.synthetic)")
        return {}
    try:
        dataset = VideoDataset(folder, str(run.results.get("split")))
    except FileNotFoundError:
        run.report_missing(
            f"no images of mistakes: there are no prepared videos in {folder}; if they were moved, "
            "give their folder by --data_dir=DIR",
            _preparation_command(run, folder),
        )
        return {}
    except (ValueError, OSError) as problem:
        run.report_missing(f"no images of mistakes: {_one_line(problem)}")
        return {}
    row_of = {name: row for row, name in enumerate(dataset.ids)}
    rows = [row_of[name] for name in ids if name in row_of]
    if len(rows) < len(ids):
        run.report_missing(
            f"no images of {len(ids) - len(rows)} of {len(ids)} mistakes: {folder} has no videos "
            "with these names; it was prepared again after the evaluation",
            run.command("eval"),
        )
    strips: dict[str, list[Strip]] = {}
    with progress_bar.ProgressBar(len(rows), "images of mistakes", "videos") as progress:
        attention = _attention_strips(run, dataset, rows, backbone) if rows else iter(())
        for row in rows:
            name = dataset.ids[row]
            try:
                strips[name] = [_draw_frame_strip(dataset, row), *next(attention, [])]
            except (ValueError, OSError, *DECODE_ERRORS) as problem:
                run.report_missing(f"no images of {name!r} and later ones: {_one_line(problem)}")
                break
            progress.update()
    return strips


def _preparation_command(run: RunRecord, folder: str) -> str:
    """Return the command that prepares the videos of a run."""
    source = run.settings.get("data.source", "DATASET")
    if source in GENERATED_SOURCES:
        return run.command("eval")  # this renders the videos again
    return (
        f"{command_line('prepare')} --dataset={source} --videos=VIDEOS "
        f"--annotations=ANNOTATIONS --out={folder}"
    )


def _attention_strips(
    run: RunRecord, dataset: VideoDataset, rows: Sequence[int], backbone: str | None
) -> Iterator[list[Strip]]:
    """Yield the attention strips of each video; end early if the model cannot draw them."""
    try:
        model = _load_evaluated_model(run, backbone)
    except (ValueError, OSError, KeyError, AttributeError) as problem:
        run.report_missing(
            f"no attention maps: {_one_line(problem)}. If the backbone was moved, give its file",
            f"{command_line('report')} --workdir={run.workdir} --backbone=FILE --out=report.html",
        )
        return
    for row in rows:
        clip = attention_figures.middle_view_clips(
            model.clips_from_frames(_SingleVideoDataset(dataset, row)), model.config
        )
        try:
            view = attention_figures.analyze_clip(model, clip, kinds=[_ATTENTION_KIND])
        except ValueError as problem:  # another method, or no class token
            run.report_missing(f"no attention maps: {_one_line(problem)}")
            return
        yield _draw_attention_strips(view)


def _load_evaluated_model(run: RunRecord, backbone: str | None) -> trained_model.TrainedModel:
    """Load the model that was evaluated: the newest checkpoint, otherwise the best."""
    model, step = trained_model.load(run.workdir, backbone), run.results["step"]
    if model.step != step:
        with contextlib.suppress(ValueError):  # the run has no best checkpoint
            model = trained_model.load(run.workdir, backbone, "best")
    if model.step != step:
        raise ValueError(f"the checkpoint of step {step}, which was evaluated, is gone")
    return model


def _draw_attention_strips(view: attention_figures.ClipAttention) -> list[Strip]:
    """Draw attention over the spatial frames, and over the frames of the framesets."""
    apart, strips = view.split_framesets(), []
    for path, images in apart.images.items():
        tiles, rows = (
            (_TILES_PER_ROW, 1) if path == "spatial" else (_SMALL_TILES_PER_ROW, _SMALL_ROWS)
        )
        height = TILE_HEIGHT * _TILES_PER_ROW // tiles
        width = round(height * images.shape[2] / images.shape[1])
        overlays = apart.draw_overlays(path, _ATTENTION_KIND, (width, height))
        chosen = [overlays[i] for i in _evenly_spaced(len(overlays), tiles * rows)]
        strips.append(_make_strip(f"where the {path} path looks", chosen, tiles))
    return strips


def _draw_frame_strip(dataset: VideoDataset, row: int) -> Strip:
    """Draw evenly spaced frames of a video."""
    records = dataset.read_frames(row, _evenly_spaced(int(dataset.num_frames[row]), _TILES_PER_ROW))
    images = []
    for record in records:
        jpeg = tf.io.parse_single_example(record, FRAME_FEATURES)["image"].numpy()
        with Image.open(io.BytesIO(jpeg)) as image:
            width = max(1, round(TILE_HEIGHT * image.width / image.height))
            images.append(np.asarray(image.convert("RGB").resize((width, TILE_HEIGHT))))
    return _make_strip("frames", images, _TILES_PER_ROW)


def _evenly_spaced(count: int, limit: int) -> list[int]:
    """Return up to `limit` indices below `count`: the middles of equal parts."""
    number = min(count, limit)
    return [int((k + 0.5) * count / number) for k in range(number)]


def _make_strip(title: str, images: Sequence[np.ndarray], tiles: int) -> Strip:
    """Join images of one size, `tiles` in a row; an incomplete last row is left out."""
    columns = min(len(images), tiles)
    rows = len(images) // columns
    grid = np.stack(images[: rows * columns]).reshape(rows, columns, *images[0].shape)
    image = Image.fromarray(einops.rearrange(grid, "r c h w rgb -> (r h) (c w) rgb"))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Strip(title, url, image.width, image.height, 100 * columns // tiles)


def _one_line(problem: Exception) -> str:
    """Return an error's message on one line, at most 300 characters."""
    return " ".join(str(problem).split())[:300]
