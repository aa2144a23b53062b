"""Training: mesh, state, step and loop, in the order in which they run.

Public: `Run`, `train`, `evaluate_run`.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

import dualpath_jax
from dualpath_jax import convert, evaluate, preprocess
from dualpath_jax import params as params_lib
from dualpath_jax.checkpoint import Checkpoints
from dualpath_jax.data import pipeline
from dualpath_jax.data.records import VideoDataset
from dualpath_jax.models import tuning, vit
from dualpath_jax.progress import Reporter, format_scores

Batch = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """What training changes. `trainable` has `optax.MaskedNode` in place of frozen leaves."""

    step: jax.Array  # int32 scalar, number of updates done
    trainable: Any  # float32
    opt_state: optax.OptState


@dataclasses.dataclass
class Run:
    """Everything a training or an evaluation needs, checked and on the devices."""

    config: Any
    workdir: str
    model: Any
    mesh: jax.sharding.Mesh
    class_names: list[str]
    backbone: convert.BackboneInfo
    state: TrainState
    frozen: Any
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    num_train_steps: int
    steps_per_epoch: float
    total_params: int
    trainable_params: int

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint of this run belongs to."""
        return {
            "method": self.config.model.method,
            "backbone_name": self.backbone.name,
            "backbone_sha256": self.backbone.sha256,
            "class_names": list(self.class_names),
            "config": json.loads(self.config.to_json_best_effort()),
            "version": dualpath_jax.__version__,
        }


# ------------------------------------------------------------------------------ what is trained


def make_schedule(optimizer: Any, num_train_steps: int, steps_per_epoch: float) -> optax.Schedule:
    """Linear warm-up, then cosine to zero at the last step."""
    warmup = min(round(optimizer.warmup_epochs * steps_per_epoch), num_train_steps // 2)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else optimizer.learning_rate,
        peak_value=optimizer.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(num_train_steps, 1),
    )


def make_optimizer(
    optimizer: Any, schedule: optax.Schedule, mask: Any
) -> optax.GradientTransformation:
    """AdamW on the leaves that `mask` names; weight decay on kernels alone."""
    adamw = optax.adamw(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        weight_decay=optimizer.weight_decay,
        mask=params_lib.decay_mask,
    )
    if optimizer.clip_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)
    return optax.masked(adamw, mask)


def init_params(model: Any, config: Any, backbone: Any) -> Any:
    """Fresh parameters from `config.seed`, with the converted backbone in place."""
    spatial, temporal = clip_shapes(config)

    def init(rng):
        return model.init(rng, jnp.zeros(spatial), jnp.zeros(temporal))["params"]

    params = dict(jax.jit(init)(jax.random.key(config.seed)))
    dtype = tuning.compute_dtype(config)
    params["backbone"] = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), backbone)
    params = model.start_from_backbone(params)
    params["backbone"] = jax.tree.map(lambda leaf: leaf.astype(dtype), params["backbone"])
    return params


def clip_shapes(config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of `spatial` [1, S, H, W, 3] and `temporal` [1, G, H', W', 3] for one clip."""
    clip = pipeline.clip_format(config.data)
    spatial = (1, clip.num_spatial_frames, clip.image_size, clip.image_size, 3)
    return spatial, (1, clip.framesets.num_framesets, *clip.framesets.size, 3)


# ----------------------------------------------------------------------------------- the steps


def make_train_step(
    model: Any,
    config: Any,
    optimizer: optax.GradientTransformation,
) -> Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The pure update (state, frozen, batch) -> (state, metrics), to be jitted."""
    parts = config.optimizer.accumulation_steps
    dtype = tuning.compute_dtype(config)

    def loss_fn(trainable, frozen, batch, rng):
        logits = model.apply(
            {"params": params_lib.merge(trainable, frozen)},
            preprocess.normalise(batch["spatial"], config.data, dtype),
            preprocess.normalise(batch["temporal"], config.data, dtype),
            rng if config.model.adapter_dropout else None,
        )
        target = jax.nn.one_hot(batch["label"], logits.shape[-1])
        target = optax.smooth_labels(target, config.optimizer.label_smoothing)
        loss = optax.softmax_cross_entropy(logits, target).mean()
        return loss, (logits.argmax(-1) == batch["label"]).mean()

    def grads_of(trainable, frozen, batch, rng):
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            trainable, frozen, batch, rng
        )
        return {"loss": loss, "accuracy": accuracy}, grads

    def accumulated(trainable, frozen, batch, rng):
        # Strided parts, so that each device keeps its own rows: [B, ...] -> [parts, B/parts, ...].
        batch = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
        )

        def body(total, part):
            index, part = part
            new = grads_of(trainable, frozen, part, jax.random.fold_in(rng, index))
            return jax.tree.map(lambda a, b: a + b / parts, total, new), None

        zeros = jax.tree.map(jnp.zeros_like, ({"loss": 0.0, "accuracy": 0.0}, trainable))
        return jax.lax.scan(body, zeros, (jnp.arange(parts), batch))[0]

    def train_step(state, frozen, batch):
        rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
        compute = grads_of if parts == 1 else accumulated
        metrics, grads = compute(state.trainable, frozen, batch, rng)
        metrics["gradient_norm"] = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return train_step


def make_eval_step(model: Any, config: Any) -> Callable[[Any, Any, Batch], dict[str, jax.Array]]:
    """The pure evaluation (trainable, frozen, batch with views) -> sums, to be jitted."""
    dtype = tuning.compute_dtype(config)

    def eval_step(trainable, frozen, batch):
        batch_size, views = batch["spatial"].shape[:2]
        flat = {k: batch[k].reshape(-1, *batch[k].shape[2:]) for k in ("spatial", "temporal")}
        logits = model.apply(
            {"params": params_lib.merge(trainable, frozen)},
            preprocess.normalise(flat["spatial"], config.data, dtype),
            preprocess.normalise(flat["temporal"], config.data, dtype),
        )
        logits = logits.reshape(batch_size, views, -1)
        return evaluate.eval_step_sums(logits, batch["label"], batch["mask"])

    return eval_step


# ------------------------------------------------------------------------------------- set-up


def make_mesh() -> jax.sharding.Mesh:
    """All devices along one axis, `data`."""
    return jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))


def replicate(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """`tree` on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def shard_batch(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """This host's rows of a batch, onto its devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {
        key: jax.make_array_from_process_local_data(sharding, value)
        for key, value in batch.items()
        if key != "example_id"
    }


def check_workdir(workdir: str) -> None:
    """Make the workdir; OSError with the remedy when it cannot be written."""
    path = epath.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").write_text("")
        (path / ".writable").unlink()
    except OSError as error:
        raise OSError(
            f"cannot write to --workdir={workdir}: {error}; choose another folder"
        ) from None


def check_inputs(config: Any) -> None:
    """FileNotFoundError with the commands for whatever is missing, data and weights at once."""
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
    if not (epath.Path(data_dir) / "dataset_info.json").exists():
        missing.append(f"prepared data in {data_dir}")
        commands.append(
            f"python scripts/prepare_dataset.py --dataset={config.data.source} --videos=VIDEOS "
            f"--annotations=ANNOTATIONS --out={data_dir}"
        )
    if not epath.Path(weights).exists():
        missing.append(f"converted {config.backbone.name} weights in {weights}")
        commands.append(f"python scripts/convert_clip.py --checkpoint=FILE --out={weights}")
    if missing:
        raise FileNotFoundError(
            f"no {' and no '.join(missing)}. Run first:\n  " + "\n  ".join(commands)
        )


def check_batch_sizes(config: Any, num_devices: int) -> None:
    """ValueError unless batches divide over the devices and the accumulation steps."""
    accumulation_steps = config.optimizer.accumulation_steps
    for key, size, parts in (
        ("data.batch_size", config.data.batch_size, accumulation_steps),
        ("eval.batch_size", config.eval.batch_size, 1),
    ):
        if size < 1 or parts < 1 or size % (num_devices * parts):
            raise ValueError(
                f"{key}={size} must be a multiple of {num_devices} devices x "
                f"{parts} accumulation steps = {num_devices * parts}"
            )


def build_run(config: Any, workdir: str, dataset: VideoDataset) -> Run:
    """Check the configuration against data and backbone; build model and state. Reads no video."""
    mesh = make_mesh()
    check_batch_sizes(config, mesh.size)
    pipeline.clip_format(config.data)
    shape = vit.vit_config(
        config.backbone.name,
        image_size=config.data.image_size,
        **{k: config.backbone[k] for k in config.backbone if k not in ("name", "checkpoint")},
    )
    predicate = tuning.trains(config.model.method)
    backbone, shape, info = convert.load_backbone(config.backbone.checkpoint, shape)
    model = tuning.build_model(config, shape, len(dataset.class_names))
    params = init_params(model, config, backbone)
    mask = params_lib.trainable_mask(params, predicate)
    steps_per_epoch = len(dataset) / config.data.batch_size
    num_train_steps = config.num_train_steps
    if num_train_steps is None:
        num_train_steps = round(config.num_epochs * steps_per_epoch)
    schedule = make_schedule(config.optimizer, num_train_steps, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, mask)
    trainable, frozen = params_lib.split(params, mask)
    state = TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(params))
    print(params_lib.parameter_table(params, mask), flush=True)
    return Run(
        config=config,
        workdir=workdir,
        model=model,
        mesh=mesh,
        class_names=dataset.class_names,
        backbone=info,
        state=replicate(state, mesh),
        frozen=replicate(frozen, mesh),
        optimizer=optimizer,
        schedule=schedule,
        num_train_steps=num_train_steps,
        steps_per_epoch=steps_per_epoch,
        total_params=params_lib.count(params["backbone"]) + params_lib.count(trainable),
        trainable_params=params_lib.count(trainable),
    )


# ------------------------------------------------------------------------------------ the loop


def check_finite(step: int, metrics: dict[str, float], checkpoints: Checkpoints) -> None:
    """FloatingPointError, with what is saved, when loss or gradient of `step` is not finite."""
    loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
    if not (np.isfinite(loss) and np.isfinite(norm)):
        checkpoints.wait()
        good = checkpoints.path(checkpoints.latest_step())
        raise FloatingPointError(
            f"loss is {loss}, gradient norm {norm} at step {step}. Last good checkpoint: {good}. "
            "Lower optimizer.learning_rate, or set optimizer.clip_norm; running again resumes there"
        )


def train(run: Run, dataset: VideoDataset, eval_dataset: VideoDataset) -> None:
    """Train to `run.num_train_steps`, resuming from the workdir's last checkpoint."""
    config, checkpoints = run.config, Checkpoints(run.workdir, run.config.checkpoint.keep)
    if jax.process_index() == 0:
        path = epath.Path(run.workdir) / "config.json"
        path.write_text(config.to_json_best_effort(indent=2) + "\n")
    first_step = resume(run, checkpoints)
    reporter = Reporter(run.workdir, run.num_train_steps, config.data.batch_size)
    train_step = jax.jit(make_train_step(run.model, config, run.optimizer), donate_argnums=0)
    batches = pipeline.train_batches(
        dataset,
        config.data,
        config.seed,
        first_step,
        run.num_train_steps,
        jax.process_index(),
        jax.process_count(),
    )
    eval_every = round(config.eval.every_epochs * run.steps_per_epoch)
    reporter.start(first_step)
    pending = None  # metrics of the step before: read while the next one computes
    for step in range(first_step, run.num_train_steps):
        profile(config.profile, run.workdir, step - first_step, run.num_train_steps - first_step)
        with reporter.waiting_for_data():
            batch = shard_batch(next(batches), run.mesh)
        run.state, metrics = train_step(run.state, run.frozen, batch)
        if pending is not None:
            check_finite(step, jax.device_get(pending), checkpoints)
        pending = metrics
        done = step + 1
        if step == first_step:
            reporter.first_step_done(done, metrics)
        last = done == run.num_train_steps
        saves = last or done % config.checkpoint.every_steps == 0
        logs = last or done % config.log_every_steps == 0
        if saves or logs:
            values = {key: float(value) for key, value in jax.device_get(metrics).items()}
            check_finite(done, values, checkpoints)
        if logs:
            reporter.progress(done, {**values, "learning_rate": float(run.schedule(step))})
        if saves:
            checkpoints.save(done, run.state, run.metadata())
        if eval_every and done % eval_every == 0 and not last:
            scores = evaluate_run(run, eval_dataset)
            reporter.scores(done, config.eval.split, scores)
    checkpoints.close()
    reporter.close()


def resume(run: Run, checkpoints: Checkpoints) -> int:
    """Load the last checkpoint into `run.state`, if there is one. Returns its step, else 0."""
    step = checkpoints.latest_step()
    if step is None:
        return 0
    run.state = checkpoints.restore(step, run.state, run.metadata())
    print(f"resumed from {checkpoints.path(step)}", flush=True)
    return step


def restore_for_eval(run: Run) -> None:
    """Load the workdir's last checkpoint; ValueError when it has none."""
    checkpoints = Checkpoints(run.workdir)
    if not resume(run, checkpoints):
        raise ValueError(f"no checkpoint in {run.workdir}/checkpoints: train first, --mode=train")
    checkpoints.close()


def profile(profile_config: Any, workdir: str, steps_done: int, num_steps: int) -> None:
    """Before a step: start or stop the JAX profiler's trace of the configured steps."""
    if not profile_config.num_steps:
        return
    first = profile_config.first_step
    if steps_done == first:
        jax.profiler.start_trace(str(epath.Path(workdir) / "profile"))
    if first < steps_done == min(first + profile_config.num_steps, num_steps - 1):
        jax.profiler.stop_trace()
        print(f"profiler trace written to {workdir}/profile", flush=True)


def evaluate_run(run: Run, dataset: VideoDataset) -> evaluate.Scores:
    """Scores of `run.state` on every video of `dataset`."""
    config = run.config
    eval_step = jax.jit(make_eval_step(run.model, config))
    batches = pipeline.eval_batches(
        dataset,
        config.data,
        config.eval.temporal_views,
        config.eval.spatial_crops,
        config.eval.batch_size,
        jax.process_index(),
        jax.process_count(),
    )

    def step(batch: Batch) -> dict[str, jax.Array]:
        return eval_step(run.state.trainable, run.frozen, shard_batch(batch, run.mesh))

    return evaluate.evaluate(step, batches)


def evaluate_and_write(run: Run, dataset: VideoDataset) -> None:
    """Score the run on `dataset`, print the scores and write results.json."""
    scores = evaluate_run(run, dataset)
    results = write_results(run, scores)
    print(f"{run.config.eval.split}  {format_scores(scores)}  views {results['views']}")
    print(f"wrote {run.workdir}/results.json", flush=True)


def write_results(run: Run, scores: evaluate.Scores) -> dict[str, Any]:
    """Write `results.json` into the workdir (atomically) and return what it holds."""
    config = run.config
    views = (config.data.num_frames, config.eval.temporal_views, config.eval.spatial_crops)
    results = {
        **dataclasses.asdict(scores),
        "views": "x".join(map(str, views)),  # frames x clips x crops, as the paper counts
        "total_params": run.total_params,
        "trainable_params": run.trainable_params,
        "step": int(run.state.step),
        "dataset": config.data.dir,
        "split": config.eval.split,
        "backbone": run.backbone.name,
        "backbone_sha256": run.backbone.sha256,
    }
    path = epath.Path(run.workdir) / "results.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(path)
    return results
