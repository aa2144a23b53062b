"""Pretrains the demo's backbone, a tiny CLIP-shaped ViT, on photographs with painted objects.

    python scripts/pretrain_demo_backbone.py --out=dualpath_jax/demo/demo_backbone.safetensors

An image is a crop of a photograph with one to eight copies of one object. Only the demo's training
photographs are used, never those of the test videos. From the class token's projected feature,
linear heads predict the object's shape and color, the number of copies and their mean position.
From each patch token, a head predicts the share of the patch that objects cover, and the center and
radius of the object. Nothing moves: temporal order is left to the fine-tuning. The heads are
discarded.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy

from dualpath_jax.cli import build_parser
from dualpath_jax.demo import render
from dualpath_jax.models.backbones.vit import ViT, ViTConfig
from dualpath_jax.runtime import console

MAX_OBJECTS = 8


def make_image(photos: list, size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw a random training image and its labels.

    Returns:
      image: uint8 [size, size, 3].
      target: float32 [size, size, 4]: 1 if an object covers the pixel, then the x, y and log
        radius of that object (0 elsewhere).
      center: float32 [2], mean position (x, y) of the copies, 0..1.
      shape, colour, count: class labels; count is the number of copies - 1.
    """
    photo, shape = rng.integers(len(photos)), rng.integers(len(render.SHAPES))
    color = rng.integers(len(render.COLORS))
    count = 1 if rng.random() < 0.4 else rng.integers(1, MAX_OBJECTS + 1)
    one_frame = np.ones(1)
    image = render.crop_photo(photos[photo], size, rng)
    target = np.zeros((size, size, 4), np.float32)
    centers = []
    largest = 0.26 if count == 1 else 0.14
    radius = np.exp(rng.uniform(np.log(0.035), np.log(largest)))
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    for _ in range(count):
        x, y = rng.uniform(0.05, 0.95, 2)
        track = render.Track(x * one_frame, y * one_frame, radius * one_frame, one_frame)
        rgb = list(render.COLORS.values())[color]
        image = render.paint_object(image, track, render.SHAPES[shape], rgb)[0]
        distance = render.shape_distance(
            render.SHAPES[shape], (pixels[None] - x) / radius, (pixels[:, None] - y) / radius
        )
        target[distance < 1] = (1, x, y, np.log(radius))
        centers.append((x, y))
    return {
        "image": image,
        "target": target,
        "center": np.mean(centers, axis=0, dtype=np.float32),
        "shape": shape,
        "colour": color,
        "count": count - 1,
    }


def make_batch(args: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
    """Draw a batch of images, see `make_image`; the result depends only on the arguments.

    Args:
      args: (seed, step, batch size, side of an image in pixels).
    """
    seed, step, batch_size, size = args
    rng = np.random.default_rng([seed, step])
    photos = [render.load_photo(name) for name in render.PHOTOS["train"]]  # cached
    images = [make_image(photos, size, rng) for _ in range(batch_size)]
    return {key: np.stack([image[key] for image in images]) for key in images[0]}


# Flax derives the initial values of a head from its name. Therefore another spelling, also of
# "centre" below, would change the pretrained backbone.
HEADS = {
    "shape": len(render.SHAPES),
    "colour": len(render.COLORS),
    "count": MAX_OBJECTS,
}


class Pretraining(nn.Module):
    """Applies the backbone and the heads that only pretraining uses."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        """Return (logits by head, center [B, 2], dense [B, patches, 4]) of images [B, H, W, 3]."""
        tokens, feature = ViT(self.config, name="backbone")(images)
        logits = {name: nn.Dense(size, name=name)(feature) for name, size in HEADS.items()}
        return logits, nn.Dense(2, name="centre")(feature), nn.Dense(4, name="dense")(tokens[:, 1:])


def compute_losses(model: Pretraining, params: dict, batch: dict) -> tuple[jax.Array, dict]:
    """Return the total loss and the metrics of a batch, all scalars."""
    mean, std = jnp.asarray(render.MEAN), jnp.asarray(render.STD)
    images = (batch["image"].astype(jnp.float32) / 255 - mean) / std
    logits, center, dense = model.apply({"params": params}, images)
    total, metrics = 0.0, {}
    for name in HEADS:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits[name], batch[name])
        total += loss.mean()
        metrics[name] = (logits[name].argmax(-1) == batch[name]).mean()
    metrics["centre_error"] = jnp.abs(center - batch["center"]).mean()
    # Patch targets: the covered share, and the mean position and log radius over covered pixels.
    patch = model.config.patch_size
    target = nn.avg_pool(batch["target"], (patch, patch), (patch, patch))
    target = target.reshape(*dense.shape)
    covered = target[..., 0]
    position = target[..., 1:] / jnp.maximum(covered, 1e-6)[..., None]
    metrics["covered_loss"] = optax.sigmoid_binary_cross_entropy(dense[..., 0], covered).mean()
    error = jnp.abs(dense[..., 1:] - position) * covered[..., None]
    error = error.sum((0, 1)) / covered.sum()
    metrics["place_error"], metrics["radius_error"] = error[:2].mean(), error[2]
    total += 5 * metrics["centre_error"] + 5 * metrics["covered_loss"]
    total += 5 * metrics["place_error"] + metrics["radius_error"]
    return total, metrics | {"loss": total}


def to_openai_layout(params: dict) -> dict[str, np.ndarray]:
    """Convert the backbone's parameters to the names and shapes of OpenAI's checkpoints."""
    b = jax.tree.map(np.asarray, params)
    out = {
        "visual.class_embedding": b["class_embedding"],
        "visual.positional_embedding": b["position_embedding"],
        "visual.conv1.weight": b["patch_embedding"]["kernel"].transpose(3, 2, 0, 1),
        "visual.proj": b["projection"],
    }
    for name in ("ln_pre", "ln_post"):
        out[f"visual.{name}.weight"] = b[name]["scale"]
        out[f"visual.{name}.bias"] = b[name]["bias"]
    blocks = b["blocks"]
    for i in range(blocks["ln_1"]["scale"].shape[0]):
        prefix = f"visual.transformer.resblocks.{i}."
        for name in ("ln_1", "ln_2"):
            out[f"{prefix}{name}.weight"] = blocks[name]["scale"][i]
            out[f"{prefix}{name}.bias"] = blocks[name]["bias"][i]
        out[prefix + "attn.in_proj_weight"] = blocks["attention"]["qkv"]["kernel"][i].T
        out[prefix + "attn.in_proj_bias"] = blocks["attention"]["qkv"]["bias"][i]
        for ours, theirs in (
            (("attention", "out"), "attn.out_proj"),
            (("mlp", "hidden"), "mlp.c_fc"),
            (("mlp", "output"), "mlp.c_proj"),
        ):
            layer = blocks[ours[0]][ours[1]]
            out[f"{prefix}{theirs}.weight"] = layer["kernel"][i].T
            out[f"{prefix}{theirs}.bias"] = layer["bias"][i]
    return {name: np.ascontiguousarray(value, np.float32) for name, value in out.items()}


def _train(
    model: Pretraining, params: dict, args: argparse.Namespace
) -> tuple[dict, dict[str, float]]:
    """Train all parameters; return them with the mean metrics of the last 250 steps."""
    warmup = min(200, args.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, warmup, args.steps)
    decay = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05, mask=decay)
    )

    @jax.jit
    def step_fn(params, opt_state, batch):
        grads, metrics = jax.grad(lambda p: compute_losses(model, p, batch), has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, metrics

    spawn = multiprocessing.get_context("spawn")
    opt_state, start, history = tx.init(params), time.monotonic(), []
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        jobs = [(args.seed, step, args.batch_size, args.image_size) for step in range(args.steps)]
        pending = [pool.submit(make_batch, job) for job in jobs[:4]]
        for step in range(args.steps):
            batch = pending.pop(0).result()
            if step + 4 < args.steps:
                pending.append(pool.submit(make_batch, jobs[step + 4]))
            params, opt_state, metrics = step_fn(params, opt_state, batch)
            history.append(metrics)
            if (step + 1) % 250 == 0 or step + 1 == args.steps:
                recent = {k: float(np.mean([m[k] for m in history[-250:]])) for k in metrics}
                figures = "  ".join(f"{k} {v:.3f}" for k, v in recent.items())
                print(
                    f"step {step + 1}/{args.steps}  {time.monotonic() - start:.0f} s  {figures}",
                    flush=True,
                )
    return params, recent


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    add = arg_parser.add_argument
    add("--out", required=True, help="safetensors file to write")
    add("--steps", type=int, default=2600, help="updates (2600)")
    add("--batch_size", type=int, default=64, help="images per update (64)")
    add("--learning_rate", type=float, default=2e-3, help="peak learning rate (0.002)")
    add("--seed", type=int, default=0, help="seed of parameters and images (0)")
    add("--image_size", type=int, default=64, help="side of an image, pixels (64)")
    add("--patch_size", type=int, default=8, help="side of a patch, pixels (8)")
    add("--width", type=int, default=96, help="width of the tokens (96)")
    add("--depth", type=int, default=4, help="number of blocks (4)")
    add("--heads", type=int, default=2, help="number of attention heads (2)")
    add("--projection_dim", type=int, default=64, help="width of the projected feature (64)")
    return arg_parser


def main() -> None:
    args = parser().parse_args()
    config = ViTConfig(
        "demo",
        args.image_size,
        args.patch_size,
        args.width,
        args.depth,
        args.heads,
        4 * args.width,
        args.projection_dim,
    )
    model = Pretraining(config)
    size = (1, args.image_size, args.image_size, 3)
    params = jax.jit(model.init)(jax.random.key(args.seed), jnp.zeros(size))["params"]
    params, recent = _train(model, params, args)
    arguments = {key: value for key, value in vars(args).items() if key != "out"}
    pretraining = {
        "arguments": arguments,
        "photos": render.PHOTOS["train"],
        "last_250_steps": recent,
    }
    metadata = {
        "activation": config.activation,
        "heads": str(config.heads),
        "pretraining": json.dumps(pretraining),
    }
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    safetensors.numpy.save_file(to_openai_layout(params["backbone"]), args.out, metadata)
    print(f"wrote {args.out}: {os.path.getsize(args.out) / 1e6:.2f} MB")


if __name__ == "__main__":
    console.run(main)
