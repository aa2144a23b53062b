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
    from etils import epath

    from dualpath_jax import adapter_file, trained

    leaves, metadata = trained.read_trained(workdir, which)
    adapter_file.write_adapter(out, leaves, metadata)
    count = sum(leaf.size for leaf in leaves.values())
    size = epath.Path(out).stat().length
    return (
        f"wrote {out}: {count:,} parameters of {metadata['method']} on {metadata['backbone_name']} "
        f"at step {metadata['step']}, {len(metadata['class_names'])} classes, {size:,} bytes"
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
