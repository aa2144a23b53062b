"""The configs that publishers put beside their checkpoints.

Public: `read_open_clip`, `read_huggingface_clip`, `read_huggingface_vit`, `read_huggingface_swin`.

Each takes the JSON ({} where there is none) and returns what it states: "shape", the (width, depth)
of the model that it describes, and "activation", "heads", "eps", "image_size" as far as they are
there; None where it is of another kind. Such files leave defaults out: those of open_clip's
CLIPVisionCfg and of transformers' CLIPVisionConfig, ViTConfig and SwinConfig.
"""

from collections.abc import Mapping
from typing import Any


def read_open_clip(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if "model_cfg" not in config:
        return None
    vision = config["model_cfg"].get("vision_cfg", {})
    width = vision.get("width", 768)
    return {
        "shape": (width, vision.get("layers", 12)),
        "activation": "quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu",
        "heads": width // vision.get("head_width", 64),
        "eps": (vision.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def read_huggingface_clip(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if not str(config.get("model_type")).startswith("clip"):
        return None
    vision = config.get("vision_config", config)
    return {
        "shape": (vision.get("hidden_size", 768), vision.get("num_hidden_layers", 12)),
        "activation": vision.get("hidden_act", "quick_gelu"),
        "heads": vision.get("num_attention_heads", 12),
        "eps": vision.get("layer_norm_eps", 1e-5),
    }


def read_huggingface_vit(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if config.get("model_type") != "vit":
        return None
    return {
        "shape": (config.get("hidden_size", 768), config.get("num_hidden_layers", 12)),
        "activation": config.get("hidden_act", "gelu"),
        "heads": config.get("num_attention_heads", 12),
        "eps": config.get("layer_norm_eps", 1e-12),
    }


def read_huggingface_swin(config: Mapping[str, Any]) -> dict[str, Any] | None:
    if config.get("model_type") != "swin":
        return None
    return {
        "shape": (config.get("embed_dim", 96), tuple(config.get("depths", (2, 2, 6, 2)))),
        "activation": config.get("hidden_act", "gelu"),
        "eps": config.get("layer_norm_eps", 1e-5),
        "image_size": config.get("image_size", 224),
    }
