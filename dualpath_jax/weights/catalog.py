"""Lists where the weights of the named backbones are, how large they are, and their licenses."""

from collections.abc import Iterator

# Image tower with its projection, as converted; without classifier.
PARAMETERS = {
    "ViT-B/32": 87_849_216,
    "ViT-B/16": 86_192_640,
    "ViT-L/14": 303_966_208,
    "ViT-L/14@336": 304_293_888,
    "ViT-H/14": 632_076_800,
    "ViT-g/14": 1_012_645_632,
    "ViT-bigG/14": 1_844_907_264,
    "ViT-B/16-IN21K": 85_798_656,
    "ViT-L/16-IN21K": 303_301_632,
    "DINOv2-S/14": 22_056_192,
    "DINOv2-B/14": 86_579_712,
    "DINOv2-L/14": 304_367_616,
    "DINOv2-g/14": 1_136_479_232,
    "DINOv2-S/14-reg": 22_057_728,
    "DINOv2-B/14-reg": 86_582_784,
    "DINOv2-L/14-reg": 304_371_712,
    "DINOv2-g/14-reg": 1_136_485_376,
    "SigLIP-B/32": 94_552_320,
    "SigLIP-B/16": 92_884_224,
    "SigLIP-L/16": 315_956_224,
    "SigLIP-So400m/14": 427_680_704,
    "SigLIP-So400m/16": 427_888_064,
    "SigLIP-g/16": 1_163_168_256,
    "Swin-T": 27_519_354,
    "Swin-S": 48_837_258,
    "Swin-B": 86_743_224,
}

_APPLE, _NC = "Apple sample code license", "CC BY-NC 4.0"
# (license, name -> repositories of Hugging Face that the converter reads). Other sizes of the same
# models are in repositories of similar names.
_SOURCES = (
    (
        "MIT",
        {
            "ViT-B/32": (
                "openai/clip-vit-base-patch32",
                "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
                "laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
            ),
            "ViT-B/16": (
                "openai/clip-vit-base-patch16",
                "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
                "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K",
            ),
            "ViT-L/14": (
                "openai/clip-vit-large-patch14",
                "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
                "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K",
            ),
            "ViT-L/14@336": ("openai/clip-vit-large-patch14-336",),
            "ViT-H/14": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K",),
            "ViT-g/14": ("laion/CLIP-ViT-g-14-laion2B-s34B-b88K",),
            "ViT-bigG/14": ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",),
        },
    ),
    (
        _APPLE,
        {
            "ViT-B/16": ("apple/DFN2B-CLIP-ViT-B-16",),
            "ViT-L/14": ("apple/DFN2B-CLIP-ViT-L-14",),
            "ViT-H/14": ("apple/DFN5B-CLIP-ViT-H-14",),
        },
    ),
    (
        _NC,
        {
            "ViT-B/32": ("timm/vit_base_patch32_clip_224.metaclip_2pt5b",),
            "ViT-B/16": ("timm/vit_base_patch16_clip_224.metaclip_2pt5b",),
            "ViT-L/14": ("timm/vit_large_patch14_clip_224.metaclip_2pt5b",),
            "ViT-H/14": ("timm/vit_huge_patch14_clip_224.metaclip_2pt5b",),
            "ViT-bigG/14": ("timm/vit_gigantic_patch14_clip_224.metaclip_2pt5b",),
        },
    ),
    (
        "Apache-2.0",
        {
            "ViT-B/16-IN21K": ("google/vit-base-patch16-224-in21k",),
            "ViT-L/16-IN21K": ("google/vit-large-patch16-224-in21k",),
            "DINOv2-S/14": ("facebook/dinov2-small",),
            "DINOv2-B/14": ("facebook/dinov2-base",),
            "DINOv2-L/14": ("facebook/dinov2-large",),
            "DINOv2-g/14": ("facebook/dinov2-giant",),
            "DINOv2-S/14-reg": ("facebook/dinov2-with-registers-small",),
            "DINOv2-B/14-reg": ("facebook/dinov2-with-registers-base",),
            "DINOv2-L/14-reg": ("facebook/dinov2-with-registers-large",),
            "DINOv2-g/14-reg": ("facebook/dinov2-with-registers-giant",),
            "SigLIP-B/32": ("google/siglip2-base-patch32-256",),
            "SigLIP-B/16": ("google/siglip-base-patch16-224", "google/siglip2-base-patch16-224"),
            "SigLIP-L/16": ("google/siglip-large-patch16-256", "google/siglip2-large-patch16-256"),
            "SigLIP-So400m/14": (
                "google/siglip-so400m-patch14-224",
                "google/siglip2-so400m-patch14-224",
            ),
            "SigLIP-So400m/16": ("google/siglip2-so400m-patch16-256",),
            "SigLIP-g/16": ("google/siglip2-giant-opt-patch16-256",),
            "Swin-T": ("microsoft/swin-tiny-patch4-window7-224",),
            "Swin-S": ("microsoft/swin-small-patch4-window7-224",),
            "Swin-B": ("microsoft/swin-base-patch4-window7-224-in22k",),
        },
    ),
)


def list_sources() -> Iterator[tuple[str, str, str]]:
    """Yield (name, repository, license) in the order of `PARAMETERS`."""
    for name in PARAMETERS:
        for license_name, sources in _SOURCES:
            for repository in sources.get(name, ()):
                yield name, repository, license_name


def format_table() -> str:
    """Return the table that `dualpath convert --list` prints."""
    header = ("name", "parameters", "MB", "--checkpoint", "license")
    rows = [header]
    for name, repository, license_name in list_sources():
        count = PARAMETERS[name]
        rows.append(
            (name, f"{count:,}", f"{4 * count / 1e6:,.0f}", f"hf:{repository}", license_name)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = []
    for name, count, size, source, license_name in rows:
        numbers = f"{count:>{widths[1]}}  {size:>{widths[2]}}"
        lines.append(f"{name:{widths[0]}}  {numbers}  {source:{widths[3]}}  {license_name}")
    return "\n".join(lines) + (
        "\n\nParameters and MB (float32) are those of the converted image tower; a download may "
        "also hold a text\ntower. Licenses are as their publishers state them: read them before "
        "use. Other image sizes and\ntrainings of these models are converted in the same way."
    )
