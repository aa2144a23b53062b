"""Writes the trained parameters of a run to one safetensors file, for --config.init_from.

    dualpath export-adapter --workdir=runs/demo --out=demo.safetensors

The file does not contain the backbone. The run may still be in progress.

In a checkout, python scripts/export_adapter.py is the same command.
"""

import argparse

from dualpath_jax.cli import add_checkpoint_option, build_parser, user_errors
from dualpath_jax.runtime import environment, files


def export(workdir: str, out: str, which: str) -> str:
    """Write the adapter file of a run and return a line that describes it.

    Args:
      workdir: folder of the run, local or gs://.
      out: .safetensors file to write, local or gs://.
      which: checkpoint, "latest" or "best" (during training by `eval.criterion`).
    """
    from etils import epath

    from dualpath_jax.inference import trained_model
    from dualpath_jax.training import adapter_file

    leaves, metadata = trained_model.read_trained_params(workdir, which)
    adapter_file.write_adapter(out, leaves, metadata)
    count = sum(leaf.size for leaf in leaves.values())
    size = epath.Path(out).stat().length
    return (
        f"wrote {out}: {count:,} parameters of {metadata['method']} on {metadata['backbone_name']} "
        f"at step {metadata['step']}, {len(metadata['class_names'])} classes, {size:,} bytes"
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    arg_parser.add_argument("--workdir", required=True, help="workdir of the run, local or gs://")
    arg_parser.add_argument(
        "--out", required=True, help="file to write, .safetensors; local or gs://"
    )
    add_checkpoint_option(arg_parser)
    return arg_parser


def main() -> None:
    """Export the checkpoint that the command line names."""
    environment.configure_environment()
    args = parser().parse_args()
    with user_errors():
        if "://" not in args.out:
            files.check_output_file("--out", args.out)
        print(export(args.workdir, args.out, args.checkpoint))
