"""The predictions of a batch that count, picked out before the loss head and put back.

The unembedding is the widest product of a model, and prompts and padding do not need
it: with a third of the tokens in prompts, the head takes a third less time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, Shaped


class Selection(NamedTuple):
    """Some places of each row, and where each place of a row went.

    `places`: as `Batch.scored`; T is none. `found`: C where a place was not picked.
    Here a row is a whole run of a batch's rows, if several share their places.
    """

    places: Int32[Array, "B C"]
    found: Int32[Array, "B T"]


def make_selection(places: Int32[Array, "B C"], length: int) -> Selection:
    """The selection of `places` from rows of `length` tokens."""
    rows, count = places.shape
    numbers = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), places.shape)
    found = jnp.full((rows, length), count, jnp.int32)
    row = jnp.arange(rows)[:, None]
    return Selection(places, found.at[row, places].set(numbers, mode="drop"))


def join_rows(x: Shaped[Array, "B T *W"], groups: int) -> Shaped[Array, "G _ *W"]:
    """Each of so many runs of rows as one row.

    In two steps, of which the first cuts the axis that devices split and the second
    joins what none of them splits: so no device needs the rows of another.
    """
    rows, length, *rest = x.shape
    if rows == groups:
        return x
    x = x.reshape(groups, rows // groups, length, *rest)
    return x.reshape(groups, rows // groups * length, *rest)


# Each of these two is the other's transpose. Left to itself, jax would transpose a
# gather into a scatter that adds, which is slow.


@jax.custom_vjp
def pick(x: Shaped[Array, "B T *W"], selection: Selection) -> Shaped[Array, "B C *W"]:
    """The selected places of each row, and zeros where there is none."""
    return _gather(x, selection.places)


@jax.custom_vjp
def put_back(
    x: Shaped[Array, "B C *W"], selection: Selection
) -> Shaped[Array, "B T *W"]:
    """What was picked at its places again, and zeros elsewhere."""
    return _gather(x, selection.found)


def _gather(x: Array, indices: Array) -> Array:
    indices = indices.reshape(*indices.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, indices, axis=1, mode="fill", fill_value=0)


pick.defvjp(
    lambda x, selection: (pick(x, selection), selection),
    lambda selection, gradient: (put_back(gradient, selection), None),
)
put_back.defvjp(
    lambda x, selection: (put_back(x, selection), selection),
    lambda selection, gradient: (pick(gradient, selection), None),
)
