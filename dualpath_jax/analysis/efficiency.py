"""Counts parameters and multiply-accumulates of a configuration; lists the paper's numbers.

A multiply-accumulate (MAC) is counted for each product inside a matrix product or a convolution,
including the embedding, adapters and classifier. Norms, activations, softmax and other elementwise
operations are not counted. The paper's "GFLOPs" are listed as printed: the paper does not state its
convention, and its numbers do not follow from its architecture (PAPER.md).
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from dualpath_jax.config.schema import check_values
from dualpath_jax.data.datasets import registry as dataset_registry
from dualpath_jax.models import param_tree
from dualpath_jax.models.abstract import AbstractModel, abstract_inputs, abstract_model
from dualpath_jax.weights.backbone_keys import fill_backbone_keys


def count_macs(function: Callable, *args: Any) -> int:
    """Count the multiply-accumulates of the matrix products and convolutions in `function`.

    A loop's body is counted as often as it runs. XLA's own cost analysis counts it only once.

    Args:
      function: function that JAX can trace.
      *args: its arguments, arrays or their `jax.ShapeDtypeStruct`.
    """
    return _count_jaxpr_macs(jax.make_jaxpr(function)(*args).jaxpr)


def _count_jaxpr_macs(jaxpr: core.Jaxpr) -> int:
    """Count the multiply-accumulates of a jaxpr, including the jaxprs inside it."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contract)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += equation.outvars[0].aval.size * kernel.size // features
        else:
            times = params["length"] if name == "scan" else 1
            total += times * sum(_count_jaxpr_macs(inner) for inner in _find_inner_jaxprs(params))
    return total


def _find_inner_jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """Return the jaxprs among an equation's parameters: bodies of loops, called functions."""
    values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
    values = [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values]
    return [value for value in values if isinstance(value, core.Jaxpr)]


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Holds the counts of one configuration.

    Attributes:
      total_params: number of parameters, including the backbone's unused ones.
      trainable_params: number of parameters that are trained.
      plain_gmacs_per_view: 10^9 multiply-accumulates of a forward pass of one view, if every token
        of every block is computed.
      gmacs_per_view: 10^9 multiply-accumulates that are executed for one view: without those that
        `model.cls_token_only` saves.
      plain_gmacs_per_video: `plain_gmacs_per_view` times the number of test views.
      gmacs_per_video: `gmacs_per_view` times the number of test views.
      views: "frames x clips x crops" of a test video, for example "16x1x3".
    """

    total_params: int
    trainable_params: int
    plain_gmacs_per_view: float
    gmacs_per_view: float
    plain_gmacs_per_video: float
    gmacs_per_video: float
    views: str


def _build_forward_fn(model: AbstractModel) -> Callable:
    """Return the function (params, *inputs) -> logits of a model."""
    return lambda params, *inputs: model.module.apply({"params": params}, *inputs)


def count_forward_macs(config: Any, num_classes: int) -> tuple[int, AbstractModel]:
    """Count the multiply-accumulates of a forward pass of one view; return them and the model.

    On a GPU, attention in half precision is a cuDNN call (`attention.can_use_flash_attention`),
    whose products cannot be counted; therefore the model is one in float32.
    """
    config = copy.deepcopy(config)
    config.model.dtype = "float32"
    model = abstract_model(config, num_classes)
    return count_macs(_build_forward_fn(model), model.params, *abstract_inputs(config)), model


def measure_efficiency(config: Any) -> Efficiency:
    """Count parameters and multiply-accumulates of a configuration.

    The model is only traced: neither weights nor data are needed. If `backbone.name` is None, it is
    read from the header of the backbone's file, if that exists. If the number of classes of
    `data.source` is not known, a placeholder is used.

    Raises:
      ValueError: a value of the configuration is invalid.
    """
    num_classes = dataset_registry.NUM_CLASSES.get(
        config.data.source, dataset_registry.PLACEHOLDER_NUM_CLASSES
    )
    check_values(config)
    config, macs = copy.deepcopy(config), []
    fill_backbone_keys(config)
    for cls_token_only in (False, True):
        config.model.cls_token_only = cls_token_only
        count, model = count_forward_macs(config, num_classes)
        macs.append(count)
    views = config.eval.temporal_views * config.eval.spatial_crops
    trainable, _ = param_tree.split(model.params, model.mask)
    return Efficiency(
        total_params=param_tree.count_params(model.params),
        trainable_params=param_tree.count_params(trainable),
        plain_gmacs_per_view=macs[0] / 1e9,
        gmacs_per_view=macs[1] / 1e9,
        plain_gmacs_per_video=views * macs[0] / 1e9,
        gmacs_per_video=views * macs[1] / 1e9,
        views=f"{config.data.num_frames}x{config.eval.temporal_views}x{config.eval.spatial_crops}",
    )


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """Holds a row of the paper's tables (1-5, A2), as printed; None where nothing is printed.

    Attributes:
      data: data set.
      label: method, backbone and setting.
      total_params: number of parameters, in millions.
      trainable_params: number of trained parameters, in millions.
      gflops: GFLOPs per video.
      top1: top-1 accuracy in percent.
    """

    data: str
    label: str
    total_params: float | None
    trainable_params: float | None
    gflops: float | None
    top1: float | None


_K400, _SSV2, _HMDB51 = "K400", "SSv2", "HMDB51"

# The keys are config files with their arguments, as in `--config=configs/<name>.py:<argument>`.
PAPER_ROWS = {
    "k400_vitb": PaperRow(_K400, "DualPath B/16", 96, 10, 710, 85.4),
    "k400_vitl": PaperRow(_K400, "DualPath L/14", 330, 27, 1868, 87.7),
    "k400_vitl_evl": PaperRow(_K400, "EVL L/14", 368, 59, 8088, 87.3),
    "k400_vitb_st_adapter": PaperRow(_K400, "ST-Adapter B/16", 93, 7, 1821, 82.7),
    "k400_vitb_zeroi2v": PaperRow(_K400, "ZeroI2V B/16", None, None, None, None),
    "ssv2_vitb": PaperRow(_SSV2, "DualPath B/16, T = 16", 99, 13, 642, 69.6),
    "ssv2_vitb:32": PaperRow(_SSV2, "DualPath B/16, T = 32", 99, 13, 716, 70.3),
    "ssv2_vitb:48": PaperRow(_SSV2, "DualPath B/16, T = 48", 99, 13, 791, 71.2),
    "ssv2_vitl": PaperRow(_SSV2, "DualPath L/14, T = 16", 336, 33, 1713, 70.2),
    "ssv2_vitl:32": PaperRow(_SSV2, "DualPath L/14, T = 32", 336, 33, 1932, 71.4),
    "ssv2_vitl:48": PaperRow(_SSV2, "DualPath L/14, T = 48", 336, 33, 2151, 72.2),
    "ssv2_vitb_in21k": PaperRow(_SSV2, "DualPath B/16 IN-21K", 99, 13, 642, 64.7),
    "ssv2_swinb": PaperRow(_SSV2, "DualPath Swin-B", 97, 11, 287, 67.8),
    "ssv2_vitb_full": PaperRow(_SSV2, "Full-tuning B/16", 86, 86, 419, 44.0),
    "ssv2_vitl_full": PaperRow(_SSV2, "Full-tuning L/14", 303, 303, 1941, 48.7),
    "ssv2_swinb_full": PaperRow(_SSV2, "Full-tuning Swin-B", 88, 88, 124, 44.3),
    "ssv2_vitb_videoprompt": PaperRow(_SSV2, "VideoPrompt B/16", 92, 6, 537, 31.0),
    "ssv2_vitb_vpt": PaperRow(_SSV2, "VPT B/16", 92, 6, 537, 36.2),
    "ssv2_vitb_adaptformer": PaperRow(_SSV2, "AdaptFormer B/16", 94, 8, 544, 51.3),
    "ssv2_vitb_protuning": PaperRow(_SSV2, "Pro-tuning B/16", 95, 9, 538, 50.8),
    "ssv2_vitb_st_adapter": PaperRow(_SSV2, "ST-Adapter B/16", 97, 11, 1955, 69.5),
    "ssv2_swinb_st_adapter": PaperRow(_SSV2, "ST-Adapter Swin-B", 95, 7, 385, 65.1),
    "ssv2_vitl_evl": PaperRow(_SSV2, "EVL L/14", 484, 175, 9641, 66.7),
    "ssv2_vitb_aim": PaperRow(_SSV2, "AIM B/16", None, None, None, None),
    "ssv2_vitb_zeroi2v": PaperRow(_SSV2, "ZeroI2V B/16", None, None, None, None),
    "ssv2_vitb:without_ta": PaperRow(_SSV2, "DualPath without TA", None, 5, 1016, 53.7),
    "ssv2_vitb:without_sa": PaperRow(_SSV2, "DualPath without SA", None, 8, 134, 55.1),
    "ssv2_vitb:s8": PaperRow(_SSV2, "DualPath, S = 8", None, 13, 642, 69.3),
    "ssv2_vitb:s12": PaperRow(_SSV2, "DualPath, S = 12", None, 13, 896, 69.6),
    "ssv2_vitb:s16": PaperRow(_SSV2, "DualPath, S = 16", None, 13, 1150, 69.8),
    "ssv2_vitb:grid2": PaperRow(_SSV2, "DualPath, w = h = 2", None, 13, 1752, 66.4),
    "ssv2_vitb:grid4": PaperRow(_SSV2, "DualPath, w = h = 4", None, 13, 864, 71.8),
    "ssv2_vitb:grid8": PaperRow(_SSV2, "DualPath, w = h = 8", None, 13, 642, 61.5),
    "ssv2_vitb:scale2": PaperRow(_SSV2, "DualPath, framesets 448x448", None, 13, 846, 70.5),
    "ssv2_vitb:scale1": PaperRow(_SSV2, "DualPath, framesets 896x896", None, 13, 1694, 71.6),
    "hmdb51_vitb": PaperRow(_HMDB51, "DualPath B/16", None, 10, 612, 75.6),
    "hmdb51_vitb_in21k": PaperRow(_HMDB51, "DualPath B/16 IN-21K", None, None, None, 70.5),
    "hmdb51_swinb": PaperRow(_HMDB51, "DualPath Swin-B", None, None, None, 75.2),
    "hmdb51_swinb_full": PaperRow(_HMDB51, "Full-tuning Swin-B", 88, 88, None, 61.2),
    "hmdb51_vitb_full": PaperRow(_HMDB51, "Full-tuning B/16", None, 86, None, 59.4),
    "hmdb51_vitb_linear": PaperRow(_HMDB51, "Linear B/16", None, 0.1, None, 61.2),
    "hmdb51_vitb_vpt": PaperRow(_HMDB51, "VPT B/16", None, 7, None, 62.4),
    "hmdb51_vitb_adaptformer": PaperRow(_HMDB51, "AdaptFormer B/16", None, 8, None, 63.7),
    "hmdb51_vitb_protuning": PaperRow(_HMDB51, "Pro-tuning B/16", None, 9, None, 63.3),
    "hmdb51_vitb_videoprompt": PaperRow(_HMDB51, "VideoPrompt B/16", None, 6, None, 66.4),
    "hmdb51_vitb_st_adapter": PaperRow(_HMDB51, "ST-Adapter B/16", None, 7, None, 65.9),
    "diving48_vitb": PaperRow("Diving48", "DualPath B/16", None, 10, None, 88.7),
}
