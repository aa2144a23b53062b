"""Checks the settings that `dualpath finetune` chooses."""

import pytest

from dualpath_jax.config import small_sets
from dualpath_jax.config.schema import check_values, choices
from dualpath_jax.config.unread_keys import RecordedReads, describe_unread_model_keys
from dualpath_jax.models.backbones import swin, vit
from dualpath_jax.training.experiment import build_abstract
from tests.helpers.documents import ROOT

DEMO = vit.ViTConfig("custom", 64, 8, 96, 4, 2, 384, 64)


def test_the_page_has_the_tables():
    page = (ROOT / "docs" / "finetuning.md").read_text()
    for table in small_sets.markdown_tables().split("\n\n"):
        assert table.strip() in page


def test_the_method_is_that_of_the_comparison():
    """Check that all rows have one method, and that it has learning rates of its own."""
    [method] = {row.method for row in small_sets.SIZES}
    assert method in small_sets.METHODS
    assert set(small_sets.METHODS) <= set(choices("model.method"))
    assert f"`{method}`" in (ROOT / "docs" / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("clips", "batch_size", "epochs"),
    [(1, 8, 120), (100, 8, 120), (101, 16, 70), (1_000, 16, 40), (1_001, 32, 16), (10**6, 64, 10)],
)
def test_rows(clips, batch_size, epochs):
    config = small_sets.make_config(clips, vit.MODELS["ViT-B/16"])
    assert (config.data.batch_size, config.num_epochs) == (batch_size, epochs)
    assert config.optimizer.warmup_epochs == pytest.approx(0.1 * epochs)
    assert config.eval.checkpoint == "best"
    assert config.early_stopping_evaluations == 12
    check_values(config)


def test_backbones_and_methods():
    base = vit.MODELS["ViT-B/16"]
    config = small_sets.make_config(180, base, "st_adapter")
    assert (config.num_epochs, config.optimizer.learning_rate) == (140, 5e-4)
    assert (config.model.st_adapter.width, config.data.num_frames) == (384, 8)
    config = small_sets.make_config(180, DEMO, "st_adapter")
    assert (config.model.st_adapter.width, config.optimizer.learning_rate) == (48, 1e-2)
    config = small_sets.make_config(180, DEMO)
    assert (config.model.method, config.num_epochs) == ("dualpath", 70)
    assert (config.data.frameset_input, config.data.num_frames) == ("motion", 16)
    assert config.optimizer.learning_rate == 1e-3
    config = small_sets.make_config(180, DEMO, "evl")
    assert config.optimizer.learning_rate == 3e-3
    config = small_sets.make_config(180, swin.MODELS["Swin-B"], "st_adapter")
    assert config.model.st_adapter.width == 384  # its own default


@pytest.mark.parametrize("method", ["st_adapter", "dualpath", "linear"])
def test_no_setting_is_without_effect(method):
    config = small_sets.make_config(180, DEMO, method)
    config.data.image_size = DEMO.image_size
    log = RecordedReads(config)
    assert build_abstract(log, 5, 10.0, DEMO).state.trainable
    assert describe_unread_model_keys(config, log.seen) == ""
    config.model.evl.num_blocks = 2  # twin
    assert "model.evl.num_blocks=2" in describe_unread_model_keys(config, log.seen)
