"""The equations of a traced program, for tests of what is computed in it."""

from collections.abc import Iterator
from typing import Any

from jaxtrain.aot.jaxpr_cost import _inner


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, each before those of the programs that it calls."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for inner in _inner(equation.params):
            yield from equations(inner)
