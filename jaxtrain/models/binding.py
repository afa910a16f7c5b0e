"""Use Flax NNX modules through static definitions and plain dicts of weights.

A definition is made once from shapes alone and needs no device or mesh. Within a trace
`bind` fills it with the arrays at hand. So all other code works with plain dicts and
with jax's own transformations, and never with NNX state. The keys of these dicts, and
the targets of adapters, are the module names of the family's published weights
(`Family.module_names`). Only the module classes use our own names, and the functions
here translate between the two.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layers import Options
from jaxtrain.tree import flatten, nest
from jaxtrain.types import LogicalAxes, Params

Path = tuple[Any, ...]


def init_module(module: Any, options: Options, key: Key[Array, ""]) -> Params:
    """Initialize a module with random weights and return these as a plain dict."""
    state = nnx.state(module(_own_targets(options), nnx.Rngs(params=key)))
    made = nnx.to_pure_dict(state)
    if not options.config.family.module_names:
        return made
    flat = {_published(path, options.config): x for path, x in flatten(made).items()}
    return nest(flat)


@functools.lru_cache(maxsize=256)
def _definition(module: Any, options: Options) -> tuple[Any, Any]:
    """The static graph of a module, and the shapes and metadata of its variables."""
    abstract = nnx.eval_shape(
        lambda: module(options, nnx.Rngs(params=jax.random.key(0)))
    )
    return nnx.split(abstract)


def bind(module: Any, options: Options, params: Params) -> Any:
    """Return the module with these weights, for use within a trace.

    Raises:
        ValueError: weights are missing or unexpected; the message names them.
    """
    graph, abstract = _definition(module, _own_targets(options))
    config = options.config
    own = {_published(path, config): path for path, _ in nnx.to_flat_state(abstract)}
    leaves = flatten(params)
    expected, given = set(own), set(leaves)
    if expected != given:
        missing, unexpected = (
            sorted("/".join(map(str, path)) for path in paths)
            for paths in (expected - given, given - expected)
        )
        raise ValueError(
            f"{module.__name__}: the weights do not fit {options.config.model_type}:"
            f" missing {missing}, unexpected {unexpected}"
        )
    state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: replacing mutates
    nnx.replace_by_pure_dict(state, nest({own[path]: x for path, x in leaves.items()}))
    return nnx.merge(graph, state)


def axes_of(module: Any, options: Options, leading: LogicalAxes = ()) -> Params:
    """The logical axes of each weight of a module, with `leading` put before them."""
    _, state = _definition(module, _own_targets(options))
    return nest(
        {
            _published(path, options.config): leading
            + variable.get_metadata()["logical_axes"]
            for path, variable in nnx.to_flat_state(state)
        }
    )


def paths_with(leaf: str, tree: Params) -> frozenset[str]:
    """Paths of all modules in this tree that have a leaf named `leaf`."""
    return frozenset(
        ".".join(map(str, path[:-1])) for path in flatten(tree) if path[-1] == leaf
    )


def _published(path: Path, config: ModelConfig) -> Path:
    """Translate a leaf's path in our modules to its path in published weights."""
    names = config.family.module_names
    if not names:
        return path
    module = ".".join(map(str, path[:-1]))
    return (*names.get(module, module).split("."), path[-1])


def _own_targets(options: Options) -> Options:
    """Return the options with the targets of adapters under our own module names."""
    lora, names = options.lora, options.config.family.module_names
    if lora is None or not names:
        return options
    ours = {published: own for own, published in names.items()}
    lora = lora.renamed(lambda path: ours.get(path, path))
    return dataclasses.replace(options, lora=lora)
