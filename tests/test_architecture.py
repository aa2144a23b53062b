"""Checks the order of the package's folders and which libraries each may reach.

Everything is read from the source, over transitive imports; nothing is executed.
"""

import pytest

from tests import code_statistics
from tests.helpers.imports import PACKAGE, import_graph, private_imports, reachable

# A module may import from its own row and from the rows below it.
FLOORS = (
    ("__main__",),
    ("main", "commands"),
    ("launch",),
    ("check_config", "cli", "report"),
    ("train", "inference", "probing"),
    ("evaluate",),
    ("training", "demo"),
    ("weights", "analysis"),
    ("models",),
    ("data",),
    ("runtime", "config"),
    ("version",),
)
HEIGHT = {name: -row for row, names in enumerate(FLOORS) for name in names}


def part_of(module):
    """Return the folder or top-level module that a module of the package belongs to."""
    return module.split(".")[1] if "." in module else ""


def upward_imports(graph):
    """Return the imports from a lower row of `FLOORS` to a higher one."""
    found = []
    for module, imported in graph.items():
        if module == PACKAGE:  # loads lazily
            continue
        for other in imported:
            own = other.startswith(f"{PACKAGE}.")
            if own and HEIGHT[part_of(other)] > HEIGHT[part_of(module)]:
                found.append(f"{module} -> {other}")
    return found


def importers(graph, library):
    """Return the modules that import a library directly."""
    return sorted(
        m for m, imported in graph.items() if library in {i.split(".")[0] for i in imported}
    )


def reaching(graph, folder, library):
    """Return the modules of a folder that reach a library over any chain of imports."""
    found = []
    for module in graph:
        if part_of(module) == folder:
            libraries = {name.split(".")[0] for name in reachable(module, graph)}
            if library in libraries:
                found.append(module)
    return found


@pytest.fixture(scope="module")
def graph():
    """Return the imports of the package as it is."""
    return import_graph()


def test_every_part_has_a_place(graph):
    parts = {part_of(module) for module in graph} - {""}
    assert parts <= HEIGHT.keys(), parts - HEIGHT.keys()


def test_imports_go_down(graph):
    assert upward_imports(graph) == []
    assert upward_imports(graph | {f"{PACKAGE}.data.new": {f"{PACKAGE}.models.registry"}})


def test_data_never_reaches_flax(graph):
    assert reaching(graph, "data", "flax") == []
    changed = graph | {f"{PACKAGE}.data.new": {f"{PACKAGE}.models.preprocess", "flax.linen"}}
    assert reaching(changed, "data", "flax") == [f"{PACKAGE}.data.new"]


def test_models_reach_tensorflow_by_no_way(graph):
    assert reaching(graph, "models", "tensorflow") == []
    changed = graph | {f"{PACKAGE}.models.new": {f"{PACKAGE}.data.pipeline"}}
    assert reaching(changed, "models", "tensorflow") == [f"{PACKAGE}.models.new"]


def test_one_module_imports_orbax_and_none_torch(graph):
    assert importers(graph, "orbax") == [f"{PACKAGE}.training.checkpoint"]
    assert importers(graph, "torch") == []


def test_no_private_module_of_a_library(graph):
    assert private_imports(graph) == []
    changed = graph | {f"{PACKAGE}.training.new": {"orbax.checkpoint._src.futures"}}
    assert len(private_imports(changed)) == 1


def test_statistics():
    """Hold the package to the limits that tests/code_statistics.py prints."""
    found = code_statistics.measure()
    assert found["modules next to the folders"] <= 10
    assert found["functions over 60 lines"] == []
    assert found["function docstrings that begin with a verb"] >= 0.8
    good = ("Return the frames.", "Decodes a video.", "Render it.")
    assert all(map(code_statistics.begins_with_verb, good))
    bad = (
        "Of the frames.",
        "`x`, named.",
        "Whether it trains.",
        "Videos by id.",
        "Selection of it",
    )
    assert not any(map(code_statistics.begins_with_verb, bad))
