"""Converts a checkpoint named like those of AIM's authors and compares logits with torch."""

import numpy as np
import pytest
import safetensors.numpy

from dualpath_jax.commands import convert as command
from dualpath_jax.config import schema
from dualpath_jax.inference import trained_model
from dualpath_jax.training import published_adapter
from dualpath_jax.weights import convert

torch = pytest.importorskip("torch")
functional = torch.nn.functional

WIDTH, DEPTH, HEADS, PATCH, SIDE, FRAMES, CLASSES = 64, 2, 1, 8, 2, 4, 5
BOTTLENECK = 16
BLOCK = "backbone.transformer.resblocks."
NAMES = [f"class {i}" for i in range(CLASSES)]


def _random_state(temporal_in):
    """Return random weights under the names of AIM's checkpoints, float32."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def add(name, *shape, scale=None, mean=0.0):
        scale = shape[-1] ** -0.5 if scale is None else scale
        state[name] = mean + scale * torch.randn(shape, generator=generator)

    def add_layer(name, out, width):
        add(f"{name}.weight", out, width)
        add(f"{name}.bias", out, scale=0.1)

    def add_norm(name):
        add(f"{name}.weight", WIDTH, scale=0.1, mean=1.0)
        add(f"{name}.bias", WIDTH, scale=0.1)

    add("backbone.conv1.weight", WIDTH, 3, PATCH, PATCH, scale=0.1)
    add("backbone.class_embedding", WIDTH)
    add("backbone.positional_embedding", SIDE**2 + 1, WIDTH)
    add("backbone.temporal_embedding", 1, FRAMES, WIDTH)
    add_norm("backbone.ln_pre")
    add_norm("backbone.ln_post")
    adapters = ["MLP_Adapter", "S_Adapter", "T_Adapter"] + ["T_Adapter_in"] * temporal_in
    for i in range(DEPTH):
        block = f"{BLOCK}{i}."
        add(f"{block}attn.in_proj_weight", 3 * WIDTH, WIDTH)
        add(f"{block}attn.in_proj_bias", 3 * WIDTH, scale=0.1)
        add_layer(f"{block}attn.out_proj", WIDTH, WIDTH)
        add_layer(f"{block}mlp.c_fc", 4 * WIDTH, WIDTH)
        add_layer(f"{block}mlp.c_proj", WIDTH, 4 * WIDTH)
        add_norm(f"{block}ln_1")
        add_norm(f"{block}ln_2")
        for name in adapters:
            add_layer(f"{block}{name}.D_fc1", BOTTLENECK, WIDTH)
            add_layer(f"{block}{name}.D_fc2", WIDTH, BOTTLENECK)
    add_layer("cls_head.fc_cls", CLASSES, WIDTH)
    return state


def _torch_logits(state, clips, scale):
    """Compute AIM from the equations of its paper: clips [B, T, H, W, 3] -> logits [B, classes]."""

    def linear(x, name):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return functional.layer_norm(
            x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"]
        )

    def adapter(x, name):
        return linear(functional.gelu(linear(x, f"{name}.D_fc1")), f"{name}.D_fc2")

    def attend(x, name):
        weight, bias = state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"]
        q, k, v = functional.linear(x, weight, bias).chunk(3, dim=-1)  # one head
        return linear(functional.scaled_dot_product_attention(q, k, v), f"{name}.out_proj")

    batch = len(clips)
    images = torch.from_numpy(clips).flatten(0, 1).permute(0, 3, 1, 2)
    patches = functional.conv2d(images, state["backbone.conv1.weight"], stride=PATCH)
    patches = patches.flatten(2).transpose(1, 2)
    token = state["backbone.class_embedding"].expand(len(images), 1, -1)
    x = torch.cat([token, patches], dim=1) + state["backbone.positional_embedding"]
    x = x.unflatten(0, (batch, FRAMES)) + state["backbone.temporal_embedding"][0][:, None]
    x = norm(x, "backbone.ln_pre")  # [B, T, N, D]
    for i in range(DEPTH):
        block = f"{BLOCK}{i}."
        y = norm(x, f"{block}ln_1").transpose(1, 2)
        if f"{block}T_Adapter_in.D_fc1.weight" in state:
            y = y + adapter(y, f"{block}T_Adapter_in")
        x = x + adapter(attend(y, f"{block}attn"), f"{block}T_Adapter").transpose(1, 2)
        y = attend(norm(x, f"{block}ln_1"), f"{block}attn")
        x = x + y + adapter(y, f"{block}S_Adapter")
        y = norm(x, f"{block}ln_2")
        hidden = linear(y, f"{block}mlp.c_fc")
        mlp = linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}mlp.c_proj")
        x = x + mlp + scale * adapter(y, f"{block}MLP_Adapter")
    features = norm(x[:, :, 0], "backbone.ln_post").mean(dim=1)
    return linear(features, "cls_head.fc_cls").numpy()


def _write_files(folder, temporal_in):
    """Write the checkpoint, and the backbone file of its CLIP; return the weights."""
    state = _random_state(temporal_in)
    tower = {
        name.replace("backbone.", "visual."): tensor.numpy()
        for name, tensor in state.items()
        if name.startswith("backbone.") and "dapter" not in name and "temporal" not in name
    }
    safetensors.numpy.save_file(tower, folder / "clip.safetensors")
    options = {"activation": "quick_gelu", "heads": HEADS, "normalization": "clip"}
    convert.convert_checkpoint(folder / "clip.safetensors", folder / "backbone", **options)
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, folder / "aim.pth")
    return state


def _config(**keys):
    config = schema.get_config()
    config.data.image_size = SIDE * PATCH
    config.data.sampling = "segments"
    config.model.method, config.model.dtype = "aim", "float32"
    config.model.update_from_flattened_dict(keys)
    return config


@pytest.mark.parametrize(("temporal_in", "scale"), [(False, 0.5), (True, 1.0)])
def test_aim_logits(temporal_in, scale, tmp_path):
    """Compare the loaded adapter file with torch; twin: another scale."""
    state = _write_files(tmp_path, temporal_in)
    out, backbone = str(tmp_path / "aim.safetensors"), str(tmp_path / "backbone")
    config = _config(**{"aim.scale": scale})
    info = published_adapter.convert_aim(tmp_path / "aim.pth", out, backbone, config, NAMES)
    assert (info["frames"], info["classes"], info["backbone"]) == (FRAMES, CLASSES, "custom")
    trained = sum(
        tensor.numel() for name, tensor in state.items()
        if "dapter" in name or "temporal" in name or "cls_head" in name
    )  # fmt: skip
    assert info["parameters"] == trained
    model = trained_model.load(out)
    assert (model.class_names, model.config.model.aim.num_temporal_adapters) == (
        NAMES,
        1 + temporal_in,
    )
    clips = np.random.default_rng(0).normal(size=(2, FRAMES, 16, 16, 3)).astype(np.float32)
    logits = model.module.apply({"params": model.params}, clips)
    expected = _torch_logits(state, clips, scale)
    assert 0.1 < expected.std() < 10
    assert np.abs(logits - expected).max() <= 1e-4
    assert np.abs(logits - _torch_logits(state, clips, 0.7)).max() > 1e-2


def test_what_does_not_fit_is_refused(tmp_path):
    state = _write_files(tmp_path, False)
    checkpoint, out = tmp_path / "aim.pth", str(tmp_path / "aim.safetensors")

    def run(names=NAMES, backbone="backbone", **keys):
        published_adapter.convert_aim(
            checkpoint, out, str(tmp_path / backbone), _config(**keys), names
        )

    with pytest.raises(ValueError, match="has 5 classes, but 4 names are given"):
        run(names=NAMES[:4])
    with pytest.raises(ValueError, match="method is 'linear': use a config of 'aim'"):
        run(method="linear")
    arrays, meta, _ = convert._read_backbone(tmp_path / "backbone")
    other = {**arrays, "class_embedding": arrays["class_embedding"] + 1}
    (tmp_path / "other").write_bytes(convert._serialize(other, meta))
    with pytest.raises(ValueError, match="another backbone than .*other: class_embedding differ"):
        run(backbone="other")
    del state["cls_head.fc_cls.bias"]
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match="names of a checkpoint of AIM.*missing: cls_head.fc_cls"):
        run()
    assert not (tmp_path / "aim.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backbone=b"], "--backbone is only for --method"),
        (["--config.data.flip=True"], "--config.data.flip=True is only for --method"),
        (["--method=aim", "--backbone=b"], "--method=aim needs --config, --classes"),
        (
            ["--method=aim", "--backbone=b", "--config=c", "--classes=t", "--heads=2"],
            "--heads has no effect with --method",
        ),
    ],
)
def test_options_of_the_command(options, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["convert", "--checkpoint=a", "--out=b", *options])
    with pytest.raises(SystemExit) as exit_info:
        command.main()
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_command(tmp_path, monkeypatch, capsys):
    _write_files(tmp_path, True)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    options = {
        "--method": "aim",
        "--checkpoint": "aim.pth",
        "--backbone": "backbone",
        "--classes": "classes.txt",
        "--out": "aim.safetensors",
        "--config": "ssv2_vitb_aim",
        "--config.backbone.name": "custom",
        "--config.data.image_size": "16",
        "--config.model.dtype": "float32",
    }
    shape = {"patch_size": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS, "mlp_dim": 256}
    options |= {f"--config.backbone.{key}": str(value) for key, value in shape.items()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["convert", *(f"{k}={v}" for k, v in options.items())])
    assert command.main() == 0
    assert "parameters of aim on custom\nmodel       4 frames, 5 classes" in capsys.readouterr().out
    assert trained_model.load("aim.safetensors").config.model.aim.scale == 1.0
