"""Chooses the frames of a video that make a clip.

Pure numpy: frame counts in, frame indices out.
"""

import numpy as np

# Sampling interval by T (sec. 5.1).
_PAPER_INTERVALS = {16: 4, 32: 2, 48: 1}


def default_interval(num_frames: int) -> int:
    """Return the paper's sampling interval for T = `num_frames` (sec. 5.1).

    Raises:
      ValueError: the paper does not use this number of frames.
    """
    if num_frames not in _PAPER_INTERVALS:
        raise ValueError(
            f"the paper gives no sampling interval for num_frames={num_frames}: set "
            f"data.sampling_interval (known: {_PAPER_INTERVALS})"
        )
    return _PAPER_INTERVALS[num_frames]


def dense_indices(
    video_frames: int,
    num_frames: int,
    interval: int,
    rng: np.random.Generator | None = None,
    view: int = 0,
    num_views: int = 1,
) -> np.ndarray:
    """Sample a dense clip: T frames, `interval` apart.

    Indices wrap around in a video that is too short.

    Args:
      video_frames: number of frames in the video, at least 1.
      num_frames: T.
      interval: distance between sampled frames.
      rng: draws the start (training). None takes test view `view`.
      view: index of the test view, 0..num_views-1.
      num_views: number of test views. Their starts are evenly spaced from the first possible start
        to the last; a single view is centered.

    Returns:
      int64 [T], each in [0, video_frames).
    """
    span = (num_frames - 1) * interval + 1
    last_start = max(video_frames - span, 0)
    if rng is not None:
        start = int(rng.integers(last_start + 1))
    else:
        start = last_start // 2 if num_views == 1 else last_start * view // (num_views - 1)
    return (start + np.arange(num_frames) * interval) % video_frames


def segment_indices(
    video_frames: int,
    num_frames: int,
    rng: np.random.Generator | None = None,
    view: int = 0,
    num_views: int = 1,
) -> np.ndarray:
    """Sample one frame from each of T equal segments of the video (SSv2's dynamic sampling).

    Args:
      video_frames: number of frames in the video, at least 1. With fewer than T frames, segments
        share frames.
      num_frames: T.
      rng: draws a frame in each segment (training). None takes test view `view`.
      view: index of the test view, 0..num_views-1.
      num_views: number of test views. Each segment is divided into as many parts, and a view takes
        the middle of its part in every segment.

    Returns:
      int64 [T], non-decreasing, each in [0, video_frames).
    """
    offset = (view + 0.5) / num_views if rng is None else rng.random(num_frames)
    position = (np.arange(num_frames) + offset) * (video_frames / num_frames)
    return np.minimum(position.astype(np.int64), video_frames - 1)


def spatial_subset(num_frames: int, num_spatial: int) -> np.ndarray:
    """Return the positions of the S spatial frames among the T frames of a clip.

    Args:
      num_frames: T.
      num_spatial: S.

    Returns:
      int64 [S], each in [0, T): floor((k + 0.5) T / S) for k = 0..S-1.

    Raises:
      ValueError: S is not between 1 and T.
    """
    if not 1 <= num_spatial <= num_frames:
        raise ValueError(
            f"num_spatial_frames={num_spatial} must be between 1 and num_frames={num_frames}"
        )
    return (2 * np.arange(num_spatial) + 1) * num_frames // (2 * num_spatial)


SAMPLINGS = ("dense", "segments")


def sample_frames(
    sampling: str,
    video_frames: int,
    num_frames: int,
    interval: int | None = None,
    rng: np.random.Generator | None = None,
    view: int = 0,
    num_views: int = 1,
) -> np.ndarray:
    """Sample the frames of a clip.

    Args:
      sampling: "dense" (`dense_indices`) or "segments" (`segment_indices`).
      video_frames: number of frames in the video, at least 1.
      num_frames: T.
      interval: distance between frames of dense clips; None takes the paper's.
      rng: draws a training clip. None takes test view `view`.
      view: index of the test view, 0..num_views-1.
      num_views: number of test views.

    Returns:
      int64 [T], each in [0, video_frames).

    Raises:
      ValueError: `sampling` is unknown, or the paper does not give an interval for T.
    """
    if sampling == "dense":
        interval = default_interval(num_frames) if interval is None else interval
        return dense_indices(video_frames, num_frames, interval, rng, view, num_views)
    if sampling == "segments":
        return segment_indices(video_frames, num_frames, rng, view, num_views)
    raise ValueError(f"unknown data.sampling {sampling!r}: known are {', '.join(SAMPLINGS)}")
