"""Parameters and multiply-accumulates of a configuration, beside what the paper prints.

Public: `count_macs`, `Efficiency`, `measure`, `PAPER`, `PaperRow`.

Convention: one multiply-accumulate (MAC) for each product inside a matrix product or a convolution,
embedding, adapters and classifier included; nothing for norms, activations, softmax and other
elementwise work. The paper's "GFLOPs" are printed as they stand, without its convention, and do not
follow from its architecture (PAPER.md).
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from dualpath_jax import params as params_lib
from dualpath_jax import run
from dualpath_jax.data import datasets

# For sources whose classes are the data's own: only the classifier depends on it.
UNKNOWN_CLASSES = 2


def count_macs(function: Callable, *args: Any) -> int:
    """Multiply-accumulates of the matrix products and convolutions that `function` traces to.

    A loop counts as often as it runs, which XLA's own cost analysis does not do.
    """
    return _jaxpr_macs(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_macs(jaxpr: core.Jaxpr) -> int:
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
            total += times * sum(_jaxpr_macs(inner) for inner in _inner_jaxprs(params))
    return total


def _inner_jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    values = [v for p in params.values() for v in (p if isinstance(p, (tuple, list)) else (p,))]
    values = [value.jaxpr if isinstance(value, core.ClosedJaxpr) else value for value in values]
    return [value for value in values if isinstance(value, core.Jaxpr)]


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Of one configuration.

    Attributes:
      total_params, trainable_params: counts; those of the backbone that are not used included.
      plain_gmacs_per_view: 10^9 multiply-accumulates of a forward pass for one view, every token of
        every block computed.
      gmacs_per_view: those that are executed (`model.class_only`).
      plain_gmacs_per_video, gmacs_per_video: of all test views.
      views: frames x clips x crops.
    """

    total_params: int
    trainable_params: int
    plain_gmacs_per_view: float
    gmacs_per_view: float
    plain_gmacs_per_video: float
    gmacs_per_video: float
    views: str


def _forward(model: run.Outline) -> Callable:
    return lambda params, *inputs: model.model.apply({"params": params}, *inputs)


def measure(config: Any) -> Efficiency:
    """Count what `config` describes, abstractly: no weights, no data, no computation."""
    num_classes = datasets.NUM_CLASSES.get(config.data.source, UNKNOWN_CLASSES)
    config, macs = copy.deepcopy(config), []
    for class_only in (False, True):
        config.model.class_only = class_only
        model = run.outline(config, num_classes)
        macs.append(count_macs(_forward(model), model.params, *run.abstract_inputs(config)))
    views = config.eval.temporal_views * config.eval.spatial_crops
    trainable, _ = params_lib.split(model.params, model.mask)
    return Efficiency(
        total_params=params_lib.count(model.params),
        trainable_params=params_lib.count(trainable),
        plain_gmacs_per_view=macs[0] / 1e9,
        gmacs_per_view=macs[1] / 1e9,
        plain_gmacs_per_video=views * macs[0] / 1e9,
        gmacs_per_video=views * macs[1] / 1e9,
        views=f"{config.data.num_frames}x{config.eval.temporal_views}x{config.eval.spatial_crops}",
    )
