"""Tests the estimate of what fits a device from two compiled batches, without libtpu."""

import pytest

from scripts.benchmarks.tpu_aot import StepReport, estimate_fits, format_fits


def report(clips):
    """Return the report of a step that needs 1 GB, and 0.5 GB for each clip."""
    peak = int(1e9 + 0.5e9 * clips)
    return StepReport("train", clips, 0.0, 0, 2 * peak, peak, 0, 0, 0, [], 1.0)


def test_fits():
    rows = estimate_fits(report(8), report(16), [1.0, 2.0, 16.0, 80.0], [64, 128])
    # 0.92 x 16 GB less 1 GB hold 27 clips: the power of two is 16.
    assert [row.clips for row in rows] == [0, 1, 16, 128]
    assert [row.accumulation_steps for row in rows] == [
        *({}, {64: 64, 128: 128}, {64: 4, 128: 8}, {64: 1, 128: 1})
    ]
    lines = format_fits(rows, [64, 128]).splitlines()
    assert lines[2:5] == [
        "| 1 | 0 | none fits | none fits |",
        "| 2 | 1 | 64 | 128 |",
        "| 16 | 16 | 4 | 8 |",
    ]
    # Twin: a step that needs twice as much for a clip fits half as many.
    assert estimate_fits(report(8), report(16), [32.0], [64])[0].clips == 32
    assert estimate_fits(report(4), report(24), [32.0], [64])[0].clips == 32  # the same line
    with pytest.raises(ValueError, match="a batch of 48 is not a power of two"):
        estimate_fits(report(8), report(16), [16.0], [48])
