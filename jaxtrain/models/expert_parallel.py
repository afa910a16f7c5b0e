"""Experts that are split over devices (`mesh.expert`), and how tokens reach them.

Along the mesh axis `expert`, each of X devices holds E / X experts and has rows of its
own with N tokens. A copy of each token goes to K experts. Everything here runs within a
`shard_map`, on one device's part. There are three ways to bring copies and experts
together, and all give the same result as a single device:

- "weights": every device gathers the weights of all experts, for one layer at a time,
  and multiplies its own tokens by them.
- "tokens": every device gathers the tokens of all X devices and multiplies the copies
  that are meant for its own experts. A reduce-scatter adds up the parts of each token's
  sum and returns it to the token's device.
- "copies": an all-to-all sends each copy to its expert's device, and a second one sends
  the result back, where the K results of each token are added up.

The shapes decide which is cheapest: see `choose_exchange`. Arrays have fixed sizes, so
"tokens" and "copies" need a bound on the copies that a device receives. If all experts
were equally popular, N K copies would arrive at each device, N K / X of them from each
other device. For "copies" the bound is `room` times N K / X per pair of devices; for
"tokens" it is max(2, `room`) times N K per device. `room` = X is always enough, and a
larger value changes nothing. If more copies than that arrive in some layer and step,
all devices run this layer by gathering its weights. So no token is ever dropped, and no
result depends on `room`.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtrain.types import LogicalAxes

logger = logging.getLogger(__name__)

AXIS = "expert"
_MEMORY_OVER_LINKS = 5  # how much faster
Exchange = Literal["auto", "weights", "tokens", "copies"]
# (x [B T D], weights [B T K], experts [B T K], *stacks [E ...]) -> [B T D], such as
# `moe.apply_experts`. A copy for expert number E, which does not exist, adds nothing.
ApplyExperts = Callable[..., Array]


@dataclasses.dataclass(frozen=True)
class ExpertSpread:
    """How a mixture's experts are spread over a mesh; static.

    `devices`: X. `room`, `exchange`: see the module. `axes_of` tells which mesh axes
    split an activation, by its shape and logical axes (`ShardingPlan.axes_of`).
    `even`: copies are taken to be shared out evenly, so that buffers of that size never
    overflow. It is for a program of which only the operations are counted, which are
    those of a real step: kernels skip empty slots, and hardly any step overflows.
    """

    devices: int
    room: float
    exchange: Exchange
    axes_of: Callable[[tuple[int, ...], LogicalAxes], tuple[str, ...]]
    even: bool = False

    def spread(self, apply: ApplyExperts, x: Float[Array, "B T D"]) -> ApplyExperts:
        """Return `apply` for use on one device's part of x, with its own experts."""
        split = self.axes_of(x.shape, ("batch", "sequence", None))
        if AXIS not in split:
            return functools.partial(_apply_to_shared_rows, apply)
        return functools.partial(_apply_to_own_rows, apply, self, split)


class _Sizes(NamedTuple):
    """The sizes on one device that determine an exchange's cost and buffers.

    `tokens`: its tokens, N. `copies`: number of experts per token, K. `experts`: the
    experts that it holds, E / X. `devices`: X. `room`: see the module; `token_room` is
    that of "tokens".
    """

    tokens: int
    copies: int
    experts: int
    devices: int
    room: float
    token_room: float = 2.0

    @property
    def most(self) -> int:
        """The most copies that one device can send to another."""
        return self.tokens * min(self.copies, self.experts)

    @property
    def rows(self) -> int:
        """With "tokens": the most copies that a device multiplies."""
        even = self.tokens * self.copies
        return min(self.devices * self.most, math.ceil(self.token_room * even))

    @property
    def slots(self) -> int:
        """With "copies": room for the copies from one device to another."""
        even = self.tokens * self.copies / self.devices
        return min(self.most, math.ceil(self.room * even))


def choose_exchange(
    wanted: Exchange, sizes: _Sizes, row_bytes: int, weight_bytes: int
) -> tuple[Exchange, Mapping[str, int]]:
    """Choose the cheapest exchange if `wanted` is "auto"; also return all costs.

    A cost is the number of bytes that arrive at a device in one forward pass through
    one layer, plus a fifth of the bytes that the exchange reads from and writes to
    device memory, which is about five times faster than the links (4.5 times on a TPU
    v5e, 5 on a v5p, 7 on an H100). Weights travel once, tokens there and back. Gathered
    tokens are then read once for each copy of all X devices, and exchanged copies are
    reordered six times. The backward pass costs the same again, because each gradient
    travels the way of the array that it belongs to.

    Args:
        row_bytes: size of one token's activation.
        weight_bytes: size of the experts that one device holds.
    """
    devices, others = sizes.devices, sizes.devices - 1
    copies = devices * sizes.tokens * sizes.copies
    arriving_and_moved = {
        "weights": (others * weight_bytes, 2 * devices * weight_bytes),
        "tokens": (2 * others * sizes.tokens * row_bytes, 2 * copies * row_bytes),
        "copies": (
            2 * others * sizes.slots * row_bytes,
            6 * devices * sizes.slots * row_bytes,
        ),
    }
    costs = {
        name: arriving + moved // _MEMORY_OVER_LINKS
        for name, (arriving, moved) in arriving_and_moved.items()
    }
    if wanted != "auto":
        return wanted, costs
    cheapest: Any = min(costs, key=lambda name: costs[name])
    return cheapest, costs


@functools.cache
def _log_choice(
    exchange: str, wanted: str, sizes: _Sizes, costs: tuple[int, ...]
) -> None:
    weights, tokens, copies = (cost / 2**20 for cost in costs)
    logger.info(
        "experts over %d devices: %s travel%s. A layer's pass of %d tokens a device"
        " costs %.1f MiB by gathering weights, %.1f by gathering tokens, %.1f by"
        " exchanging copies of them",
        sizes.devices,
        exchange,
        "" if wanted == "auto" else " (model.expert_exchange)",
        sizes.tokens,
        *(weights, tokens, copies),
    )


def _apply_to_shared_rows(
    apply: ApplyExperts, x: Array, weights: Array, experts: Array, *stacks: Array
) -> Array:
    """Apply experts when all X devices have the same rows, as in generating texts."""
    own = _own_experts(experts, stacks[0].shape[0])
    return jax.lax.psum(apply(x, weights, own, *stacks), AXIS)


def _apply_to_own_rows(
    apply: ApplyExperts,
    spread: ExpertSpread,
    split: tuple[str, ...],
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T K"],
    experts: Int[Array, "B T K"],
    *stacks: Array,
) -> Float[Array, "B T D"]:
    copies = experts.shape[-1]
    sizes = _Sizes(
        tokens=x.shape[0] * x.shape[1],
        copies=copies,
        experts=stacks[0].shape[0],
        devices=spread.devices,
        room=1.0 if spread.even else spread.room,
        token_room=1.0 if spread.even else max(2.0, spread.room),
    )
    exchange, costs = choose_exchange(
        spread.exchange,
        sizes,
        row_bytes=x.shape[-1] * x.dtype.itemsize,
        weight_bytes=sum(stack.size * stack.dtype.itemsize for stack in stacks),
    )
    if not spread.even:
        _log_choice(exchange, spread.exchange, sizes, tuple(costs.values()))
    by_weights = functools.partial(_by_weights, apply)
    if exchange == "weights":
        return by_weights(x, weights, experts, *stacks)
    travel = functools.partial(
        _by_tokens if exchange == "tokens" else _by_copies, apply, sizes
    )
    limit = sizes.rows if exchange == "tokens" else sizes.slots
    is_enough = limit >= sizes.most * (sizes.devices if exchange == "tokens" else 1)
    if is_enough:
        return travel(x, weights, experts, *stacks)

    # Both branches of a conditional return the same arrays, so each would have to save
    # what the other needs for its backward pass. So nothing is saved, and the branch
    # runs again; in that second run, too, the gathered weights must not be saved.
    remat = functools.partial(jax.checkpoint, prevent_cse=False)

    @remat
    def run(*arrays: Array) -> Array:
        if spread.even:
            return travel(*arrays)
        overflows = _most_copies(experts, sizes, exchange, split) > limit
        return jax.lax.cond(overflows, remat(by_weights), travel, *arrays)

    return run(x, weights, experts, *stacks)


def _most_copies(
    experts: Array, sizes: _Sizes, exchange: Exchange, split: tuple[str, ...]
) -> Array:
    """The most copies that must fit anywhere; the same number on every device."""
    devices = jnp.arange(sizes.devices)
    sent = (experts.reshape(-1, 1) // sizes.experts == devices).sum(axis=0)
    if exchange == "tokens":
        sent = jax.lax.psum(sent, AXIS)
        split = tuple(axis for axis in split if axis != AXIS)
    most = sent.max()
    return jax.lax.pmax(most, split) if split else most


def _by_weights(
    apply: ApplyExperts, x: Array, weights: Array, experts: Array, *stacks: Array
) -> Array:
    gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)
    return apply(x, weights, experts, *map(gather, stacks))


def _by_tokens(
    apply: ApplyExperts,
    sizes: _Sizes,
    x: Array,
    weights: Array,
    experts: Array,
    *stacks: Array,
) -> Array:
    gather = functools.partial(jax.lax.all_gather, axis_name=AXIS, tiled=True)
    copies = sizes.copies
    tokens = gather(x.reshape(-1, x.shape[-1]))
    weights = gather(weights.reshape(-1, copies))
    own = _own_experts(gather(experts.reshape(-1, copies)), sizes.experts)
    if sizes.rows == own.size:
        y = apply(tokens[None], weights[None], own[None], *stacks)[0]
    else:
        packed = _pack(own.reshape(-1), own.reshape(-1) // sizes.experts, 1, sizes.rows)
        y = _apply_packed(apply, packed, tokens, weights, own, *stacks)
    y = jax.lax.psum_scatter(y, AXIS, scatter_dimension=0, tiled=True)
    return y.reshape(x.shape)


def _by_copies(
    apply: ApplyExperts,
    sizes: _Sizes,
    x: Array,
    weights: Array,
    experts: Array,
    *stacks: Array,
) -> Array:
    swap = functools.partial(
        jax.lax.all_to_all, axis_name=AXIS, split_axis=0, concat_axis=0, tiled=True
    )

    def apply_there(rows: Array, weights: Array, own: Array, *stacks: Array) -> Array:
        rows, weights, own = (swap(a[0])[None] for a in (rows, weights, own))
        return swap(apply(rows, weights, own, *stacks)[0])[None]

    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = weights.reshape(-1, sizes.copies), experts.reshape(-1)
    packed = _pack(chosen, chosen // sizes.experts, sizes.devices, sizes.slots)
    own = (chosen % sizes.experts).reshape(weights.shape)
    y = _apply_packed(apply_there, packed, tokens, weights, own, *stacks)
    return y.reshape(x.shape)


def _own_experts(experts: Array, count: int) -> Array:
    """Renumber experts from the first of this device; `count` for all others."""
    own = experts - jax.lax.axis_index(AXIS) * count
    return jnp.where((own >= 0) & (own < count), own, count)


# --- copies in slots ------------------------------------------------------------------


class _Packed(NamedTuple):
    """Which copy of a token is in each of S slots, and which slot each of M copies has.

    `copy_of_slot` is M for an empty slot, and `slot_of_copy` is S for a copy without a
    slot.
    """

    copy_of_slot: Int[Array, "S"]
    slot_of_copy: Int[Array, "M"]


def _pack(
    chosen: Int[Array, "M"], places: Int[Array, "M"], count: int, slots: int
) -> _Packed:
    """Assign copies, sorted by expert, to `slots` slots for each of `count` places.

    Args:
        chosen: the expert of each copy.
        places: the place of that expert, which ascends with the expert's number;
            `count` or more if it is not among them.
    """
    total = chosen.shape[0]
    order = jnp.argsort(chosen, stable=True)
    ranks = jnp.argsort(order)
    sizes = (places[:, None] == jnp.arange(count)).sum(axis=0)
    starts = jnp.cumsum(sizes) - sizes
    slot = jnp.arange(slots)
    sources = jnp.minimum(starts[:, None] + slot, total - 1)
    copy_of_slot = jnp.where(slot < sizes[:, None], order[sources], total)
    is_here = places < count
    at = ranks - starts[jnp.minimum(places, count - 1)]
    slot_of_copy = jnp.where(is_here & (at < slots), places * slots + at, count * slots)
    return _Packed(copy_of_slot.reshape(-1), slot_of_copy)


def _apply_packed(
    apply: ApplyExperts,
    packed: _Packed,
    tokens: Float[Array, "N D"],
    weights: Float[Array, "N K"],
    own: Int[Array, "N K"],
    *stacks: Array,
) -> Float[Array, "N D"]:
    """Call `apply` on the copies in their slots, as tokens with one expert each.

    The result is the sum over each token's copies that have a slot.
    """
    copies, experts = weights.shape[-1], stacks[0].shape[0]
    slot_of_copy = packed.slot_of_copy.reshape(weights.shape)
    token_of_slot = packed.copy_of_slot // copies  # N where a slot is empty
    rows = _pick(tokens, token_of_slot, slot_of_copy)
    each = _pick(
        weights.reshape(-1, 1), packed.copy_of_slot, packed.slot_of_copy[:, None]
    )
    expert = _rows_at(own.reshape(-1, 1), packed.copy_of_slot, experts)
    y = apply(rows[None], each[None], expert[None], *stacks)[0]
    return _total(y, slot_of_copy, token_of_slot)


def _rows_at(x: Array, index: Array, fill: float = 0) -> Array:
    return x.at[index].get(mode="fill", fill_value=fill)


# Each of these two is the other's transpose. So neither pass needs a scatter-add, which
# is slow, and on GPUs adds in no fixed order.


@jax.custom_vjp
def _pick(
    x: Float[Array, "N D"], index: Int[Array, "S"], inverse: Int[Array, "N K"]
) -> Float[Array, "S D"]:
    """Rows x[index], or 0 where the index is N. `inverse`: a row's places, or S."""
    del inverse
    return _rows_at(x, index)


@jax.custom_vjp
def _total(
    y: Float[Array, "S D"], inverse: Int[Array, "N K"], index: Int[Array, "S"]
) -> Float[Array, "N D"]:
    """The sum of each row's y[inverse], in float32 because it may have many terms."""
    del index
    return _rows_at(y, inverse).sum(axis=1, dtype=jnp.float32).astype(y.dtype)


def _forward(
    function: Callable[..., Array], rows: Array, *how: Array
) -> tuple[Array, tuple[Array, ...]]:
    return function(rows, *how), how


def _backward(
    transpose: Callable[..., Array], how: tuple[Array, Array], gradient: Array
) -> tuple[Array, None, None]:
    return transpose(gradient, *reversed(how)), None, None


_pick.defvjp(functools.partial(_forward, _pick), functools.partial(_backward, _total))
_total.defvjp(functools.partial(_forward, _total), functools.partial(_backward, _pick))
