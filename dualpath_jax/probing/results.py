"""Holds the results of probes, which probe.json keeps."""

import dataclasses
import json
from typing import Any

from etils import epath

from dualpath_jax.runtime import files

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
      head: a name of `models.methods.probe.HEADS`.
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
      heads: one result for each head, in the order of `models.methods.probe.HEADS`.
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
        rows[0] += [f"{split} top-1 (95% interval)" for split in splits]
        for result in self.heads:
            row = [result.head, f"{result.trainable_params:,}"]
            row += [f"{result.learning_rate:g}", f"{result.weight_decay:g}"]
            scores = {s.split: s for s in (result.validation, result.final)}
            for split in splits:
                low, high = scores[split].interval
                row.append(f"{scores[split].top1:.4f} ({low:.3f} to {high:.3f})")
            rows.append(row)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
