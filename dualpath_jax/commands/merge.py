"""Merges what was trained in the blocks of a backbone into a plain backbone file.

    dualpath merge runs/lora --out=merged.safetensors

The model must be tuned with lora, zeroi2v or full. Its other parameters, such as the classifier, go
to a second file, here merged.adapter.safetensors, which names the backbone: dualpath predict
--adapter takes it. Both together have the logits of the model, and what was trained in the blocks
costs nothing any more.

In a checkout, python scripts/merge.py is the same command.
"""

import argparse

from dualpath_jax.cli import (
    add_backbone_option,
    add_checkpoint_option,
    build_parser,
    user_errors,
)
from dualpath_jax.runtime import environment, files


def merge(run: str, out: str, backbone: str | None, which: str) -> str:
    """Write the files of a merged model and return lines that describe them.

    Args:
      run: workdir or adapter file, local or gs://.
      out: backbone file to write, local or gs://.
      backbone: file of the converted backbone; None: the file that the run used.
      which: checkpoint, "latest" or "best" (during training by `eval.criterion`).
    """
    from dualpath_jax.inference import merged_model

    merged = merged_model.merge_model(run, out, backbone, which)
    return (
        f"wrote {merged.backbone}: {merged.parameters:,} parameters of the backbone with "
        f"{merged.method} of step {merged.step} merged\n"
        f"wrote {merged.adapter}: {merged.remaining:,} other parameters"
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    arg_parser.add_argument("run", help="workdir of the run, or an adapter file; local or gs://")
    arg_parser.add_argument(
        "--out", required=True, help="backbone file to write, .safetensors; local or gs://"
    )
    add_backbone_option(arg_parser)
    add_checkpoint_option(arg_parser)
    return arg_parser


def main() -> None:
    """Merge the model that the command line names."""
    environment.configure_environment()
    args = parser().parse_args()
    with user_errors():
        if "://" not in args.out:
            files.check_output_file("--out", args.out)
        print(merge(args.run, args.out, args.backbone, args.checkpoint))
