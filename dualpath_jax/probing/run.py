"""Trains probes: heads on the features of a frozen backbone, which are computed once.

A probe shows what a backbone knows without being tuned, in minutes. The features of all clips are
kept on disk (`features`). Each head is then trained with all learning rates and weight decays at
once (`grid`), and chosen by validation videos.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.analysis.confidence import confidence_interval
from dualpath_jax.config import schema
from dualpath_jax.config.values import format_views
from dualpath_jax.data import augment, dataset_metadata, pipeline
from dualpath_jax.data.clip_spec import ClipInputs, Views
from dualpath_jax.data.preparation.summary import format_bytes
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.data.video_source import VideoSource
from dualpath_jax.demo import setup
from dualpath_jax.evaluate import Scores
from dualpath_jax.models import abstract, param_tree, preprocess
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.backbones.registry import BackboneConfig
from dualpath_jax.models.forward import flatten_views
from dualpath_jax.models.methods.probe import build_head
from dualpath_jax.probing import grid
from dualpath_jax.probing.features import (
    FOLDER,
    FeatureCache,
    Features,
    FeatureSpec,
    ProgressOfSplits,
    row_bytes,
)
from dualpath_jax.probing.options import AUGMENTATION_KEYS, CLIP_KEYS, ProbeOptions, as_probe
from dualpath_jax.probing.results import HeadResult, ProbeResults, ProbeScores
from dualpath_jax.training import adapter_file, sharding
from dualpath_jax.training.experiment import describe_trained, load_backbone
from dualpath_jax.training.inputs import check_inputs, open_datasets
from dualpath_jax.version import __version__
from dualpath_jax.weights.backbone_keys import fill_backbone_keys
from dualpath_jax.weights.convert import BackboneInfo

_MIN_STEPS, _MIN_EPOCHS = 300, 20


def run_probe(config: Any, workdir: str, options: ProbeOptions | None = None) -> ProbeResults:
    """Compute the features of a data set, or take those in `workdir`, and train probes on them.

    Prints the size of the features before they are computed, the time that they take after the
    first batches, and at the end a table of results. The caller holds the lock of `workdir`.

    Writes in `workdir`: probe_features/, reused by a later call with the same backbone, data and
    data settings; probe.json; probe_<head>.safetensors, adapter files with the chosen trainings.
    Interrupted, the same call continues.

    Args:
      config: the whole configuration, of any method, see `as_probe`; one of
        `inputs.expand_splits`.
      workdir: an existing local folder; may be that of a training run.
      options: None for the defaults.

    Raises:
      ValueError, OSError: the user can fix the problem; the message has the remedy.
    """
    options = options or ProbeOptions()
    probe = _Probe.build(as_probe(config), options)
    features = _load_features(probe, workdir)
    results = probe.train_heads(features, workdir)
    results.write(workdir)
    print(results.format_table())
    print(f"wrote {workdir}/probe.json", flush=True)
    return results


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Holds what the features and the trainings of a probe need.

    Attributes:
      config: the whole configuration, of method probe.
      options: of the trainings.
      mesh: all devices.
      backbone: shape of the backbone.
      info: where its weights come from.
      params: {"backbone": its weights in the compute dtype}, on the devices.
      datasets: the splits by name; the training split is the first.
      chosen_by: the split that chooses.
    """

    config: Any
    options: ProbeOptions
    mesh: jax.sharding.Mesh
    backbone: BackboneConfig
    info: BackboneInfo
    params: Any
    datasets: dict[str, VideoSource]
    chosen_by: str

    @classmethod
    def build(cls, config: Any, options: ProbeOptions) -> "_Probe":
        """Check the configuration, open the data and load the backbone."""
        schema.check_values(config)
        if config.data.synthetic:
            raise ValueError("data.synthetic has no features to probe: leave it out")
        if config.data.split is not None:
            raise ValueError("data.split must be expanded before, by inputs.expand_splits")
        setup.ensure_generated(config)
        check_inputs(config)
        fill_backbone_keys(config)
        mesh = sharding.make_mesh(config.mesh.fsdp)
        names = (config.data.train_split, _find_validation_split(config), config.eval.split)
        if names[0] in names[1:]:
            raise ValueError(
                f"data.train_split={names[0]} is also the split to choose by or to evaluate: "
                "choose another data.train_split or eval.split"
            )
        training, evaluation = open_datasets(config)
        datasets = {names[0]: training, names[1]: evaluation, names[2]: evaluation}
        if names[1] != names[2]:
            datasets[names[1]] = VideoDataset(config.data.dir, names[1])
        weights, backbone, info = load_backbone(config)
        dtype = method_registry.compute_dtype(config)
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), {"backbone": weights})
        params = jax.device_put(params, sharding.fsdp_sharding(params, mesh))
        return cls(config, options, mesh, backbone, info, params, datasets, names[1])

    @property
    def batch_size(self) -> int:
        """Return the clips per step, `options.batch_size` rounded up to share among the devices."""
        return sharding.round_up(self.options.batch_size, self.mesh.size)

    def views(self, split: str) -> Views:
        """Return the views of each clip of a split: one in training."""
        if split == self.config.data.train_split:
            return Views(1, 1)
        return Views(self.config.eval.temporal_views, self.config.eval.spatial_crops)

    def spec(self, split: str) -> FeatureSpec:
        """Describe the features of a split."""
        data, dataset, views = self.config.data, self.datasets[split], self.views(split)
        identity = {
            "version": __version__,
            "backbone": self.info.sha256,
            "shape": str(self.backbone),
            "dtype": self.config.model.dtype,
            "videos": dataset.identity,
            "names": hashlib.sha256(json.dumps(list(dataset.ids)).encode()).hexdigest(),
            "views": views,
            **{f"data.{key}": data[key] for key in CLIP_KEYS},
        }
        passes = self.options.augmented_passes if split == data.train_split else 0
        if passes:
            identity |= {f"data.{key}": data[key] for key in AUGMENTATION_KEYS}
            identity |= {"augmented_passes": passes, "seed": self.config.seed}
            if data.flip:
                mirrored = augment.mirrored_labels(dataset.class_names, data.label_swap)
                identity["mirrored classes"] = mirrored.tolist()
        num_clips = len(dataset) * max(1, passes)
        batch_size = max(1, min(self.config.eval.batch_size // views.total, num_clips))
        return FeatureSpec(
            split,
            num_clips,
            (views.total, *token_shape(self.config, self.backbone)),
            json.loads(json.dumps(identity)),
            sharding.round_up(batch_size, self.mesh.size),
        )

    def compute(
        self, spec: FeatureSpec, first_row: int
    ) -> Generator[tuple[np.ndarray, np.ndarray]]:
        """Yield (tokens bfloat16 [B, V, T, N, D], labels int32 [B]) of clips from a row on."""
        module = method_registry.build_model(self.config, self.backbone, 1)
        dtype = method_registry.compute_dtype(self.config)

        def features(params, batch):
            has_views = batch["spatial"].ndim == 6
            clips = flatten_views(batch) if has_views else batch
            frames, _ = preprocess.model_inputs(clips, self.config.data, dtype)
            tokens = module.apply({"params": params}, frames, method="features")
            return tokens.reshape(-1, *spec.shape).astype(jnp.bfloat16)

        run = jax.jit(features, out_shardings=sharding.batch_sharding(self.mesh))
        with contextlib.closing(self._batches(spec, first_row)) as batches:
            for batch in batches:
                with sharding.with_mesh(self.mesh):
                    tokens = run(self.params, sharding.shard_batch(batch, self.mesh))
                real = batch["mask"] > 0
                yield np.asarray(tokens)[real], batch["label"][real]

    def _batches(self, spec: FeatureSpec, first_row: int) -> Generator[pipeline.Batch]:
        """Return the batches of clips of a split from a row on."""
        dataset, first = self.datasets[spec.split], first_row // spec.batch_size
        if "augmented_passes" not in spec.identity:
            return pipeline.eval_batches(
                dataset,
                self.config.data,
                self.views(spec.split),
                spec.batch_size,
                inputs=ClipInputs.ALL_FRAMES,
                first_batch=first,
            )
        data = copy.deepcopy(self.config.data)
        data.batch_size = spec.batch_size
        return pipeline.train_batches(
            *(dataset, data, self.config.seed, first, -(-spec.num_clips // spec.batch_size)),
            inputs=ClipInputs.ALL_FRAMES,
        )

    def train_heads(self, features: dict[str, Features], workdir: str) -> ProbeResults:
        """Train the heads on the features of the splits, and write their adapter files."""
        config, options = self.config, self.options
        train = features[config.data.train_split]
        steps = options.num_steps or max(
            _MIN_STEPS, math.ceil(_MIN_EPOCHS * len(train) / self.batch_size)
        )
        return ProbeResults(
            heads=tuple(self._train_head(head, features, steps, workdir) for head in options.heads),
            views=format_views(config),
            num_clips=len(train),
            augmented_passes=options.augmented_passes,
            num_steps=steps,
            backbone=self.info.name,
            backbone_sha256=self.info.sha256,
            dataset=config.data.dir,
            chosen_by=self.chosen_by,
        )

    def _train_head(
        self, name: str, features: dict[str, Features], num_steps: int, workdir: str
    ) -> HeadResult:
        """Train all cells of a head, choose one, and write its adapter file."""
        options, config = self.options, copy.deepcopy(self.config)
        config.model.probe.head, config.num_train_steps = name, num_steps
        dataset = self.datasets[config.data.train_split]
        head = build_head(config.model.probe, self.backbone, len(dataset.class_names))
        cells = grid.make_cells(options.learning_rates, options.weight_decays)
        size, mesh = self.batch_size, self.mesh
        train = features[config.data.train_split]
        params = grid.train_grid(head, train, config, cells, num_steps, size, mesh)
        scores, losses = grid.score_cells(head, params, features[self.chosen_by], size, mesh)
        cell = grid.choose_cell(scores, losses)
        params = jax.tree.map(lambda leaf: leaf[cell : cell + 1], params)
        chosen = final = scores[cell]
        if self.chosen_by != config.eval.split:
            (final,), _ = grid.score_cells(head, params, features[config.eval.split], size, mesh)
        rate, decay = (float(f"{values[cell]:.6g}") for values in cells)
        config.optimizer.learning_rate, config.optimizer.weight_decay = rate, decay
        file = f"probe_{name}.safetensors"
        leaves = param_tree.flatten(
            {"head": jax.tree.map(lambda leaf: np.asarray(leaf[0]), params)}
        )
        metadata = describe_trained(config, self.info, dataset.class_names)
        metadata |= {"frame_format": dataclasses.asdict(dataset.frame_format), "step": num_steps}
        adapter_file.write_adapter(os.path.join(workdir, file), leaves, metadata)
        return HeadResult(
            head=name,
            learning_rate=rate,
            weight_decay=decay,
            trainable_params=param_tree.count_params(leaves),
            adapter=file,
            validation=_describe_scores(self.chosen_by, chosen),
            final=_describe_scores(config.eval.split, final),
        )


def token_shape(config: Any, backbone: BackboneConfig) -> tuple[int, int, int]:
    """Return (T, N, D), the shape of the tokens of a clip.

    Args:
      config: of `as_probe`.
      backbone: shape of the backbone.
    """
    module = method_registry.build_model(config, backbone, 1)

    def tokens(rng, frames):
        return module.init_with_output(rng, frames, method="features")[0]

    frames, _ = abstract.abstract_inputs(config)
    return jax.eval_shape(tokens, jax.random.key(0), frames).shape[1:]


def estimate_bytes(config: Any, num_clips: int, num_videos: int) -> int:
    """Return the size of the features on disk, without data or weights.

    Args:
      config: the whole configuration, of any method; see `as_probe`.
      num_clips: number of training clips.
      num_videos: number of videos to evaluate, each with all views of `config.eval`.
    """
    config = as_probe(config)
    shape = token_shape(config, abstract.build_backbone_config(config))
    views = config.eval.temporal_views * config.eval.spatial_crops
    return num_clips * row_bytes((1, *shape)) + num_videos * row_bytes((views, *shape))


def _find_validation_split(config: Any) -> str:
    """Return the split that chooses: "validation", or `eval.split` in data without one."""
    if "validation" in dataset_metadata.read_splits(config.data.dir):
        return "validation"
    print(
        f"note: {config.data.dir} has no split 'validation': learning rates and weight decays are "
        f"chosen on {config.eval.split!r} itself, and its accuracies are too high",
        flush=True,
    )
    return config.eval.split


def _describe_scores(split: str, scores: Scores) -> ProbeScores:
    """Return the scores of a head with their interval."""
    interval = confidence_interval(scores.top1, scores.num_videos)
    return ProbeScores(split, scores.top1, interval, scores.mean_class_accuracy, scores.num_videos)


def _load_features(probe: _Probe, workdir: str) -> dict[str, Features]:
    """Return the features of all splits; compute those that the workdir does not have.

    Raises:
      OSError: the disk is too small for them.
    """
    cache = FeatureCache(os.path.join(workdir, FOLDER))
    specs = [probe.spec(split) for split in probe.datasets]
    for spec in specs:
        if reason := cache.remove_others(spec):
            print(f"{reason}: computed again", flush=True)
    first = {spec.split: cache.num_complete(spec) for spec in specs}
    rows = {
        spec.split: max(0, spec.num_clips - first[spec.split] * spec.shard_rows) for spec in specs
    }
    clips = ", ".join(f"{spec.num_clips:,} {spec.split}" for spec in specs)
    total = format_bytes(sum(spec.num_bytes for spec in specs))
    needed = sum(rows[spec.split] * spec.row_bytes for spec in specs)
    free = shutil.disk_usage(workdir).free
    if needed > free:
        raise OSError(
            f"the features of {clips} clips need {format_bytes(needed)}, and {workdir} has "
            f"{format_bytes(free)} free: choose a --workdir on a larger disk, or fewer frames by "
            "--config.data.num_frames"
        )
    print(f"features: {clips} clips, {total} in {workdir}/{FOLDER}", end="")
    print(f", {format_bytes(needed)} to compute" if needed else ", computed before", flush=True)
    if needed:
        with ProgressOfSplits(sum(rows.values())).shown() as progress:
            for spec in specs:
                if rows[spec.split]:
                    start = first[spec.split] * spec.shard_rows
                    with contextlib.closing(probe.compute(spec, start)) as batches:
                        cache.write(spec, first[spec.split], batches, progress.on_batch)
    return {spec.split: cache.open(spec) for spec in specs}
