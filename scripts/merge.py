"""Runs `dualpath merge`: see dualpath_jax/commands/merge.py."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.commands.merge import main, parser  # noqa: E402
from dualpath_jax.runtime import console  # noqa: E402

__all__ = ["main", "parser"]

if __name__ == "__main__":
    console.run(main)
