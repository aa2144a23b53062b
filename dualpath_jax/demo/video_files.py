"""Writes rendered frames as video files, on all cores."""

import concurrent.futures
import multiprocessing
import pathlib
from collections.abc import Callable, Sequence

import av
import numpy as np

from dualpath_jax.runtime.cpu_count import num_cores
from dualpath_jax.runtime.progress_bar import ProgressBar

Clip = tuple[str, int]  # split, and number of the video in it


def write_video(frames: np.ndarray, path: pathlib.Path, fps: int = 12) -> None:
    """Write frames as H.264 in an .mp4 file.

    Args:
      frames: uint8 [frames, height, width, 3], RGB; height and width are even.
      path: file to write.
      fps: frames per second.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "preset": "veryfast",
            "crf": "18",
            "threads": "1",
            # With a lookahead thread, frame types would depend on the timing of threads.
            "x264-params": "sync-lookahead=0:rc-lookahead=0",
        }
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_videos(
    render_frames: Callable[[str, int], np.ndarray],
    clips: Sequence[Clip],
    paths: Sequence[pathlib.Path],
    progress: bool = True,
) -> None:
    """Render clips in several processes and write them; folders are created.

    Args:
      render_frames: a module's function of split and number, see `write_video` for its result.
      clips: what to render.
      paths: file of each clip.
      progress: True shows a progress bar, see `ProgressBar`.
    """
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    jobs = list(zip(clips, paths, strict=True))
    context = multiprocessing.get_context("spawn")  # the parent may have threads of JAX
    with (
        concurrent.futures.ProcessPoolExecutor(num_cores(), mp_context=context) as pool,
        ProgressBar(len(jobs), "render", "videos", shown=progress) as bar,
    ):
        parts = [
            pool.submit(_write_part, render_frames, jobs[start : start + 50])
            for start in range(0, len(jobs), 50)
        ]
        for part in concurrent.futures.as_completed(parts):
            bar.update(part.result())


def _write_part(
    render_frames: Callable[[str, int], np.ndarray], jobs: Sequence[tuple[Clip, pathlib.Path]]
) -> int:
    """Render and write a part of the clips; return how many."""
    for clip, path in jobs:
        temporary = path.with_name(f".{path.name}")  # a killed program leaves no half a video
        write_video(render_frames(*clip), temporary)
        temporary.rename(path)
    return len(jobs)
