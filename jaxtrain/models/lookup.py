"""Looking tokens up in an embedding that several devices hold, each for its own tokens.

The gradient of a table is zero but for the rows that were looked up. Left to itself XLA
makes it as large as the table on each device and adds it up over the links, at the end
of the backward pass, where nothing is left to compute meanwhile. Where the gradients of
the vectors are smaller, devices exchange these, and each adds up those of all tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.attention.partition import Layout


def look_up(
    layout: Layout | None,
    table: Float[Array, "V D"],
    tokens: Int32[Array, "B T"],
    dtype: str,
) -> Float[Array, "B T D"]:
    """The table's row of each token, in `dtype`."""
    if layout is None or not _is_exchanged(layout, table, tokens, dtype):
        return jnp.take(table, tokens, axis=0).astype(dtype)
    return _look_up(layout, dtype, table, tokens)


def _is_exchanged(layout: Layout, table: Array, tokens: Array, dtype: str) -> bool:
    """Whether devices that would add up tables exchange less as vectors."""
    width = _width(layout, table)
    shared = layout.sharing(*tokens.shape)
    if layout.count(tuple(axis for axis in shared if axis not in width)) == 1:
        return False  # none: those that split the width have each vector's own part
    # Each vector comes once. A sum over devices sends and brings a table's numbers.
    vectors = tokens.size * jnp.dtype(dtype).itemsize
    return vectors < 2 * table.shape[0] * table.dtype.itemsize


def _width(layout: Layout, table: Array) -> tuple[str, ...]:
    """The axes of the mesh that split the width of this table."""
    return layout.fitting(layout.weights, table.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _look_up(layout: Layout, dtype: str, table: Array, tokens: Array) -> Array:
    return jnp.take(table, tokens, axis=0).astype(dtype)


def _forward(
    layout: Layout, dtype: str, table: Array, tokens: Array
) -> tuple[Array, tuple[Array, Array]]:
    return _look_up(layout, dtype, table, tokens), (table, tokens)


def _backward(
    layout: Layout, dtype: str, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, None]:
    table, tokens = kept
    mesh = layout.mesh
    assert mesh is not None  # else nothing is exchanged

    def pin(x: Array, *axes: tuple[str, ...] | None) -> Array:
        spec = PartitionSpec(*axes)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    width = _width(layout, table) or None
    gradient = pin(gradient, None, None, width).astype(table.dtype)
    tokens = pin(tokens, None, None)
    add_up = jax.linear_transpose(lambda rows: jnp.take(rows, tokens, axis=0), table)
    (of_table,) = add_up(gradient)
    return pin(of_table, None, width), None


_look_up.defvjp(_forward, _backward)
