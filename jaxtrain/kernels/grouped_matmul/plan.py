"""Where groups of rows meet tiles of rows: what the kernels are told of the sizes.

Rows are sorted by group, and a group may begin in the middle of a tile. A tile then
belongs to several groups, and kernels visit it once for each.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int32

TILE = 128  # rows


class Plan(NamedTuple):
    """The groups' bounds and the order of work, longest first.

    Group e has the rows `bounds[e]` to `bounds[e + 1]`. Tile t meets the `counts[t]`
    groups from `firsts[t]` on, empty ones among them; a tile behind all groups meets
    none. `tiles` and `groups` are the order in which they are taken.
    """

    bounds: Int32[Array, "E1"]
    firsts: Int32[Array, "T"]
    counts: Int32[Array, "T"]
    tiles: Int32[Array, "T"]
    groups: Int32[Array, "E"]


def make_plan(sizes: Int32[Array, "E"], length: int) -> Plan:
    """The plan of groups of these sizes in `length` rows; their sum may be less."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    first_rows = jnp.arange(0, length, TILE, dtype=jnp.int32)
    last_rows = jnp.minimum(first_rows + TILE, ends[-1]) - 1
    firsts = _group_of(ends, first_rows)
    counts = jnp.where(
        last_rows < first_rows, 0, _group_of(ends, last_rows) - firsts + 1
    )
    return Plan(
        bounds,
        jnp.minimum(firsts, len(sizes) - 1),
        counts,
        _longest_first(counts),
        _longest_first(sizes),
    )


def _longest_first(costs: Int32[Array, "N"]) -> Int32[Array, "N"]:
    """The numbers 0 to N - 1 by falling cost, equal ones as they are.

    By comparisons: of so few numbers they are faster than a sort, on a GPU.
    """
    number = jnp.arange(len(costs), dtype=jnp.int32)
    equal = (costs == costs[:, None]) & (number < number[:, None])
    place = ((costs > costs[:, None]) | equal).sum(axis=1, dtype=jnp.int32)
    is_there = place == number[:, None]
    return jnp.where(is_there, number, 0).sum(axis=1, dtype=jnp.int32)


def _group_of(ends: Int32[Array, "E"], rows: Int32[Array, "T"]) -> Int32[Array, "T"]:
    """The group that each row is in, E for a row behind all."""
    return (ends <= rows[:, None]).sum(axis=1, dtype=jnp.int32)
