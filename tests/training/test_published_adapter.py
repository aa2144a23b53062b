"""Converts checkpoints named like those of AIM's and ST-Adapter's authors; compares with torch."""

import re

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
BLOCK = "transformer.resblocks."
NAMES = [f"class {i}" for i in range(CLASSES)]


def _random_state(prefix, adapters, others):
    """Return random weights of a CLIP with `prefix` and of a method, float32, by their names.

    Args:
      prefix: of the names of the frozen tower.
      adapters: {name of a layer of each block: the weight's shape}, with a bias of its length.
      others: {name: shape} of the weights outside the blocks.
    """
    generator = torch.Generator().manual_seed(0)
    state = {}

    def add(name, *shape, scale=None, mean=0.0):
        scale = shape[-1] ** -0.5 if scale is None else scale
        state[name] = mean + scale * torch.randn(shape, generator=generator)

    def add_layer(name, *shape):
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0], scale=0.1)

    def add_norm(name):
        add(f"{name}.weight", WIDTH, scale=0.1, mean=1.0)
        add(f"{name}.bias", WIDTH, scale=0.1)

    add(f"{prefix}conv1.weight", WIDTH, 3, PATCH, PATCH, scale=0.1)
    add(f"{prefix}class_embedding", WIDTH)
    add(f"{prefix}positional_embedding", SIDE**2 + 1, WIDTH)
    add_norm(f"{prefix}ln_pre")
    add_norm(f"{prefix}ln_post")
    for i in range(DEPTH):
        block = f"{prefix}{BLOCK}{i}."
        add(f"{block}attn.in_proj_weight", 3 * WIDTH, WIDTH)
        add(f"{block}attn.in_proj_bias", 3 * WIDTH, scale=0.1)
        add_layer(f"{block}attn.out_proj", WIDTH, WIDTH)
        add_layer(f"{block}mlp.c_fc", 4 * WIDTH, WIDTH)
        add_layer(f"{block}mlp.c_proj", WIDTH, 4 * WIDTH)
        add_norm(f"{block}ln_1")
        add_norm(f"{block}ln_2")
        for name, shape in adapters.items():
            add_layer(f"{block}{name}", *shape)
    for name, shape in others.items():
        add(name, *shape)
    return state


def _random_aim(temporal_in):
    """Return weights under the names of AIM's checkpoints."""
    adapters = {}
    for name in ["MLP_Adapter", "S_Adapter", "T_Adapter"] + ["T_Adapter_in"] * temporal_in:
        adapters[f"{name}.D_fc1"] = (BOTTLENECK, WIDTH)
        adapters[f"{name}.D_fc2"] = (WIDTH, BOTTLENECK)
    others = {
        "backbone.temporal_embedding": (1, FRAMES, WIDTH),
        "cls_head.fc_cls.weight": (CLASSES, WIDTH),
        "cls_head.fc_cls.bias": (CLASSES,),
    }
    return _random_state("backbone.", adapters, others)


def _random_st_adapter(places):
    """Return weights under the names of ST-Adapter's checkpoints."""
    adapters = {}
    for place in places:
        adapters[f"adapter_pre_{place}.fc1"] = (BOTTLENECK, WIDTH)
        adapters[f"adapter_pre_{place}.conv"] = (BOTTLENECK, 1, 3, 1, 1)
        adapters[f"adapter_pre_{place}.fc2"] = (WIDTH, BOTTLENECK)
    return _random_state("", adapters, {"fc.weight": (CLASSES, WIDTH), "fc.bias": (CLASSES,)})


class _Torch:
    """Computes the parts of a CLIP and of adapters in torch, by the names in `state`."""

    def __init__(self, state):
        self.state = state

    def linear(self, x, name):
        return functional.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, x, name):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return functional.layer_norm(x, x.shape[-1:], weight, bias)

    def attend(self, x, name):
        weight, bias = self.state[f"{name}.in_proj_weight"], self.state[f"{name}.in_proj_bias"]
        q, k, v = functional.linear(x, weight, bias).chunk(3, dim=-1)  # one head
        return self.linear(functional.scaled_dot_product_attention(q, k, v), f"{name}.out_proj")

    def mlp(self, x, block):
        hidden = self.linear(x, f"{block}mlp.c_fc")
        return self.linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}mlp.c_proj")

    def tokens(self, clips, prefix, temporal):
        """Embed clips [B, T, H, W, 3] as tokens [B, T, N, D]; `temporal` is added to them."""
        images = torch.from_numpy(clips).flatten(0, 1).permute(0, 3, 1, 2)
        patches = functional.conv2d(images, self.state[f"{prefix}conv1.weight"], stride=PATCH)
        patches = patches.flatten(2).transpose(1, 2)
        token = self.state[f"{prefix}class_embedding"].expand(len(images), 1, -1)
        x = torch.cat([token, patches], dim=1) + self.state[f"{prefix}positional_embedding"]
        x = x.unflatten(0, clips.shape[:2]) + temporal
        return self.norm(x, f"{prefix}ln_pre")


def _aim_logits(state, clips, scale):
    """Compute AIM from the equations of its paper: clips [B, T, H, W, 3] -> logits [B, classes]."""
    net = _Torch(state)

    def adapter(x, name):
        return net.linear(functional.gelu(net.linear(x, f"{name}.D_fc1")), f"{name}.D_fc2")

    x = net.tokens(clips, "backbone.", state["backbone.temporal_embedding"][0][:, None])
    for i in range(DEPTH):
        block = f"backbone.{BLOCK}{i}."
        y = net.norm(x, f"{block}ln_1").transpose(1, 2)
        if f"{block}T_Adapter_in.D_fc1.weight" in state:
            y = y + adapter(y, f"{block}T_Adapter_in")
        x = x + adapter(net.attend(y, f"{block}attn"), f"{block}T_Adapter").transpose(1, 2)
        y = net.attend(net.norm(x, f"{block}ln_1"), f"{block}attn")
        x = x + y + adapter(y, f"{block}S_Adapter")
        y = net.norm(x, f"{block}ln_2")
        x = x + net.mlp(y, block) + scale * adapter(y, f"{block}MLP_Adapter")
    features = net.norm(x[:, :, 0], "backbone.ln_post").mean(dim=1)
    return net.linear(features, "cls_head.fc_cls").numpy()


def _st_adapter_logits(state, clips, order=("mean", "norm")):
    """Compute ST-Adapter as its authors released it: clips [B, T, H, W, 3] -> [B, classes]."""
    net = _Torch(state)

    def adapt(x, name):
        if f"{name}.fc1.weight" not in state:
            return x
        y = net.linear(x[:, :, 1:], f"{name}.fc1").unflatten(2, (SIDE, SIDE))
        weight, bias = state[f"{name}.conv.weight"], state[f"{name}.conv.bias"]
        padding = [size // 2 for size in weight.shape[2:]]
        y = functional.conv3d(y.movedim(-1, 1), weight, bias, padding=padding, groups=len(weight))
        y = net.linear(y.movedim(1, -1).flatten(2, 3), f"{name}.fc2")
        return x + functional.pad(y, (0, 0, 1, 0))

    x = net.tokens(clips, "", 0.0)
    for i in range(DEPTH):
        block = f"{BLOCK}{i}."
        x = adapt(x, f"{block}adapter_pre_attn")
        x = x + net.attend(net.norm(x, f"{block}ln_1"), f"{block}attn")
        x = adapt(x, f"{block}adapter_pre_mlp")
        x = x + net.mlp(net.norm(x, f"{block}ln_2"), block)
    x = x[:, :, 0]
    for step in order:
        x = x.mean(dim=1) if step == "mean" else net.norm(x, "ln_post")
    return net.linear(x, "fc").numpy()


def _write_backbone(state, prefix, folder):
    """Write the backbone file of the CLIP in a method's weights."""
    tower = {
        f"visual.{name.removeprefix(prefix)}": tensor.numpy()
        for name, tensor in state.items()
        if name.startswith(prefix) and not re.search("dapter|temporal|^fc", name)
    }
    safetensors.numpy.save_file(tower, folder / "clip.safetensors")
    options = {"activation": "quick_gelu", "heads": HEADS, "normalization": "clip"}
    convert.convert_checkpoint(folder / "clip.safetensors", folder / "backbone", **options)


def _write_aim(folder, temporal_in):
    """Write a checkpoint of AIM and the backbone file of its CLIP; return the weights."""
    state = _random_aim(temporal_in)
    _write_backbone(state, "backbone.", folder)
    torch.save({"meta": {"epoch": 3}, "state_dict": state}, folder / "aim.pth")
    return state


def _config(method="aim", **keys):
    config = schema.get_config()
    config.data.image_size = SIDE * PATCH
    config.data.sampling = "segments"
    config.model.method, config.model.dtype = method, "float32"
    config.model.update_from_flattened_dict(keys)
    return config


@pytest.mark.parametrize(("temporal_in", "scale"), [(False, 0.5), (True, 1.0)])
def test_aim_logits(temporal_in, scale, tmp_path):
    """Compare the loaded adapter file with torch; twin: another scale."""
    state = _write_aim(tmp_path, temporal_in)
    out, backbone = str(tmp_path / "aim.safetensors"), str(tmp_path / "backbone")
    config = _config(**{"aim.scale": scale})
    info = published_adapter.convert_published(
        "aim", tmp_path / "aim.pth", out, backbone, config, NAMES
    )
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
    expected = _aim_logits(state, clips, scale)
    assert 0.1 < expected.std() < 10
    assert np.abs(logits - expected).max() <= 1e-4
    assert np.abs(logits - _aim_logits(state, clips, 0.7)).max() > 1e-2


@pytest.mark.parametrize("places", [("mlp",), ("attn", "mlp")])
@pytest.mark.parametrize("frozen", [True, False])
def test_st_adapter_logits(places, frozen, tmp_path):
    """Compare the loaded adapter file with torch; twin: the norm before the average."""
    state = _random_st_adapter(places)
    _write_backbone(state, "", tmp_path)
    trained = {name: x for name, x in state.items() if re.search("adapter|^fc", name)}
    held = state if frozen else trained  # the authors' files hold only the trained weights
    torch.save({"model": held, "optimizer": {"state": {}}, "next_epoch": 12}, tmp_path / "st.pth")
    out, backbone = str(tmp_path / "st.safetensors"), str(tmp_path / "backbone")
    config = _config("st_adapter")
    config.data.num_frames = FRAMES
    info = published_adapter.convert_published(
        "st_adapter", tmp_path / "st.pth", out, backbone, config, NAMES
    )
    assert info["parameters"] == sum(tensor.numel() for tensor in trained.values())
    model = trained_model.load(out)
    options = model.config.model.st_adapter
    assert (options.form, options.places) == ("released", "both" if len(places) == 2 else "mlp")
    assert (options.width, tuple(options.kernel_size)) == (BOTTLENECK, (3, 1, 1))
    clips = np.random.default_rng(0).normal(size=(2, FRAMES, 16, 16, 3)).astype(np.float32)
    logits = model.module.apply({"params": model.params}, clips)
    expected = _st_adapter_logits(state, clips)
    assert 0.1 < expected.std() < 10
    assert np.abs(logits - expected).max() <= 1e-4
    assert np.abs(logits - _st_adapter_logits(state, clips, ("norm", "mean"))).max() > 1e-2


def test_an_adapter_that_one_block_lacks_is_an_error(tmp_path):
    state = _random_st_adapter(("attn", "mlp"))
    _write_backbone(state, "", tmp_path)
    state = {n: x for n, x in state.items() if "resblocks.1.adapter_pre_attn" not in n}
    torch.save({"model": state}, tmp_path / "st.pth")
    arguments = (str(tmp_path / "out"), str(tmp_path / "backbone"), _config("st_adapter"), NAMES)
    with pytest.raises(ValueError, match="missing: transformer.resblocks.1.adapter_pre_attn.conv"):
        published_adapter.convert_published("st_adapter", tmp_path / "st.pth", *arguments)


def test_what_does_not_fit_is_refused(tmp_path):
    state = _write_aim(tmp_path, False)
    checkpoint, out = tmp_path / "aim.pth", str(tmp_path / "aim.safetensors")

    def run(names=NAMES, backbone="backbone", **keys):
        published_adapter.convert_published(
            "aim", checkpoint, out, str(tmp_path / backbone), _config(**keys), names
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
    _write_aim(tmp_path, True)
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
