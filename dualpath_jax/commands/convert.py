"""Converts a checkpoint of CLIP, SigLIP, DINOv2, an ImageNet ViT or a Swin to a backbone file.

    dualpath convert --checkpoint=ViT-B-16.pt --out=clip_vitb16.safetensors

Supported are CLIP of OpenAI, open_clip, Hugging Face or timm; SigLIP and ViT of their authors
(.npz), timm or Hugging Face; DINOv2 and Swin of their authors, timm or Hugging Face. The model is
recognized by the names of the weights. The file is safetensors, torch (.pt, .pth, .bin or .ckpt;
torch is not needed), TorchScript (nothing in it is executed) or .npz. For a checkpoint in shards,
name its index or any shard. A folder of Hugging Face can be named too, or hf:org/name, which
huggingface_hub downloads.

    dualpath convert --method=aim --checkpoint=aim.pth --backbone=clip_vitb16.safetensors \
        --config=ssv2_vitb_aim --classes=classes.txt --out=aim.safetensors

converts a model that AIM's authors published to an adapter file, for dualpath predict --adapter.
--method=st_adapter does so for the models of ST-Adapter's authors.

In a checkout, python scripts/convert_clip.py is the same command.
"""

import argparse
from typing import NoReturn

from dualpath_jax.cli import build_parser, parse_with_overrides, user_errors
from dualpath_jax.runtime import environment, progress_bar
from dualpath_jax.runtime.safe_read import read_lines
from dualpath_jax.weights import catalog

_PUBLISHED = ("backbone", "config", "classes")  # options that belong to --method


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
        default=argparse.SUPPRESS,  # it is no option of a conversion
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
        "publisher's config next to it states them; half is 0.5 and 0.5",
    )
    arg_parser.add_argument(
        "--heads",
        type=int,
        help="attention heads of a ViT (those of the named model of its shape, else width / 64)",
    )
    published = arg_parser.add_argument_group(
        "adapters that authors published", "write an adapter file instead of a backbone file"
    )
    published.add_argument(
        "--method",
        choices=("aim", "st_adapter"),
        help="the method whose authors published the checkpoint",
    )
    published.add_argument("--backbone", help="converted file of the CLIP that they started from")
    published.add_argument("--config", help="config of the method, such as ssv2_vitb_aim")
    published.add_argument("--classes", help="text file: names of the classes, one in a line")
    progress_bar.add_quiet_option(arg_parser)
    return arg_parser


def _check_options(
    arg_parser: argparse.ArgumentParser, args: argparse.Namespace, overrides: list[str]
) -> None:
    """End with status 2 unless the options for published adapters are all given, or none."""
    given = [f"--{key}" for key in _PUBLISHED if getattr(args, key) is not None]
    if args.method is None and (given or overrides):
        arg_parser.error(f"{(given or overrides)[0]} is only for --method")
    if args.method is None:
        return
    if missing := [f"--{key}" for key in _PUBLISHED if f"--{key}" not in given]:
        arg_parser.error(f"--method={args.method} needs {', '.join(missing)}")
    for key in ("activation", "normalization", "heads"):
        if getattr(args, key) is not None:
            arg_parser.error(f"--{key} has no effect with --method: --backbone states it")


def _convert_published(args: argparse.Namespace, overrides: list[str]) -> None:
    """Write an adapter file of a published checkpoint and print a summary."""
    from dualpath_jax.config.loading import load_config
    from dualpath_jax.training import published_adapter

    config = load_config(args.config, overrides)
    names = [line.strip() for line in read_lines(args.classes) if line.strip()]
    info = published_adapter.convert_published(
        args.method, args.checkpoint, args.out, args.backbone, config, names
    )
    print(f"adapter     {info['parameters']:,} parameters of {args.method} on {info['backbone']}")
    print(f"model       {info['frames']} frames, {info['classes']} classes")
    print(f"written     {info['out']}")


def _convert_backbone(args: argparse.Namespace) -> None:
    """Write a backbone file and print a summary."""
    from dualpath_jax.weights import convert  # imports JAX

    info = convert.convert_checkpoint(
        args.checkpoint,
        args.out,
        activation=args.activation,
        heads=args.heads,
        normalization=args.normalization,
    )
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


def main() -> int:
    """Convert the checkpoint and return the exit status."""
    environment.configure_environment()
    arg_parser = parser()
    args, overrides = parse_with_overrides(arg_parser)
    progress_bar.set_quiet(args.quiet)
    _check_options(arg_parser, args, overrides)
    with user_errors():
        if args.method is not None:
            _convert_published(args, overrides)
        else:
            _convert_backbone(args)
    return 0
