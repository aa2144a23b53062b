"""Every method at tiny size, for test_methods.py and test_method_equations.py.

Public: `TINY`, `CASES`, `tiny_config`, `started`, `random`, `perturbed`, `clips`, `apply`, `EXACT`.
"""

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

# For programs that agree to the bit: what conftest.py turns off fuses so that they do.
EXACT = {"xla_cpu_use_fusion_emitters": True}

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
    "videoprompt": ("videoprompt", {"videoprompt.num_prompts": 3}),
    "aim": ("aim", {}),
    "aim_two": ("aim", {"aim.num_temporal_adapters": 2, "aim.scale": 1.0, "aim.bottleneck": 8}),
    "evl": ("evl", {"evl.num_blocks": 2}),
}


def tiny_config(case, **options):
    """Configuration of a case; `options` are keys under config.model."""
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
    """Every leaf moved, so that no bias is zero and no scale is one."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: np.asarray(x) + scale * rng.normal(size=x.shape).astype(x.dtype), params
    )


@functools.cache
def backbone():
    """Parameters of a TINY backbone that are nowhere trivial."""
    init = jax.jit(vit.ViT(TINY, scan_blocks=True).init)
    return perturbed(init(jax.random.key(7), jnp.zeros((1, 32, 32, 3)))["params"])


def started(config):
    """(model, its parameters as a run starts with them)."""
    model = method_registry.build_model(config, TINY, CLASSES)
    scanned = model.clone(scan_blocks=True)  # compiles sooner
    return model, experiment.init_params(scanned, config, backbone())


def random(config, shape=TINY):
    """(model, parameters that are nowhere trivial), without compiling the initialisation."""
    model = method_registry.build_model(config, shape, CLASSES)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *clips(config))["params"]
    zeros = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, path[-1].key == "scale", leaf.dtype), dict(shapes)
    )
    params = perturbed(zeros)
    return model, (params | {"backbone": backbone()} if shape is TINY else params)


def clips(config, batch=2):
    """Inputs of the model, as normalised images: (spatial, temporal or None)."""
    rng = np.random.default_rng(0)
    shapes = clip_shapes(config)
    return tuple(
        None if shape is None else rng.normal(size=(batch, *shape[1:])).astype(np.float32)
        for shape in shapes
    )


def apply(model, params, *args, method=None):
    """`model.apply`, compiled."""

    def run(params, *args):
        return model.apply({"params": params}, *args, method=method)

    return jax.jit(run)(params, *args)
