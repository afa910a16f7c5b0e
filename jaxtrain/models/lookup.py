"""Looking tokens up in an embedding, with a gradient that is the same each time.

The gradient of a table is zero but for the rows that were looked up. XLA adds these up
on a GPU in the order in which threads come, another in each run: there `sum_rows` adds
them up by products.

On several devices, each of which looks up its own tokens, XLA makes the gradient as
large as the table on each device and adds it up over the links, at the end of the
backward pass, where nothing is left to compute meanwhile. Where the gradients of the
vectors are smaller, devices exchange these, and each adds up those of all tokens.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from jaxtrain.kernels.attention.partition import Axes, Layout

_CHUNK = 128  # rows that one product adds up
# From the gradients of vectors and their tokens to the gradient of the table.
_AddUp = Callable[[Float[Array, "B T D"], Int32[Array, "B T"]], Float[Array, "V D"]]


def look_up(
    layout: Layout | None,
    table: Float[Array, "V D"],
    tokens: Int32[Array, "B T"],
    dtype: str,
) -> Float[Array, "B T D"]:
    """The table's row of each token, in `dtype`."""
    layout = layout or Layout()
    if _on_gpu(layout) or layout.parts or _is_exchanged(layout, table, tokens, dtype):
        return _look_up(layout, dtype, table, tokens)
    return jnp.take(table, tokens, axis=0).astype(dtype)


def _on_gpu(layout: Layout) -> bool:
    return layout.platform == "gpu"


def _is_exchanged(layout: Layout, table: Array, tokens: Array, dtype: str) -> bool:
    """Whether devices that would add up tables exchange less as vectors."""
    if layout.mesh is None or layout.mesh.size == 1:
        return False
    rows, along = _apart(layout, table, tokens)
    if layout.count(rows + along) == 1:
        return False  # none: those that split the width have each vector's own part
    # Each vector comes once. A sum over devices sends and brings a table's numbers.
    vectors = tokens.size * jnp.dtype(dtype).itemsize
    return vectors < 2 * table.shape[0] * table.dtype.itemsize


def _width(layout: Layout, table: Array) -> Axes:
    """The axes of the mesh that split the width of this table."""
    return layout.fitting(layout.weights, table.shape[1])


def _apart(layout: Layout, table: Array, tokens: Array) -> tuple[Axes, Axes]:
    """The axes that split rows, and tokens along them, but not the table's width."""
    width, shared = _width(layout, table), layout.sharing(*tokens.shape)
    apart = tuple(axis for axis in shared if axis not in width)
    rows = tuple(axis for axis in apart if axis in layout.rows)
    return rows, tuple(axis for axis in apart if axis not in layout.rows)


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
    (table, tokens), mesh = kept, layout.mesh
    # A table in parts is read in the compute type, in which sums would be rounded.
    summed = jax.ShapeDtypeStruct(
        table.shape, jnp.float32 if layout.parts else table.dtype
    )
    add_up: _AddUp = functools.partial(
        _sum_exactly if _on_gpu(layout) else _transposed, summed
    )
    if mesh is None or mesh.size == 1:
        return add_up(gradient, tokens), None
    width = _width(layout, table) or None
    rows = along = None
    if not _is_exchanged(layout, table, tokens, dtype):
        rows, along = (axes or None for axes in _apart(layout, table, tokens))

    def pin(x: Array, *axes: Axes | None) -> Array:
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.lax.with_sharding_constraint(x, sharding)

    gradient, tokens = pin(gradient, rows, along, width), pin(tokens, rows, along)
    if rows or along:
        add_up = _on_shards(add_up, layout, (rows, along, width))
    parts = layout.fitting(layout.parts, table.shape[0]) or None
    of_table = pin(add_up(gradient, tokens), parts, width)
    return of_table.astype(table.dtype), None


_look_up.defvjp(_forward, _backward)


def _transposed(table: jax.ShapeDtypeStruct, gradient: Array, tokens: Array) -> Array:
    """XLA's own sum."""
    add_up = jax.linear_transpose(lambda rows: jnp.take(rows, tokens, axis=0), table)
    (found,) = add_up(gradient.astype(table.dtype))
    return found


def _sum_exactly(table: jax.ShapeDtypeStruct, gradient: Array, tokens: Array) -> Array:
    vectors = gradient.reshape(-1, gradient.shape[-1])
    return sum_rows(vectors, tokens.reshape(-1), table.shape[0], table.dtype)


def _on_shards(add_up: _AddUp, layout: Layout, axes: tuple[Axes | None, ...]) -> _AddUp:
    """`add_up` of each device's own tokens, and the sum over devices."""
    rows, along, width = axes
    over = (rows or ()) + (along or ())
    return jax.shard_map(
        lambda *own: jax.lax.psum(add_up(*own), over),
        mesh=layout.mesh,
        in_specs=(PartitionSpec(rows, along, width), PartitionSpec(rows, along)),
        out_specs=PartitionSpec(None, width),
        check_vma=False,
    )


def sum_rows(
    rows: Float[Array, "N D"], places: Int32[Array, "N"], count: int, dtype: Any
) -> Float[Array, "V D"]:
    """Rows added up by their places, of which there are `count`, in a certain order.

    In float32; a narrower `dtype` rounds what a chunk has of a place, and the rest.

    Sorted by place they are cut into chunks, of which a product with zeros and ones
    adds up what has one place. A place that goes on over several chunks has one sum in
    each: all but the first are rows for another turn. So what is added to the table at
    once has a place of its own for each row.
    """
    order = jnp.argsort(places)
    rows, places = (jnp.take(x, order, axis=0, mode="clip") for x in (rows, places))
    table = jnp.zeros((count, rows.shape[1]), dtype)
    while True:
        chunks = math.ceil(len(rows) / _CHUNK)
        missing = chunks * _CHUNK - len(rows)
        rows = jnp.pad(rows, ((0, missing), (0, 0))).reshape(chunks, _CHUNK, -1)
        places = jnp.pad(places, (0, missing), constant_values=count)
        begins = (places != jnp.roll(places, 1)).at[0].set(True)
        sums = _sum_chunks(rows, places.reshape(chunks, _CHUNK))
        # Each that is left out gets a place of its own, too, behind the table.
        outside = count + jnp.arange(len(places))
        target = jnp.where(begins & (places < count), places, outside)
        added = sums.reshape(len(target), -1).astype(dtype)
        table = table.at[target].add(added, mode="drop", unique_indices=True)
        if chunks == 1:
            return table
        # What the first place of a chunk has there, where it began in an earlier one.
        goes_on = ~begins[::_CHUNK, None]
        rows, places = jnp.where(goes_on, sums[:, 0], 0), places[::_CHUNK]


def _sum_chunks(
    rows: Float[Array, "C N D"], places: Int32[Array, "C N"]
) -> Float32[Array, "C N D"]:
    """Beside each row of a chunk the sum of all those in it that have its place."""
    same = places[:, :, None] == places[:, None, :]
    return jnp.einsum(
        "crn,cnd->crd",
        same.astype(rows.dtype),
        rows,
        precision=jax.lax.Precision.HIGHEST,  # float32 stays so, to the last digit
        preferred_element_type=jnp.float32,
    )
