"""Defines every configuration key once: name, default, allowed values and meaning.

`KEYS` is the one table. From it come the `ConfigDict` that config files override (`get_config`),
the check of a configuration (`check_values`), `--help_config` (`format_keys`) and
docs/configuration.md (`markdown_table`; python -m dualpath_jax.config.schema prints it).

A description that ends in "ours" marks a default that the paper does not give (see
docs/paper_differences.md). Upper limits are far above what anybody trains: a configuration may come
with an untrusted file.
"""

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

_INFINITY = float("inf")


@dataclasses.dataclass(frozen=True)
class Range:
    """Describes an interval of numbers; `open_low` and `open_high` exclude its ends."""

    low: float
    high: float = _INFINITY
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.open_low else self.low <= value
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if self.high == _INFINITY:
            return f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {left}{self.low:.10g}, {self.high:.10g}{right}"


@dataclasses.dataclass(frozen=True)
class Optional:
    """Stands for a default of None; the key takes values of `kind` or None."""

    kind: type


@dataclasses.dataclass(frozen=True)
class Key:
    """Describes a configuration key.

    Attributes:
      name: dotted, "data.batch_size".
      default: its value unless a config file or the command line changes it.
      description: what it sets, one sentence.
      allowed: a `Range` of each number, a tuple of choices (of a value that is a tuple, for each of
        its items), or None for any value of its type.
        None as a value is always allowed where the default is `Optional`.
    """

    name: str
    default: Any
    description: str
    allowed: Range | tuple[Any, ...] | None = None


_COUNT, _NOT_NEGATIVE, _POSITIVE = Range(1), Range(0), Range(0, open_low=True)
_FRACTION, _RATE = Range(0, 1), Range(0, 1, open_high=True)
_SIZE, _WIDTH, _DEPTH = Range(1, 4096), Range(1, 2**16), Range(1, 256)
_SIZE_OR_NONE = Range(0, 4096)

# Literal, as this module may not import the registries; a test compares them.
_METHODS = (
    *("dualpath", "full", "linear", "vpt", "adaptformer", "protuning", "st_adapter"),
    *("videoprompt", "aim", "evl", "lora", "zeroi2v", "probe"),
)
_BACKBONES = (
    *("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336", "ViT-H/14", "ViT-g/14", "ViT-bigG/14"),
    *("ViT-B/16-IN21K", "ViT-L/16-IN21K"),
    *("DINOv2-S/14", "DINOv2-B/14", "DINOv2-L/14", "DINOv2-g/14"),
    *("DINOv2-S/14-reg", "DINOv2-B/14-reg", "DINOv2-L/14-reg", "DINOv2-g/14-reg"),
    *("SigLIP-B/32", "SigLIP-B/16", "SigLIP-L/16"),
    *("SigLIP-So400m/14", "SigLIP-So400m/16", "SigLIP-g/16"),
    *("Swin-T", "Swin-S", "Swin-B", "custom", "custom-swin"),
)
GENERATED_SOURCES = ("demo", "paths", "paths_large")  # rendered by dualpath_jax/demo
_SOURCES = (
    *("k400", "ssv2", "hmdb51", "ucf101", "diving48", "folder", "csv"),
    *GENERATED_SOURCES,
)

# fmt: off
KEYS = (
    Key("seed", 0, "Seed of all randomness: initial parameters, order of examples, augmentation.",
        Range(0, 2**32 - 1)),
    Key("num_epochs", 30, "Length of the training in epochs; ours.", _NOT_NEGATIVE),
    Key("num_train_steps", Optional(int),
        "Length of the training in steps, used instead of num_epochs when set.", _NOT_NEGATIVE),
    Key("early_stopping_evaluations", 0,
        "Evaluations in a row without a new best score after which the training ends; 0: never.",
        _NOT_NEGATIVE),
    Key("log_every_steps", 50,
        "Steps between two progress lines and entries in metrics.jsonl, and the steps over which "
        "their loss and accuracy are averaged.", _COUNT),
    Key("init_from", Optional(str),
        "Adapter file (scripts/export_adapter.py) whose parameters the run starts from."),
    Key("resume_changed", False,
        "Resumes from a checkpoint even if it was saved with other settings or data."),
    # data
    Key("data.dir", Optional(str), "Output folder of scripts/prepare_dataset.py, local or gs://."),
    Key("data.source", "folder",
        "Data set that was prepared (its --dataset); demo, paths and paths_large are rendered and "
        "prepared on first use.",
        _SOURCES),
    Key("data.train_split", "train", "Split that is trained on."),
    Key("data.split", Optional(str),
        "HMDB51, UCF101: division 1, 2, 3, or all of them in turn; None: that of train_split and "
        "eval.split.",
        ("1", "2", "3", "all")),
    Key("data.shots", Optional(int),
        "Training videos of each class, always the same ones; None: all; ours.", _COUNT),
    Key("data.batch_size", 64, "Clips per step, over all devices and hosts.", _COUNT),
    Key("data.image_size", 224, "Height and width of a spatial frame, pixels.", _SIZE),
    Key("data.num_frames", 32,
        "T, frames sampled from a video (sec. 3.2: 8 for the baselines).", _SIZE),
    Key("data.num_spatial_frames", 8,
        "S, frames of the spatial path; only dualpath uses it.", _SIZE),
    Key("data.grid", (4, 4),
        "(w, h), frames across and down a frameset; only dualpath uses it.", _SIZE),
    Key("data.frame_scale", 4,
        "Factor by which a frame is reduced in a frameset; only dualpath uses it.", _SIZE),
    Key("data.frameset_input", "rgb",
        "What framesets hold: rgb (paper); differences from the mean of the clip's frames or from "
        "the frame before, in units of data.std; or motion: how much the frame before (red), the "
        "frame itself (green) and the next one (blue) differ from the background. Only dualpath "
        "uses it; ours.",
        ("rgb", "minus_mean", "minus_previous", "abs_minus_mean", "motion")),
    Key("data.sampling", "dense",
        "How frames are sampled: dense takes frames sampling_interval apart, segments "
        "one frame of each of T equal parts of the video.",
        ("dense", "segments")),
    Key("data.sampling_interval", Optional(int),
        "Frames from one sampled frame to the next; None: 4, 2, 1 for T = 16, 32, 48 (sec. 5.1).",
        _COUNT),
    Key("data.crop_scale", (0.08, 1.0),
        "Smallest and largest part of a frame's area in a random resized crop; ours.",
        Range(0, 1, open_low=True)),
    Key("data.crop_ratio", (3 / 4, 4 / 3),
        "Smallest and largest width / height of a random resized crop; ours.", _POSITIVE),
    Key("data.flip", True,
        "Mirrors half of the training clips; label_swap handles left and right; ours."),
    Key("data.label_swap", Optional(str),
        "Pairs of classes that a flip exchanges: ssv2, or a JSON file of pairs."),
    Key("data.randaugment_layers", 0,
        "N, RandAugment operations drawn per clip; 0 switches RandAugment off.", _NOT_NEGATIVE),
    Key("data.randaugment_magnitude", 7.0, "M, RandAugment's magnitude; ours.", Range(0, 10)),
    Key("data.erasing_probability", 0.0,
        "Probability of erasing a box in all frames of a clip.", _FRACTION),
    Key("data.class_weights", "none",
        "Weights of the classes in the training loss: none, or balanced, in inverse proportion to "
        "their numbers of training videos; ours.",
        ("none", "balanced")),
    Key("data.mean", Optional(tuple),
        "Mean of red, green and blue that the backbone expects; None: that of its file, or CLIP's "
        "if the file states none.",
        _FRACTION),
    Key("data.std", Optional(tuple),
        "Standard deviation of red, green and blue that the backbone expects; None: as data.mean.",
        Range(0, 1, open_low=True)),
    Key("data.keep_normalization", False,
        "Keeps data.mean and data.std even if the file of the backbone states others."),
    Key("data.prefetch", 2,
        "Batches made ahead of the step that needs them; -1 lets tf.data choose.", Range(-1)),
    Key("data.max_broken_videos", 100,
        "Number of unreadable videos that training replaces; one more stops it.", _NOT_NEGATIVE),
    Key("data.synthetic", False,
        "Uses one made-up batch and random weights, without files, to time the device."),
    # mesh
    Key("mesh.fsdp", 1,
        "Number of devices among which frozen weights and optimizer state are divided.", _COUNT),
    # backbone
    Key("backbone.name", Optional(str),
        "Name of the backbone; None: that of the checkpoint, or ViT-B/16 without one. custom and "
        "custom-swin take their shape from the keys below.",
        _BACKBONES),
    Key("backbone.checkpoint", Optional(str), "Output file of scripts/convert_clip.py."),
    Key("backbone.patch_size", Optional(int),
        "P, side of a patch, pixels; None, here and below, is the value of the named backbone.",
        _SIZE),
    Key("backbone.width", Optional(int),
        "D, width of the tokens; Swin: of the first stage.", _WIDTH),
    Key("backbone.depth", Optional(int), "ViT: L, number of blocks.", _DEPTH),
    Key("backbone.depths", Optional(tuple), "Swin: number of blocks in each stage.", _DEPTH),
    Key("backbone.heads", Optional(int),
        "K, number of attention heads; must be that of the weights.", _WIDTH),
    Key("backbone.mlp_dim", Optional(int), "Width of the MLP's hidden layer.", _WIDTH),
    Key("backbone.window_size", Optional(int), "Swin: side of a window, tokens.", _SIZE),
    Key("backbone.projection_dim", Optional(int),
        "ViT: e, width of CLIP's joint space; custom backbones may have none.", _WIDTH),
    Key("backbone.pre_norm", Optional(bool), "ViT: CLIP's LayerNorm before the first block."),
    Key("backbone.patch_bias", Optional(bool), "ViT: a bias in the patch embedding (not in CLIP)."),
    Key("backbone.class_token", Optional(bool), "ViT: a class token (not in SigLIP)."),
    Key("backbone.num_register_tokens", Optional(int), "ViT: registers (DINOv2).", _SIZE_OR_NONE),
    Key("backbone.readout", Optional(str),
        "ViT: what features are read from: the class token, the mean of the patches, or attention "
        "pooling (SigLIP).",
        ("class", "mean", "attention")),
    Key("backbone.layer_scale", Optional(bool),
        "ViT: a trained factor for each channel of a branch (DINOv2)."),
    Key("backbone.gated_mlp", Optional(bool), "ViT: gated MLPs (SwiGLU of DINOv2-g)."),
    # model
    Key("model.method", "dualpath", "Tuning method.", _METHODS),
    Key("model.spatial_path", True,
        "dualpath: uses the spatial path; False is Table 5 without spatial adaptation."),
    Key("model.temporal_path", True,
        "dualpath: uses the temporal path; False is Table 5 without temporal adaptation."),
    Key("model.adapter_bottleneck", 128, "dualpath: R, width of an adapter.", _WIDTH),
    Key("model.adapter_scale", 1.0, "dualpath: s, factor on an adapter's output; ours."),
    Key("model.adapter_dropout", 0.0,
        "dualpath: dropout rate in an adapter, after its activation; ours.", _RATE),
    Key("model.adapter_layer_norm", False, "dualpath: a LayerNorm before each adapter; ours."),
    Key("model.serial_skip", False,
        "dualpath, temporal path: y + Adapter(y) instead of eq. 9's Adapter(y)."),
    Key("model.pre_attention_adapter", False,
        "dualpath, temporal path: one more adapter before attention (SSv2)."),
    Key("model.pre_attention_residual", True,
        "dualpath: that adapter computes x + Adapter(x) instead of Adapter(x); ours."),
    Key("model.temporal_position", "sincos3d",
        "dualpath: position encoding of the framesets' patches.",
        ("sincos3d", "sincos3d+clip", "clip", "learned")),
    Key("model.spatial_dropout", 0.0,
        "dualpath: probability that training drops the spatial features of a clip; ours.", _RATE),
    Key("model.time_kernel_size", 0,
        "dualpath: frames that a depthwise convolution in the temporal adapters covers, an odd "
        "number; 0 for none (paper); ours.", _SIZE_OR_NONE),
    Key("model.readout_width", 0,
        "dualpath: channels of each patch token of the framesets, which the classifier then reads "
        "in order; 0: it reads the class token (paper); ours.", _SIZE_OR_NONE),
    Key("model.readout_frame_width", 0,
        "dualpath: features that these channels give for each frame, by the same weights for all "
        "frames; the classifier then reads the frames in order; 0 for none; ours.",
        _SIZE_OR_NONE),
    Key("model.train_tokens", True,
        "dualpath: trains class tokens and spatial positions (sec. 4)."),
    Key("model.adapt_shifted_windows", False,
        "dualpath on a Swin: adapters also in the shifted-window blocks (not in App. B.1)."),
    Key("model.dtype", "bfloat16",
        "Dtype of the computation; trainable parameters are float32; ours.",
        ("float32", "bfloat16")),
    Key("model.scan_blocks", Optional(bool),
        "True scans over the blocks, False unrolls them; None: unrolled on a GPU, else scanned."),
    Key("model.remat", "save_matmuls",
        "Activation checkpointing: none saves everything, save_matmuls the outputs of large "
        "products, full block inputs only.",
        ("none", "save_matmuls", "full")),
    Key("model.cls_token_only", True,
        "ViT: the last block computes only what the class token needs; same result."),
    Key("model.vpt.num_prompts", 10,
        "vpt: K, number of prompts; VPT's own choices are 1, 5, 10, 50, 100, 200; ours.", _WIDTH),
    Key("model.vpt.deep", True, "vpt: new prompts in each block; False is VPT-shallow."),
    Key("model.adaptformer.bottleneck", 64, "adaptformer: R, width of an adapter.", _WIDTH),
    Key("model.adaptformer.scale", 0.1, "adaptformer: s, factor on an adapter's output."),
    Key("model.adaptformer.parallel", True, "adaptformer: eq. 4; False is the serial Fig. 2c."),
    Key("model.protuning.width", 96,
        "protuning: channels between the 1x1 convolutions, which give the paper's 9M; ours.",
        _WIDTH),
    Key("model.st_adapter.form", "paper",
        "st_adapter: eq. 6 of the paper, or the form that its authors released.",
        ("paper", "released")),
    Key("model.st_adapter.places", "attention",
        "st_adapter, form=released: adapters before attention, before the MLP or before both; its "
        "authors' models have mlp (K400) or both (SSv2).",
        ("attention", "mlp", "both")),
    Key("model.st_adapter.width", 384,
        "st_adapter: R, width of an adapter; its authors' value.", _WIDTH),
    Key("model.st_adapter.kernel_size", (3, 1, 1),
        "st_adapter: kernel over frames, rows, columns, odd numbers; its authors' value.", _SIZE),
    Key("model.st_adapter.scale", 1.0,
        "st_adapter: s, factor on an adapter's output; ours."),
    Key("model.videoprompt.num_prompts", 32,
        "videoprompt: number of prompts before the frames; its authors' 16 + 16.", _WIDTH),
    Key("model.aim.bottleneck", Optional(int),
        "aim: R, width of an adapter; None: D/4, its authors' value.", _WIDTH),
    Key("model.aim.scale", 0.5,
        "aim: s, factor of joint adaptation; its authors' value; on SSv2 theirs is 1.0."),
    Key("model.aim.num_temporal_adapters", 1,
        "aim: adapters around temporal attention; its authors' value; on SSv2 theirs is 2.",
        (1, 2)),
    Key("model.aim.drop_path", 0.2,
        "aim: probability that training drops temporal or joint adaptation of a clip; its authors' "
        "value.", _RATE),
    Key("model.aim.dropout", 0.5,
        "aim: dropout rate before the classifier; its authors' value.", _RATE),
    Key("model.evl.num_blocks", 4,
        "evl: M, number of last blocks that are decoded; its authors' value."),
    Key("model.evl.mlp_dropout", 0.5,
        "evl: dropout rate in the decoder's MLP; its authors' value.", _RATE),
    Key("model.evl.dropout", 0.5,
        "evl: dropout rate before the classifier; its authors' value.", _RATE),
    Key("model.lora.rank", 8, "lora: r, rank of an update; that of RoBERTa in its paper.", _WIDTH),
    Key("model.lora.alpha", Optional(float),
        "lora: updates are multiplied by alpha / r; None: r, which gives 1.", _POSITIVE),
    Key("model.lora.targets", ("query", "value"),
        "lora: matrices that are updated; mlp is both of the MLP; its paper's choice.",
        ("query", "key", "value", "output", "mlp")),
    Key("model.zeroi2v.offsets", (-1, 1),
        "zeroi2v: for each, some heads take keys and values from the frame so many frames later; "
        "its authors' value; on SSv2 theirs is (-1, 1, -2, 2).", Range(-64, 64)),
    Key("model.zeroi2v.heads_per_offset", 1,
        "zeroi2v: number of heads of each offset; its authors' value on ViT-B.", _WIDTH),
    Key("model.zeroi2v.bottleneck", Optional(int),
        "zeroi2v: R, width of an adapter; None: D/4, its authors' value.", _WIDTH),
    Key("model.zeroi2v.scale", 0.5,
        "zeroi2v: s, factor of an adapter; its authors' value; on SSv2 theirs is 1.0."),
    Key("model.zeroi2v.adapter_dropout", 0.1,
        "zeroi2v: dropout rate in an adapter; its authors' value; on SSv2 theirs is 0.", _RATE),
    Key("model.zeroi2v.dropout", 0.5,
        "zeroi2v: dropout rate before the classifier; its authors' value.", _RATE),
    Key("model.merged", False,
        "lora, zeroi2v: the backbone is a file of scripts/merge.py, which contains what was "
        "trained in its blocks; only the other parameters train."),
    Key("model.probe.head", "attentive",
        "probe: linear reads the mean tokens of a clip, attentive pools tokens by a learned query, "
        "ordered reads patches in the order of frames; ours.",
        ("linear", "attentive", "ordered")),
    Key("model.probe.width", 16,
        "probe: channels of each patch token that the head ordered reads; ours.", _WIDTH),
    # optimizer
    Key("optimizer.learning_rate", 3e-4,
        "Peak learning rate of AdamW; the schedule is a cosine to zero.", _POSITIVE),
    Key("optimizer.weight_decay", 5e-2, "Weight decay, on kernels only (ours).", _NOT_NEGATIVE),
    Key("optimizer.warmup_epochs", 3.0,
        "Epochs of linear warm-up, at most half of the training; ours.", _NOT_NEGATIVE),
    Key("optimizer.b1", 0.9, "AdamW's decay of the first moment; ours.", _RATE),
    Key("optimizer.b2", 0.999, "AdamW's decay of the second moment; ours.", _RATE),
    Key("optimizer.clip_norm", Optional(float),
        "Largest global gradient norm; None does not clip.", _POSITIVE),
    Key("optimizer.label_smoothing", 0.0, "Label smoothing; ours.", _RATE),
    Key("optimizer.accumulation_steps", 1,
        "Number of parts of a batch that are computed one after the other.", _COUNT),
    Key("optimizer.reduce_dtype", "float32",
        "Dtype of gradients between devices, along mesh axis data.", ("float32", "bfloat16")),
    Key("optimizer.max_skipped_steps", 0,
        "Number of steps with a non-finite loss or gradient that are skipped; one more stops "
        "training.",
        _NOT_NEGATIVE),
    # eval
    Key("eval.split", "validation", "Split that is evaluated, for results.json."),
    Key("eval.batch_size", 32, "Videos per evaluation step, over all devices and hosts.", _COUNT),
    Key("eval.temporal_views", 3, "Clips (views in time) per video.", Range(1, 1024)),
    Key("eval.spatial_crops", 1, "Crops (views in space) per clip.", (1, 3)),
    Key("eval.every_epochs", Optional(int),
        "Epochs between evaluations during training; None: a tenth of the training; 0: only at the "
        "end.", _NOT_NEGATIVE),
    Key("eval.checkpoint", "latest",
        "Checkpoint that --mode=eval and the end of a training evaluate: the latest, or the best "
        "during training by eval.criterion.",
        ("latest", "best")),
    Key("eval.criterion", "top1",
        "Score that decides which checkpoint is the best, and when early stopping ends a training.",
        ("top1", "mean_class_accuracy")),
    # checkpoint
    Key("checkpoint.every_steps", 1000,
        "Steps between checkpoints; evaluations and the end are saved as well.", _COUNT),
    Key("checkpoint.every_minutes", 15.0,
        "Minutes after which a checkpoint is saved in any case, checked when progress is logged.",
        _POSITIVE),
    Key("checkpoint.keep", 3,
        "Newest checkpoints that are kept, in addition to the best.", _COUNT),
    # profile
    Key("profile.first_step", 10,
        "First step that is traced, counted from the start of the process.", _NOT_NEGATIVE),
    Key("profile.num_steps", 0,
        "Steps that JAX's profiler traces into the workdir; 0 traces none.", _NOT_NEGATIVE),
)
# fmt: on

_BY_NAME = {key.name: key for key in KEYS}
_ADDED_CHOICES: dict[str, list[Any]] = {}

# Keys and values of older versions, and what they are called now.
RENAMED_KEYS = {"model.class_only": "model.cls_token_only"}
RENAMED_VALUES = {("model.remat", "cheap"): "save_matmuls"}


def get_config() -> ConfigDict:
    """Return every key with its default; config files change the values they need."""
    config = ConfigDict()
    for key in KEYS:
        *groups, name = key.name.split(".")
        group = config
        for part in groups:
            if part not in group:
                group[part] = ConfigDict()
            group = group[part]
        optional = isinstance(key.default, Optional)
        group[name] = placeholder(key.default.kind) if optional else key.default
    return config


def choices(name: str) -> tuple[Any, ...] | None:
    """Return the values that key `name` may have, or None if it is not restricted to a list."""
    allowed = _BY_NAME[name].allowed
    if not isinstance(allowed, tuple):
        return None
    return (*allowed, *_ADDED_CHOICES.get(name, ()))


def add_choice(name: str, value: Any) -> None:
    """Allow one more value of key `name`, for a data set, method or backbone of other code."""
    if choices(name) is None:
        raise ValueError(f"{name} is not restricted to a list of values")
    _ADDED_CHOICES.setdefault(name, []).append(value)


def check_values(config: Mapping[str, Any]) -> None:
    """Check each value of a configuration; combinations are checked where they are used.

    Args:
      config: a `ConfigDict` with the keys of `KEYS`.

    Raises:
      ValueError: a value is not allowed; the message names key, value and what is allowed.
      TypeError: a value is not of its key's type, which only an untrusted file can cause.
    """
    for key in KEYS:
        value = _look_up(config, key.name)
        if value is None or key.allowed is None:
            continue
        if isinstance(key.allowed, tuple):
            known = choices(key.name)
            values = value if isinstance(key.default, tuple) else (value,)
            if not all(one in known for one in values):
                listed = ", ".join(map(str, known))
                raise ValueError(f"unknown {key.name}={value!r}: known are {listed}")
            continue
        numbers = value if isinstance(value, tuple | list) else (value,)
        if not all(number in key.allowed for number in numbers):
            raise ValueError(f"{key.name}={value} must be {key.allowed}")
    for name, count in (("data.mean", 3), ("data.std", 3), ("data.grid", 2)):
        value = _look_up(config, name)
        if value is not None and len(value) != count:
            raise ValueError(f"{name}={tuple(value)} must be {count} numbers")
    for name in ("data.crop_scale", "data.crop_ratio"):
        value = _look_up(config, name)
        if len(value) != 2 or value[0] > value[1]:
            raise ValueError(f"{name}={value} must be two numbers, the smallest and the largest")


def _look_up(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def _describe_default(key: Key) -> str:
    if isinstance(key.default, Optional):
        return f"None ({key.default.kind.__name__})"
    return repr(key.default)


def _describe_allowed(key: Key) -> str:
    if isinstance(key.allowed, tuple):
        return ", ".join(map(str, choices(key.name)))
    return "" if key.allowed is None else str(key.allowed)


def format_keys() -> str:
    """Return all keys as text for a terminal, which --help_config prints."""

    def lines() -> Iterator[str]:
        for key in KEYS:
            yield f"--config.{key.name}={_describe_default(key)}"
            text = key.description
            if allowed := _describe_allowed(key):
                text += f" Allowed: {allowed}."
            yield textwrap.fill(text, 96, initial_indent="    ", subsequent_indent="    ")

    return "\n".join(lines())


def markdown_table() -> str:
    """Return all keys as the Markdown page docs/configuration.md."""
    lines = [
        "# Configuration keys",
        "",
        "`python -m dualpath_jax.config.schema` writes this page from "
        "`dualpath_jax/config/schema.py`. Set a key",
        "in a config file (`config.data.batch_size = 32`) or on the command line "
        "(`--config.data.batch_size=32`).",
        "",
        "| key | default | allowed values | meaning |",
        "|---|---|---|---|",
    ]
    for key in KEYS:
        cells = (f"`{key.name}`", f"`{_describe_default(key)}`", _describe_allowed(key))
        lines.append(f"| {' | '.join(cells)} | {key.description} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown_table(), end="")
