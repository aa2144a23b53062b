"""Makes small video files for the tests."""

import os
import signal
import time

import av
import numpy as np

from dualpath_jax.inference import sliding_windows


def gray_frames(num_frames: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Return gray uint8 [H, W, 3] frames; frame i < 20 has brightness 10 + 12 i."""
    return [np.full((height, width, 3), 10 + 12 * i % 240, np.uint8) for i in range(num_frames)]


def write_video(
    path: str,
    frames: list[np.ndarray] | int = 8,
    codec: str = "mpeg4",
    rate: int = 10,
    options: dict[str, str] | None = None,
    gop: int | None = None,
) -> str:
    """Write a video file and return its path.

    Args:
      path: the file to write.
      frames: uint8 [H, W, 3] RGB frames, or the number of frames of `gray_frames`.
      codec: ffmpeg's name of the encoder.
      rate: frames per second.
      options: options of the container.
      gop: frames per group of pictures; None uses the encoder's default.
    """
    frames = gray_frames(frames) if isinstance(frames, int) else frames
    path = os.fspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with av.open("file:" + path, "w", container_options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 2_000_000
        if gop:
            stream.gop_size = gop
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def noise_frames(num_frames: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Return uint8 [H, W, 3] frames of noise, which take many bytes when compressed."""
    rng = np.random.default_rng(0)
    return list(rng.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8))


def decode_windows_then_fail(path: str, *arguments):
    """Run in a worker; yield two windows, then do what the file's name says."""
    for number, window in enumerate(sliding_windows.decode_windows(path, *arguments)):
        if number == 2 and os.path.basename(path) == "crash.mp4":
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 2 and os.path.basename(path) == "hang.mp4":
            time.sleep(600)
        yield window
