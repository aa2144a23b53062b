"""Implements blocks of the tuning methods in torch, from the equations.

They are the references of test_method_equations.py. `p` holds the parameters of a frozen block and
`a` those of the method in it, as dicts of tensors in Flax's shapes. h is [B, T, N, D]. `wrong`
names a fault for the negative twins.
"""

import torch
from torch.nn import functional

HEADS = 4


def linear(x, p):
    return x @ p["kernel"] + p["bias"]


def norm(x, p):
    return functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], eps=1e-5)


def attend(x, p):
    """Apply attention over the N tokens of x [..., N, D]."""
    q, k, v = linear(x, p["qkv"]).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-2, -3)
    y = functional.scaled_dot_product_attention(q, k, v)
    return linear(y.transpose(-2, -3).flatten(-2), p["out"])


def mlp(x, p):
    y = linear(x, p["hidden"])
    return linear(y * torch.sigmoid(1.702 * y), p["output"])


def adapter(x, a):
    return linear(functional.gelu(linear(x, a["down"])), a["up"])


def run_frozen_block(h, p):
    """Return (z, MLP output) of a frozen block; the block's output is their sum."""
    z = h + attend(norm(h, p["ln_1"]), p["attention"])
    return z, mlp(norm(z, p["ln_2"]), p["mlp"])


def convolve(x, a, side):
    """Apply a depthwise 3D convolution to x [B, T, side^2, R]."""
    kernel = a["kernel"]  # [T, H, W, 1, R]
    x = x.unflatten(2, (side, side)).permute(0, 4, 1, 2, 3)
    padding = [size // 2 for size in kernel.shape[:3]]
    weight = kernel.permute(4, 3, 0, 1, 2)
    y = functional.conv3d(x, weight, a["bias"], padding=padding, groups=len(weight))
    return y.permute(0, 2, 3, 4, 1).flatten(2, 3)


def adaptformer(h, p, a, wrong):
    z, y = run_frozen_block(h, p)
    scale = 1.0 if wrong == "scale" else 0.1
    x = z if wrong == "no norm" else norm(z, p["ln_2"])
    return z + y + scale * adapter(x, a["mlp"])


def adaptformer_serial(h, p, a, wrong):
    z, y = run_frozen_block(h, p)
    return z + (0 if wrong == "no skip" else y) + 0.1 * adapter(y, a["mlp"])


def protuning(h, p, a, wrong):
    z, y = run_frozen_block(h, p)
    h = z + y
    side = round((h.shape[2] - 1) ** 0.5)
    v = linear(h[:, :, 1:], a["down"]).flatten(0, 1).unflatten(1, (side, side)).movedim(-1, 1)
    weight = a["conv"]["kernel"].permute(3, 2, 0, 1)
    v = functional.conv2d(v, weight, a["conv"]["bias"], padding=2, groups=len(weight))
    v = linear(v.movedim(1, -1).flatten(1, 2).unflatten(0, h.shape[:2]), a["up"])
    v = v if wrong == "no activation" else functional.gelu(v)
    return h + functional.pad(v, (0, 0, 1, 0))


def st_adapter(h, p, a, wrong):
    z, y = run_frozen_block(h, p)
    x = linear(norm(z, p["ln_2"]), a["down"])
    side = round((h.shape[2] - 1) ** 0.5)
    patches = convolve(x[:, :, 1:], a["conv"], side)
    if wrong == "no time":
        patches = convolve(x[:, :, 1:].flatten(0, 1)[:, None], a["conv"], side).reshape(
            patches.shape
        )
    x = torch.cat([convolve(x[:, :, :1], a["conv"], 1), patches], dim=2)
    x = x if wrong == "no activation" else functional.gelu(x)
    return z + y + linear(x, a["up"])


def st_adapter_released(h, p, a, wrong):
    def adapt(h, a):
        x = convolve(linear(h[:, :, 1:], a["down"]), a["conv"], round((h.shape[2] - 1) ** 0.5))
        x = functional.gelu(x) if wrong == "activation" else x
        x = (2.0 if wrong == "scale" else 1.0) * linear(x, a["up"])
        return h + functional.pad(x, (0, 0, 1, 0))

    h = adapt(h, a["attention_adapter"]) if "attention_adapter" in a else h
    z = h + attend(norm(h, p["ln_1"]), p["attention"])
    if "mlp_adapter" in a and wrong != "after the MLP":
        z = adapt(z, a["mlp_adapter"])
    h = z + mlp(norm(z, p["ln_2"]), p["mlp"])
    return adapt(h, a["mlp_adapter"]) if wrong == "after the MLP" else h


def aim(h, p, a, wrong, scale=0.5):
    x = norm(h, p["ln_1"])
    if "temporal_in" in a:
        x = x + adapter(x, a["temporal_in"])
    if wrong != "no temporal attention":
        x = attend(x.transpose(1, 2), p["attention"]).transpose(1, 2)
    z = h + adapter(x, a["temporal"])
    y = attend(norm(z, p["ln_1"]), p["attention"])
    z = z + (0 if wrong == "no skip" else y) + adapter(y, a["spatial"])
    x = norm(z, p["ln_2"])
    scale = 0.7 if wrong == "scale" else scale
    return z + mlp(x, p["mlp"]) + scale * adapter(x, a["joint"])


def aim_two(h, p, a, wrong):
    return aim(h, p, a, wrong, scale=1.0)


def low_rank(p, a, scale):
    """Return the layer of p with the kernel W + s A B."""
    return p | {"kernel": p["kernel"] + scale * a["down_kernel"] @ a["up_kernel"]}


def lora(h, p, a, wrong):
    """Update the matrices of which `a` has factors; W of queries, keys and values are columns."""
    scale = 1.0 if wrong == "scale" or "key" in a else 2.0
    columns = torch.split(p["attention"]["qkv"]["kernel"], h.shape[-1], dim=1)
    names = ("value", "key", "query") if wrong == "order" else ("query", "key", "value")
    kernels = [
        low_rank({"kernel": kernel}, a[name], scale)["kernel"] if name in a else kernel
        for name, kernel in zip(names, columns, strict=True)
    ]
    attention = p["attention"] | {"qkv": p["attention"]["qkv"] | {"kernel": torch.cat(kernels, 1)}}
    feed_forward = p["mlp"]
    if "output" in a:
        attention["out"] = low_rank(attention["out"], a["output"], scale)
        names = ("hidden", "output") if wrong != "no MLP" else ()
        feed_forward |= {n: low_rank(feed_forward[n], a[f"mlp_{n}"], scale) for n in names}
    z, y = run_frozen_block(h, p | {"attention": attention, "mlp": feed_forward})
    return z + y


def attend_to_frames(x, p, offsets):
    """Attend head by head: head i of frame t to frame t + offsets[i], or t if there is none."""
    qkv = linear(x, p["qkv"]).unflatten(-1, (3, HEADS, -1))
    q, k, v = (qkv[:, :, :, i].transpose(2, 3) for i in range(3))  # [B, T, K, N, d]
    frames, y = x.shape[1], torch.empty_like(q)
    for head in range(HEADS):
        for t in range(frames):
            other = t + (offsets[head] if head < len(offsets) else 0)
            other = other if 0 <= other < frames else t
            weights = q[:, t, head] @ k[:, other, head].transpose(1, 2) * q.shape[-1] ** -0.5
            y[:, t, head] = weights.softmax(-1) @ v[:, other, head]
    return linear(y.transpose(2, 3).flatten(-2), p["out"])


def zeroi2v(h, p, a, wrong, scale=0.5, offsets=(-1, 1)):
    offsets = {"no shift": (), "direction": [-n for n in offsets]}.get(wrong, offsets)
    scale = 0.7 if wrong == "scale" else scale

    def adapt(x, name):
        y = linear(x, a[name]["down"])
        y = functional.gelu(y) if wrong == "activation" else y
        return (0 if wrong == "no skip" else x) + scale * linear(y, a[name]["up"])

    x = adapt(norm(h, p["ln_1"]), "attention_in")
    z = h + adapt(attend_to_frames(x, p["attention"], offsets), "attention_out")
    return z + adapt(mlp(adapt(norm(z, p["ln_2"]), "mlp_in"), p["mlp"]), "mlp_out")


def zeroi2v_four(h, p, a, wrong):
    return zeroi2v(h, p, a, wrong, scale=1.0, offsets=(-1, 1, -2, 2))


# Case of method_cases.py -> its block, and faults that must show.
METHODS = {
    "adaptformer": (adaptformer, ("scale", "no norm")),
    "adaptformer_serial": (adaptformer_serial, ("no skip",)),
    "protuning": (protuning, ("no activation",)),
    "st_adapter": (st_adapter, ("no time", "no activation")),
    "st_adapter_released": (st_adapter_released, ("activation", "scale")),
    "st_adapter_both": (st_adapter_released, ("activation", "scale", "after the MLP")),
    "aim": (aim, ("no temporal attention", "no skip", "scale")),
    "aim_two": (aim_two, ("no temporal attention", "scale")),
    "lora": (lora, ("scale", "order")),
    "lora_all": (lora, ("order", "no MLP")),
    "zeroi2v": (zeroi2v, ("no shift", "direction", "scale", "activation", "no skip")),
    "zeroi2v_four": (zeroi2v_four, ("no shift", "direction", "scale")),
}


def select_block(tree, i):
    """Return the tensors of block i from arrays stacked [L, ...]."""
    if isinstance(tree, dict):
        return {name: select_block(leaf, i) for name, leaf in tree.items()}
    return torch.tensor(tree[i])


def run(case, h, blocks, adapters, wrong=None):
    """Run h [B, T, N, D] through all blocks of a case."""
    h = torch.tensor(h)
    for i in range(len(blocks["ln_1"]["scale"])):
        h = METHODS[case][0](h, select_block(blocks, i), select_block(adapters, i), wrong)
    return h.numpy()
