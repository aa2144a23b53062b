"""Tests the counts of efficiency.py against the XLA program, a formula, and PAPER.md."""

import importlib
import math
import re

import jax
import jax.numpy as jnp
import pytest

from dualpath_jax.analysis import efficiency
from dualpath_jax.config import recipes, schema
from dualpath_jax.models.abstract import abstract_inputs, abstract_model, build_backbone_config
from dualpath_jax.models.backbones import attention


def load_config(name):
    file, _, argument = name.partition(":")
    get_config = importlib.import_module(f"configs.{file}").get_config
    return get_config(argument) if argument else get_config()


def test_macs_of_known_products():
    x, w = jnp.zeros((3, 4, 5)), jnp.zeros((5, 7))
    assert efficiency.count_macs(lambda x: x @ w, x) == 3 * 4 * 5 * 7
    assert efficiency.count_macs(lambda x: x + 1, x) == 0

    def looped(x):
        return jax.lax.scan(
            lambda c, _: (jax.jit(jnp.matmul)(c, jnp.zeros((5, 5))), None), x, length=6
        )

    assert efficiency.count_macs(looped, x) == 6 * 3 * 4 * 5 * 5

    def conv(x, kernel, groups):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    image = jnp.zeros((2, 8, 8, 6))
    plain = efficiency.count_macs(lambda x: conv(x, jnp.zeros((3, 3, 6, 10)), 1), image)
    assert plain == 2 * 8 * 8 * 10 * 3 * 3 * 6
    depthwise = efficiency.count_macs(lambda x: conv(x, jnp.zeros((3, 3, 1, 6)), 6), image)
    assert depthwise == 2 * 8 * 8 * 6 * 3 * 3


def _parse_dims(text):
    return [int(d) for d in text.split("x")[:-1]]


def count_stablehlo_macs(text):
    """Count a StableHLO module's multiply-accumulates; a function counts once for each call."""
    functions, body = {}, None
    for line in text.splitlines():
        if match := re.search(r"func\.func .*?@([\w.]+)\(", line):
            body = functions.setdefault(match.group(1), [])
        elif body is not None:
            body.append(line)

    def macs(name):
        total = 0
        for line in functions[name]:
            if call := re.search(r"call @([\w.]+)\(", line):
                total += macs(call.group(1))
            types = re.findall(r"tensor<([^>]*)>", line)
            if "stablehlo.dot_general" in line:
                left, _, out = types[-3:]
                contracted = re.search(r"contracting_dims = \[([\d, ]*)\] x", line).group(1)
                axes = [int(axis) for axis in contracted.split(",")]
                total += math.prod(_parse_dims(out)) * math.prod(
                    _parse_dims(left)[axis] for axis in axes
                )
            elif "stablehlo.convolution" in line:
                _, kernel, out = types[-3:]
                features = _parse_dims(out)[-1]
                total += math.prod(_parse_dims(out)) * math.prod(_parse_dims(kernel)) // features
        return total

    return macs("main")


def expected_macs(config, classes):
    """Return the plain MACs of DualPath on a CLIP ViT for one view, by PAPER.md."""
    shape = build_backbone_config(config)
    width, tokens, e = shape.width, shape.num_tokens, shape.projection_dim
    r, s = config.model.adapter_bottleneck, config.data.num_spatial_frames
    g = config.data.num_frames // math.prod(config.data.grid)
    embed = (tokens - 1) * 3 * shape.patch_size**2 * width
    block = tokens * (4 * width**2 + 2 * width * shape.mlp_dim) + 2 * tokens**2 * width
    adapter = tokens * 2 * width * r
    serial = 3 if config.model.pre_attention_adapter else 2
    spatial = embed + shape.depth * (block + 2 * adapter) + width * e
    temporal = embed + shape.depth * (block + serial * adapter) + width * e
    return s * spatial + g * temporal + 2 * e * e + e * classes


@pytest.mark.parametrize(("name", "classes"), [("ssv2_vitb", 174), ("k400_vitl", 400)])
def test_dualpath_matches_the_formula(name, classes):
    config = load_config(name)
    counted = efficiency.measure_efficiency(config)
    assert round(counted.plain_gmacs_per_view * 1e9) == expected_macs(config, classes)
    assert counted.gmacs_per_view < counted.plain_gmacs_per_view
    config.data.num_frames = 48  # negative twin: another clip has another count
    assert round(counted.plain_gmacs_per_view * 1e9) != expected_macs(config, classes)


def test_cudnn_attention_is_counted(monkeypatch):
    """Check that cuDNN's attention is counted; tracing for a GPU directly would miss it."""
    config = load_config("ssv2_vitb")
    expected = efficiency.measure_efficiency(config)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "has_flash_attention", lambda: True)
    monkeypatch.setattr(attention, "_by_cudnn", lambda q, k, v, padding: v)
    assert efficiency.measure_efficiency(config) == expected
    model = abstract_model(config, 174)
    forward = efficiency._build_forward_fn(model)
    traced = efficiency.count_macs(forward, model.params, *abstract_inputs(config))
    assert traced < round(expected.gmacs_per_view * 1e9)


@pytest.mark.parametrize("cls_token_only", [False, True])
def test_count_is_that_of_the_unrolled_program(cls_token_only):
    config = load_config("ssv2_vitb")
    config.model.scan_blocks, config.model.cls_token_only = False, cls_token_only
    model = abstract_model(config, 174)
    lowered = jax.jit(lambda p, *x: model.module.apply({"params": p}, *x)).lower(
        model.params, *abstract_inputs(config)
    )
    counted = efficiency.measure_efficiency(config)
    gmacs = counted.gmacs_per_view if cls_token_only else counted.plain_gmacs_per_view
    assert count_stablehlo_macs(lowered.as_text()) == round(gmacs * 1e9)


def test_skipping_the_last_block_saves_what_it_should():
    """Check that the last block skips N - 1 tokens.

    Only its attention still reads their norms, once per head.
    """
    config = recipes.baseline(recipes.vit_b16(recipes.ssv2()), "linear")
    counted = efficiency.measure_efficiency(config)
    tokens, width, heads = 197, 768, 12
    saved = (tokens - 1) * 12 * width**2 + 2 * tokens * width * (tokens - heads)
    difference = counted.plain_gmacs_per_view - counted.gmacs_per_view
    assert round(difference * 1e9) == config.data.num_frames * saved


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        ("ssv2_vitb", 12_617_134),
        ("ssv2_vitb:without_sa", 7_724_974),
        ("ssv2_vitb:without_ta", 5_506_222),
        ("hmdb51_swinb", 8_341_043),
    ],
)
def test_trainable_parameters(name, trainable):
    """Check some counts of PAPER.md; test_dualpath.py and the configs' headers have the others."""
    assert efficiency.measure_efficiency(load_config(name)).trainable_params == trainable


def test_unknown_sources_get_a_placeholder_number_of_classes():
    config = schema.get_config()
    config.model.scan_blocks = True
    assert efficiency.measure_efficiency(config).trainable_params == 10_158_850  # with two classes
