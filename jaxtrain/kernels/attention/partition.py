"""Attention on a mesh: each device works on its rows, heads and tokens.

The compiler cannot cut a kernel by itself, so the call stands in a `jax.shard_map`:
rows (B) and heads (N, K) are independent, and a device needs nothing of the others'.
Tokens are not: see context.py.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxtrain.kernels.attention import context
from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.schedule import Plan, Schedule

_logger = logging.getLogger(__name__)
Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which axes of a mesh split rows, heads, tokens, vocabulary. None: one device.

    `weights`: those that may split the width of weights. A size that does not divide is
    kept whole on every device, as activations are. `parts`: those over which gradients
    of tables are wanted in parts, by rows.
    """

    mesh: Mesh | None = None
    rows: Axes = ()
    heads: Axes = ()
    tokens: Axes = ()
    vocab: Axes = ()
    weights: Axes = ()
    parts: Axes = ()

    @property
    def platform(self) -> str:
        """That of the mesh, whose devices need not be present; else jax's default."""
        if self.mesh is None:
            return jax.default_backend()
        return str(self.mesh.devices.flat[0].platform)

    def count(self, axes: Axes) -> int:
        """Devices along these axes."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def fitting(self, axes: Axes, size: int) -> Axes:
        """As many of the axes, from the first, as divide `size`."""
        while size % self.count(axes):
            _log_whole(size, axes)
            axes = axes[:-1]
        return axes

    def token_shards(self, length: int) -> int:
        """Devices that share a row of so many tokens: 1 where it can't be cut."""
        shards = self.count(self.tokens)
        if length % (2 * shards):
            _log_whole(length, self.tokens)
            return 1
        return shards

    def sharing(self, batch: int, length: int) -> Axes:
        """The axes that split the tokens of rows [batch, length]."""
        rows = self.fitting(self.rows, batch)
        return rows + (self.tokens if self.token_shards(length) > 1 else ())

    def join_tokens(self, x: Array) -> Array:
        """[B T ...] -> [B * T ...], the tokens of one device together."""
        batch, length, *rest = x.shape
        rows = self.count(self.fitting(self.rows, batch))
        shards = self.token_shards(length)
        if shards > 1:
            x = x.reshape(rows, batch // rows, shards, length // shards, *rest)
            x = x.swapaxes(1, 2)
        return x.reshape(batch * length, *rest)

    def split_tokens(self, x: Array, shape: tuple[int, ...]) -> Array:
        """What `join_tokens` joined, [B T] of this shape again."""
        (batch, length), rest = shape, x.shape[1:]
        rows = self.count(self.fitting(self.rows, batch))
        shards = self.token_shards(length)
        if shards > 1:
            x = x.reshape(rows, shards, batch // rows, length // shards, *rest)
            x = x.swapaxes(1, 2)
        return x.reshape(batch, length, *rest)


@functools.cache
def _log_whole(size: int, axes: Axes) -> None:
    _logger.info(
        "kernels: a size of %d does not divide over %s: whole there", size, axes
    )


def parts_of_rows(
    layout: Layout, mask: Mask, batch: int, length: int
) -> list[tuple[Mask, int]]:
    """The mask of each part that devices cut rows into, and its number of keys.

    Every device is given the ids of its whole rows.
    """
    assert layout.mesh is not None
    rows = PartitionSpec(layout.fitting(layout.rows, batch) or None)
    whole = NamedSharding(layout.mesh, rows)
    mask = jax.tree.map(lambda ids: jax.lax.with_sharding_constraint(ids, whole), mask)
    parts = 2 * layout.token_shards(length)
    queries = length // parts
    return [context.part_of(mask, part, queries, length) for part in range(parts)]


def attend_on_shards(
    attend: Callable[..., Float[Array, "B T N V"]],
    layout: Layout,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    mask: Mask,
    schedule: Plan = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N V"]:
    """`attend(q, k, v, mask, schedule, sinks)` on each device for what lies there."""
    if layout.mesh is None or layout.mesh.size == 1:
        return attend(q, k, v, mask, schedule, sinks)
    rows = layout.fitting(layout.rows, q.shape[0])
    heads = layout.fitting(layout.heads, q.shape[2])
    shards = layout.token_shards(q.shape[1])
    tokens = layout.tokens if shards > 1 else ()
    # Where devices outnumber key-value heads, several have the same one.
    copies = math.lcm(k.shape[2], layout.count(heads)) // k.shape[2]
    if copies > 1:
        k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
    if shards > 1:
        if isinstance(schedule, Schedule):
            raise ValueError("schedule: it is of whole rows, and the layout cuts them")
        attend = functools.partial(
            context.attend_to_gathered, attend, context.Ring(tokens, shards)
        )
    # Axes that a spec does not name cost a sum of gradients, be they of size 1.
    idle = (axis for axis, size in layout.mesh.shape.items() if size == 1)
    rows += tuple(axis for axis in idle if axis not in (*rows, *heads, *tokens))
    of_heads = PartitionSpec(rows or None, tokens or None, heads or None)
    of_rows, of_sinks = PartitionSpec(rows or None), PartitionSpec(heads or None)
    in_specs = (of_heads, of_heads, of_heads, of_rows, of_rows, of_sinks)
    return jax.shard_map(
        attend,
        mesh=layout.mesh,
        in_specs=in_specs,
        out_specs=of_heads,
        check_vma=False,  # a kernel does not say over which axes its outputs vary
    )(q, k, v, mask, schedule, sinks)
