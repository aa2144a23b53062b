"""Tests the embedded data set: its content, and that only order distinguishes paired classes."""

import json

import av
import numpy as np
import pytest
from safetensors import safe_open

from dualpath_jax.demo import render as render_lib
from dualpath_jax.demo import setup


@pytest.mark.parametrize("label", range(8))
def test_tracks_match_their_class(label):
    for seed in range(20):
        track = render_lib.draw_track(label, 16, np.random.default_rng(seed))
        change = {
            0: track.x[0] - track.x[-1],
            1: track.x[-1] - track.x[0],
            2: track.y[0] - track.y[-1],
            3: track.y[-1] - track.y[0],
            4: track.radius[-1] / track.radius[0] - 2,
            5: track.radius[0] / track.radius[-1] - 2,
            6: track.opacity[-1] - track.opacity[0],
            7: track.opacity[0] - track.opacity[-1],
        }[label]
        assert change > 0.3
        assert np.all((track.x > 0.1) & (track.x < 0.9) & (track.y > 0.1) & (track.y < 0.9))


@pytest.mark.parametrize("pair", range(4))
def test_a_pair_differs_only_in_order(pair):
    """Check that a clip reversed is a clip of the paired class, with the same set of frames."""
    photo = render_lib.load_photo("chelsea")
    forward, backward = (
        render_lib.render_clip(photo, label, 16, 64, np.random.default_rng(5))
        for label in (2 * pair, 2 * pair + 1)
    )
    assert np.array_equal(forward, backward[::-1])
    assert not np.array_equal(forward, backward)


def test_a_second_rendering_has_the_same_bytes(tmp_path):
    """Check that rendering is reproducible, which x264's lookahead thread would prevent."""

    def render(name: str) -> dict[str, bytes]:
        render_lib.render_demo(tmp_path / name, {"train": 64}, progress=False)
        return {path.name: path.read_bytes() for path in (tmp_path / name / "videos").iterdir()}

    first = render("first")
    assert len(set(first.values())) == 64
    assert render("second") == first


def test_test_photographs_are_not_in_training():
    assert not set(render_lib.PHOTOS["test"]) & {
        *render_lib.PHOTOS["train"],
        *render_lib.PHOTOS["validation"],
    }
    with safe_open(setup.BACKBONE, "numpy") as file:
        pretraining = json.loads(file.metadata()["pretraining"])
    assert not set(render_lib.PHOTOS["test"]) & set(pretraining["photos"])


def test_backbone_is_small_and_has_openais_layout():
    assert setup.BACKBONE.stat().st_size <= 4_000_000
    with safe_open(setup.BACKBONE, "numpy") as file:
        assert "visual.transformer.resblocks.0.attn.in_proj_weight" in file.keys()  # noqa: SIM118


def test_rendered_files(demo_data):
    raw = demo_data.parent / "raw"
    labels = json.loads((raw / "labels" / "labels.json").read_text())
    assert labels["Moving something up"] == "2"
    assert len(labels) == 8
    test = json.loads((raw / "labels" / "test.json").read_text())
    assert len(test) == 21
    assert set(test[0]) == {"id", "label", "template", "placeholders"}
    with av.open(str(raw / "videos" / f"{test[0]['id']}.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert np.shape(frames) == (16, 72, 72, 3)
    photo_rng = np.random.default_rng([2, 0])
    photo = render_lib.load_photo(render_lib.PHOTOS["test"][photo_rng.integers(2)])
    expected = render_lib.render_clip(photo, 0, 16, 72, photo_rng)
    assert np.abs(np.array(frames, int) - expected).mean() < 6  # the loss of H.264


def test_rendering_is_done_once(demo_data):
    raw = demo_data.parent / "raw"
    before = (raw / "videos" / "0.mp4").stat().st_mtime_ns
    render_lib.render_demo(raw, {"train": 1}, progress=False)
    assert (raw / "videos" / "0.mp4").stat().st_mtime_ns == before
