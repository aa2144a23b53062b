"""Which frames of a video make a clip. Pure numpy: frame counts in, frame indices out.

Public: `dense_indices`, `segment_indices`, `spatial_subset`, `default_interval`, `sample_frames`.
"""

import numpy as np

# Sec. 5.1: sampling intervals 4, 2, 1 for T = 16, 32, 48.
PAPER_INTERVALS = {16: 4, 32: 2, 48: 1}


def default_interval(num_frames: int) -> int:
    """The paper's sampling interval for T = `num_frames`; ValueError where it gives none."""
    if num_frames not in PAPER_INTERVALS:
        raise ValueError(
            f"the paper gives no sampling interval for num_frames={num_frames}: set "
            f"data.sampling_interval (known: {PAPER_INTERVALS})"
        )
    return PAPER_INTERVALS[num_frames]


def dense_indices(
    video_frames: int,
    num_frames: int,
    interval: int,
    rng: np.random.Generator | None = None,
    view: int = 0,
    num_views: int = 1,
) -> np.ndarray:
    """A dense clip: T frames, `interval` apart; indices wrap round a video that is too short.

    Args:
      video_frames: frames in the video, >= 1.
      num_frames: T.
      interval: distance of sampled frames.
      rng: draws the start (training); None takes test view `view` of `num_views`, whose starts are
        evenly spaced from the first possible to the last (a single view is centred).

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
    """One frame of each of T equal segments of the whole video (SSv2's dynamic sampling).

    Args:
      video_frames: frames in the video, >= 1; with fewer than T, segments share frames.
      num_frames: T.
      rng: draws a frame in each segment (training); None takes the same place in every segment:
        the middle, or for test view `view` of `num_views` the middle of that part of the segment.

    Returns:
      int64 [T], non-decreasing, each in [0, video_frames).
    """
    place = (view + 0.5) / num_views if rng is None else rng.random(num_frames)
    position = (np.arange(num_frames) + place) * (video_frames / num_frames)
    return np.minimum(position.astype(np.int64), video_frames - 1)


def spatial_subset(num_frames: int, num_spatial: int) -> np.ndarray:
    """Places of the S spatial frames among the T: floor((k + 0.5) T / S); int64 [S]."""
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
    """Frame indices int64 [T] by `sampling` ("dense" or "segments"); see those functions."""
    if sampling == "dense":
        interval = default_interval(num_frames) if interval is None else interval
        return dense_indices(video_frames, num_frames, interval, rng, view, num_views)
    if sampling == "segments":
        return segment_indices(video_frames, num_frames, rng, view, num_views)
    raise ValueError(f"unknown data.sampling {sampling!r}: known are {', '.join(SAMPLINGS)}")
