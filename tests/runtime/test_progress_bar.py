"""Progress: lines in a log by a clock, nothing when quiet, a bar on a terminal."""

import pytest

from dualpath_jax.runtime import progress_bar


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture(autouse=True)
def loud():
    yield
    progress_bar.set_quiet(False)


def work(clock, **options):
    """100 items of a second each, 40 of them done before."""
    with progress_bar.ProgressBar(100, "prepare", "videos", 40, clock=clock, **options) as shown:
        for _ in range(60):
            clock.now += 1
            shown.update()


def test_lines_in_a_log(capsys):
    work(Clock())
    assert capsys.readouterr().err.splitlines() == [
        "prepare: 70 of 100 videos (70%), 0:00:30 left",
        "prepare: 100 of 100 videos (100%), 0:00:00 left",
    ]


@pytest.mark.parametrize("quiet", [{"shown": False}, {}])
def test_nothing_when_quiet(capsys, quiet):
    progress_bar.set_quiet(not quiet)
    work(Clock(), **quiet)
    progress_bar.print_above_bar("step 1")
    read = capsys.readouterr()
    assert read.err == ""
    assert read.out == ("step 1\n" if quiet else "")


def test_another_line_told_how_far_it_is(capsys):
    clock = Clock()
    shown = progress_bar.ProgressBar(100, "train", "steps", clock=clock)
    clock.now = 29
    shown.postpone_line()
    clock.now = 31
    shown.update_to(50)
    assert capsys.readouterr().err == ""
    clock.now = 59
    shown.update_to(75)
    assert capsys.readouterr().err == "train: 75 of 100 steps (75%), 0:00:20 left\n"


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress_bar.iterate_with_bar([1, 2, 3], "count", "things")) == [1, 2, 3]
    drawn = capsys.readouterr().err
    assert "count: 100%" in drawn
    assert "3/3" in drawn
    assert "left" not in drawn


@pytest.mark.parametrize(("seconds", "words"), [(0, "0:00:00"), (3725.4, "1:02:05")])
def test_in_hours(seconds, words):
    assert progress_bar.format_duration(seconds) == words
