"""Defines every method at tiny size, for test_methods.py and test_method_equations.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dualpath_jax.config import schema
from dualpath_jax.models import registry as method_registry
from dualpath_jax.models.abstract import clip_shapes
from dualpath_jax.models.backbones import vit
from dualpath_jax.training import experiment

TINY = vit.ViTConfig("tiny", 32, 8, 48, 3, 4, 96, 24)
FRAMES, CLASSES = 4, 5

# Compiler option for programs that agree to the bit, which conftest.py turns off otherwise.
EXACT = {"xla_cpu_use_fusion_emitters": True} if jax.__version__.startswith("0.10.") else {}

# Name of the case -> method and its keys under config.model.
CASES = {
    "dualpath": ("dualpath", {"adapter_bottleneck": 8, "adapter_dropout": 0.5}),
    "full": ("full", {}),
    "linear": ("linear", {}),
    "vpt": ("vpt", {"vpt.num_prompts": 3}),
    "vpt_shallow": ("vpt", {"vpt.num_prompts": 3, "vpt.deep": False}),
    "adaptformer": ("adaptformer", {"adaptformer.bottleneck": 8}),
    "adaptformer_serial": (
        "adaptformer",
        {"adaptformer.bottleneck": 8, "adaptformer.parallel": False},
    ),
    "protuning": ("protuning", {"protuning.width": 8}),
    "st_adapter": ("st_adapter", {"st_adapter.width": 8, "st_adapter.kernel_size": (3, 3, 3)}),
    "st_adapter_released": (
        "st_adapter",
        {"st_adapter.width": 8, "st_adapter.form": "released"},
    ),
    "st_adapter_both": (
        "st_adapter",
        {"st_adapter.width": 8, "st_adapter.form": "released", "st_adapter.places": "both"},
    ),
    "videoprompt": ("videoprompt", {"videoprompt.num_prompts": 3}),
    "aim": ("aim", {}),
    "aim_two": ("aim", {"aim.num_temporal_adapters": 2, "aim.scale": 1.0, "aim.bottleneck": 8}),
    "evl": ("evl", {"evl.num_blocks": 2}),
    "lora": ("lora", {"lora.rank": 3, "lora.alpha": 6.0}),
    "lora_all": (
        "lora",
        {"lora.rank": 3, "lora.targets": ("query", "key", "value", "output", "mlp")},
    ),
    "zeroi2v": ("zeroi2v", {"zeroi2v.adapter_dropout": 0.3}),
    "zeroi2v_four": (
        "zeroi2v",
        {"zeroi2v.offsets": (-1, 1, -2, 2), "zeroi2v.scale": 1.0, "zeroi2v.bottleneck": 8},
    ),
    "probe_linear": ("probe", {"probe.head": "linear"}),
    "probe_attentive": ("probe", {"probe.head": "attentive"}),
    "probe_ordered": ("probe", {"probe.head": "ordered", "probe.width": 6}),
}


def tiny_config(case, **options):
    """Return the configuration of a case; `options` are keys under config.model."""
    method, keys = CASES[case]
    config = schema.get_config()
    config.data.image_size = 32
    config.data.num_frames = FRAMES
    config.data.num_spatial_frames = 2
    config.data.grid, config.data.frame_scale = (2, 2), 2
    config.data.sampling = "segments"
    config.model.method = method
    config.model.dtype = "float32"
    config.model.scan_blocks = False
    config.model.update_from_flattened_dict(keys | options)
    return config


def perturbed(params, scale=0.1):
    """Add noise to every leaf, so that no bias is zero and no scale is one."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: np.asarray(x) + scale * rng.normal(size=x.shape).astype(x.dtype), params
    )


@functools.cache
def backbone():
    """Return nontrivial parameters of a TINY backbone."""
    init = jax.jit(vit.ViT(TINY, scan_blocks=True).init)
    return perturbed(init(jax.random.key(7), jnp.zeros((1, 32, 32, 3)))["params"])


def build_initialized(config):
    """Return the model and the initial parameters of a run."""
    model = method_registry.build_model(config, TINY, CLASSES)
    scanned = model.clone(scan_blocks=True)  # compiles faster
    return model, experiment.init_params(scanned, config, backbone())


def build_randomized(config, shape=TINY):
    """Return the model and nontrivial parameters, without compiling the initialization."""
    model = method_registry.build_model(config, shape, CLASSES)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *clips(config))["params"]
    zeros = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, path[-1].key == "scale", leaf.dtype), dict(shapes)
    )
    params = perturbed(zeros)
    return model, (params | {"backbone": backbone()} if shape is TINY else params)


def clips(config, batch=2):
    """Return random inputs of the model, like normalized images: (spatial, temporal or None)."""
    rng = np.random.default_rng(0)
    shapes = clip_shapes(config)
    return tuple(
        None if shape is None else rng.normal(size=(batch, *shape[1:])).astype(np.float32)
        for shape in shapes
    )


def apply(model, params, *args, method=None):
    """Compile and run `model.apply`."""

    def run(params, *args):
        return model.apply({"params": params}, *args, method=method)

    return jax.jit(run)(params, *args)
