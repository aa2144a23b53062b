"""Builds runs from a converted backbone."""

import pytest

from dualpath_jax.data.video_dataset import VideoDataset
from dualpath_jax.models import abstract, param_tree
from dualpath_jax.models import registry as method_registry
from dualpath_jax.training.experiment import build_experiment

TRAINED = sorted(set(method_registry.METHODS) - {"probe"})  # probes are trained on kept features


@pytest.mark.parametrize("method", TRAINED)
def test_parameters_of_a_run_are_those_of_its_model(config, tmp_path, method):
    """Check that parts of the backbone's file that a method leaves out are not in its run."""
    config.model.method = method
    config.data.num_spatial_frames = 2
    config.model.evl.num_blocks, config.model.zeroi2v.offsets = 2, (-1,)
    dataset = VideoDataset(config.data.dir, "train")
    experiment, state = build_experiment(config, str(tmp_path), dataset)
    held = param_tree.flatten(param_tree.merge(state.trainable, experiment.frozen))
    model = abstract.abstract_model(config, len(dataset.class_names))
    assert list(held) == list(param_tree.flatten(model.params))
    assert experiment.total_params == param_tree.count_params(model.params)


def test_select():
    weights = {"a": {"b": 1, "c": 2}, "d": 3}
    assert param_tree.select(weights, {"a": {"c": 0}}) == {"a": {"c": 2}}
    assert param_tree.select(weights, weights) == weights
    with pytest.raises(KeyError, match="e"):
        param_tree.select(weights, {"e": 0})
