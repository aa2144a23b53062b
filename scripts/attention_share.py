"""Measures how much of the class token's attention falls on the demo's moving object.

    python scripts/attention_share.py --workdirs runs/demo runs/demo_seed1 runs/demo_seed2

Prints a Markdown table of the share for each run of configs/demo.py and each path, without and with
adaptation, averaged over the videos of the evaluated split. Two columns are for comparison: "area"
is the object's share of the area, which uniform attention would have; "at most" is the share that
attention to the one patch with most of the object would have. The attention is that of the last
block to the patches, or with --rollout that of all blocks.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

import numpy as np  # noqa: E402

from dualpath_jax.cli import build_parser, user_errors  # noqa: E402
from dualpath_jax.runtime import console, progress_bar  # noqa: E402

COLUMNS = ("area", "without adaptation", "with adaptation", "at most")


def compute_shares(model, rollout: bool) -> dict[str, np.ndarray]:
    """Compute the `COLUMNS` of each path, averaged over the videos of the evaluated split."""
    from dualpath_jax.analysis import attention_maps
    from dualpath_jax.data import pipeline
    from dualpath_jax.data.clip_spec import Views
    from dualpath_jax.data.video_dataset import VideoDataset
    from dualpath_jax.demo import object_masks

    config, patch = model.config, model.module.config.patch_size
    dataset = VideoDataset(config.data.dir, config.eval.split)
    sources = dataset, object_masks.ObjectMasks(dataset, config.eval.split)
    views = Views(config.eval.temporal_views, config.eval.spatial_crops)
    batches = [
        pipeline.eval_batches(source, config.data, views, config.eval.batch_size)
        for source in sources
    ]
    shares: dict[str, list] = {path: [] for path in model.module.paths}
    bar = progress_bar.ProgressBar(len(dataset), f"seed {config.seed}", "videos")
    for videos, objects in zip(*batches, strict=True):
        real = videos["mask"] > 0
        clips, masks = (
            {p: b[p][real].reshape(-1, *b[p].shape[2:]) for p in shares} for b in (videos, objects)
        )
        maps = [
            attention_maps.class_token_attention(model, clips, adapted, rollout)
            for adapted in (False, True)
        ]
        for path in shares:
            coverage = attention_maps.patch_coverage(masks[path][..., 0] / 255, patch)
            area, most = coverage.mean(axis=(1, 2, 3)), coverage.max(axis=(2, 3)).mean(axis=1)
            columns = [attention_maps.mean_attention_share(m[path], coverage) for m in maps]
            shares[path].append([area, *columns, most])
        bar.update(int(real.sum()))
    bar.close()
    return {path: np.concatenate(parts, axis=1).mean(axis=1) for path, parts in shares.items()}


def build_table(workdirs: list[str], backbone: str | None, rollout: bool) -> list[str]:
    """Compute the shares of the runs and return the lines of the table."""
    from dualpath_jax.inference import trained_model

    lines = [f"| path | run | {' | '.join(COLUMNS)} |", "|---|---|---|---|---|---|"]
    runs = {}
    for workdir in workdirs:
        model = trained_model.load(workdir, backbone=backbone)
        runs[f"seed {model.config.seed}"] = compute_shares(model, rollout)
    for path in dict.fromkeys(path for run in runs.values() for path in run):
        rows = {name: run[path] for name, run in runs.items() if path in run}
        if len(rows) > 1:
            rows["mean"] = np.mean(list(rows.values()), axis=0)
        for name, row in rows.items():
            lines.append(f"| {path} | {name} | {' | '.join(f'{x:.3f}' for x in row)} |")
    return lines


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = build_parser(__doc__)
    parser.add_argument(
        "--workdirs", nargs="+", required=True, help="folders of runs of configs/demo.py"
    )
    parser.add_argument(
        "--backbone", help="file of the converted backbone, if it is not where the runs had it"
    )
    parser.add_argument(
        "--rollout",
        action="store_true",
        help="measure attention rolled out over all blocks, not that of the last one",
    )
    progress_bar.add_quiet_option(parser)
    return parser


def main() -> None:
    """Print the table."""
    args = parser().parse_args()
    progress_bar.set_quiet(args.quiet)
    with user_errors():
        print("\n".join(build_table(args.workdirs, args.backbone, args.rollout)))


if __name__ == "__main__":
    from dualpath_jax.runtime.environment import quiet_tensorflow

    quiet_tensorflow()
    console.run(main)
