"""Defines the fuzzing target for the annotations of every data set."""

import json
import os
import pathlib
import random

from dualpath_jax.data import augment
from dualpath_jax.data.datasets.registry import list_videos
from dualpath_jax.data.preparation import summary
from dualpath_jax.data.preparation.worker_pool import Failure
from tests.fuzz.mutate import mutate_bytes, mutate_json, mutate_text
from tests.fuzz.sandbox import Case, Target

_K400 = "label,youtube_id,time_start,time_end,split\n" + "".join(
    f"{label},-abc_{label[:2]}{i},{i},{i + 10},{{split}}\n"
    for label in ("abseiling", '"air, ""drumming"""')
    for i in range(3)
)
_SSV2 = [
    {"id": str(i), "label": "holding a cup", "template": "Holding [something]"} for i in range(4)
]
_DIVING = [{"vid_name": f"0Ms{i}_00{i}", "label": i % 2, "start_frame": 0} for i in range(4)]


def _encode_json(content: object) -> bytes:
    return json.dumps(content).encode()


# Files by data set; `list_videos` reads the folders "annotations" and "videos".
_SEEDS = {
    "k400": {f"annotations/{s}.csv": _K400.format(split=s).encode() for s in ("train", "val")}
    | {"videos/a/-abc_ab0_000000_000010.mp4": b""},
    "ssv2": {
        "annotations/labels.json": _encode_json(
            {"Holding something": "0", "Folding something": "1"}
        ),
        "annotations/train.json": _encode_json(_SSV2),
        "annotations/validation.json": _encode_json(_SSV2[:2]),
        "annotations/test.json": _encode_json([{"id": "8"}, {"id": "9"}]),
        "annotations/test-answers.csv": b"8;Holding something\n9;Folding something\n",
        "videos/0.webm": b"",
    },
    "hmdb51": {
        f"annotations/{name}_test_split{i}.txt": f"a_{name}.avi {i % 2 + 1} \nb.avi 0\n".encode()
        for name in ("wave", "sword_exercise")
        for i in (1, 2, 3)
    }
    | {"videos/wave/a_wave.avi": b""},
    "ucf101": {
        "annotations/classInd.txt": b"1 Archery\n2 Fencing\n",
        "annotations/trainlist01.txt": b"Archery/v_a.avi 1\nFencing/v_b.avi 2\n",
        "annotations/testlist01.txt": b"Archery/v_c.avi\n",
        "videos/Archery/v_a.avi": b"",
    },
    "diving48": {
        "annotations/Diving48_V2_train.json": _encode_json(_DIVING),
        "annotations/Diving48_V2_test.json": _encode_json(_DIVING[:2]),
        "annotations/Diving48_vocab.json": _encode_json([["Back", "15som", "05Twis", "FREE"]] * 2),
        "videos/0Ms0_000.mp4": b"",
    },
    "csv": {
        "annotations/train.csv": b'path,label\na/1.mp4,waves\n"b, 2.mp4",runs\nc.mp4 4,waves\n',
        "annotations/val.csv": b"d.mp4,waves\n",
        "videos/a/1.mp4": b"",
    },
    "csv_numbers": {
        "annotations/train.csv": b"a.mp4 0\nb.mp4 1\nc.mp4 1\nd.mp4 0\n",
        "videos/a.mp4": b"",
    },
    "folder": {f"videos/{split}/{i}/v.mp4": b"" for split in ("train", "val") for i in range(2)},
    "label_swap": {"swap.json": _encode_json([["turns left", "turns right"], ["pulls", "pushes"]])},
}


class Annotations(Target):
    """Reads annotations with `list_videos` of every data set, and with `mirrored_labels`.

    If they are accepted, it then writes a report of them, as `prepare` does for missing and bad
    videos.
    """

    def __init__(self, folder: pathlib.Path):
        del folder  # the seeds need no files
        self._seeds = [Case(kind, files) for kind, files in _SEEDS.items()]

    def seeds(self) -> list[Case]:
        return self._seeds

    def mutate(self, rng: random.Random, seed: Case) -> Case:
        files = dict(seed.files)
        name = rng.choice([n for n in files if files[n] or rng.random() < 0.2] or sorted(files))
        if not files[name]:  # a video, of which only the name is read
            files[_mutate_name(rng, name)] = files.pop(name)
        elif name.endswith(".json") and rng.random() < 0.6:
            files[name] = mutate_json(rng, files[name])
        else:
            files[name] = mutate_text(rng, files[name])
        return Case(seed.kind, files)

    def read(self, kind: str, folder: pathlib.Path, out: pathlib.Path) -> None:
        if kind == "label_swap":
            names = ["turns left", "turns right", "pulls", "pushes"]
            augment.mirrored_labels(names, str(folder / "swap.json"))
            return
        videos, dataset = folder / "videos", kind.partition("_")[0]
        listing = list_videos(dataset, str(videos), str(folder / "annotations"))
        lines = [*map(str, listing.class_names), *listing.notices]
        for split, split_videos in listing.videos_to_store().items():
            for video in split_videos:
                lines.append(
                    summary.format_json_line(summary.build_bad_entry(split, video, Failure("none")))
                )
                os.path.exists(os.path.join(videos, video.path))
        text = "\n".join(lines)
        (out / "report").write_text(text, encoding="utf-8", errors="surrogateescape")


def _mutate_name(rng: random.Random, path: str) -> str:
    """Return a damaged file name in the same folder or below."""
    folder, _, name = path.rpartition("/")
    mutated = mutate_bytes(rng, os.fsencode(name))[:200].strip(b"./").replace(b"\0", b"")
    parts = [part for part in mutated.split(b"/") if part.strip(b".")]
    return f"{folder}/{os.fsdecode(b'/'.join(parts[:3]) or b'x')}"
