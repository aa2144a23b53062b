"""Defines the fuzzing targets for files of weights, all of tiny backbones."""

import contextlib
import dataclasses
import io
import itertools
import json
import pathlib
import random

import numpy as np
import safetensors.numpy

from dualpath_jax.config.values import INVALID_CONFIG_ERRORS
from dualpath_jax.inference import trained_model
from dualpath_jax.models.backbones import registry as backbone_registry
from dualpath_jax.training import adapter_file
from dualpath_jax.weights import convert, layouts
from tests.fuzz.mutate import mutate_bytes, mutate_json
from tests.fuzz.sandbox import Case, Target

_TINY = {"patch_size": 4, "width": 8, "heads": 1, "mlp_dim": 16}
_TINY_VIT = {**_TINY, "image_size": 8, "depth": 2}
_WITHOUT_CLIP = {**_TINY_VIT, "pre_norm": False, "patch_bias": True}
BACKBONES = {
    "vit": backbone_registry.backbone_config("custom", **_TINY_VIT, projection_dim=4),
    "vit-in21k": backbone_registry.backbone_config("custom", **_WITHOUT_CLIP, activation="gelu"),
    "vit-dinov2": backbone_registry.backbone_config(
        "custom", **_WITHOUT_CLIP, activation="gelu", num_register_tokens=2, layer_scale=True
    ),
    "vit-siglip": backbone_registry.backbone_config(
        "custom",
        **_WITHOUT_CLIP,
        activation="gelu_tanh",
        class_token=False,
        readout="attention",
    ),
    "swin": backbone_registry.backbone_config(
        "custom-swin", **_TINY, image_size=16, depths=(2, 2), window_size=2
    ),
}
# By layout: the name in `BACKBONES`, and the publisher's config file next to the checkpoint.
_LAYOUTS = {
    "openai": ("vit", {"model_cfg": {"vision_cfg": {"width": 8, "layers": 2, "head_width": 8}}}),
    "huggingface": (
        "vit",
        {
            "model_type": "clip",
            "vision_config": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1},
        },
    ),
    "timm-clip": ("vit", {"architecture": "vit_base_patch16_clip_224"}),
    "timm-vit": ("vit-in21k", {}),
    "huggingface-vit": (
        "vit-in21k",
        {
            "model_type": "vit",
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    ),
    "timm-dinov2": ("vit-dinov2", {}),
    "huggingface-siglip": (
        "vit-siglip",
        {
            "model_type": "siglip_vision_model",
            "hidden_size": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
        },
    ),
    "microsoft-swin": ("swin", {}),
    "timm-swin": ("swin", {}),
    "huggingface-swin": ("swin", {"model_type": "swin", "embed_dim": 8, "depths": [2, 2]}),
}


def _backbone_arrays(name: str) -> dict[str, np.ndarray]:
    """Return a backbone's parameters by flat name, float16 noise."""
    rng = np.random.default_rng(0)
    shapes = convert.parameter_shapes(BACKBONES[name])
    return {n: rng.standard_normal(shape).astype(np.float16) for n, shape in shapes.items()}


def _invert_transform(transform, array: np.ndarray) -> np.ndarray:
    """Return the array that `transform` turns into `array`.

    The transforms in the tables of `layouts` permute axes or drop axes of size 1.
    """
    for num_dropped in (2, 1):  # axes of size 1
        larger = array.reshape([1] * num_dropped + list(array.shape))
        with contextlib.suppress(ValueError):
            if transform(larger).shape == array.shape:
                return larger
    places = transform(np.arange(array.size).reshape(_shape_before(transform, array.shape)))
    original = np.empty(array.size, array.dtype)
    original[places.ravel()] = array.ravel()
    return original.reshape(_shape_before(transform, array.shape))


def _shape_before(transform, shape: tuple[int, ...]) -> list[int]:
    """Return the shape that a permutation of axes turns into `shape`."""
    probe = transform(np.empty(range(2, 2 + len(shape))))  # a different size for each axis
    before = [0] * len(shape)
    for size, place in zip(shape, probe.shape, strict=True):
        before[place - 2] = size
    return before


def _state_dict(layout: str) -> dict[str, np.ndarray]:
    """Return random weights under the names of a publisher's layout."""
    arrays = _backbone_arrays(_LAYOUTS[layout][0])
    table = layouts.LAYOUTS[layout].table
    state = {}
    for ours, group in itertools.groupby(sorted(table, key=lambda row: row[1]), lambda r: r[1]):
        rows = list(group)  # concatenated along the last axis
        for s in range(2 if "{s}" in ours else 1):
            array = arrays.get(ours.format(s=s))
            if array is None:  # there is no patch merging after the last stage
                continue
            for (source, _, transform), part in zip(
                rows, np.split(array, len(rows), axis=-1), strict=True
            ):
                blocks = part if "{i}" in source else part[None]
                for i, block in enumerate(blocks):
                    name = source.format(s=s, next=s + 1, i=i)
                    state[name] = np.ascontiguousarray(_invert_transform(transform, block))
    return state


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Damage any bytes, the header's JSON (sometimes with a wrong length), or JSON inside it."""
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    metadata = json.loads(header).get("__metadata__", {})
    if kind == 1 and metadata:
        key = rng.choice(sorted(metadata))
        text = metadata[key].encode()
        structured = text[:1] in b"{[" and rng.random() < 0.8
        text = (mutate_json if structured else mutate_bytes)(rng, text)
        changed = json.loads(header)
        changed["__metadata__"][key] = text.decode(errors="replace")
        header = json.dumps(changed).encode()
    else:
        header = (mutate_json if rng.random() < 0.8 else mutate_bytes)(rng, header)
    length = len(header) if rng.random() < 0.95 else rng.choice((0, 2**32, 2**63, len(data)))
    return length.to_bytes(8, "little") + header + rest


class Backbones(Target):
    """Reads files of `convert_checkpoint` with `load_backbone`."""

    def __init__(self, folder: pathlib.Path):
        del folder
        self._seeds = []
        for name, config in BACKBONES.items():
            family = backbone_registry.family_of(config)
            meta = {
                "version": convert.FORMAT_VERSION,
                "family": family,
                "config": dataclasses.asdict(config),
                "container": "safetensors",
                "layout": "openai",
                "source": "a.safetensors",
                "source_sha256": "0" * 64,
            }
            data = safetensors.numpy.save(
                _backbone_arrays(name), {convert.CONVERTED_KEY: json.dumps(meta)}
            )
            self._seeds.append(Case(name, {"backbone.safetensors": data}))

    def seeds(self) -> list[Case]:
        return self._seeds

    def mutate(self, rng: random.Random, seed: Case) -> Case:
        ((name, data),) = seed.files.items()
        return Case(seed.kind, {name: mutate_safetensors(rng, data)})

    def read(self, kind: str, folder: pathlib.Path, out: pathlib.Path) -> None:
        del out
        config = BACKBONES[kind]
        size = 2 * config.image_size  # another size, which resizes the position embeddings
        config = dataclasses.replace(config, image_size=size) if kind != "swin" else config
        convert.load_backbone(folder / "backbone.safetensors", config)


class Checkpoints(Target):
    """Converts checkpoints of every layout, next to their config files."""

    def __init__(self, folder: pathlib.Path):
        del folder
        self._seeds = []
        for name, (_, config) in _LAYOUTS.items():
            config_files = {layouts.LAYOUTS[name].config_file: json.dumps(config).encode()}
            for suffix, data in self._files(_state_dict(name)).items():
                files = {f"weights{suffix}": data} | (config_files if config else {})
                self._seeds.append(Case(name, files))

    def _files(self, state: dict[str, np.ndarray]) -> dict[str, bytes]:
        """Return the checkpoint's content by file suffix."""
        metadata = {"heads": "1"}  # a single entry: safetensors writes several in random order
        return {".safetensors": safetensors.numpy.save(state, metadata)}

    def seeds(self) -> list[Case]:
        return self._seeds

    def mutate(self, rng: random.Random, seed: Case) -> Case:
        files = dict(seed.files)
        weights = next(name for name in files if name.startswith("weights"))
        for name in files:
            if name != weights and rng.random() < 0.3:
                mutate = mutate_json if rng.random() < 0.8 else mutate_bytes
                return Case(seed.kind, files | {name: mutate(rng, files[name])})
        return Case(seed.kind, files | {weights: self._mutate_weights(rng, files[weights])})

    def _mutate_weights(self, rng: random.Random, data: bytes) -> bytes:
        return mutate_safetensors(rng, data)

    def read(self, kind: str, folder: pathlib.Path, out: pathlib.Path) -> None:
        (weights,) = folder.glob("weights*")
        options = {"activation": "gelu", "normalization": "clip"}
        convert.convert_checkpoint(weights, out / "backbone.safetensors", **options)


class TorchCheckpoints(Checkpoints):
    """Converts the same checkpoints as torch files, in the current and the old format."""

    def _files(self, state: dict[str, np.ndarray]) -> dict[str, bytes]:
        import torch

        # All tensors share one storage: the old format orders storages by their addresses.
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in state.values()]))
        parts = flat.split([array.size for array in state.values()])
        tensors = {
            name: part.view(array.shape)
            for (name, array), part in zip(state.items(), parts, strict=True)
        }
        current, old = io.BytesIO(), io.BytesIO()
        torch.save(tensors, current)
        torch.save(tensors, old, _use_new_zipfile_serialization=False)
        address = _pickle_text(
            str(flat.untyped_storage()._cdata)
        )  # the old format identifies the storage by it
        return {
            ".pt": current.getvalue(),
            ".bin": old.getvalue().replace(address, _pickle_text("1")),
        }

    def _mutate_weights(self, rng: random.Random, data: bytes) -> bytes:
        return mutate_bytes(rng, data)


def _pickle_text(text: str) -> bytes:
    """Return a short text as encoded by pickle protocol 2."""
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


class Adapters(Target):
    """Reads files of `write_adapter` with `read_adapter`, and their configs."""

    def __init__(self, folder: pathlib.Path):
        leaves = {
            "temporal/class_token": np.ones((1, 8), np.float32),
            "classifier/kernel": np.ones((8, 3), np.float32),
        }
        metadata = {
            "method": "dualpath",
            "backbone_name": "custom",
            "backbone_sha256": "0" * 64,
            "class_names": ["a", "b", "c"],
            "config": {
                "seed": 0,
                "data": {
                    "num_frames": 16,
                    "image_size": 32,
                    "grid": [4, 4],
                    "crop_scale": [0.1, 1],
                },
                "backbone": {"name": "ViT-B/16", "depth": 2, "heads": 12, "checkpoint": "a"},
                "model": {"method": "dualpath", "adapter_bottleneck": 4},
            },
            "version": "0",
            "step": 5,
        }
        path = folder / "adapter.safetensors"
        adapter_file.write_adapter(str(path), leaves, metadata)
        self._seeds = [Case("adapter", {path.name: path.read_bytes()})]

    def seeds(self) -> list[Case]:
        return self._seeds

    def mutate(self, rng: random.Random, seed: Case) -> Case:
        ((name, data),) = seed.files.items()
        return Case(seed.kind, {name: mutate_safetensors(rng, data)})

    def read(self, kind: str, folder: pathlib.Path, out: pathlib.Path) -> None:
        del kind, out
        leaves, metadata = adapter_file.read_adapter(str(folder / "adapter.safetensors"))
        # `init_from_adapter` relies on these types.
        assert all(isinstance(leaf, np.ndarray) for leaf in leaves.values())
        assert all(isinstance(metadata[key], str) for key in ("method", "backbone_sha256"))
        assert all(isinstance(name, str) for name in metadata["class_names"])
        assert isinstance(metadata["step"], int)
        try:  # as `trained_model.load` does
            trained_model.parse_saved_config(metadata)
        except INVALID_CONFIG_ERRORS as error:
            raise ValueError(str(error)) from None
