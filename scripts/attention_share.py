"""How much of the class token's attention falls on the demo's moving object.

    python scripts/attention_share.py --workdirs runs/demo runs/demo_seed1 runs/demo_seed2

Prints a Markdown table: for each run of configs/demo.py, each path, without and with adaptation,
the mean over the videos that evaluation sees. Beside it stand the object's share of the area, which
uniform attention would have, and what attention to the one patch with most of the object would
have. Attention is that of the last block to the patches.
"""

import argparse
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

import numpy as np  # noqa: E402

from dualpath_jax.cli import build_parser, user_errors  # noqa: E402
from dualpath_jax.runtime import progress_bar  # noqa: E402

COLUMNS = ("area", "without adaptation", "with adaptation", "at most")


def shares(model, rollout: bool) -> dict[str, np.ndarray]:
    """path -> the `COLUMNS`, means over the videos of the evaluated split."""
    from dualpath_jax.analysis import attention_maps
    from dualpath_jax.data import pipeline
    from dualpath_jax.data.video_dataset import VideoDataset
    from dualpath_jax.demo import object_masks

    config, patch = model.config, model.module.config.patch_size
    dataset = VideoDataset(config.data.dir, config.eval.split)
    sources = dataset, object_masks.ObjectMasks(dataset, config.eval.split)
    settings = (config.data, config.eval.temporal_views, config.eval.spatial_crops)
    batches = [
        pipeline.eval_batches(source, *settings, config.eval.batch_size) for source in sources
    ]
    found: dict[str, list] = {path: [] for path in model.module.paths}
    shown = progress_bar.ProgressBar(len(dataset), f"seed {config.seed}", "videos")
    for videos, objects in zip(*batches, strict=True):
        real = videos["mask"] > 0
        clips, masks = (
            {p: b[p][real].reshape(-1, *b[p].shape[2:]) for p in found} for b in (videos, objects)
        )
        maps = [
            attention_maps.class_token_attention(model, clips, kind, rollout)
            for kind in (False, True)
        ]
        for path in found:
            covered = attention_maps.patch_coverage(masks[path][..., 0] / 255, patch)
            area, most = covered.mean(axis=(1, 2, 3)), covered.max(axis=(2, 3)).mean(axis=1)
            columns = [attention_maps.mean_attention_share(m[path], covered) for m in maps]
            found[path].append([area, *columns, most])
        shown.update(int(real.sum()))
    shown.close()
    return {path: np.concatenate(parts, axis=1).mean(axis=1) for path, parts in found.items()}


def table(workdirs: list[str], backbone: str | None, rollout: bool) -> list[str]:
    """The lines of the table."""
    from dualpath_jax.inference import trained_model

    lines = [f"| path | run | {' | '.join(COLUMNS)} |", "|---|---|---|---|---|---|"]
    runs = {}
    for workdir in workdirs:
        model = trained_model.load(workdir, backbone=backbone)
        runs[f"seed {model.config.seed}"] = shares(model, rollout)
    for path in dict.fromkeys(path for run in runs.values() for path in run):
        rows = {name: run[path] for name, run in runs.items() if path in run}
        if len(rows) > 1:
            rows["mean"] = np.mean(list(rows.values()), axis=0)
        for name, row in rows.items():
            lines.append(f"| {path} | {name} | {' | '.join(f'{x:.3f}' for x in row)} |")
    return lines


def parser() -> argparse.ArgumentParser:
    made = build_parser(__doc__)
    made.add_argument("--workdirs", nargs="+", required=True, help="of runs of configs/demo.py")
    made.add_argument("--backbone", help="converted backbone, if not where the runs had it")
    made.add_argument(
        "--rollout", action="store_true", help="through all blocks, instead of the last one alone"
    )
    progress_bar.add_quiet_option(made)
    return made


def main() -> None:
    args = parser().parse_args()
    progress_bar.set_quiet(args.quiet)
    with user_errors():
        print("\n".join(table(args.workdirs, args.backbone, args.rollout)))


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
