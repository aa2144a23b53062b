"""Defines the fuzzing target for videos."""

import json
import pathlib
import random
import re

import av
import numpy as np

from dualpath_jax.data.datasets.annotations import DatasetIndex, Video
from dualpath_jax.data.preparation.prepare import PrepareOptions, prepare_dataset
from dualpath_jax.data.preparation.video_decoder import DecodeLimits
from dualpath_jax.data.video_dataset import VideoDataset
from tests.fuzz.mutate import mutate_bytes
from tests.fuzz.sandbox import ACCEPTED, FINDING, REFUSED, Case, Outcome, Target

_FORMATS = (  # file, codec, options of the container
    ("v.mp4", "libx264", {}),
    ("v.mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"}),
    ("v.mkv", "libx264", {}),
    ("v.webm", "libvpx", {}),
    ("v.avi", "mpeg4", {}),
)
_LIMITS = DecodeLimits(seconds=20, memory_mb=1024, max_pixels=512 * 512, max_frames=64)
# Parts of an mp4 or an avi file whose numbers control the decoder.
_ATOMS = re.compile(
    rb"ftyp|moov|mvhd|trak|tkhd|mdhd|hdlr|stsd|stts|stss|stsc|stsz|stco|ctts|elst|avc1|avcC|mp4v|"
    rb"esds|moof|tfhd|trun|mdat|avih|strh|strf|idx1|movi"
)


class Videos(Target):
    """Prepares videos with `prepare_dataset`: each must be stored or listed as bad.

    This holds whatever a video does to its decoding process.
    """

    batch = 25
    seconds = batch * _LIMITS.seconds  # twice the time that two workers need at most

    def __init__(self, folder: pathlib.Path):
        self._seeds = []
        for i, (name, codec, options) in enumerate(_FORMATS):
            path = folder / f"{i}-{name}"
            _write_video(path, codec, options)
            self._seeds.append(Case(name, {name: path.read_bytes()}))

    def seeds(self) -> list[Case]:
        return self._seeds

    def mutate(self, rng: random.Random, seed: Case) -> Case:
        ((name, data),) = seed.files.items()
        places = [match.start() for match in _ATOMS.finditer(data)]
        if places and rng.random() < 0.4:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 2))):
                place = max(0, rng.choice(places) + rng.randrange(-4, 32))
                value = rng.choice((0, 1, 2, 65535, 2**15, 2**24, 2**31 - 1, 2**32 - 1))
                changed[place : place + 4] = value.to_bytes(4, "big")
            return Case(seed.kind, {name: bytes(changed)})
        return Case(seed.kind, {name: mutate_bytes(rng, data)})

    def read_all(
        self, cases: list[Case], folders: list[pathlib.Path], out: pathlib.Path
    ) -> list[Outcome]:
        names = [f"{folder.name}/{case.kind}" for case, folder in zip(cases, folders, strict=True)]
        listing = DatasetIndex(["a"], {"train": [Video(name, name, 0) for name in names]})
        prepared = out / "prepared"
        stored = []
        try:
            prepare_dataset(
                listing,
                str(folders[0].parent),
                str(prepared),
                PrepareOptions(num_workers=2, limits=_LIMITS, progress=False),
            )
            stored = VideoDataset(str(prepared), "train").ids
        except ValueError as error:
            if "could be stored" not in str(error):
                raise
        lines = (prepared / "bad_videos.jsonl").read_text().splitlines()
        bad = {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}
        return [_find_outcome(name, stored, bad) for name in names]


def _find_outcome(name: str, stored: list[str], bad: dict[str, str]) -> Outcome:
    """Return the outcome of a video by the table of stored videos and the list of bad ones."""
    if (name in stored) == (name in bad):
        return Outcome(FINDING, f"{name} is both stored and listed as bad, or neither")
    return (
        Outcome(ACCEPTED) if name in stored else Outcome(REFUSED, f"bad_videos.jsonl: {bad[name]}")
    )


def _write_video(path: pathlib.Path, codec: str, options: dict[str, str]) -> None:
    """Write a video of 12 small frames of smooth noise."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 6, 8, 3), np.uint8)
    frames = noise.repeat(8, 1).repeat(8, 2)
    options = options | {"fflags": "+bitexact"}  # no random numbers in mkv and webm
    with av.open(str(path), "w", container_options=options) as container:
        stream = container.add_stream(codec, rate=12)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 6
        stream.codec_context.thread_count = 1  # the same bytes every time
        if codec == "libx264":  # its lookahead has a thread of its own
            stream.options = {"x264-params": "sync-lookahead=0:rc-lookahead=0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
