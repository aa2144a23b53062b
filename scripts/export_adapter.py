"""The trained parameters of a run as one safetensors file, for --config.init_from.

python scripts/export_adapter.py --workdir=runs/ssv2_vitb --out=ssv2_vitb.safetensors
"""

import argparse
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


def export(workdir: str, out: str, which: str) -> str:
    """Write the file; returns what to print."""
    import numpy as np
    from etils import epath

    from dualpath_jax import adapter_file
    from dualpath_jax.checkpoint import Checkpoints, DamagedCheckpoint

    if not (epath.Path(workdir) / "checkpoints").is_dir():
        raise ValueError(f"no checkpoints in --workdir={workdir}")
    checkpoints = Checkpoints(workdir, read_only=True)  # the run may be going on
    step = checkpoints.best_step() if which == "best" else checkpoints.latest_step()
    if step is None:
        found = "evaluated during training (config.eval.every_epochs)" if which == "best" else ""
        raise ValueError(f"no checkpoint {found} in --workdir={workdir}")
    try:
        leaves, metadata = checkpoints.read(step)
    except DamagedCheckpoint as damage:
        raise ValueError(str(damage)) from None
    prefix = "trainable/"
    trained = {
        name.removeprefix(prefix): np.asarray(leaf)
        for name, leaf in leaves.items()
        if name.startswith(prefix)
    }
    adapter_file.write_adapter(out, trained, metadata | {"step": step})
    count = sum(leaf.size for leaf in trained.values())
    size = epath.Path(out).stat().length
    return (
        f"wrote {out}: {count:,} parameters of {metadata['method']} on {metadata['backbone_name']} "
        f"at step {step}, {len(metadata['class_names'])} classes, {size:,} bytes"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", required=True, help="of the run, local or gs://")
    parser.add_argument("--out", required=True, help="file to write, .safetensors; local or gs://")
    parser.add_argument(
        "--checkpoint", choices=["latest", "best"], default="latest", help="best: by top-1"
    )
    args = parser.parse_args()
    try:
        print(export(args.workdir, args.out, args.checkpoint))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
