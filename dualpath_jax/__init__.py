"""DualPath in JAX: image transformers adapted to video (CVPR 2023).

import dualpath_jax as dp
model = dp.load("runs/demo")
model.predict("clip.mp4")
"""

from typing import TYPE_CHECKING, Any

from dualpath_jax.version import __version__

if TYPE_CHECKING:
    from dualpath_jax.inference.trained_model import load

__all__ = ["__version__", "load"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """Import `load` on first use, because decoding workers need no JAX."""
    if name != "load":
        raise AttributeError(f"module 'dualpath_jax' has no attribute {name!r}")
    from dualpath_jax.inference.trained_model import load

    return load
