"""Every key of a configuration, once, with its default. Other configs only override.

A value marked `ours` is not in the paper (see README, "What differs from the paper").
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of all randomness: initial parameters, order of examples, augmentation
    config.num_epochs = 30  # length of the training; ours
    config.num_train_steps = placeholder(int)  # length in steps, instead of num_epochs
    config.log_every_steps = 50  # a progress line and an entry in metrics.jsonl
    config.init_from = placeholder(str)  # file of scripts/export_adapter.py to start from
    config.resume_changed = False  # go on from a checkpoint that had other settings than these

    config.data = ConfigDict()
    config.data.dir = placeholder(str)  # output folder of scripts/prepare_dataset.py
    config.data.source = "folder"  # its --dataset, such as ssv2; or demo: rendered on first use
    config.data.train_split = "train"  # the split that is trained on
    config.data.split = placeholder(str)  # HMDB51: 1, 2, 3 or all, instead of the 1 in the names
    config.data.batch_size = 64  # clips per step, over all devices and hosts
    config.data.image_size = 224  # H = W of a spatial frame, pixels
    config.data.num_frames = 32  # T, frames sampled from a video (sec. 3.2: 8 for the baselines)
    config.data.num_spatial_frames = 8  # S, the subset for the spatial path; dualpath alone
    config.data.grid = (4, 4)  # (w, h), frames across and down a frameset; dualpath alone
    config.data.frame_scale = 4  # how much a frame is reduced in a frameset; dualpath alone
    config.data.sampling = "dense"  # dense: a clip at sampling_interval; segments: whole video
    config.data.sampling_interval = placeholder(int)  # None: 4, 2, 1 for T = 16, 32, 48 (sec. 5.1)
    config.data.crop_scale = (0.08, 1.0)  # random resized crop: part of the frame's area; ours
    config.data.crop_ratio = (3 / 4, 4 / 3)  # random resized crop: width / height; ours
    config.data.flip = True  # mirror clips half of the time; left / right: see label_swap; ours
    config.data.label_swap = placeholder(str)  # classes that flip exchanges: ssv2, or a JSON file
    config.data.randaugment_layers = 0  # N, operations drawn per clip; 0: no RandAugment
    config.data.randaugment_magnitude = 7.0  # M, 0..10; ours
    config.data.erasing_probability = 0.0  # of erasing a box in all frames of a clip
    config.data.mean = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    config.data.std = (0.26862954, 0.26130258, 0.27577711)  # CLIP's
    config.data.prefetch = 2  # batches made ahead of the step that needs them
    config.data.max_broken_videos = 100  # unreadable ones replaced in training; one more stops it
    config.data.synthetic = False  # time the device: one made-up batch, random weights, no files

    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices that share frozen weights and optimizer; divides their number

    config.backbone = ConfigDict()
    config.backbone.name = "ViT-B/16"  # a name of dualpath_jax.models.backbones.MODELS or CUSTOM
    config.backbone.checkpoint = placeholder(str)  # output file of scripts/convert_clip.py
    config.backbone.patch_size = placeholder(int)  # P, pixels; None here and below: the name's own
    config.backbone.width = placeholder(int)  # D; Swin, here and below: of the first stage
    config.backbone.depth = placeholder(int)  # ViT: L, number of blocks
    config.backbone.depths = placeholder(tuple)  # Swin: L of each stage
    config.backbone.heads = placeholder(int)  # K; that of the weights
    config.backbone.mlp_dim = placeholder(int)  # width of the MLP's hidden layer
    config.backbone.window_size = placeholder(int)  # Swin: side of a window, tokens
    config.backbone.projection_dim = placeholder(int)  # ViT: e, CLIP's joint space; custom: or none
    config.backbone.pre_norm = placeholder(bool)  # ViT: CLIP's LayerNorm before the first block
    config.backbone.patch_bias = placeholder(bool)  # ViT: a bias in the patch embedding (ImageNet)

    config.model = ConfigDict()
    config.model.method = "dualpath"  # a name of dualpath_jax.models.tuning.METHODS
    # From here to train_tokens: dualpath alone.
    config.model.spatial_path = True  # False: Table 5, "without spatial adaptation"
    config.model.temporal_path = True  # False: Table 5, "without temporal adaptation"
    config.model.adapter_bottleneck = 128  # R
    config.model.adapter_scale = 1.0  # s, factor on an adapter's output; ours
    config.model.adapter_dropout = 0.0  # inside an adapter, after its activation; ours
    config.model.adapter_layer_norm = False  # a LayerNorm of its own before an adapter; ours
    config.model.serial_skip = False  # temporal path: y + Adapter(y) instead of eq. 9's Adapter(y)
    config.model.pre_attention_adapter = False  # temporal path: an adapter before MHA (SSv2)
    config.model.pre_attention_residual = True  # x + Adapter(x) there, instead of Adapter(x); ours
    config.model.temporal_position = "sincos3d"  # or sincos3d+clip, clip, learned
    config.model.train_tokens = True  # class tokens and spatial positions train (sec. 4)
    config.model.adapt_shifted_windows = False  # Swin: adapters in these blocks too (not App. B.1)
    config.model.dtype = "bfloat16"  # of the computation; trainable parameters are float32; ours
    config.model.scan_blocks = placeholder(bool)  # False: write blocks out; None: on a GPU alone
    config.model.remat = "cheap"  # kept for the backward pass: none: all; cheap; full: block inputs
    config.model.cls_token_only = (
        True  # ViT's last block: only what the class token needs; same result
    )

    config.model.vpt = ConfigDict()
    config.model.vpt.num_prompts = 10  # K; one of VPT's own 1, 5, 10, 50, 100, 200; ours
    config.model.vpt.deep = True  # new prompts for each block; False: VPT-shallow, the first alone

    config.model.adaptformer = ConfigDict()
    config.model.adaptformer.bottleneck = 64  # R
    config.model.adaptformer.scale = 0.1  # s
    config.model.adaptformer.parallel = True  # eq. 4; False: the serial form of Fig. 2c

    config.model.protuning = ConfigDict()
    config.model.protuning.width = 96  # channels between the 1x1 convolutions; ours: gives its 9M

    config.model.st_adapter = ConfigDict()
    config.model.st_adapter.form = "paper"  # eq. 6; released: as its authors published it
    config.model.st_adapter.width = 384  # R; its authors'
    config.model.st_adapter.kernel_size = (3, 1, 1)  # frames, rows, columns; its authors'
    config.model.st_adapter.scale = 1.0  # s; ours in eq. 6, none in the released form

    config.model.videoprompt = ConfigDict()
    config.model.videoprompt.num_prompts = 32  # before the frames; its authors' 16 + 16

    config.model.aim = ConfigDict()
    config.model.aim.bottleneck = placeholder(int)  # R of its adapters; None: D/4, its authors'
    config.model.aim.scale = 0.5  # s of joint adaptation; its authors'; 1.0 on SSv2
    config.model.aim.num_temporal_adapters = 1  # its authors'; 2 on SSv2
    config.model.aim.drop_path = 0.2  # of temporal and joint adaptation, by clip; its authors'
    config.model.aim.dropout = 0.5  # before the FC; its authors'

    config.model.evl = ConfigDict()
    config.model.evl.num_blocks = 4  # M, last blocks that are decoded; its authors'
    config.model.evl.mlp_dropout = 0.5  # in the decoder's MLP; its authors'
    config.model.evl.dropout = 0.5  # before the FC; its authors'

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 3e-4  # at the top of the schedule; AdamW, cosine to zero
    config.optimizer.weight_decay = 5e-2  # on kernels only; ours in that
    config.optimizer.warmup_epochs = 3.0  # linear; at most half of the training; ours
    config.optimizer.b1 = 0.9  # AdamW; ours
    config.optimizer.b2 = 0.999  # AdamW; ours
    config.optimizer.clip_norm = placeholder(float)  # largest global gradient norm; None: no limit
    config.optimizer.label_smoothing = 0.0  # ours
    config.optimizer.accumulation_steps = 1  # parts of a batch computed one after the other
    config.optimizer.reduce_dtype = "float32"  # of gradients along mesh axis `data`; or bfloat16
    config.optimizer.max_skipped_steps = 0  # non-finite steps left out; one more stops training

    config.eval = ConfigDict()
    config.eval.split = "validation"  # the split that results.json is about
    config.eval.batch_size = 32  # videos per step, over all devices and hosts
    config.eval.temporal_views = 3  # clips per video
    config.eval.spatial_crops = 1  # crops per clip, 1 or 3
    config.eval.every_epochs = 0  # evaluate during training; 0: only at the end
    config.eval.checkpoint = "latest"  # that --mode=eval takes; best: by top-1 during training

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 1000  # and at evaluations and the end
    config.checkpoint.every_minutes = 15.0  # or so long after the last; looked at when logged
    config.checkpoint.keep = 3  # newest ones kept, beside the best by top-1

    config.profile = ConfigDict()
    config.profile.first_step = 10  # first traced step, counted from the start of the process
    config.profile.num_steps = 0  # steps traced by the JAX profiler into the workdir; 0: none
    return config
