"""The leaves of a state as a checkpoint stores them: a flat dict of plain arrays."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

_SHOWN_DIFFERENCES = 4


class CheckpointMismatchError(ValueError):
    """The checkpoint's leaves are not those of the state it should fill."""


def named_leaves(tree: Any, *, abstract: bool = False) -> dict[str, Any]:
    """Leaves by dotted path, in tree order.

    A flat dict needs no knowledge of optax's or our own node types to be read back.

    Raises:
        ValueError: a leaf is no `jax.Array`, or two have one name.
    """
    kinds = (jax.Array, jax.ShapeDtypeStruct) if abstract else (jax.Array,)
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        if not isinstance(leaf, kinds):
            raise ValueError(
                f"{name} is a {type(leaf).__name__}; a state holds jax.Arrays only: "
                "convert it with jnp.asarray"
            )
        if name in named:
            raise ValueError(f"two leaves of the state are named {name}: rename one")
        named[name] = leaf
    return named


def describe(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of a leaf for the record's `layout`, in JSON's types."""
    description = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if _is_key(leaf) and isinstance(leaf, jax.Array):
        description["key_impl"] = str(jax.random.key_impl(leaf))
    return description


def check_layout(
    checkpoint: pathlib.Path,
    saved: Mapping[str, Mapping[str, Any]],
    wanted: Mapping[str, Any],
    *,
    partial: bool,
) -> None:
    """Compare the leaves that a checkpoint holds with those that are wanted.

    Args:
        partial: whether it may hold more.

    Raises:
        CheckpointMismatchError: they differ; names the first with their shapes.
    """
    # A key's implementation is free to differ only if its dtype does not.
    then = {name: _show(description) for name, description in saved.items()}
    now = {name: _show(describe(leaf)) for name, leaf in wanted.items()}
    lines = [
        f"{name}: {then[name]} in the checkpoint, the model has {shown}"
        if name in then
        else f"{name}: not in the checkpoint, the model has {shown}"
        for name, shown in now.items()
        if then.get(name) != shown
    ]
    if not partial:
        lines += [
            f"{name}: {shown} in the checkpoint, not in the model"
            for name, shown in then.items()
            if name not in now
        ]
    if lines:
        more = len(lines) - _SHOWN_DIFFERENCES
        raise CheckpointMismatchError(
            f"{checkpoint} does not fit the model; "
            f"{len(lines)} leaves differ: {'; '.join(lines[:_SHOWN_DIFFERENCES])}"
            + (f"; and {more} more" if more > 0 else "")
            + ". Use the model and optimizer that saved it, or another workdir"
        )


def to_raw(leaf: jax.Array) -> jax.Array:
    """What Orbax may hold while it writes: key data for keys, copies of host arrays.

    Orbax copies from device to host before `save` returns, but of an array in host
    memory (offloading) it takes a view, and jax refuses to donate what is viewed.
    """
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    if leaf.sharding.memory_kind not in ("pinned_host", "unpinned_host"):
        return leaf
    copies = [
        jax.device_put(shard.data, shard.data.sharding, may_alias=False)
        for shard in leaf.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, copies)


def from_raw(array: jax.Array, description: Mapping[str, Any]) -> jax.Array:
    """The leaf of which `to_raw` made `array`."""
    if "key_impl" not in description:
        return array
    return jax.random.wrap_key_data(array, impl=description["key_impl"])


def raw_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding under which a leaf is stored."""
    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
    struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if _is_key(leaf):
        struct = jax.eval_shape(jax.random.key_data, struct)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _show(description: Mapping[str, Any]) -> str:
    return f"{description['dtype']}{description['shape']}"
