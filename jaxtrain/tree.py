"""Nested dicts with leaves at paths: parameters, configurations, saved records."""

from collections.abc import Mapping
from typing import Any

Path = tuple[Any, ...]


def flatten(tree: Mapping[str, Any], path: Path = ()) -> dict[Path, Any]:
    """{"a": {"b": 1}} -> {("a", "b"): 1}. An empty dict is a leaf."""
    flat: dict[Path, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, (*path, name))
        else:
            flat[(*path, name)] = value
    return flat


def nest(flat: Mapping[Path, Any]) -> dict[Any, Any]:
    """The inverse of `flatten`."""
    tree: dict[Any, Any] = {}
    for path, leaf in flat.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree


def dotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}. An empty dict is a leaf."""
    return {".".join(map(str, path)): leaf for path, leaf in flatten(tree).items()}


def get(tree: Mapping[Any, Any], path: Path | str) -> Any:
    """Return what stands at a path, written ("a", "b") or "a.b": a leaf or a branch.

    Raises:
        KeyError: nothing stands there.
    """
    node: Any = tree
    for name in path.split(".") if isinstance(path, str) else path:
        node = node[name]
    return node


def overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested dicts; where both have a leaf, `top` wins."""
    merged = dict(base)
    for name, value in top.items():
        below = merged.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[name] = overlay(below, value)
        else:
            merged[name] = value
    return merged


def select(tree: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a nested dict that stands at `like`'s paths."""
    return {
        name: select(tree[name], below) if isinstance(below, Mapping) else tree[name]
        for name, below in like.items()
    }
