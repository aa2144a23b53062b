"""Builds CLIP in torch with random weights, the reference of test_convert.py."""

import re
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

# Side of image and patch, width, blocks, heads, width of the joint space.
SMALL = {
    "image_size": 32,
    "patch_size": 8,
    "width": 128,
    "depth": 3,
    "heads": 2,
    "projection_dim": 48,
}
B16 = {
    "image_size": 224,
    "patch_size": 16,
    "width": 768,
    "depth": 12,
    "heads": 12,
    "projection_dim": 512,
}

_torchvision = torch.library.Library("torchvision", "FRAGMENT")


def import_torchvision() -> None:
    """Import torchvision, which open_clip and transformers need, even if its operators are broken.

    Next to a torch of another build (CPU torch, CUDA torchvision) its compiled operators do not
    load, and the import fails with "operator torchvision::nms does not exist". CLIP does not need
    these operators, therefore each missing one is declared without a body and the import is
    repeated. If the builds match, the first import succeeds.
    """
    for _ in range(10):
        try:
            import torchvision  # noqa: F401

            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            _torchvision.define(
                f"{missing[1]}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]  # partly imported
    raise RuntimeError("torchvision cannot be imported")


def randomize_parameters(model: torch.nn.Module) -> torch.nn.Module:
    """Set every parameter to new values, none of them zero or one, and return the model.

    Branches are of order 1. Embeddings are small, as in CLIP: with tokens of low variance before
    the first LayerNorm, its epsilon has a visible effect.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if re.search(r"embed(ding|\.|$)|conv1|cls_token", name) and "norm" not in name:
                fan_in = parameter[0].numel() if parameter.ndim == 4 else 1
                parameter.copy_(0.05 * noise * fan_in**-0.5)
            elif parameter.ndim < 2:  # biases, and scales around one
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def open_clip_model(shape: dict, quick_gelu: bool) -> torch.nn.Module:
    """Build open_clip's CLIP with a ViT of `shape` and a small text tower."""
    import_torchvision()
    import open_clip

    vision = {
        "image_size": shape["image_size"],
        "patch_size": shape["patch_size"],
        "width": shape["width"],
        "layers": shape["depth"],
        "head_width": shape["width"] // shape["heads"],
    }
    text = {"context_length": 8, "vocab_size": 10, "width": 64, "heads": 1, "layers": 1}
    return randomize_parameters(
        open_clip.CLIP(shape["projection_dim"], vision, text, quick_gelu=quick_gelu)
    )


def huggingface_model(shape: dict, hidden_act: str, vision_only: bool = False) -> torch.nn.Module:
    """Build transformers' CLIPModel, or CLIPVisionModelWithProjection, with a ViT of `shape`."""
    import_torchvision()
    import transformers

    vision = {
        "image_size": shape["image_size"],
        "patch_size": shape["patch_size"],
        "hidden_size": shape["width"],
        "intermediate_size": 4 * shape["width"],
        "num_hidden_layers": shape["depth"],
        "num_attention_heads": shape["heads"],
        "projection_dim": shape["projection_dim"],
        "hidden_act": hidden_act,
    }
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 10,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = transformers.CLIPConfig(
        vision_config=vision, text_config=text, projection_dim=shape["projection_dim"]
    )
    if vision_only:
        return randomize_parameters(
            transformers.CLIPVisionModelWithProjection(config.vision_config)
        )
    return randomize_parameters(transformers.CLIPModel(config))


def record_outputs(
    modules: dict[str, torch.nn.Module], run: Callable[[], Any]
) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the outputs of `modules` during run(), by name, and its result."""
    outputs = {}

    def hook(name):
        def record(module, inputs, output):
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return record

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    with torch.no_grad():
        result = run()
    for handle in handles:
        handle.remove()
    return outputs, result


def _record_clip(modules: dict[str, torch.nn.Module], run) -> dict[str, torch.Tensor]:
    """Record the outputs of `modules` during run(), and its result as "projection"."""
    outputs, outputs["projection"] = record_outputs(modules, run)
    if outputs["ln_post"].ndim == 3:  # open_clip normalizes all tokens, then takes the class token
        outputs["ln_post"] = outputs["ln_post"][:, 0]
    return outputs


def open_clip_stages(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run open_clip's image tower on [M, 3, H, W] and record its stages.

    Returns:
      "embed" and "block_<i>" [M, N, D], "ln_post" [M, D], "projection" [M, e].
    """
    visual = model.visual
    blocks = {f"block_{i}": block for i, block in enumerate(visual.transformer.resblocks)}
    modules = {"embed": visual.ln_pre, **blocks, "ln_post": visual.ln_post}
    return _record_clip(modules, lambda: visual(images))


def huggingface_stages(model: torch.nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Record the stages of either model of transformers, as `open_clip_stages` does."""
    vision = model.vision_model
    blocks = {f"block_{i}": block for i, block in enumerate(vision.encoder.layers)}
    modules = {"embed": vision.pre_layrnorm, **blocks, "ln_post": vision.post_layernorm}

    def run():
        return model.visual_projection(vision(pixel_values=images).pooler_output)

    return _record_clip(modules, run)


def torch_to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor as an array of the same dtype; numpy itself has no bfloat16."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
