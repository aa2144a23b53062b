"""Tests progress: timed lines in a log, nothing when quiet, a bar on a terminal."""

import sys

import pytest

from dualpath_jax.runtime import progress_bar


class Clock:
    """Returns a time that the test sets."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def restore_quiet():
    yield
    progress_bar.set_quiet(False)


def count_videos(clock, **options):
    """Count 100 videos of one second each, 40 of them done before."""
    with progress_bar.ProgressBar(100, "prepare", "videos", 40, clock=clock, **options) as bar:
        for _ in range(60):
            clock.now += 1
            bar.update()


def test_lines_in_a_log(capsys):
    count_videos(Clock())
    assert capsys.readouterr().err.splitlines() == [
        "prepare: 70 of 100 videos (70%), 0:00:30 left",
        "prepare: 100 of 100 videos (100%), 0:00:00 left",
    ]


@pytest.mark.parametrize("quiet", [{"shown": False}, {}])
def test_nothing_when_quiet(capsys, quiet):
    progress_bar.set_quiet(not quiet)
    count_videos(Clock(), **quiet)
    progress_bar.print_above_bar("step 1")
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out == ("step 1\n" if quiet else "")


def test_another_line_postpones_the_next(capsys):
    clock = Clock()
    bar = progress_bar.ProgressBar(100, "train", "steps", clock=clock)
    clock.now = 29
    bar.postpone_line()
    clock.now = 31
    bar.update_to(50)
    assert capsys.readouterr().err == ""
    clock.now = 59
    bar.update_to(75)
    assert capsys.readouterr().err == "train: 75 of 100 steps (75%), 0:00:20 left\n"


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress_bar.iterate_with_bar([1, 2, 3], "count", "things")) == [1, 2, 3]
    captured_bar = capsys.readouterr().err
    assert "count: 100%" in captured_bar
    assert "3/3" in captured_bar
    assert "left" not in captured_bar


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (3725.4, "1:02:05")])
def test_format_duration(seconds, text):
    assert progress_bar.format_duration(seconds) == text
