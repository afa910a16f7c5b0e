"""Flax NNX at arm's length: a module is a static definition and a plain dict.

A definition is made once, from shapes alone, without device or mesh. Within a trace
`bind` fills it with the arrays at hand, so all else deals with plain dicts and with
jax's own transformations only. In these dicts, and in the targets of adapters, modules
go by the names that the family's published weights have for them
(`Family.module_names`); only modules themselves know ours.
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
    """Random weights of a module, as a plain dict."""
    state = nnx.state(module(_own_targets(options), nnx.Rngs(params=key)))
    made = nnx.to_pure_dict(state)
    if not options.config.family.module_names:
        return made
    flat = {_published(path, options.config): x for path, x in flatten(made).items()}
    return nest(flat)


@functools.lru_cache(maxsize=256)
def _definition(module: Any, options: Options) -> tuple[Any, Any]:
    """The static graph of a module, and its variables as shapes with metadata."""
    abstract = nnx.eval_shape(
        lambda: module(options, nnx.Rngs(params=jax.random.key(0)))
    )
    return nnx.split(abstract)


def bind(module: Any, options: Options, params: Params) -> Any:
    """The module with these weights; for use within a trace.

    Raises:
        ValueError: `params` lacks a weight or has one too many; it names them.
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
    """The logical axes of a module's weights, `leading` before each."""
    _, state = _definition(module, _own_targets(options))
    return nest(
        {
            _published(path, options.config): leading
            + variable.get_metadata()["logical_axes"]
            for path, variable in nnx.to_flat_state(state)
        }
    )


def paths_with(leaf: str, tree: Params) -> frozenset[str]:
    """Paths of all modules in this tree that have such a leaf."""
    return frozenset(
        ".".join(map(str, path[:-1])) for path in flatten(tree) if path[-1] == leaf
    )


def _published(path: Path, config: ModelConfig) -> Path:
    """The path in published weights of a leaf that stands here in a module."""
    names = config.family.module_names
    if not names:
        return path
    module = ".".join(map(str, path[:-1]))
    return (*names.get(module, module).split("."), path[-1])


def _own_targets(options: Options) -> Options:
    """The same with adapters' targets by our own names for modules."""
    lora, names = options.lora, options.config.family.module_names
    if lora is None or not names:
        return options
    ours = {published: own for own, published in names.items()}
    lora = lora.renamed(lambda path: ours.get(path, path))
    return dataclasses.replace(options, lora=lora)
