"""Reads the configs that publishers put next to their checkpoints.

Each function takes the parsed JSON ({} if there is no file). It returns the stated values: "shape",
the (width, depth) of the described model (if the config has it), and "activation", "heads", "eps",
"image_size", "mean" and "std" as far as the publisher's configs have them. It returns None if the
config is of another kind.

Such configs leave out default values. The defaults here are those of open_clip's CLIPVisionCfg and
of transformers' configs.
"""

from collections.abc import Mapping
from typing import Any

from dualpath_jax.data.clip_spec import CLIP_MEAN, CLIP_STD

# Mean and standard deviation of red, green and blue in 0..1 that pretraining used.
NORMALIZATIONS: dict[str, dict[str, tuple[float, ...]]] = {
    "clip": {"mean": CLIP_MEAN, "std": CLIP_STD},
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "half": {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
}

# Hugging Face's names of activations, where ours differ.
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def _read_huggingface(config: Mapping[str, Any], activation: str, eps: float) -> dict[str, Any]:
    """Read what Hugging Face's configs of ViTs have in common; the arguments are the defaults."""
    stated = {
        "shape": (config.get("hidden_size", 768), config.get("num_hidden_layers", 12)),
        "activation": config.get("hidden_act", activation),
        "heads": config.get("num_attention_heads", 12),
        "eps": config.get("layer_norm_eps", eps),
    }
    if isinstance(stated["activation"], str):
        stated["activation"] = _ACTIVATIONS.get(stated["activation"], stated["activation"])
    return stated


def read_open_clip(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read open_clip's `open_clip_config.json`."""
    if "model_cfg" not in config:
        return None
    vision = config["model_cfg"].get("vision_cfg", {})
    width = vision.get("width", 768)
    images = config.get("preprocess_cfg") or {}
    return {
        **NORMALIZATIONS["clip"],
        **{key: images[key] for key in ("mean", "std") if images.get(key) is not None},
        "shape": (width, vision.get("layers", 12)),
        "activation": "quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu",
        "heads": width // vision.get("head_width", 64),
        "eps": (vision.get("norm_kwargs") or {}).get("eps", 1e-5),
    }


def read_huggingface_clip(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the `config.json` of a Hugging Face CLIP, with or without its text tower."""
    if not str(config.get("model_type")).startswith("clip"):
        return None
    vision = config.get("vision_config", config)
    return {**NORMALIZATIONS["clip"], **_read_huggingface(vision, "quick_gelu", 1e-5)}


def read_huggingface_siglip(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the `config.json` of a Hugging Face SigLIP, with or without its text tower."""
    if not str(config.get("model_type")).startswith("siglip"):
        return None
    return _read_huggingface(config.get("vision_config", config), "gelu_tanh", 1e-6)


def read_huggingface_dinov2(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the `config.json` of a Hugging Face DINOv2, with or without registers."""
    if not str(config.get("model_type")).startswith("dinov2"):
        return None
    return _read_huggingface(config, "gelu", 1e-6)


def read_huggingface_vit(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the `config.json` of a Hugging Face ViT."""
    if config.get("model_type") != "vit":
        return None
    return _read_huggingface(config, "gelu", 1e-12)


def read_huggingface_swin(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the `config.json` of a Hugging Face Swin; its depth is a tuple over the stages."""
    if config.get("model_type") != "swin":
        return None
    return {
        "shape": (config.get("embed_dim", 96), tuple(config.get("depths", (2, 2, 6, 2)))),
        "activation": config.get("hidden_act", "gelu"),
        "eps": config.get("layer_norm_eps", 1e-5),
        "image_size": config.get("image_size", 224),
    }


def read_timm(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read timm's `config.json`. It names the model, and usually its normalization."""
    name = config.get("architecture")
    if not isinstance(name, str):
        return None
    stated: dict[str, Any] = {"activation": "quick_gelu" if "quickgelu" in name else "gelu"}
    if "_clip_" in name:
        stated |= NORMALIZATIONS["clip"]
    if "siglip" in name:  # some of timm's have the exact GELU, but all were trained with this one
        stated |= {"activation": "gelu_tanh", **NORMALIZATIONS["half"]}
    images = config.get("pretrained_cfg") or {}
    return stated | {key: images[key] for key in ("mean", "std") if images.get(key) is not None}
