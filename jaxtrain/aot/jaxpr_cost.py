"""FLOPs of a traced program: its matrix products, loops counted in full."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np


def count_flops(jaxpr: Any) -> float:
    """2 M N K of every `dot_general` and `ragged_dot`, of all devices together.

    A conditional counts as its most expensive branch. A loop of unknown length counts
    as often as a number in its condition allows, or once. A Pallas kernel counts as its
    own estimate says, or as its body at every grid point.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot_flops(equation)
        elif name == "ragged_dot_general":
            total += _ragged_dot_flops(equation)
        elif name == "scan":
            total += parameters["length"] * count_flops(parameters["jaxpr"])
        elif name == "while":
            steps = _most_steps(parameters["cond_jaxpr"])
            total += steps * count_flops(parameters["body_jaxpr"])
        elif name == "cond":
            total += max(count_flops(branch) for branch in parameters["branches"])
        elif name == "pallas_call" or parameters.get("cost_estimate") is not None:
            total += _kernel_flops(parameters)
        elif name == "shard_map":
            size = math.prod(parameters["mesh"].shape.values())
            total += size * count_flops(parameters["jaxpr"])
        else:
            total += sum(count_flops(inner) for inner in _inner(parameters))
    return total


def _most_steps(condition: Any) -> int:
    """The number below which a loop's condition holds its counter; 1 for none."""
    bounds = [
        int(equation.invars[1].val)
        for equation in condition.jaxpr.eqns
        # Only a literal has a value.
        if equation.primitive.name == "lt" and hasattr(equation.invars[1], "val")
    ]
    return min(bounds, default=1)


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return 2.0 * depth * float(np.prod(equation.outvars[0].aval.shape, dtype=float))


def _ragged_dot_flops(equation: Any) -> float:
    """Each row meets one group's matrix, or adds to one group's gradient."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    left, right = (operand.aval.shape for operand in equation.invars[:2])
    flops = 2.0 * math.prod(left)
    (_, contracted), _ = numbers.dot_dimension_numbers
    whole = {*contracted, *numbers.rhs_group_dimensions}
    return flops * math.prod(n for axis, n in enumerate(right) if axis not in whole)


def _kernel_flops(parameters: Any) -> float:
    estimate = parameters.get("cost_estimate")
    if estimate is not None:
        return float(estimate.flops)
    points = math.prod(n for n in parameters["grid_mapping"].grid if isinstance(n, int))
    return points * count_flops(parameters["jaxpr"])


def _inner(parameters: Any) -> Iterator[Any]:
    """The programs that an equation calls."""
    for name, value in parameters.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun", "call_jaxpr_thunk"):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(one, "jaxpr", one), "eqns"):
                yield one
