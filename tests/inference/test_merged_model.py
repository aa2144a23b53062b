"""Merges trained models into backbone files and compares logits with those of the models."""

import dataclasses
import pathlib
import re
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from dualpath_jax.commands import merge as merge_command
from dualpath_jax.config import schema
from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.inference import export, merged_model, trained_model
from dualpath_jax.models import abstract, param_tree
from dualpath_jax.training import adapter_file, experiment
from dualpath_jax.training.step import make_train_step
from dualpath_jax.weights import convert
from dualpath_jax.weights.backbone_keys import fill_backbone_keys
from tests.helpers.runs import build_run

NAMES = ["jump", "run", "walk"]
CASES = {
    "lora": {"lora.targets": ("query", "key", "output", "mlp")},
    "zeroi2v": {"zeroi2v.offsets": (-1, 2)},
    "full": {},
}


@pytest.fixture(scope="module")
def half_backbone(demo_backbone, tmp_path_factory):
    """Return a backbone file whose weights are float16, as those of OpenAI's CLIP."""
    arrays, meta, _ = convert._read_backbone(demo_backbone)
    path = tmp_path_factory.mktemp("half") / "half.safetensors"
    arrays = {name: array.astype(np.float16) for name, array in arrays.items()}
    path.write_bytes(convert._serialize(arrays, meta))
    return str(path)


def tuned_model(method, backbone, folder, **keys):
    """Write an adapter file with random parameters of a method; return its path."""
    config = schema.get_config()
    config.model.method, config.model.dtype = method, "float32"
    config.model.scan_blocks = True
    config.data.image_size, config.data.num_frames = 32, 4
    config.data.sampling = "segments"
    config.backbone.checkpoint = backbone
    config.model.update_from_flattened_dict(CASES.get(method, {}) | keys)
    fill_backbone_keys(config)
    frozen, shape, info = convert.load_backbone(backbone, abstract.build_backbone_config(config))
    model = abstract.abstract_model(config, len(NAMES), shape)
    rng = np.random.default_rng(0)
    start = param_tree.flatten({"backbone": frozen})
    leaves = {
        name: (start.get(name, 0) + 0.05 * rng.normal(size=leaf.shape)).astype(np.float32)
        for name, leaf in param_tree.flatten(param_tree.split(model.params, model.mask)[0]).items()
    }
    path = str(folder / f"{method}.safetensors")
    metadata = experiment.describe_trained(config, info, NAMES) | {"step": 7}
    adapter_file.write_adapter(path, leaves, metadata)
    return path


def logits(path, clip, backbone=None):
    """Return the logits of an adapter file."""
    model = trained_model.load(path, backbone)
    return np.asarray(model.module.apply({"params": model.params}, clip))


@pytest.mark.parametrize("method", CASES)
def test_files_of_a_merged_model(method, half_backbone, tmp_path):
    """Check logits, dtypes and metadata; twin: the backbone that is not merged."""
    path = tuned_model(method, half_backbone, tmp_path)
    out = str(tmp_path / "merged.safetensors")
    merged = merged_model.merge_model(path, out)
    assert (merged.method, merged.step) == (method, 7)
    clip = np.random.default_rng(1).normal(size=(2, 4, 32, 32, 3)).astype(np.float32)
    tuned, plain = logits(path, clip), logits(merged.adapter, clip)
    np.testing.assert_allclose(plain, tuned, rtol=0, atol=1e-4)
    assert np.abs(tuned).max() > 0.1

    # The backbone file describes itself, and states what was merged.
    before, shape = (convert.read_description(path) for path in (half_backbone, out))
    assert shape[0] == dataclasses.replace(before[0], image_size=32)
    assert shape[1] == before[1]  # the normalization
    meta = convert._read_metadata(out)
    assert meta["merged"]["method"] == method
    assert meta["source_sha256"] == convert._read_metadata(half_backbone)["source_sha256"]
    arrays = safetensors.numpy.load_file(out)
    changed = {name for name, array in arrays.items() if array.dtype == np.float32}
    original = safetensors.numpy.load_file(half_backbone)
    original.pop("position_embedding")  # the merged file has that of the run's image size
    same = original.keys() - changed
    assert all(np.array_equal(arrays[name], original[name]) for name in same)
    assert "blocks/attention/qkv/kernel" in changed
    if method != "full":
        assert changed == {n for n in changed if n.startswith(("blocks/attention/", "blocks/mlp/"))}
        assert "blocks/ln_1/scale" not in changed

    # The adapter file has the rest.
    leaves, saved = adapter_file.read_adapter(merged.adapter)
    assert merged.remaining == sum(leaf.size for leaf in leaves.values())
    assert {name.split("/")[0] for name in leaves} == {
        *("head", *(["temporal_position"] if method == "zeroi2v" else []))
    }
    assert saved["config"]["backbone"]["checkpoint"] == out
    assert saved["method"] == ("linear" if method == "full" else method)

    # Twin: the other backbone is refused, and would have other logits.
    with pytest.raises(ValueError, match="half.safetensors is not the backbone that"):
        logits(merged.adapter, clip, half_backbone)
    adapter_file.write_adapter(
        merged.adapter, leaves, saved | {"backbone_sha256": hash_of(half_backbone)}
    )
    if method == "full":  # the configuration is that of any linear model
        assert np.abs(logits(merged.adapter, clip, half_backbone) - tuned).max() > 1e-2
        return
    with pytest.raises(ValueError, match=f"no training of {method} is merged into .*half.safe"):
        logits(merged.adapter, clip, half_backbone)


def hash_of(path):
    """Return the identity of a backbone file."""
    return convert._read_backbone(path)[2]


def test_errors(half_backbone, tmp_path, monkeypatch, capsys):
    def error_of(*arguments):
        monkeypatch.setattr(sys, "argv", ["merge.py", *arguments])
        with pytest.raises(SystemExit) as end:
            merge_command.main()
        assert end.value.code == 2
        output = capsys.readouterr()
        assert not output.out
        lines = output.err.splitlines(keepends=True)
        return "".join(line for line in lines if not re.match(r"W\d{4} ", line))  # of the log

    out = str(tmp_path / "merged.safetensors")
    for method in ("adaptformer", "linear"):
        path = tuned_model(method, half_backbone, tmp_path)
        error = error_of(path, f"--out={out}")
        assert f"was tuned with '{method}', which cannot be merged into a backbone: only" in error
        assert "only full, lora, zeroi2v can;" in error
        assert error.count("\n") == 1
    path = tuned_model("lora", half_backbone, tmp_path)
    error = error_of(path, f"--out={half_backbone}")
    assert f"{half_backbone} would replace {half_backbone}, which is read: choose anoth" in error
    assert error.count("\n") == 1
    before = pathlib.Path(path).read_bytes()
    assert f"{path} would replace {path}, which is read" in error_of(path, f"--out={path}")
    named = tmp_path / "named.adapter.safetensors"
    named.write_bytes(before)
    error = error_of(str(named), f"--out={tmp_path}/named.safetensors")
    assert f"{named} would replace {named}, which is read" in error
    assert pathlib.Path(path).read_bytes() == named.read_bytes() == before
    assert "no folder" in error_of(path, f"--out={tmp_path}/none/merged.safetensors")
    assert not (tmp_path / "merged.adapter.safetensors").exists()
    merged = merged_model.merge_model(path, out)
    error = error_of(merged.adapter, f"--out={tmp_path}/again.safetensors")
    assert "merged.adapter.safetensors is merged already: its backbone is" in error


def test_a_merged_model_trains_on(config, tmp_path):
    """Check that the command's files start a training, in which only the rest trains."""
    config.model.method, config.data.num_frames = "zeroi2v", 4
    config.model.zeroi2v.offsets = (-1,)
    dataset = VideoDataset(config.data.dir, "train")
    tuned = build_run(config, str(tmp_path / "tuned"), dataset)
    path = str(tmp_path / "tuned.safetensors")
    leaves = {n: np.asarray(x) for n, x in param_tree.flatten(tuned.state.trainable).items()}
    leaves = {n: x + 0.02 * np.ones_like(x) for n, x in leaves.items()}
    adapter_file.write_adapter(path, leaves, tuned.metadata() | {"step": 5})
    message = merge_command.merge(path, str(tmp_path / "merged.safetensors"), None, "latest")
    assert f"with zeroi2v of step 5 merged\nwrote {tmp_path}/merged.adapter" in message

    config.model.merged = True
    with pytest.raises(ValueError, match="no training of zeroi2v is merged into"):
        build_run(config, str(tmp_path / "plain"), dataset)
    config.backbone.checkpoint = str(tmp_path / "merged.safetensors")
    config.init_from = str(tmp_path / "merged.adapter.safetensors")
    merged = build_run(config, str(tmp_path / "merged"), dataset)
    merged.init_from_adapter(config.init_from)
    trained = param_tree.flatten(merged.state.trainable)
    rest = {n: leaf for n, leaf in leaves.items() if not n.startswith("adapters/")}
    assert trained.keys() == rest.keys()
    assert all(np.array_equal(trained[n], rest[n]) for n in rest)
    step = make_train_step(merged.model, config, merged.optimizer)
    batch = {
        "spatial": jax.ShapeDtypeStruct((8, 4, 32, 32, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    after, _ = jax.eval_shape(step, merged.state, merged.frozen, batch)
    assert param_tree.flatten(after.trainable).keys() == rest.keys()
    clip = jnp.asarray(np.random.default_rng(2).normal(size=(1, 4, 32, 32, 3)), jnp.float32)
    params = param_tree.merge(merged.state.trainable, merged.frozen)
    expected = trained_model.load(path)
    np.testing.assert_allclose(
        merged.model.apply({"params": params}, clip),
        expected.module.apply({"params": expected.params}, clip),
        *(0, 1e-4),
    )


@pytest.mark.parametrize("method", ["lora", "zeroi2v"])
def test_a_merged_model_is_exported(method, half_backbone, tmp_path):
    """Check the exported program of merged files; twin: the shift of heads is part of it."""
    path = tuned_model(method, half_backbone, tmp_path)
    merged = merged_model.merge_model(path, str(tmp_path / "merged.safetensors"))
    tuned, model = trained_model.load(path), trained_model.load(merged.adapter)
    shape = export.FrameShape(4, 40, 40)
    export.export_model(model, str(tmp_path / "exported"), ["stablehlo"], shape=shape)
    program = jax.export.deserialize((tmp_path / "exported" / "model.stablehlo").read_bytes())
    video = np.random.default_rng(3).integers(0, 256, shape.shape, dtype=np.uint8)
    videos = np.stack([video, video[::-1]])
    forward, backward = np.asarray(program.call(videos))
    for got, frames in ((forward, video), (backward, video[::-1])):
        want = np.asarray(tuned.logits_of_frames(frames))
        np.testing.assert_allclose(got, want[0], rtol=0, atol=1e-4)
    shifts_heads = method == "zeroi2v"
    assert (np.abs(forward - backward).max() > 1e-3) == shifts_heads  # lora averages the frames
