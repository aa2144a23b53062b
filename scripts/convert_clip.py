"""Converts a checkpoint of CLIP, or of an ImageNet ViT or Swin, to a backbone file.

    python scripts/convert_clip.py --checkpoint=ViT-B-16.pt --out=clip_vitb16.safetensors

CLIP of OpenAI, open_clip or Hugging Face; ViT of timm or Hugging Face; Swin of its authors, timm or
Hugging Face. Which one it is, is seen from the names in the file. A file of torch's own needs torch
(the CPU build is enough); safetensors files do not.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # runs uninstalled

from dualpath_jax.cli import build_parser  # noqa: E402
from dualpath_jax.runtime import progress_bar  # noqa: E402
from dualpath_jax.weights import convert  # noqa: E402


def parser() -> argparse.ArgumentParser:
    made = build_parser(__doc__)
    made.add_argument("--checkpoint", required=True, help="checkpoint, a local file")
    made.add_argument("--out", required=True, help="safetensors file to write, local or gs://")
    made.add_argument(
        "--trust",
        action="store_true",
        help="open a TorchScript archive that OpenAI did not publish; it can run code",
    )
    made.add_argument(
        "--activation",
        choices=("quick_gelu", "gelu"),
        help="of the MLPs, where neither the checkpoint nor a config beside it says",
    )
    made.add_argument("--heads", type=int, help="attention heads of a ViT; default: width / 64")
    progress_bar.add_quiet_option(made)
    return made


def main() -> int:
    options = vars(parser().parse_args())
    progress_bar.set_quiet(options.pop("quiet"))
    try:
        info = convert.convert_checkpoint(**options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config, published = info["config"], info["published"]
    shape = config.architecture
    shape |= {key: getattr(config, key) for key in ("heads", "image_size", "activation", "eps")}
    print(f"found       {info['layout']} names in a {info['container']} file")
    print(f"backbone    {config.name}: {', '.join(f'{k} {v}' for k, v in shape.items())}")
    print(f"parameters  {info['parameters']:,}")
    print(f"SHA-256     {info['source_sha256']}")
    print(f"published   {f'yes, OpenAI {published}' if published else 'not among OpenAI releases'}")
    print(f"written     {info['out']} (SHA-256 {info['sha256']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
