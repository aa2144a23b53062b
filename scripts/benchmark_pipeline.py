"""Compares the data pipeline's clips per second with online decoding and the limit.

    pip install ".[bench]"
    python scripts/benchmark_pipeline.py --videos=FOLDER

It prepares the videos in a temporary folder (or in --prepared). Then it times in turns, on the
same clips and cores: this pipeline; decord (or decord2, which has the same module), torchcodec and
PyAV, which decode the files for each clip, with the same crops and augmentation; and, as the limit,
libjpeg, which only decodes the same frames from memory. Readers that are not installed are left
out. The clips are those of the recipe for Kinetics-400. Ratios are medians over rounds. Last, it
measures the cost of each stage, and the pipeline on videos of 300 and of 60 frames.
"""

import argparse
import contextlib
import importlib
import json
import pathlib
import sys
import tempfile

# The process that measures the stages imports this file again, therefore `main` is guarded.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # runs without installation

from dualpath_jax.cli import build_parser, positive  # noqa: E402
from dualpath_jax.runtime import console  # noqa: E402

VIDEO_LENGTHS = (300, 60)  # frames


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = build_parser(__doc__)
    add = result.add_argument
    add("--videos", nargs="+", required=True, help="folder of video files, or the files")
    add("--prepared", help="folder for the prepared videos, which another run can reuse")
    add("--frames", type=positive(int), nargs="+", default=[16, 48], help="frames per clip (16 48)")
    add("--rounds", type=positive(int), default=5, help="measurements of each loader (5)")
    add(
        "--batches",
        type=positive(int),
        default=5,
        help="batches per measurement, the first untimed (5)",
    )
    add("--batch_size", type=positive(int), default=32, help="clips per batch (32)")
    add("--json", action="store_true", help="print JSON instead of Markdown")
    return result


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    arguments = parser().parse_args()
    if arguments.batches < 2:
        parser().error("--batches must be at least 2")
    return arguments


def find_video_files(names: list[str]) -> list[str]:
    """Return the given files and the files in the given folders, without hidden files.

    Raises:
      ValueError: a name does not exist, or there are no files.
    """
    files = []
    for path in map(pathlib.Path, names):
        if not path.exists():
            raise ValueError(f"{path} does not exist; check --videos")
        candidates = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [str(file) for file in candidates if file.is_file() and file.name[0] != "."]
    if not files:
        raise ValueError(f"there are no files in {', '.join(names)}; check --videos")
    return files


def make_data_config(num_frames: int, batch_size: int):
    """Return `config.data` of the recipe for Kinetics-400 for clips of `num_frames` frames."""
    from dualpath_jax.config import recipes

    data_config = recipes.k400().data
    data_config.num_frames, data_config.batch_size = num_frames, batch_size
    return data_config


def measure_pipeline(arguments: argparse.Namespace, folder: str) -> dict:
    """Measure all cases; prepare the videos in `folder`.

    Returns:
      {"videos", "cores": numbers; "cases": results of `compare_loaders` with "frames", "mode" and
      "stages"; "lengths": result of `compare_video_lengths` with "frames"}.
    """
    from dualpath_jax.runtime.cpu_count import num_cores
    from scripts.benchmarks import pipeline

    missing = pipeline.find_missing_readers()
    for name, problem in missing.items():
        print(f"{name} {problem}: it is left out", file=sys.stderr)
    loaders = [name for name in pipeline.LOADERS if name not in missing]
    dataset = pipeline.prepare_files(find_video_files(arguments.videos), folder)
    counts = arguments.batches, arguments.rounds
    cases = []
    for frames in arguments.frames:
        data_config = make_data_config(frames, arguments.batch_size)
        for training in (True, False):
            case = {"frames": frames, "mode": "training" if training else "test"}
            print(f"{frames} frames, {case['mode']} ...", file=sys.stderr, flush=True)
            case |= pipeline.compare_loaders(dataset, data_config, training, *counts, loaders)
            case["stages"] = pipeline.stage_costs(folder, data_config, training, arguments.batches)
            cases.append(case)
    data_config = make_data_config(arguments.frames[0], arguments.batch_size)
    long, short = VIDEO_LENGTHS
    print(f"videos of {long} and {short} frames ...", file=sys.stderr, flush=True)
    lengths = pipeline.compare_video_lengths(dataset, data_config, VIDEO_LENGTHS, *counts)
    return {
        "videos": len(dataset),
        "cores": num_cores(),
        "cases": cases,
        "lengths": {"frames": arguments.frames[0]} | lengths,
    }


def format_markdown(result: dict) -> str:
    """Format the result of `measure_pipeline` as Markdown tables."""
    names = list(result["cases"][0]["clips_per_second"])
    others = names[1:]
    lines = [
        f"{result['videos']} videos, {result['cores']} cores. Clips/s (CPU ms per clip), ratios of "
        "clips/s (of CPU time):",
        "",
        f"| frames, mode | {' | '.join(names)} | {' | '.join(f'ours / {o}' for o in others)} |",
        "|---" * (1 + len(names) + len(others)) + "|",
    ]
    for case in result["cases"]:
        speed, cost = case["clips_per_second"], case["cpu_ms_per_clip"]
        cells = [f"{case['frames']}, {case['mode']}"]
        cells += [f"{speed[name]:.1f} ({cost[name]:.1f})" for name in names]
        cells += [f"{case['ratios'][n]:.2f} ({case['cpu_ratios'][n]:.2f})" for n in others]
        lines.append(f"| {' | '.join(cells)} |")
    stages = list(result["cases"][0]["stages"])
    lines += ["", "Stages of ours on one core, CPU ms per clip:", ""]
    lines += [f"| frames, mode | {' | '.join(stages)} | sum |", "|---" * (2 + len(stages)) + "|"]
    for case in result["cases"]:
        costs = [case["stages"][stage] for stage in stages]
        cells = [f"{case['frames']}, {case['mode']}", *(f"{c:.2f}" for c in [*costs, sum(costs)])]
        lines.append(f"| {' | '.join(cells)} |")
    lengths = result["lengths"]
    long, short = map(str, VIDEO_LENGTHS)
    lines += [
        "",
        f"Videos of {long} frames: {lengths['clips_per_second'][long]:.1f} clips/s; of {short}: "
        f"{lengths['clips_per_second'][short]:.1f}; ratio {lengths['ratios'][short]:.2f}, by CPU "
        f"time {lengths['cpu_ratios'][short]:.2f} ({lengths['frames']} frames per clip, training).",
    ]
    return "\n".join(lines)


def main() -> None:
    arguments = parse_arguments()
    # TensorFlow's libraries crash torchcodec if they are loaded first.
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        importlib.import_module("torchcodec.decoders")
    from dualpath_jax.runtime.environment import quiet_tensorflow

    quiet_tensorflow()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = measure_pipeline(arguments, arguments.prepared or folder)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
    print(json.dumps(result, indent=1) if arguments.json else format_markdown(result))


if __name__ == "__main__":
    console.run(main)
