"""Builds ViT and Swin of timm and transformers with random weights, for test_backbones.py.

A model is built from our own config, which defines its shape.
"""

import torch

from dualpath_jax.models.backbones.swin import SwinConfig
from dualpath_jax.models.backbones.vit import ViTConfig
from tests.helpers.torch_reference import (
    import_torchvision,
    randomize_parameters,
    record_outputs,
)


def timm_vit(config: ViTConfig) -> torch.nn.Module:
    """Build timm's ViT."""
    import_torchvision()
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=7,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_dim / config.width,
    )
    return randomize_parameters(model)


def huggingface_vit(config: ViTConfig, classifier: bool = True) -> torch.nn.Module:
    """Build transformers' ViT, with or without its classifier."""
    import_torchvision()
    import transformers

    shape = transformers.ViTConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_dim,
        image_size=config.image_size,
        patch_size=config.patch_size,
        layer_norm_eps=config.eps,
    )
    kind = transformers.ViTForImageClassification if classifier else transformers.ViTModel
    return randomize_parameters(kind(shape))


def timm_swin(config: SwinConfig) -> torch.nn.Module:
    """Build timm's Swin."""
    import_torchvision()
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=7,
        embed_dim=config.width,
        depths=config.depths,
        num_heads=tuple(config.heads * 2**stage for stage in range(len(config.depths))),
        window_size=config.window_size,
        mlp_ratio=config.mlp_dim / config.width,
    )
    return randomize_parameters(model)


def huggingface_swin(config: SwinConfig, classifier: bool = True) -> torch.nn.Module:
    """Build transformers' Swin, with or without its classifier."""
    import_torchvision()
    import transformers

    shape = transformers.SwinConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depths=list(config.depths),
        num_heads=[config.heads * 2**stage for stage in range(len(config.depths))],
        window_size=config.window_size,
        mlp_ratio=config.mlp_dim / config.width,
        layer_norm_eps=config.eps,
    )
    kind = transformers.SwinForImageClassification if classifier else transformers.SwinModel
    return randomize_parameters(kind(shape))


def _stage_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules to record: "embed", "block_<s>_<i>" (ViT: s = 0), "merge_<s>", "norm"."""
    if hasattr(model, "blocks"):  # timm's ViT
        embed, norm, stages, merges = model.norm_pre, model.norm, [model.blocks], []
    elif hasattr(model, "layers") and hasattr(model, "patch_embed"):  # timm's Swin
        embed, norm = model.patch_embed, model.norm
        stages = [layer.blocks for layer in model.layers]
        merges = [layer.downsample for layer in model.layers[1:]]
    elif hasattr(model, "encoder"):  # transformers' Swin
        embed, norm = model.embeddings, model.layernorm
        stages = [layer.blocks for layer in model.encoder.layers]
        merges = [layer.downsample for layer in model.encoder.layers[:-1]]
    else:  # transformers' ViT
        embed, norm, stages, merges = model.embeddings, model.layernorm, [model.layers], []
    blocks = {
        f"block_{s}_{i}": block for s, stage in enumerate(stages) for i, block in enumerate(stage)
    }
    merges = {f"merge_{s}": merge for s, merge in enumerate(merges)}
    return {"embed": embed, **blocks, **merges, "norm": norm}


def stages(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a model on images [M, 3, H, W] and record the outputs of its stages.

    Returns:
      Outputs [M, N, D] by the names of `_stage_modules` (but "norm"), and "features" [M, D].
    """
    model = getattr(model, "vit", getattr(model, "swin", model))
    modules = _stage_modules(model)
    outputs, _ = record_outputs(modules, lambda: model(images))
    outputs = {name: output.flatten(1, -2) for name, output in outputs.items()}
    norm = outputs.pop("norm")
    outputs["features"] = norm.mean(1) if "merge_0" in modules else norm[:, 0]
    return outputs
