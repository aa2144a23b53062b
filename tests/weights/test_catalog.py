"""Tests the table of known weights that `dualpath convert --list` prints."""

import re

import pytest

from dualpath_jax.commands import convert
from dualpath_jax.models.backbones import registry
from dualpath_jax.weights import catalog


def test_every_named_backbone_has_a_source():
    """Check names and forms; test_families.py and test_backbones.py check the sizes."""
    assert list(catalog.PARAMETERS) == list(registry.MODELS)
    sources = list(catalog.list_sources())
    assert {name for name, _, _ in sources} == set(registry.MODELS)
    repositories = [repository for _, repository, _ in sources]
    assert len(set(repositories)) == len(repositories)
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", repository) for repository in repositories)


def test_list_is_printed(capsys):
    """Check that --list needs no other option, and that without it they are needed."""
    with pytest.raises(SystemExit) as exit_info:
        convert.parser().parse_args(["--list"])
    assert exit_info.value.code == 0
    row = r"DINOv2-S/14 +22,056,192 +88  hf:facebook/dinov2-small +Apache-2\.0"
    assert re.search(row, capsys.readouterr().out)
    with pytest.raises(SystemExit) as exit_info:
        convert.parser().parse_args([])
    assert exit_info.value.code == 2
    assert "list" not in convert.parser().parse_args(["--checkpoint=a", "--out=b"])
