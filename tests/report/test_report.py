"""Tests the report: its numbers, missing and hostile input, and the page in a browser."""

import json
import re
import shutil
import sys
from html import unescape

import numpy as np
import pytest

from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.report import line_charts, mistake_images, page, run_reader, statistics
from dualpath_jax.training.checkpoint import Checkpoints
from tests.helpers.report_runs import NAMES, write_run
from tests.helpers.runs import build_run
from tests.test_docs import script

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture
def report(monkeypatch, tmp_path, capsys):
    """Return a function that runs scripts/report.py: (arguments) -> (status, page, output)."""

    def make(*arguments, out=tmp_path / "report.html"):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments), f"--out={out}"])
        status = 0
        try:
            script("scripts/report.py").main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, out.read_text() if out.is_file() else "", printed.out + printed.err

    return make


# Numbers.


def test_calibration_by_hand():
    confidence = np.array([0.05, 0.5, 0.51, 0.95, 0.97, 1.0])
    correct = np.array([False, True, False, True, True, False])
    bins = statistics.calibration_bins(confidence, correct, bins=10)
    assert bins.count.tolist() == [1, 0, 0, 0, 1, 1, 0, 0, 0, 3]  # 0.5 is the edge of the fifth
    assert bins.accuracy[9] == pytest.approx(2 / 3)
    assert bins.confidence[9] == pytest.approx(2.92 / 3)
    assert np.isnan(bins.accuracy[1])
    expected = (0.05 + 0.5 + 0.51 + 3 * (2.92 / 3 - 2 / 3)) / 6
    assert bins.ece == pytest.approx(expected)
    # Twins: other answers, and fewer bins, in which errors cancel.
    assert statistics.calibration_bins(confidence, ~correct, 10).ece != pytest.approx(expected)
    assert statistics.calibration_bins(confidence, correct, 1).ece == pytest.approx(3.98 / 6 - 0.5)


def test_error_of_a_calibrated_model_is_small():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 50_000)
    correct = rng.uniform(size=50_000) < confidence
    assert statistics.calibration_bins(confidence, correct).ece < 0.01
    assert statistics.calibration_bins(confidence, correct | (confidence < 0.5)).ece > 0.1


def test_classes_and_confusions():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    predicted = np.array([0, 2, 2, 1, 1, 2, 0, 1])
    matrix = statistics.confusion_matrix(labels, predicted, 4)
    assert matrix.tolist() == [[1, 0, 2, 0], [0, 2, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert matrix.tolist() != statistics.confusion_matrix(predicted, labels, 4).tolist()
    videos, correct = statistics.class_counts(matrix)
    assert (videos.tolist(), correct.tolist()) == ([3, 2, 3, 0], [1, 2, 1, 0])
    assert statistics.worst_pairs(matrix, 2) == [(0, 2, 2), (2, 0, 1)]
    assert statistics.worst_pairs(matrix, 9) == [
        (0, 2, 2),
        (2, 0, 1),
        (2, 1, 1),
    ]  # no pair without videos


def max_pair_distance(order, pairs):
    """Return the largest distance between the two classes of a pair in an order."""
    return max(abs(order.index(a) - order.index(b)) for a, b in pairs)


def test_confused_classes_are_neighbors():
    matrix = np.diag([50] * 8)
    pairs = [(0, 5), (1, 7), (2, 4), (3, 6)]
    for a, b in pairs:
        matrix[a, b] = matrix[b, a] = 9
    order = statistics.order_by_similarity(matrix)
    assert sorted(order) == list(range(8))
    assert max_pair_distance(order, pairs) == 1
    assert max_pair_distance(list(range(8)), pairs) > 1  # twin: the data set's order
    assert statistics.order_by_similarity(np.zeros((2, 2), int)) == [0, 1]


def test_most_confident_mistakes():
    confidence = np.array([0.9, 0.8, 0.99, 0.7, 0.8])
    correct = np.array([True, False, False, False, False])
    assert statistics.confident_mistakes(confidence, correct, 3) == [2, 1, 4]
    assert statistics.confident_mistakes(confidence, ~correct, 3) == [0]


def test_differences_of_settings():
    base = {"seed": 0, "data.grid": (4, 4), "data.flip": True}
    assert statistics.pairwise_differences([base, base | {"data.grid": [4, 4]}]) == {}
    changed = base | {"seed": 1, "new": "x"}
    assert statistics.pairwise_differences([base, changed]) == {"seed": [0, 1], "new": [None, "x"]}


def test_charts():
    noisy = [(step, 1.0 if step != 7777 else 50.0) for step in range(1, 20_001)]
    chart = line_charts.line_chart(
        "Loss", [line_charts.Series("a", 0, noisy)], line_charts.format_number
    )
    (line,) = chart.readout["series"]
    assert len(line["values"]) <= line_charts.MAX_POINTS
    assert max(line["values"]) == 50.0  # the one peak among 20,000 entries is not thinned out
    assert "from 1 at step 1 to 1 at step 20,000" in chart.summary
    assert (
        line_charts.line_chart("Loss", [line_charts.Series("a", 0, [])], line_charts.format_number)
        is None
    )
    flat = line_charts.line_chart(
        "Loss", [line_charts.Series("a", 0, [(5, 0.0)])], line_charts.format_number
    )
    assert flat.lines[0]["dots"] == [(line_charts.RIGHT, line_charts.BOTTOM)]


# Reading.


def missing_texts(run):
    """Return the entries of `run.missing` as "what: command"."""
    return [f"{item.what}: {item.command}" for item in run.missing]


def test_a_complete_run(tmp_path):
    (run,) = run_reader.read_runs([str(write_run(tmp_path / "whole"))])
    assert missing_texts(run) == []
    assert (run.name, run.num_train_steps, run.class_names) == ("whole", 1500, NAMES)
    assert len(run.training) == 15
    assert run.parameters["total"][:2] == [742_824, 264_168]
    assert run.predictions.correct.mean() == pytest.approx(run.results["top1"])
    assert run.settings["data.source"] == "demo"


SCORES = {"split": "test", "top1": 0.25, "interval": [0.2, 0.31], "num_videos": 200}
SCORES["mean_class_accuracy"] = 0.24
PROBE = {
    "heads": [
        {"head": head, "learning_rate": 0.01, "weight_decay": 0.1, "trainable_params": 5}
        | {"adapter": "", "validation": SCORES | {"split": "validation"}, "final": final}
        for head, final in (("linear", SCORES), ("ordered", SCORES | {"split": "other"}))
    ],
    "views": "8x1x1",
    "num_clips": 9,
    "augmented_passes": 0,
    "num_steps": 3,
    "backbone": "custom",
    "backbone_sha256": "",
    "dataset": "d",
    "chosen_by": "validation",
}


def test_probes_are_next_to_the_tuned_model(tmp_path, report):
    """Check one run and two; twin: no rows without probe.json."""
    workdirs = [write_run(tmp_path / name) for name in ("a", "b")]
    (workdirs[0] / "probe.json").write_text(json.dumps(PROBE))
    rows = dict(page._summary_rows(run_reader.read_runs(list(map(str, workdirs)))))
    assert [name for name in rows if "probe" in name] == [
        "top-1 of the linear probe, without tuning",
        "top-1 of the ordered probe, without tuning",
    ]
    names = list(rows)
    assert names.index("top-1") < names.index("top-1 of the linear probe, without tuning")
    text = "25.00% (95% interval 20.0% to 31.0%"
    assert rows["top-1 of the linear probe, without tuning"] == [f"{text})", "–"]
    assert rows["top-1 of the ordered probe, without tuning"] == [f"{text}, split other)", "–"]
    _, html, _ = report(f"--workdir={workdirs[0]}")
    assert f"{text})" in html
    for name in ("config.json", "metrics.jsonl", "results.json", "environment.json"):
        (workdirs[0] / name).unlink()
    status, html, _ = report(f"--workdir={workdirs[0]}")  # a probe alone
    assert status == 0
    assert text in html


def edit(path, old, new):
    """Replace the first `old` in a file, which must contain it."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


PREDICTIONS = "predictions/00000-of-00001.jsonl"
EVALUATE = "python -m dualpath_jax.main --config=configs/demo.py --workdir=.* --mode=eval"
TRAIN = "python -m dualpath_jax.main --config=configs/demo.py --workdir=[^ ]*$"
DAMAGE = {
    "no metrics": (lambda w: (w / "metrics.jsonl").unlink(), f"no entries about training.*{TRAIN}"),
    "unfinished": (
        lambda w: (
            edit(w / "environment.json", "1500", "2000")
            or edit(w / "config.json", '"num_train_steps": 1500', '"num_train_steps": null')
        ),
        f"not finished: step 1,500 of 2,000.*{TRAIN}",
    ),
    "died while writing": (
        lambda w: (w / "metrics.jsonl").open("a").write('{"step": 16'),
        "metrics.jsonl has unreadable lines, which are left out: 1",
    ),
    "no evaluation": (lambda w: (w / "results.json").unlink(), f"no evaluation.*{EVALUATE}"),
    "older evaluation": (
        lambda w: [
            edit(w / name, '"step": 1500', '"step": 900') for name in ("results.json", PREDICTIONS)
        ],
        f"the evaluation is of step 900.*{EVALUATE}",
    ),
    "results cut off": (
        lambda w: (w / "results.json").write_text('{"top1"'),
        f"results.json cannot be read.*{EVALUATE}",
    ),
    "results of nonsense": (
        lambda w: edit(w / "results.json", '"top5": 1.0', '"top5": "many"'),
        f"results.json is damaged .top5='many'.*{EVALUATE}",
    ),
    "no predictions": (
        lambda w: shutil.rmtree(w / "predictions"),
        f"no per-class accuracy.*no predictions in.*{EVALUATE}",
    ),
    "other predictions": (
        lambda w: edit(w / PREDICTIONS, '"step": 1500', '"step": 3'),
        f"belongs to {{'step': 3.*{EVALUATE}",
    ),
    "damaged predictions": (
        lambda w: edit(w / PREDICTIONS, '"label": 0', '"label": -4'),
        f"the predictions are damaged.*{EVALUATE}",
    ),
    "no class names": (
        lambda w: edit(w / PREDICTIONS, json.dumps(NAMES), "[]"),
        f"classes 0 to 7 have no names.*{EVALUATE}",
    ),
    "no settings": (
        lambda w: (w / "config.json").unlink(),
        f"no config.json.*{TRAIN}",
    ),
    "no environment": (
        lambda w: (w / "environment.json").unlink(),
        r"no environment.json.*--config=configs/CONFIG.py --workdir=",
    ),
    "settings of nonsense": (
        lambda w: (w / "config.json").write_text('{"seed": {"a.b": 1}}'),
        "config.json is not a valid configuration",
    ),
    **{
        f"probe of {name}": (
            lambda w, content=content: (w / "probe.json").write_text(json.dumps(content)),
            "the probe cannot be read: .*probe.json is damaged",
        )
        for name, content in {
            "no heads": PROBE | {"heads": []},
            "text": PROBE | {"heads": "linear"},
            "wrong scores": PROBE
            | {"heads": [PROBE["heads"][0] | {"final": SCORES | {"top1": 2}}]},
            "no interval": PROBE
            | {"heads": [PROBE["heads"][0] | {"final": SCORES | {"interval": 1}}]},
        }.items()
    },
    "settings of no model": (
        lambda w: edit(w / "config.json", '"name": "custom"', '"name": "ViT-X"'),
        "config.json does not describe a model .*ViT-X",
    ),
}

WITHOUT_CONFUSIONS = {
    *("no evaluation", "results cut off", "results of nonsense", "no predictions"),
    *("other predictions", "damaged predictions"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_missing_results_are_listed_and_the_rest_is_shown(case, tmp_path, report):
    workdir = write_run(tmp_path / "run")
    damage, message = DAMAGE[case]
    damage(workdir)
    status, html, printed = report(f"--workdir={workdir}", "--mistakes=0")
    assert (status, "; it lists what is missing (" in printed) == (0, True)
    items = re.findall(r"<li>(.*?)</li>", html, flags=re.S)
    items = [unescape(re.sub("<.*?>", "", item)) for item in items]
    assert any(re.search(message, " ".join(item.split())) for item in items), items
    assert all(f'<section id="{name}"' in html for name in ("figures", "curves", "settings"))
    assert ("<canvas" in html) == (case not in WITHOUT_CONFUSIONS)
    if case == "no class names":
        assert "class 7" in html


def test_nothing_but_a_config(tmp_path, report):
    workdir = write_run(tmp_path / "begun")
    for name in ("metrics.jsonl", "results.json", "environment.json"):
        (workdir / name).unlink()
    status, html, _ = report(f"--workdir={workdir}")
    assert status == 0
    assert "There are no entries in metrics.jsonl yet." in html
    assert '<td class="name">dualpath</td>' in html  # taken from the settings


def test_a_run_older_than_a_setting(tmp_path, report):
    """Check that a missing setting counts as its default in comparisons and parameter tables."""
    pages = []
    for name in ("new", "old"):
        path = write_run(tmp_path / name) / "config.json"
        config = json.loads(path.read_text())
        config["data"].pop("dir"), config["backbone"].pop("checkpoint")  # their values differ
        if name == "old":
            config["model"].pop("remat"), config.pop("mesh")
        path.write_text(json.dumps(config))
        pages.append(report(f"--workdir={path.parent}", "--mistakes=0")[1])
    assert not [html for html in pages if "no table of parameters" in html]
    html = report("--workdir", tmp_path / "new", tmp_path / "old", "--mistakes=0")[1]
    assert "remat" not in html
    # Twin: another value is a difference.
    edit(tmp_path / "new" / "config.json", '"remat": "save_matmuls"', '"remat": "full"')
    html = report("--workdir", tmp_path / "new", tmp_path / "old", "--mistakes=0")[1]
    assert "model.remat" in html


def test_images_that_cannot_be_drawn(tmp_path, report):
    workdir = write_run(tmp_path / "run")
    status, html, _ = report(f"--workdir={workdir}")
    assert (status, "<img" in html) == (0, False)
    assert f"no prepared videos in {workdir}/no_data; if they were moved" in html
    assert "v1" in html  # the mistakes are listed nevertheless
    status, html, _ = report(f"--workdir={workdir}", "--mistakes=0")
    assert (status, 'id="missing"' in html) == (0, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=nowhere"], "there is no folder --workdir=nowhere; give that of a training"),
        (
            ["--workdir={empty}"],
            "--workdir=.*empty is not the folder of a training run: it has none of",
        ),
        (["--workdir=gs://b/run"], "--workdir=gs://b/run is in Cloud Storage.*rsync"),
        (["--workdir", "{run}", "{run}/"], "--workdir names .*run/ twice|--workdir names .*run tw"),
        (["--workdir={run}", "--mistakes=-1"], "--mistakes=-1 must be at least 0"),
    ],
)
def test_bad_input(arguments, message, tmp_path, report):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    folders = {"run": tmp_path / "run", "empty": tmp_path / "empty"}
    status, html, printed = report(*[argument.format(**folders) for argument in arguments])
    assert (status, html) == (2, "")
    assert re.search(message, printed), printed


def test_bad_out(tmp_path, report):
    workdir = write_run(tmp_path / "run")
    status, _, printed = report(f"--workdir={workdir}", out=tmp_path)
    assert status == 2
    assert f"--out={tmp_path} is a folder" in printed
    status, _, printed = report(f"--workdir={workdir}", out=tmp_path / "no" / "r.html")
    assert status == 2
    assert f"there is no folder {tmp_path}/no; make it first" in printed
    assert not list(tmp_path.glob("*.html"))


def test_a_page_is_replaced_atomically(tmp_path, report, monkeypatch):
    workdir = write_run(tmp_path / "run")
    (tmp_path / "report.html").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(page, "render_page", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            report(f"--workdir={workdir}")
    assert (tmp_path / "report.html").read_text() == "old"
    assert report(f"--workdir={workdir}")[1].startswith("<!DOCTYPE html>")
    assert not list(tmp_path.glob("*.tmp"))


def test_untrusted_names_are_escaped(tmp_path, report):
    workdir = write_run(tmp_path / "<i>run", [HOSTILE, *NAMES[1:]])
    edit(workdir / PREDICTIONS, '"v1"', '"\\udc80<b>v1"')  # ids may hold any bytes
    status, html, _ = report(f"--workdir={workdir}")
    assert status == 0
    assert html.count("<script") == 2  # the data, and our own
    assert html.count("</script>") == 2
    assert "<img" not in html
    assert "<i>" not in html
    assert "<b>" not in html
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in html


def test_several_runs(tmp_path, report):
    one = write_run(tmp_path / "one")
    two = write_run(tmp_path / "two", seed=1, steps=900, wrong=0.4)
    three = write_run(tmp_path / "three", seed=2)
    shutil.rmtree(three / "predictions")
    status, html, _ = report("--workdir", one, two, three)
    assert status == 0
    assert "<strong>three:</strong> no per-class accuracy" in html
    figure = re.search(r"top-1</th>(.*?)</tr>", html, flags=re.S).group(1)
    assert figure.count("<td") == 3
    settings = html[html.index('id="settings"') : html.index('id="environment"')]
    keys = re.findall(r'scope="row"><code>(.*?)</code>', settings)
    assert keys == ["backbone.checkpoint", "data.dir", "num_train_steps", "seed"]
    readouts = re.findall(r'data-chart="(.*?)"', html)
    assert len(readouts) == 4
    assert all(readout.count("&#34;steps&#34;") >= 3 for readout in readouts)
    assert html.count("Number of parameters: all") == 1  # equal in the two runs that have it
    classes = html[html.index('id="classes"') : html.index('id="parameters"')]
    assert re.findall(r"<button type=.button.>(.*?)<", classes) == ["class", "one", "two", "spread"]
    spreads = re.findall(r'data-value="([\d.]+)">[\d.]+%</td></tr>', classes)
    assert len(spreads) == 8
    assert spreads == sorted(spreads, key=float, reverse=True)
    assert re.search(r'Left out: <span class="name">three</span> \(no predictions\)\.', html)


def test_runs_with_other_classes_are_left_out_by_name(tmp_path, report):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=1)
    other = write_run(tmp_path / "other", [f"other {name}" for name in NAMES])
    status, html, _ = report("--workdir", one, two, other)
    assert status == 0
    assert re.search(r'Left out: <span class="name">other</span> \(other classes\)\.', html)
    classes = html[html.index('id="classes"') : html.index('id="parameters"')]
    assert re.findall(r"<button type=.button.>(.*?)<", classes) == ["class", "one", "two", "spread"]
    assert "Left out" not in report("--workdir", one, two)[1]


def test_top5_needs_more_than_five_classes(tmp_path, report):
    few = write_run(tmp_path / "few", NAMES[:5])
    assert "top-5" not in report(f"--workdir={few}")[1].partition('id="curves"')[0].lower()
    many = write_run(tmp_path / "many")
    assert "top-5" in report(f"--workdir={many}")[1].partition('id="curves"')[0]


def test_runs_with_equal_names_are_named_by_path(tmp_path):
    paths = [str(write_run(tmp_path / part / "run")) for part in ("a", "b")]
    assert [run.name for run in run_reader.read_runs(paths)] == paths


def test_splits_of_one_run(tmp_path):
    for number in (1, 2, 3):
        write_run(tmp_path / "all" / f"split{number}")
    (tmp_path / "all" / "results.json").write_text('{"top1": 0.5, "splits": {}}')
    runs = run_reader.read_runs([str(tmp_path / "all")])
    assert [run.name for run in runs] == ["split1", "split2", "split3"]


@pytest.mark.slow
def test_images_of_a_real_run(config, tmp_path):
    """Check frames and attention of an untrained run with a checkpoint and made-up results."""
    dataset = VideoDataset(config.data.dir, "test")
    run = build_run(config, str(tmp_path), dataset)
    checkpoints = Checkpoints(run.workdir)
    checkpoints.save(0, run.state, run.metadata())
    checkpoints.close()
    results = {"step": 0, "split": "test", "dataset": config.data.dir}
    record = run_reader.RunRecord(run.workdir, "run", results=results)
    ids = dataset.ids[3:5]
    images = mistake_images.mistake_strips(record, ids)
    assert (missing_texts(record), list(images)) == ([], ids)
    titles = ["frames", "where the spatial path looks", "where the temporal path looks"]
    assert all([strip.title for strip in strips] == titles for strips in images.values())
    assert all(s.url.startswith("data:image/jpeg;base64,/9j/") for s in images[ids[0]])
    frames, spatial, temporal = images[ids[0]]
    assert [frames.percent, spatial.percent, temporal.percent] == [100, 50, 100]
    assert spatial.width == 2 * mistake_images.TILE_HEIGHT
    assert (
        temporal.height == frames.height == mistake_images.TILE_HEIGHT
    )  # two rows of half the size
    assert images[ids[1]][0].url != frames.url
    # Three things are missing: the weights, a checkpoint of this step, and a video.
    weights = str(tmp_path / "other.safetensors")
    assert len(mistake_images.mistake_strips(record, ids, backbone=weights)[ids[0]]) == 1
    results["step"] = 7
    mistake_images.mistake_strips(record, [*ids, "gone"])
    messages = [
        r"no attention maps: .*other.safetensors.*--backbone=FILE",
        r"no images of 1 of 3 mistakes: .* has no videos with these names.*--mode=eval",
        r"no attention maps: the checkpoint of step 7, which was evaluated, is gone",
    ]
    texts = missing_texts(record)
    assert len(texts) == 3
    assert all(re.search(*pair) for pair in zip(messages, texts, strict=True)), texts


# In a browser.


@pytest.fixture(scope="module")
def browser():
    """Return a running Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if program is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Return a function that opens a page: (path, width, scheme) -> tab.

    At the end it checks that no page had an error, a dialog or a request to another address.
    """
    contexts, wrong = [], []

    def open_page(path, width=1200, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("dialog", lambda dialog: wrong.append(dialog.message) or dialog.dismiss())
        uri = path.as_uri()
        tab.on("request", lambda r: None if r.url.startswith(("data:", uri)) else wrong.append(r))
        tab.goto(uri)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def test_errors_in_a_page_are_noticed(browser, tmp_path):
    """Check, as a twin of the fixture `visit`, that an error and a request can be noticed."""
    (tmp_path / "bad.html").write_text('<img src="other.png"><script>null.x</script>')
    tab, wrong, uri = browser.new_page(), [], (tmp_path / "bad.html").as_uri()
    tab.on("pageerror", lambda error: wrong.append("error"))
    tab.on("request", lambda r: r.url == uri or wrong.append("request"))
    tab.goto(uri)
    tab.close()
    assert set(wrong) == {"error", "request"}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return the pages of a hostile run, of a run with 400 classes, and of three runs."""
    folder = tmp_path_factory.mktemp("pages")
    many = [f"class of a rather long name number {i}" for i in range(400)]
    hostile = write_run(folder / "hostile", [HOSTILE, *NAMES[1:]])
    big = write_run(folder / "big", many, num_videos=8000, steps=10_000)
    others = [write_run(folder / f"run{seed}", seed=seed) for seed in range(3)]
    paths = {}
    for name, workdirs in {"hostile": [hostile], "big": [big], "several": others}.items():
        runs = run_reader.read_runs([str(workdir) for workdir in workdirs])
        predictions = runs[0].predictions
        rows = statistics.confident_mistakes(
            predictions.probabilities[:, 0], predictions.correct, 12
        )
        paths[name] = folder / f"{name}.html"
        paths[name].write_text(page.render_page(runs, rows if len(runs) == 1 else [], {}))
    return paths


@pytest.mark.parametrize("name", ["hostile", "big", "several"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_scrolls_sideways(name, width, pages, visit):
    tab = visit(pages[name], width)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    assert tab.locator("figure[data-chart] path.line").count() >= 3
    assert tab.title().startswith("Report on ")


def test_a_page_that_is_too_wide_is_noticed(pages, visit):
    """Check, as a twin of the test above, that the measured width can fail."""
    tab = visit(pages["several"], 360)
    tab.evaluate("document.body.append(document.createElement('hr'))")
    tab.evaluate("document.body.lastChild.style.width = '500px'")
    assert tab.evaluate("document.documentElement.scrollWidth") > 360


def test_hostile_names_are_shown_as_text(pages, visit):
    tab = visit(pages["hostile"])
    assert tab.get_by_text(HOSTILE, exact=True).count() >= 2
    assert tab.locator("img").count() == 0


def test_charts_are_read_by_pointer_and_keys(pages, visit):
    tab = visit(pages["several"])
    chart = tab.locator("figure[data-chart]").first
    chart.locator("svg").first.hover()
    assert re.match(r"step 7\d\d|step 800: run0 ", chart.locator("output").inner_text())
    chart.focus()
    tab.keyboard.press("End")
    tab.keyboard.press("ArrowLeft")
    assert chart.locator("output").inner_text().startswith("step 1,400: run0 ")
    tab.keyboard.press("Home")
    assert chart.locator("output").inner_text().startswith("step 100: run0 ")


def test_confusion_by_keys(pages, visit):
    tab = visit(pages["big"])
    cell = tab.locator("#cell")
    tab.locator("#order").select_option("data")
    tab.locator("#matrix").focus()
    tab.keyboard.press("ArrowRight")  # chooses the first cell
    assert "number 0” is recognized: " in cell.inner_text()
    before = tab.evaluate("document.getElementById('matrix').toDataURL()")
    for key in ("+", "+", "+", "ArrowRight"):
        tab.keyboard.press(key)
    assert "number 0” is taken for “class of a rather long name number 1”" in cell.inner_text()
    assert tab.evaluate("document.getElementById('matrix').toDataURL()") != before
    tab.locator("button.show").first.click()
    pair = tab.locator("button.show").first.get_attribute("data-label")
    assert f"number {pair}” is taken for" in cell.inner_text()


def test_everything_can_be_reached_by_keys(pages, visit):
    tab = visit(pages["hostile"])
    reached = set()
    for _ in range(200):
        tab.keyboard.press("Tab")
        where = "document.activeElement.id || document.activeElement.className || "
        reached.add(tab.evaluate(where + "document.activeElement.tagName"))
        if "BODY" in reached:
            break
    assert {"skip", "A", "chart", "scroll", "BUTTON", "order", "closer", "matrix"} <= reached
    tab.locator("#matrix").focus()
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_headings_sort(pages, visit):
    tab = visit(pages["hostile"])
    column = tab.locator("table.sortable td.bar")
    tab.get_by_role("button", name="accuracy").click()
    falling = [float(cell.get_attribute("data-value")) for cell in column.all()]
    assert falling == sorted(falling, reverse=True)
    tab.get_by_role("button", name="accuracy").click()
    rising = [float(cell.get_attribute("data-value")) for cell in column.all()]
    assert rising == falling[::-1] or rising == sorted(falling)
    assert tab.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"


def contrast(tab, front, behind):
    """Return WCAG's contrast ratio of two colors of the page, given by name."""
    luminances = []
    for name in (front, behind):
        value = tab.evaluate(
            f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()"
        )
        channels = [int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme, pages, visit):
    tab = visit(pages["hostile"], scheme=scheme)
    for behind in ("ground", "raised"):
        for front in ("text", "faint", "link", *(f"s{i}" for i in range(8))):
            assert contrast(tab, front, behind) >= 4.5, (front, behind)
    assert contrast(tab, "text", "warn") >= 4.5
    assert contrast(tab, "line", "ground") < 4.5  # twin: the ratio can be low
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]


def test_early_stopping_is_recognized_by_its_criterion(tmp_path):
    """Check a run whose mean class accuracy no longer rises, while its top-1 still does."""
    run = write_run(tmp_path / "run", steps=1500)
    config = json.loads((run / "config.json").read_text())
    config |= {"early_stopping_evaluations": 2, "num_train_steps": 2000}
    entries = [
        {"step": 500 * i, "split": "test", "top1": 0.5 + i / 10, "mean_class_accuracy": 0.5}
        for i in (1, 2, 3)
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
    for criterion, is_finished in (("mean_class_accuracy", True), ("top1", False)):
        config["eval"]["criterion"] = criterion
        (run / "config.json").write_text(json.dumps(config))
        (record,) = run_reader.read_runs([str(run)])
        missing = [item.what for item in record.missing]
        assert any("not finished" in what for what in missing) == (not is_finished)
