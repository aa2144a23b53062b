"""Trains DualPath on your own videos, prepared from class folders or a CSV list; ours.

    python -m dualpath_jax.main --config=configs/finetune.py --config.data.dir=DIR
    python -m dualpath_jax.main --config=configs/finetune.py:demo --config.data.source=paths \
        --config.data.dir=data/paths

Classes are taken from the data. The recipe differs from the paper's where small data need it:
framesets hold pictures of motion (`data.frameset_input=motion`) at half the frames' size, adapters
in the temporal path see the frames before and after theirs, the classifier reads the patches of
framesets in order, and half of the clips are trained without their spatial features. The variant
`demo` takes the demo's small backbone instead of CLIP ViT-B/16.
"""

from dualpath_jax.config import recipes


def get_config(backbone: str = "clip"):
    return recipes.finetune(backbone)
