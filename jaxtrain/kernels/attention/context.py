"""Attention where the tokens of a row are split over devices ("context parallelism").

Each device gathers the keys and values of the whole row and attends with a share of
its queries, as in section 3.3.2 of arXiv:2407.21783. A ring (arXiv:2310.01889) would
hold 1/n of them at a time; but with grouped heads they are few, any mask and any
kernel serves as it is, and a row's softmax is summed as on a single device.

Under a causal mask a later query reads more keys. So a row is cut into 2 n parts, and
device i of n attends for parts i and 2 n - 1 - i, which read 2 n + 1 parts of keys
together, whatever i is. It holds parts 2 i and 2 i + 1: of each device's two parts one
is even and one is odd, and the same holds for the pairs, so that two exchanges among
the devices bring them there, and two more the results back. Outside of this module
tokens stand in the order of the row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.schedule import Schedule

Attend = Callable[..., Float[Array, "B T N H"]]
Schedules = tuple[Schedule, ...] | None


class Ring(NamedTuple):
    """The mesh axes that split a row, and how many devices share it."""

    axes: tuple[str, ...]
    size: int


class _Row(NamedTuple):
    """The mask with the ids of a whole row, and the schedule of each of its parts."""

    mask: Mask
    schedules: Schedules


def parts_of(index: int, size: int) -> tuple[int, int]:
    """The even and the odd part of a row that device `index` of `size` attends for."""
    first, last = index, 2 * size - 1 - index
    return (first, last) if index % 2 == 0 else (last, first)


def part_of(mask: Mask, part: int, queries: int, length: int) -> tuple[Mask, int]:
    """The mask of a part's `queries`, and how many keys it may read, from the first.

    `mask` has the ids of the whole row, of `length` tokens.
    """
    start, stop = part * queries, (part + 1) * queries
    keys = stop if mask.causal else length
    own = dataclasses.replace(
        mask,
        segment_ids=_cut(mask.segment_ids, start, stop),
        prompt_ids=_cut(mask.prompt_ids, start, stop),
        key_ids=_cut(mask.segment_ids, 0, keys),
        offset=start,
    )
    return own, keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_to_gathered(
    attend: Attend,
    ring: Ring,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    mask: Mask,
    schedules: Schedules = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N V"]:
    """`attend` of this device's queries to the keys of its row's devices.

    Within `shard_map`; T counts the tokens of a device, but the ids of `mask` are of
    the whole row. The backward pass gathers again, so no keys of a whole row are kept.
    `schedules`: of each part of the row.
    """
    return _forward(attend, ring, q, k, v, mask, schedules, sinks)[0]


def _forward(
    attend: Attend,
    ring: Ring,
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    schedules: Schedules,
    sinks: Array | None,
) -> tuple[Array, tuple]:
    keys, values = _gather(ring, k), _gather(ring, v)
    queries, row = _exchange(ring, q), _Row(mask, schedules)

    def on_device(index: int, q: Array, keys: Array, values: Array) -> Array:
        return _attend_parts(attend, ring, index, q, keys, values, row, sinks)

    out = _switch(ring, on_device, queries, keys, values)
    return _exchange(ring, out, back=True), (q, k, v, mask, schedules, sinks)


def _backward(
    attend: Attend, ring: Ring, residuals: tuple, d_out: Array
) -> tuple[Array, Array, Array, None, None, Array | None]:
    q, k, v, mask, schedules, sinks = residuals
    keys, values = _gather(ring, k), _gather(ring, v)
    queries, row = _exchange(ring, q), _Row(mask, schedules)

    def on_device(
        index: int, q: Array, keys: Array, values: Array, d_out: Array
    ) -> tuple[Array, ...]:
        def forward(q: Array, keys: Array, values: Array, sinks: Array | None) -> Array:
            return _attend_parts(attend, ring, index, q, keys, values, row, sinks)

        return jax.vjp(forward, q, keys, values, sinks)[1](d_out)

    d_out = _exchange(ring, d_out)
    gradients = _switch(ring, on_device, queries, keys, values, d_out)
    dq, d_keys, d_values, d_sinks = gradients
    dk, dv = (
        jax.lax.psum_scatter(x, ring.axes, scatter_dimension=1, tiled=True)
        for x in (d_keys, d_values)
    )
    return _exchange(ring, dq, back=True), dk, dv, None, None, d_sinks


attend_to_gathered.defvjp(_forward, _backward)


def _switch(ring: Ring, function: Callable[..., Any], *operands: Array) -> Any:
    """`function(index, *operands)`, traced for every device, run for this one.

    Which keys a part reads is thus known when a program is compiled, and no device
    computes what causality or a window leaves out.
    """
    branches = [functools.partial(function, index) for index in range(ring.size)]
    return jax.lax.switch(jax.lax.axis_index(ring.axes), branches, *operands)


def _attend_parts(
    attend: Attend,
    ring: Ring,
    index: int,
    q: Array,
    keys: Array,
    values: Array,
    row: _Row,
    sinks: Array | None,
) -> Array:
    """The two parts of device `index`, each with the keys up to its own end."""
    length = q.shape[1] // 2
    outputs = []
    for queries, part in zip(
        jnp.split(q, 2, axis=1), parts_of(index, ring.size), strict=True
    ):
        mask, end = part_of(row.mask, part, length, keys.shape[1])
        of_keys = (keys[:, :end], values[:, :end])
        schedule = None if row.schedules is None else row.schedules[part]
        outputs.append(attend(queries, *of_keys, mask, schedule, sinks))
    return jnp.concatenate(outputs, axis=1)


def _cut(ids: Array | None, start: int, stop: int) -> Array | None:
    return None if ids is None else ids[:, start:stop]


def _exchange(ring: Ring, x: Array, *, back: bool = False) -> Array:
    """From the parts [B T ...] that a device holds to those it attends for, or back."""
    halves = []
    for parity, half in enumerate(jnp.split(x, 2, axis=1)):
        pairs = [
            (parts_of(index, ring.size)[parity] // 2, index)
            for index in range(ring.size)
        ]
        if back:
            pairs = [(index, holder) for holder, index in pairs]
        halves.append(jax.lax.ppermute(half, ring.axes, pairs))
    return jnp.concatenate(halves, axis=1)


def _gather(ring: Ring, x: Array) -> Array:
    """[B T ...] of the whole row."""
    return jax.lax.all_gather(x, ring.axes, axis=1, tiled=True)
