"""Trains the demo: DualPath on a tiny CLIP-shaped ViT and rendered videos, without downloads.

    python -m dualpath_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m dualpath_jax.main --config=configs/demo.py:paper --workdir=runs/demo_paper

The eight actions come in pairs that differ only in the order of their frames: top-1 is 0.125 by
chance, and at most 0.5 without order. The model has the form of configs/finetune.py with four
differences, chosen on validation videos (docs/notes/small_data.md): framesets hold differences from
the mean frame, frames in them are as small as in the paper, the classifier has weights of its own
for each patch, and no clip is trained without its spatial features. The variant `paper` has the
paper's form.
Duration: see README.md (measured).
Top-1 at 16x1x1 views, 400 test videos: see docs/demo.md (measured).
Trainable parameters: 338,232 of 816,888; `paper`: 264,168 of 742,824 (measured).
"""

from dualpath_jax.config import recipes, schema


def get_config(form: str = "finetune"):
    if form not in ("finetune", "paper"):
        raise ValueError(f"unknown argument {form!r} of this config: known are finetune, paper")
    config = recipes.demo_backbone(schema.get_config())
    config.num_train_steps = 1000
    config.log_every_steps = 100
    config.data.source = "demo"
    config.data.dir = "data/demo"
    config.data.batch_size = 16
    config.data.num_frames = 16
    config.data.num_spatial_frames = 2
    config.data.sampling = "segments"
    config.data.flip = False  # left and right are classes
    config.model.pre_attention_adapter = True
    config.optimizer.warmup_epochs = 0.15
    config.optimizer.clip_norm = 1.0
    config.eval.split = "test"
    config.eval.batch_size = 40
    config.eval.temporal_views = 1
    config.eval.spatial_crops = 1
    config.checkpoint.every_steps = 400
    if form == "finetune":
        recipes.set_small_data_form(config)
        config.data.frameset_input = "minus_mean"
        config.data.frame_scale = 4
        config.model.readout_frame_width = 0
        config.model.spatial_dropout = 0.0
    else:
        config.num_train_steps = 1500
    return config
