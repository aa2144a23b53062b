"""Computes the stages of a ViT one after the other, for comparisons with other programs."""

import operator

import jax

from dualpath_jax.models.backbones import layers, vit


def compile_block(block):
    """Return the compiled function (params, h) -> h of a frozen block on tokens h [M, N, D]."""
    return jax.jit(lambda params, h: block.apply({"params": params}, h, layers.no_hooks()))


def vit_stages(params, config, images):
    """Return "embed", "block_0_<i>" [M, N, D] and "features" [M, e] of images [M, H, W, 3]."""
    model, variables = vit.ViT(config), {"params": params}
    h = model.apply(variables, images, method="embed")
    stages = {"embed": h}
    run_block = compile_block(vit.Block(config, parent=None))
    for i in range(config.depth):
        h = run_block(jax.tree.map(operator.itemgetter(i), params["blocks"]), h)
        stages[f"block_0_{i}"] = h
    return {**stages, "features": model.apply(variables, h, method="pool")}
