"""Converts a checkpoint of CLIP, SigLIP, DINOv2, an ImageNet ViT or a Swin to a backbone file.

    dualpath convert --checkpoint=ViT-B-16.pt --out=clip_vitb16.safetensors

Supported are CLIP of OpenAI, open_clip, Hugging Face or timm; SigLIP and ViT of their authors
(.npz), timm or Hugging Face; DINOv2 and Swin of their authors, timm or Hugging Face. The kind is
detected from the names in the file: safetensors, torch (.pt, .pth, .bin, .ckpt; torch is not
needed), TorchScript (nothing in it is executed) or .npz. Give a shard or its index for a file in
shards, a folder as of Hugging Face, or hf:org/name, which huggingface_hub downloads.

In a checkout, python scripts/convert_clip.py is the same command.
"""

import argparse
from typing import NoReturn

from dualpath_jax.cli import build_parser, user_errors
from dualpath_jax.runtime import environment, progress_bar
from dualpath_jax.weights import catalog


class _ListAction(argparse.Action):
    """Prints the table of known weights and exits."""

    def __call__(self, arg_parser: argparse.ArgumentParser, *unused: object) -> NoReturn:
        del unused
        print(catalog.format_table())
        arg_parser.exit()


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    arg_parser = build_parser(__doc__)
    arg_parser.add_argument(
        "--list",
        action=_ListAction,
        nargs=0,
        help="print the known backbones with the places of their weights, sizes and licenses",
    )
    arg_parser.add_argument("--checkpoint", required=True, help="file, folder or hf:org/name")
    arg_parser.add_argument(
        "--out", required=True, help="safetensors file to write, local or gs://"
    )
    arg_parser.add_argument(
        "--activation",
        choices=("quick_gelu", "gelu", "gelu_tanh"),
        help="activation of the MLPs; needed if neither the checkpoint nor the publisher's config "
        "next to it states it",
    )
    arg_parser.add_argument(
        "--normalization",
        choices=("clip", "imagenet", "half"),
        help="mean and standard deviation of the images; needed if neither the checkpoint nor the "
        "publisher's config next to it states them (half: 0.5 and 0.5)",
    )
    arg_parser.add_argument(
        "--heads", type=int, help="attention heads of a ViT; default: width / 64"
    )
    progress_bar.add_quiet_option(arg_parser)
    return arg_parser


def main() -> int:
    """Convert the checkpoint, print a summary and return the exit status."""
    environment.configure_environment()
    options = vars(parser().parse_args())
    progress_bar.set_quiet(options.pop("quiet"))
    with user_errors():
        from dualpath_jax.weights import convert  # imports JAX

        info = convert.convert_checkpoint(**options)
    config, published = info["config"], info["published"]
    shape = config.architecture
    shape |= {key: getattr(config, key) for key in ("heads", "image_size", "activation", "eps")}
    print(f"found       {info['layout']} names in a {info['container']} file")
    print(f"backbone    {config.name}: {', '.join(f'{k} {v}' for k, v in shape.items())}")
    print(f"images      mean {info['mean']}, standard deviation {info['std']}")
    if config.feature_dim == getattr(config, "width", None):
        print("projection  none: features have the width of the tokens")
    print(f"parameters  {info['parameters']:,}")
    print(f"SHA-256     {info['source_sha256']}")
    print(f"published   {f'yes, OpenAI {published}' if published else 'not among OpenAI releases'}")
    print(f"written     {info['out']} (SHA-256 {info['sha256']})")
    return 0
