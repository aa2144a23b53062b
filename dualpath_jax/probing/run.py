"""Trains probes: heads on the features of a frozen backbone, which are computed once.

A probe shows what a backbone knows without being tuned, in minutes. The features of all clips are
kept on disk (`features`). Each head is then trained with all learning rates and weight decays at
once (`grid`), and chosen by validation videos.
"""

import copy
import dataclasses
from collections.abc import Collection
from typing import Any

from dualpath_jax.config import recipes
from dualpath_jax.models.methods.probe import HEADS
from dualpath_jax.probing.results import ProbeResults


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """Describes the trainings of a probe.

    Attributes:
      heads: names of `models.methods.probe.HEADS`.
      augmented_passes: passes over the training videos with the augmentation of `config.data`; 0:
        one plain pass, the middle crop of the clip in the middle of each video.
      learning_rates: peaks of AdamW's cosine schedule.
      weight_decays: each is combined with each learning rate.
      num_steps: updates of each training; None: 300, or 20 epochs if they are more.
      batch_size: clips per step.
    """

    heads: tuple[str, ...] = HEADS
    augmented_passes: int = 0
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    weight_decays: tuple[float, ...] = (0.01, 0.1, 1.0)
    num_steps: int | None = None
    batch_size: int = 32


def as_probe(config: Any, keep: Collection[str] = ()) -> Any:
    """Return a copy of `config` whose method is probe.

    A config of another method gets the frames of the baselines, see `recipes.baseline`.

    Args:
      config: the whole configuration, of any method.
      keep: dotted keys that the user set; they stay as they are.
    """
    probe = copy.deepcopy(config)
    if config.model.method != "probe":
        recipes.baseline(probe, "probe")
        for key in keep:
            group, _, name = key.rpartition(".")
            if key != "model.method" and group:
                probe[group][name] = config[group][name]
    return probe


def estimate_bytes(config: Any, num_clips: int, num_videos: int) -> int:
    """Return the size of the features on disk.

    Args:
      config: of `as_probe`.
      num_clips: number of training clips, one view each.
      num_videos: number of evaluated videos, with all views of `config.eval`.
    """
    raise NotImplementedError


def run_probe(config: Any, workdir: str, options: ProbeOptions | None = None) -> ProbeResults:
    """Compute the features of a data set, or take those in `workdir`, and train probes on them.

    Prints the size of the features before they are computed, the time that it takes after the
    first batches, and at the end a table of results. The caller holds the lock of `workdir`.

    Writes in `workdir`: probe_features/, reused by a later call with the same backbone, data and
    data settings; probe.json; probe_<head>.safetensors, adapter files with the chosen trainings.
    Interrupted, the same call continues.

    Args:
      config: the whole configuration, of any method; see `as_probe`.
      workdir: an existing local folder; may be that of a training run.
      options: None for the defaults.

    Raises:
      ValueError, OSError: the user can fix the problem; the message has the remedy.
    """
    raise NotImplementedError
