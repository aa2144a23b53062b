"""Checks README and docs: links, commands, error messages, file map and examples."""

import ast
import copy
import dataclasses
import importlib
import importlib.util
import itertools
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from setuptools.config.pyprojecttoml import read_configuration

import dualpath_jax.main
from dualpath_jax.__main__ import COMMANDS as SUBCOMMANDS
from dualpath_jax.analysis import efficiency
from dualpath_jax.commands import efficiency as efficiency_command
from dualpath_jax.config import loading, schema
from dualpath_jax.config.loading import load_config
from tests.helpers.documents import (
    PAGES,
    ROOT,
    find_anchors,
    find_commands,
    find_example,
    find_links,
    find_subcommands,
    find_table_messages,
)
from tests.helpers.video_files import write_video

EXTENDING = ROOT / "docs" / "extending.md"
COMMANDS = [(str(page.relative_to(ROOT)), c) for page in PAGES for c in find_commands(page)]
POD = {"POD_NAME": "pod", "POD_ZONE": "us-west4-a", "POD_ACCELERATOR": "v5litepod-16"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for file, anchor in find_links(page):
        target = page.parent / file if file else page
        assert target.exists(), f"{file} of {page}"
        assert not anchor or anchor in find_anchors(target), f"{file}#{anchor} of {page}"


def test_a_broken_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title, with marks\n\n[a](b.md#c) and ![d](e.png), [f](https://g.org)\n")
    assert find_links(page) == [("b.md", "c"), ("e.png", "")]
    assert find_anchors(page) == {"a-title-with-marks"}


def test_every_page_can_be_reached():
    reached, todo = set(), [PAGES[0]]
    while todo:
        page = todo.pop()
        if page not in reached:
            reached.add(page)
            files = [(page.parent / file).resolve() for file, _ in find_links(page) if file]
            todo += [file for file in files if file.suffix == ".md"]
    assert set(PAGES) <= reached


def test_an_installation_has_every_package():
    """Check that setuptools finds each folder with an __init__.py, and the config files."""
    settings = read_configuration(ROOT / "pyproject.toml", expand=True)["tool"]["setuptools"]
    folders = [path.parent for path in (ROOT / "dualpath_jax").rglob("__init__.py")]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert len(names) > 10
    assert set(settings["packages"]) == names | {"dualpath_jax.configs"}
    assert settings["package-dir"]["dualpath_jax.configs"] == "configs"


def test_the_file_map_has_every_folder():
    """Check that each package of README's table of folders exists, and that none is missing."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (`[\w/]+/`(?:, `[\w/]+/`)*) \|", text, flags=re.M)
    named = [name for row in rows for name in re.findall(r"`([\w/]+/)`", row)]
    assert all((ROOT / name).is_dir() for name in named), named
    folders = [path.parent for path in (ROOT / "dualpath_jax").rglob("__init__.py")]
    assert {f"{folder.relative_to(ROOT)}/" for folder in folders} <= set(named)
    assert len(rows) <= 15


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 2000


def test_figures_of_the_readme_are_those_of_their_pages():
    """Compare the demo's score, the only measured figure of README that another page has."""
    score = re.search(r"^test  top-1 (0\.\d+) ", (ROOT / "README.md").read_text(), flags=re.M)[1]
    row = r"^\| `--config=configs/demo\.py` \| (0\.\d+) \|$"
    measured = re.search(row, (ROOT / "docs" / "demo.md").read_text(), flags=re.M)[1]
    assert f"{float(score) + 1e-9:.3f}" == measured  # 0.9875 is printed as 0.988


def test_the_page_of_parameters_has_what_its_command_prints():
    text = (ROOT / "docs" / "parameters.md").read_text()
    rows = re.findall(r"^\| `([\w:]+)` \| .*$", text, flags=re.M)
    assert rows == list(efficiency.PAPER_ROWS)
    for name in ("ssv2_vitb:without_sa", "hmdb51_vitb_linear"):
        table = efficiency_command.format_markdown([efficiency_command.build_row(name)])
        assert set(table.splitlines()) <= set(text.splitlines())


def find_missing_paths(page):
    """Return the paths of files that a page names and that do not exist; NAME is a placeholder."""
    folders = r"(?:dualpath_jax|scripts|tests|configs|docs)"
    paths = re.findall(rf"(?<![\w/.])({folders}/[\w./]+\.(?:py|sh|md))", page.read_text())
    return [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    assert find_missing_paths(page) == []


def test_a_missing_file_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("`dualpath_jax/train.py`, `dualpath_jax/data/nothing.py`, `configs/{a,b}.py`\n")
    assert find_missing_paths(page) == ["dualpath_jax/data/nothing.py"]


def find_promises(text):
    """Return (promise, tests) of each row of the table of promises."""
    rows = re.findall(r"^\| (.+?) \| .+ \| (`tests/\S+`) \|$", text, flags=re.M)
    return [(promise, re.findall(r"`([^`]+)`", tests)) for promise, tests in rows]


def find_untested_promises(text):
    """Return the promises of a page without a test, and the tests that do not exist."""
    table = text.split("| what happens |", 1)[1].split("\n\n", 1)[0]
    promises = find_promises(table)
    untested = table.count("\n|") - 1 - len(promises)  # without the line below the heading
    return untested, find_missing_tests(table)


def test_each_promise_about_interruptions_names_a_test():
    text = (ROOT / "docs" / "interruptions.md").read_text()
    assert len(find_promises(text)) > 25
    assert find_untested_promises(text) == (0, [])
    known = "tests/training/test_resume.py::test_stop_request"
    renamed = text.replace(f"`{known}`", f"`{known}ed`")
    assert find_untested_promises(renamed) == (0, [f"{known}ed"])
    without = re.sub(r" \| `[^|]+` \|$", " | |", text, count=1, flags=re.M)
    assert find_untested_promises(without) == (1, [])


def find_missing_tests(text):
    """Return the tests that a text promises by tests/FILE.py::NAME and that do not exist."""
    named = dict.fromkeys(re.findall(r"(tests/[\w/]+\.py)::(\w+)", text))
    return [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).exists() or f"\ndef {name}(" not in (ROOT / file).read_text()
    ]


@pytest.mark.parametrize("name", ["untrusted_files.md", "interruptions.md"])
def test_promised_tests_exist(name):
    """Check the tables promise | test; every promise of the page on untrusted files has a test."""
    text = (ROOT / "docs" / name).read_text()
    assert find_missing_tests(text) == []
    _, separator, rows = text.partition("| promise | test |\n|---|---|\n")
    for row in itertools.takewhile(lambda line: line.startswith("|"), rows.splitlines()):
        assert "::" in row.split("|")[2], row
    assert separator or name != "untrusted_files.md"


def test_a_missing_test_is_found():
    text = "tests/test_docs.py::test_links, tests/test_docs.py::test_x, tests/no.py::y\n"
    assert find_missing_tests(text) == ["tests/test_docs.py::test_x", "tests/no.py::y"]


def test_subcommands_are_known():
    """Check each `dualpath NAME` of the pages; README's table has all of them."""
    named = {page: find_subcommands(page) for page in PAGES}
    assert set().union(*named.values()) <= SUBCOMMANDS.keys()
    assert named[PAGES[0]] == SUBCOMMANDS.keys()


def script(name):
    """Return the module of a script."""
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location(pathlib.Path(name).stem, ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_main(arguments):
    """Parse the flags of dualpath_jax.main, including those of the configuration."""
    if arguments == ["--help_config"]:
        return
    arguments = [
        f"--config={loading.find_config_file(argument.removeprefix('--config='))}"
        if argument.startswith("--config=")
        else argument
        for argument in arguments
    ]
    values, argv = flags.FlagValues(), ["main", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    for flag in flags.FLAGS.flags_by_module_dict()[dualpath_jax.main.__name__]:
        if flag.name != "config":
            flags.DEFINE_flag(copy.deepcopy(flag), values)
    rest = values(argv)
    assert rest == ["main"], f"not a flag: {rest[1:]}"
    if values["config"].present or "--mode=eval" not in arguments:  # it takes that of the run
        assert values["config"].value.seed is not None  # reads the file


def parse_absl(name, arguments):
    """Parse the flags of a script that uses absl, in a process of its own.

    The script and dualpath_jax.main have flags of the same name.
    """
    code = (
        f"import {name} as m, sys; from absl import flags; assert len(flags.FLAGS(sys.argv)) == 1"
    )
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True, cwd=ROOT / "scripts", env=os.environ, timeout=100)


def parse_pip(arguments):
    """Check the files and extras that a `pip install` command names."""
    assert arguments[0] == "install"
    files = [after for word, after in itertools.pairwise(arguments) if word == "-r"]
    assert all((ROOT / file).exists() for file in files), files
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for word in arguments:
        if named := re.fullmatch(r"\.\[(.*)\]", word):
            assert set(named[1].split(",")) <= extras.keys(), word


def parse_subcommand(name, arguments):
    """Parse `dualpath NAME ARGUMENTS`."""
    module, added, _ = SUBCOMMANDS[name]
    if module == dualpath_jax.main.__name__:
        if name == "eval":  # the folder of a run needs no flag
            arguments = [f"--workdir={a}" if not a.startswith("-") else a for a in arguments]
        return parse_main([*added, *arguments])
    return importlib.import_module(module).parser().parse_args(arguments)


def parse_command(command):
    """Raise an error if a command is wrong; run only dry runs."""
    words = shlex.split(command, comments=True)
    if words[0] == "bash":
        words = words[1:]
    if words[0] == "scripts/rerun.sh":
        return parse_command(shlex.join(words[1:]))
    if words[0] == "scripts/tpu_pod.sh":
        words.insert(2, "--dry_run")
        return subprocess.run(
            ["bash", *words], check=True, cwd=ROOT, env=os.environ | POD, capture_output=True
        )
    if words[0] == "pip":
        return parse_pip(words[1:])
    if words[0] == "dualpath":
        return parse_subcommand(words[1], words[2:])
    assert words[0] == "python", f"unknown program {words[0]}"
    if words[1:3] == ["-m", "pytest"]:
        tests = [word for word in words[3:] if word.startswith("tests")]
        assert all((ROOT / test).exists() for test in tests), tests
        return None
    if words[1:3] == ["-m", "dualpath_jax.main"]:
        return parse_main(words[3:])
    if words[1] == "-m" and words[2].startswith("tests."):
        return importlib.import_module(words[2]).parser().parse_args(words[3:])
    if words[1:3] == ["-m", "pdoc"]:
        return [importlib.import_module(word) for word in words[4:]]
    if words[1:3] == ["-m", "dualpath_jax.config.schema"]:  # takes no arguments
        assert words[3:] == []
        return None
    if words[1] == "scripts/compile_tpu.py":
        return parse_absl("compile_tpu", words[2:])
    module, arguments = script(words[1]), [word for word in words[2:] if word != "..."]
    # A script of a subcommand has the function only where its main is defined.
    if parse_with_overrides := module.main.__globals__.get("parse_with_overrides"):
        options, overrides = parse_with_overrides(module.parser(), arguments)
        names = options.config if isinstance(options.config, list) else [options.config]
        return [load_config(name, overrides) for name in names if name]
    return module.parser().parse_args(arguments)


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=lambda value: value[:90])
def test_commands_parse(page, command):
    parse_command(command)


def test_there_are_commands():
    names = {page for page, _ in COMMANDS}
    assert {"README.md", "docs/data/hmdb51.md", "docs/tpu_pod.md", "docs/benchmarks.md"} <= names
    assert len(COMMANDS) > 50


@pytest.mark.parametrize(
    "command",
    [
        "python -m dualpath_jax.main --config=configs/demo.py --config.seeed=1",
        "python -m dualpath_jax.main --config=configs/nothing.py",
        "python -m dualpath_jax.main --config=configs/demo.py --mode=test",
        "python -m dualpath_jax.main --config=configs/demo.py runs/demo",
        "python scripts/prepare_dataset.py --dataset=k401 --videos=V --out=O",
        "python scripts/nothing.py",
        "python -m pytest tests/test_nothing.py",
        "pip install -r requirements-nothing.txt",
        "pip install '.[nothing]'",
        "dualpath demos",
        "dualpath check --config=nothing",
        "dualpath train --config=demo --config.seeed=1",
        "dualpath report --workdir=runs/demo --output=report.html",
        "scripts/tpu_pod.sh creat --spot",
        "scripts/rerun.sh python -m dualpath_jax.main --confg=configs/demo.py",
    ],
)
def test_wrong_commands_do_not_parse(command):
    with pytest.raises((Exception, SystemExit)):
        parse_command(command)


def constants():
    """Return the constant texts of the package; the parts of an f-string are joined by NUL."""
    found = []
    for path in (ROOT / "dualpath_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(p.value for p in node.values if isinstance(p, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return [" ".join(text.split()) for text in found]


def unknown_parts(messages, texts):
    parts = {part for parts in messages.values() for part in parts}
    return {part for part in parts if not any(part in text for text in texts)}


def test_the_program_can_say_every_message_of_troubleshooting():
    messages, texts = find_table_messages(ROOT / "docs" / "troubleshooting.md"), constants()
    assert len(messages) > 40
    assert unknown_parts(messages, texts) == set()
    assert unknown_parts({"x": ["config.data.dir is not sett"]}, texts)


@pytest.fixture
def tables(monkeypatch):
    """Restore the tables that the examples add to."""
    from dualpath_jax.data.datasets import registry as dataset_registry
    from dualpath_jax.models import param_tree
    from dualpath_jax.models import registry as method_registry
    from dualpath_jax.models.backbones import registry as backbone_registry
    from dualpath_jax.weights import layouts

    dicts = (
        *(dataset_registry.DATASETS, method_registry.METHODS, layouts.LAYOUTS),
        *(backbone_registry.FAMILIES, backbone_registry.MODELS),
    )
    before = [(table, dict(table)) for table in dicts]
    monkeypatch.setattr(schema, "_ADDED_CHOICES", {})
    monkeypatch.setattr(param_tree, "DECAY_RULES", param_tree.DECAY_RULES.copy())
    yield
    for table, content in before:
        table.clear()
        table.update(content)


def run_example(name, parts):
    """Run an example of docs/extending.md, of so many parts; return the names that it defines."""
    found, names = find_example(EXTENDING, name), {"__name__": "example"}
    assert len(found) == parts
    for part in found:
        exec(compile(part, f"{EXTENDING.name}, {name}", "exec", dont_inherit=True), names)
    return names


@pytest.mark.usefixtures("tables")
def test_extending_a_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    for number in range(12):
        split = "validation" if number > 7 else "train"
        write_video(tmp_path / "videos" / f"{number}.mp4", 20)
        lines.append(f"{split} {number}.mp4 {['three balls', 'four clubs'][number % 2]}\n")
    (tmp_path / "juggling.txt").write_text("".join(lines))
    names = run_example("data set", parts=2)
    assert names["index"].class_names == ["four clubs", "three balls"]
    assert {split: len(v) for split, v in names["index"].splits.items()} == {
        "train": 8,
        "validation": 4,
    }
    assert names["batch"]["spatial"].shape == (4, 2, 224, 224, 3)
    assert names["batch"]["temporal"].shape == (4, 1, 448, 448, 3)
    assert names["batch"]["label"].max() == 1
    (tmp_path / "juggling.txt").write_text("train a.mp4 four clubs\ntraining b.mp4 four clubs\n")
    with pytest.raises(ValueError, match=r"'training b.mp4 four clubs' is not `<train\|valid"):
        names["registry"].list_videos("juggling", "videos", "juggling.txt")


@pytest.mark.slow
@pytest.mark.usefixtures("tables")
def test_extending_a_method():
    import jax
    import jax.numpy as jnp

    from dualpath_jax.models.abstract import abstract_inputs

    names = run_example("method", parts=2)
    flatten, registry = names["param_tree"].flatten, names["registry"]
    before, after = flatten(names["trainable"]), flatten(names["after"].trainable)
    assert set(after) == {
        *("adapters/lora_a", "adapters/lora_b", "head/output/kernel", "head/output/bias")
    }
    assert before["adapters/lora_a"].shape == (3, 48, 4)  # [L, D, rank]
    # As long as B is zero, the gradient of A is zero, and only weight decay moves A.
    assert all((jax.device_get(before[n]) != jax.device_get(after[n])).any() for n in after)
    assert all(path.startswith("backbone/") for path in flatten(names["frozen"]))
    assert float(names["metrics"]["loss"]) > 0
    decays = flatten(names["param_tree"].decay_mask(names["params"]))
    assert decays["adapters/lora_a"]
    assert not decays["head/output/bias"]
    with pytest.raises(ValueError, match="no rule of method 'low_rank_input' matches parameter"):
        registry.is_trainable_fn("low_rank_input")("gate/kernel")

    # The hook has the effect of the weights (I + A B) W of queries, keys and values.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf) + 0.0, names["params"])
    low_rank = params["adapters"]
    low_rank["lora_b"] = 0.1 * jax.random.normal(jax.random.key(1), low_rank["lora_b"].shape)
    clip = jax.random.normal(jax.random.key(2), abstract_inputs(names["config"])[0].shape)
    run = jax.jit(names["model"].apply)
    changed = run({"params": params}, clip)
    qkv = params["backbone"]["blocks"]["attention"]["qkv"]
    qkv["kernel"] += low_rank["lora_a"] @ low_rank["lora_b"] @ qkv["kernel"]
    low_rank["lora_b"] *= 0
    merged = run({"params": params}, clip)
    assert float(abs(changed - merged).max()) < 1e-5
    unchanged = run({"params": names["params"]}, clip)
    assert float(abs(changed - unchanged).max()) > 1e-3


@pytest.mark.usefixtures("tables")
def test_a_config_file_can_import_a_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_method.py").write_text(find_example(EXTENDING, "method")[0])
    (tmp_path / "mine.py").write_text(
        "import my_method\nfrom dualpath_jax.config import schema\n\n\n"
        "def get_config():\n"
        "    config = schema.get_config()\n"
        "    config.model.method = 'low_rank_input'\n"
        "    return config\n"
    )
    config = loading.load_config("mine.py", ["--config.seed=1"])
    schema.check_values(config)
    assert (config.model.method, config.seed) == ("low_rank_input", 1)


def make_mixer_checkpoint(width, patch, tokens, token_mlp, channel_mlp, depth):
    """Return random weights by timm's names of an MLP-Mixer, in PyTorch's order of axes."""
    shapes = {"stem.proj": (width, 3, patch, patch), "norm": (width,), "head": (7, width)}
    for block in (f"blocks.{i}" for i in range(depth)):
        shapes |= {f"{block}.norm1": (width,), f"{block}.norm2": (width,)}
        for mlp, outer, inner in (
            ("mlp_tokens", tokens, token_mlp),
            ("mlp_channels", width, channel_mlp),
        ):
            shapes |= {f"{block}.{mlp}.fc1": (inner, outer), f"{block}.{mlp}.fc2": (outer, inner)}
    rng = np.random.default_rng(0)
    arrays = {}
    for name, shape in shapes.items():
        arrays[f"{name}.weight"] = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.2, shape)
        arrays[f"{name}.bias"] = rng.normal(0.0, 0.2, shape[:1])
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def mixer_features(arrays, images, patch, depth):
    """Compute the features [M, D] of images [M, H, W, 3] from timm's names, in float64."""
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}

    def linear(name, x):
        kernel = arrays[f"{name}.weight"]
        return x @ kernel.reshape(len(kernel), -1).T + arrays[f"{name}.bias"]

    def norm(name, x):
        centered = x - x.mean(axis=-1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(axis=-1, keepdims=True) + 1e-6)
        return scaled * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]

    def mlp(name, x):
        y = linear(f"{name}.fc1", x)
        erf = np.vectorize(math.erf)
        return linear(f"{name}.fc2", y * (1 + erf(y / math.sqrt(2))) / 2)

    side = images.shape[1] // patch
    patches = images.reshape(len(images), side, patch, side, patch, 3)
    patches = patches.transpose(0, 1, 3, 5, 2, 4).reshape(len(images), side**2, -1)
    h = linear("stem.proj", patches)
    for block in (f"blocks.{i}" for i in range(depth)):
        x = norm(f"{block}.norm1", h).swapaxes(1, 2)
        h = h + mlp(f"{block}.mlp_tokens", x).swapaxes(1, 2)
        h = h + mlp(f"{block}.mlp_channels", norm(f"{block}.norm2", h))
    return norm("norm", h).mean(axis=1)


@pytest.mark.slow
@pytest.mark.usefixtures("tables")
def test_extending_a_backbone(tmp_path, monkeypatch):
    import jax
    import safetensors.numpy

    from dualpath_jax.models import registry as method_registry
    from dualpath_jax.models.abstract import abstract_model

    monkeypatch.chdir(tmp_path)
    arrays = make_mixer_checkpoint(48, 8, 16, 24, 96, depth=2)
    safetensors.numpy.save_file(arrays, "mixer.safetensors")
    names = run_example("backbone", parts=3)
    assert names["info"].name == "Mixer-tiny"
    assert names["logits"].shape == (1, 5)
    flatten = names["param_tree"].flatten
    trained = {n.split("/")[0] for n, trains in flatten(names["model"].mask).items() if trains}
    assert trained == {"spatial", "temporal", "classifier"}

    # Its features are those of an independent program on the source's weights.
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    backbone = names["registry"].build_backbone(names["shape"])
    _, features = jax.jit(backbone.apply)({"params": names["weights"]}, images)
    expected = mixer_features(arrays, images, patch=8, depth=2)
    assert np.std(expected) > 0.1
    assert np.abs(features - expected).max() < 1e-4

    # Methods that need no class token work with it; the others are refused.
    config = names["config"]
    for method in ("linear", "full", "adaptformer", "protuning", "st_adapter", "videoprompt"):
        config.model.method = method
        abstract_model(config, 5, names["shape"])
    config.model.method = "vpt"
    with pytest.raises(ValueError, match="backbone 'Mixer-tiny', which lacks global attention"):
        method_registry.build_model(config, names["shape"], 5)
    larger = dataclasses.replace(names["shape"], image_size=64)
    with pytest.raises(
        ValueError, match=r"'image_size': 32.* asks for Mixer-tiny .*'image_size': 64"
    ):
        names["convert"].load_backbone("mixer_tiny.safetensors", larger)
