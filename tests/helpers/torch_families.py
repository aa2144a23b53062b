"""Builds DINOv2 and SigLIP of timm and transformers with random weights, for test_families.py.

A model is built from our own config, which defines its shape.
"""

import torch

from dualpath_jax.models.backbones.vit import ViTConfig
from tests.helpers.torch_reference import (
    import_torchvision,
    randomize_parameters,
    record_outputs,
)


def timm_model(config: ViTConfig) -> torch.nn.Module:
    """Build timm's ViT with the options of DINOv2 or SigLIP; images may have any size."""
    import_torchvision()
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import VisionTransformer

    options = {
        "class": {"global_pool": "token"},
        "mean": {"global_pool": "avg", "fc_norm": False},
        "attention": {"global_pool": "map"},
    }[config.readout]
    if config.gated_mlp:
        options |= {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU}
    elif config.activation == "gelu_tanh":
        options |= {"act_layer": "gelu_tanh"}
    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=0,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_dim / config.width * (2 if config.gated_mlp else 1),
        class_token=config.class_token,
        init_values=1e-5 if config.layer_scale else None,
        reg_tokens=config.num_register_tokens,
        no_embed_class=config.num_register_tokens > 0,
        dynamic_img_size=True,
        **options,
    )
    return randomize_parameters(model)


def huggingface_dinov2(config: ViTConfig) -> torch.nn.Module:
    """Build transformers' DINOv2, with or without registers."""
    import_torchvision()
    import transformers

    shape = {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        # Its SwiGLU takes two thirds of the width.
        "mlp_ratio": config.mlp_dim * 3 // (2 * config.width) if config.gated_mlp else 4,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "use_swiglu_ffn": config.gated_mlp,
    }
    if registers := config.num_register_tokens:
        full = transformers.Dinov2WithRegistersConfig(**shape, num_register_tokens=registers)
        return randomize_parameters(transformers.Dinov2WithRegistersModel(full))
    return randomize_parameters(transformers.Dinov2Model(transformers.Dinov2Config(**shape)))


def huggingface_siglip(config: ViTConfig) -> torch.nn.Module:
    """Build the image tower of transformers' SigLIP."""
    import_torchvision()
    import transformers

    shape = transformers.SiglipVisionConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_dim,
        image_size=config.image_size,
        patch_size=config.patch_size,
    )
    return randomize_parameters(transformers.SiglipVisionModel(shape))


def stages(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a model on images [M, 3, H, W] and record the outputs of its stages.

    Returns:
      "embed", "block_0_<i>" [M, N, D], and "features" [M, D].
    """
    if hasattr(model, "norm_pre"):  # timm
        embed, blocks = model.norm_pre, model.blocks
    else:
        encoder = getattr(model, "encoder", model)
        blocks = next(getattr(encoder, n) for n in ("layer", "layers") if hasattr(encoder, n))
        embed = model.embeddings
    modules = {"embed": embed} | {f"block_0_{i}": block for i, block in enumerate(blocks)}
    outputs, features = record_outputs(modules, lambda: model(images))
    return {**outputs, "features": getattr(features, "pooler_output", features)}
