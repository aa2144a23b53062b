"""DualPath in JAX: image transformers adapted to video (CVPR 2023)."""

__version__ = "0.1.0"
