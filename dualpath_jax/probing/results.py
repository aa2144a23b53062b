"""Holds the results of probes, which probe.json keeps."""

import dataclasses
import json
from typing import Any

from etils import epath

from dualpath_jax.analysis.confidence import format_accuracy
from dualpath_jax.runtime import files
from dualpath_jax.runtime.safe_read import read_json, truncated_repr

FILE = "probe.json"


@dataclasses.dataclass(frozen=True)
class ProbeScores:
    """Holds the result of a head on a split.

    Attributes:
      split: name of the split.
      top1: fraction of videos whose label is the most probable class, 0..1.
      interval: (low, high), Wilson's 95% confidence interval of `top1`.
      mean_class_accuracy: top-1 of each class, averaged over the classes in the split, 0..1.
      num_videos: number of videos.
    """

    split: str
    top1: float
    interval: tuple[float, float]
    mean_class_accuracy: float
    num_videos: int


@dataclasses.dataclass(frozen=True)
class HeadResult:
    """Holds the chosen training of a head.

    Attributes:
      head: a name of `options.HEADS`.
      learning_rate: the chosen one of the grid.
      weight_decay: the chosen one of the grid.
      trainable_params: number of parameters of the head.
      adapter: name of the file in the workdir with the trained head, an adapter file.
      validation: scores on the split by which the training was chosen.
      final: scores on `eval.split`; those of `validation` if it is the same split.
    """

    head: str
    learning_rate: float
    weight_decay: float
    trainable_params: int
    adapter: str
    validation: ProbeScores
    final: ProbeScores


@dataclasses.dataclass(frozen=True)
class ProbeResults:
    """Holds what `run.run_probe` found out; `to_json` is the content of probe.json.

    Attributes:
      heads: one result for each head, in the order of `ProbeOptions.heads`.
      views: frames x clips x crops of an evaluated video.
      num_clips: number of training clips whose features the heads were trained on.
      augmented_passes: number of augmented passes over the training videos; 0: one plain pass.
      num_steps: updates of each training.
      backbone: name of the backbone.
      backbone_sha256: of its file.
      dataset: folder of the prepared data.
      chosen_by: split by which learning rate and weight decay were chosen.
    """

    heads: tuple[HeadResult, ...]
    views: str
    num_clips: int
    augmented_passes: int
    num_steps: int
    backbone: str
    backbone_sha256: str
    dataset: str
    chosen_by: str

    @property
    def best(self) -> HeadResult:
        """Return the result of the head with the highest top-1 on `chosen_by`."""
        return max(self.heads, key=lambda result: result.validation.top1)

    def to_json(self) -> dict[str, Any]:
        """Return the results as nested dicts and lists."""
        return dataclasses.asdict(self)

    def write(self, workdir: str) -> None:
        """Write probe.json in `workdir`.

        Raises:
          OSError: it cannot be written.
        """
        files.write_text(epath.Path(workdir) / FILE, json.dumps(self.to_json(), indent=2) + "\n")

    def format_table(self) -> str:
        """Format the results as a text table with a row for each head."""
        splits = dict.fromkeys((self.chosen_by, self.heads[0].final.split))
        rows = [["head", "parameters", "learning rate", "weight decay"]]
        rows[0] += [f"{split} top-1" for split in splits]
        for result in self.heads:
            row = [result.head, f"{result.trainable_params:,}"]
            row += [f"{result.learning_rate:g}", f"{result.weight_decay:g}"]
            scores = {s.split: s for s in (result.validation, result.final)}
            for split in splits:
                row.append(format_accuracy(scores[split].top1, scores[split].num_videos))
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def read_results(workdir: str) -> ProbeResults | None:
    """Read probe.json; None if there is none.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return None
    content = read_json(path, dict)
    try:
        rows = [
            HeadResult(**row | {key: _parse_scores(row[key]) for key in ("validation", "final")})
            for row in content["heads"]
        ]
        results = ProbeResults(**content | {"heads": tuple(rows)})
        for row in rows:
            if not (isinstance(row.head, str) and type(row.trainable_params) is int):
                raise TypeError(f"{row} has a value of another type")
        if not rows:
            raise ValueError("it has no heads")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {truncated_repr(str(error))}") from None
    return results


def _parse_scores(values: dict[str, Any]) -> ProbeScores:
    """Return the scores in an entry of probe.json.

    Raises:
      TypeError, ValueError: the entry is damaged.
    """
    scores = ProbeScores(**values | {"interval": tuple(values["interval"])})
    fractions = (scores.top1, *scores.interval, scores.mean_class_accuracy)
    if len(fractions) != 4 or not all(
        type(value) in (int, float) and 0 <= value <= 1 for value in fractions
    ):
        raise ValueError(f"{fractions} are not four values in 0..1")
    if type(scores.num_videos) is not int or scores.num_videos < 1 or type(scores.split) is not str:
        raise ValueError(f"{scores.num_videos} is not a number of videos")
    return scores


def describe_probe(workdir: str) -> str:
    """Return a line with the accuracy of each head of the probe in a workdir; "" without one."""
    try:
        results = read_results(workdir)
    except (OSError, ValueError):
        return ""
    if results is None:
        return ""
    scores = (f"{row.head} {row.final.top1:.4f}" for row in results.heads)
    return f"{results.heads[0].final.split}  top-1 of probes, without tuning: {', '.join(scores)}"
