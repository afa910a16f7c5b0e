"""What a path in a tree of parameters, or of an optimizer's state, tells."""

import itertools
from typing import Any

import jax

Path = tuple[Any, ...]

LAYERS = "layers"


def names_of(path: Path) -> tuple[str, ...]:
    """The keys of a path as text."""
    return tuple(str(getattr(key, "key", key)) for key in path)


def parameter_of(path: Path) -> tuple[str, ...]:
    """The names of the parameter that a leaf of an optimizer's state belongs to.

    A state holds copies of the parameters' tree, so a moment's path ends in its
    parameter's names (the last run of dict keys), then perhaps in a field. Empty for
    what belongs to no parameter, such as step counts.
    """
    runs = itertools.groupby(path, lambda key: isinstance(key, jax.tree_util.DictKey))
    found = [names_of(tuple(run)) for is_dict, run in runs if is_dict]
    return (found or [()])[-1]


def matrix_rank(names: tuple[str, ...], leaf: Any) -> int:
    """Axes of one layer's array, less the layers'; 3 of experts' stacked matrices."""
    return leaf.ndim - (names[:1] == (LAYERS,))
