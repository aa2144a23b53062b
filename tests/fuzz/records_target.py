"""Defines the fuzzing target for prepared data."""

import io
import pathlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

from dualpath_jax.config import schema
from dualpath_jax.data import augment, clip_assembly, clip_spec, frame_sampling, video_dataset
from dualpath_jax.data.dataset_metadata import DECODE_ERRORS
from dualpath_jax.data.preparation import shard_writer
from dualpath_jax.data.preparation.shard_writer import VideoRow
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.data.video_source import FrameFormat
from tests.fuzz.mutate import mutate_bytes, mutate_json
from tests.fuzz.sandbox import Case, Target

_NUM_FRAMES = (3, 1, 5, 2)  # per video; the first two are in one shard
_HEIGHT, _WIDTH = 24, 32
# Replacements for the numbers in the video table.
_NUMBERS = (-(2**63), -1, 0, 1, 2, 3, 11, 12, 8192, 65535, 2**31, 2**62, 2**63 - 1)


class Records(Target):
    """Opens a `VideoDataset` and decodes a clip of every video, as training and evaluation do."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        (folder / "data/frames").mkdir(parents=True)
        _write_prepared_data(folder / "data")
        files = [path for path in (folder / "data").rglob("*") if path.is_file()]
        content = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}
        self._seeds = [Case("records", content)]
        self._payloads = {
            name: ArrayRecordReader(str(folder / name)).read_all()
            for name in content
            if "array_record" in name
        }
        self._data_config = schema.get_config().data
        self._data_config.update(
            num_frames=4,
            num_spatial_frames=2,
            grid=(2, 2),
            frame_scale=2,
            image_size=16,
            sampling="segments",
        )
        self._clip_format = clip_spec.build_clip_format(self._data_config)
        self._samples = _ClipSamples(self._clip_format)
        self._errors: list[Exception] = []
        # All cases share one stream, because tracing it takes much longer than decoding a clip.
        self._stream = clip_assembly.decode_clips(
            self._samples, self._clip_format, self._data_config, self._errors
        )

    def seeds(self) -> list[Case]:
        return self._seeds

    def mutate(self, rng: random.Random, seed: Case) -> Case:
        names = [n for n in seed.files if n.endswith(("dataset_info.json", "class_names.json"))]
        name = rng.choice([*names, *self._payloads, *self._payloads])
        content = seed.files[name]
        if name in self._payloads and rng.random() < 0.6:
            content = self._mutate_records(rng, name)
        elif name.endswith(".json") and rng.random() < 0.7:
            content = mutate_json(rng, content)
        else:
            content = mutate_bytes(rng, content)
        return Case(seed.kind, seed.files | {name: content})

    def _mutate_records(self, rng: random.Random, name: str) -> bytes:
        """Return a shard with valid checksums and a record damaged, missing or doubled."""
        payloads = list(self._payloads[name])
        place = rng.randrange(len(payloads))
        kind = rng.randrange(6)
        if kind == 0:
            del payloads[place]
        elif kind == 1:
            payloads.insert(place, payloads[place])
        elif kind == 2:
            payloads[place] = mutate_bytes(rng, payloads[place])
        else:
            payloads[place] = _mutate_example(rng, payloads[place])
        path = str(self._folder / "mutated")
        writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
        for payload in payloads:
            writer.write(payload)
        writer.close()
        return pathlib.Path(path).read_bytes()

    def read(self, kind: str, folder: pathlib.Path, out: pathlib.Path) -> None:
        del kind, out
        dataset = VideoDataset(str(folder / "data"), "train")
        self._errors.clear()
        self._samples.dataset = dataset
        try:
            for decoded in self._stream.as_numpy_iterator():
                dataset.class_names[decoded["label"]].encode("utf-8", "surrogateescape")
        except DECODE_ERRORS as error:  # handled as in `pipeline.eval_batches`
            if self._errors:
                raise self._errors[0] from None
            if not any(
                clip_assembly.find_decode_error(s, self._clip_format, self._data_config)
                for s in self._samples
            ):
                raise
            raise video_dataset.UnreadableVideo(str(error)) from None


class _ClipSamples:
    """Yields the clip samples of a data set, from the start in each iteration."""

    dataset: Any = None

    def __init__(self, clip_format: clip_spec.ClipFormat):
        self._clip_format = clip_format

    def __iter__(self) -> Iterator[dict[str, Any]]:
        dataset, rng = self.dataset, np.random.default_rng(0)
        for video in range(min(len(dataset), 10)):
            height, width = int(dataset.heights[video]), int(dataset.widths[video])
            count = int(dataset.num_frames[video])
            frames = frame_sampling.sample_frames("segments", count, 4, None, rng)
            crop = augment.eval_crop(height, width, 0, 3)
            if video % 2:
                crop = augment.random_resized_crop(height, width, rng, (0.08, 1.0), flip=True)
            yield clip_assembly.make_clip_sample(dataset, self._clip_format, video, frames, crop)


def _encode_noise(seed: int, progressive: bool) -> bytes:
    """Return a JPEG of random pixels."""
    noise = np.random.default_rng(seed).integers(0, 256, (_HEIGHT, _WIDTH, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=50, progressive=progressive)
    return buffer.getvalue()


def _write_prepared_data(out: pathlib.Path) -> None:
    """Write a small prepared data set of random frames."""
    first = np.cumsum([0, *_NUM_FRAMES])
    rows = [
        VideoRow(f"v{i}", i % 2, int(first[i]), count, 12.5, _HEIGHT, _WIDTH, False)
        for i, count in enumerate(_NUM_FRAMES)
    ]
    frames = []
    for shard, videos in enumerate(((0, 1), (2, 3))):
        with shard_writer.ShardWriter(
            video_dataset.frame_shard_path(str(out), "train", shard, 2)
        ) as writer:
            for video in videos:
                for frame in range(_NUM_FRAMES[video]):
                    jpeg = _encode_noise(10 * video + frame, progressive=video == 2)
                    writer.write(shard_writer.encode_frame(jpeg))
        frames.append(writer.describe())
    shard_writer.write_tables(
        str(out), ["a", "b"], {"train": rows}, {"train": frames}, FrameFormat()
    )
    (out / "identity.json").unlink()  # with it, a file of another size is not read at all


def _mutate_example(rng: random.Random, payload: bytes) -> bytes:
    """Return a tf.train.Example with one feature damaged, empty, doubled, missing or retyped."""
    example = tf.train.Example.FromString(payload)
    features = example.features.feature
    name = rng.choice(sorted(features))
    feature = features[name]
    values = getattr(feature, feature.WhichOneof("kind")).value
    kind = rng.randrange(10)
    if kind == 0:
        del features[name]
    elif kind == 1:
        values.append(values[0])
    elif kind == 2:
        del values[:]
    elif kind == 3:
        feature.bytes_list.value.append(b"3")
    elif isinstance(values[0], bytes):
        values[0] = mutate_bytes(rng, values[0])
    elif isinstance(values[0], float):
        values[0] = rng.choice((float("nan"), float("inf"), -1.0, 1e30))
    else:
        values[0] = rng.choice(_NUMBERS)
    return example.SerializeToString(deterministic=True)
