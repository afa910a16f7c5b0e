"""What all blocked attention kernels share: padding, schedule and gradient rule."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.reference import zero_padding
from jaxtrain.kernels.attention.schedule import Schedule, count_visits, make_schedule

# Kernels work in base 2: exp2 is the machine's own exponential.
LOG2_E = math.log2(math.e)
# Replaces minus infinity, because the difference of two infinities would be NaN.
NEVER = -1e30


class Options(NamedTuple):
    """Static options of a kernel, in addition to the shapes.

    `offset`: index of the first query among the keys. `has_padding`: some ids may be 0,
    and the rows of such tokens may hold any value, including NaN.
    """

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    interpret: bool
    offset: int = 0
    has_padding: bool = True


class Ids(NamedTuple):
    """The segment of each query and of each key.

    `prompts`: the segment of a shared prompt that a query also reads (0: none).
    """

    segments: Int32[Array, "B T"]
    prompts: Int32[Array, "B T"] | None
    keys: Int32[Array, "B S"]


class Saved(NamedTuple):
    """What a backward pass reads beside the ids and the schedule.

    `lse`: the base-2 log of the softmax's denominator, -NEVER for a query without keys.
    `delta`: the sum of out * d_out over V, the width of values.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K V"]
    lse: Float[Array, "B N T"]
    delta: Float[Array, "B N T"]
    d_out: Float[Array, "B T N V"]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One implementation: its forward and backward pass and the tiles they work on.

    `forward(options, q, k, v, ids, schedule) -> (out, lse)`, the latter as in `Saved`;
    `backward(options, saved, ids, schedule) -> (dq, dk, dv)`.
    """

    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]
    choose_blocks: Callable[[int], tuple[int, int]]
    choose_width: Callable[[int], int]


def attention_blocked(
    kernels: Kernels,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    *,
    softcap: float | None,
    scale: float,
    sinks: Float[Array, "N"] | None = None,
    schedule: Schedule | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N V"]:
    """Run attention with `kernels`, after padding rows and heads to whole tiles."""
    length, keys = q.shape[1], k.shape[1]
    has_padding = mask.keys is not None
    mask = _with_keys(mask, q.shape[0], length, keys)
    padded = padded_mask(kernels, mask, q.shape[0], length)
    if schedule is None:
        schedule = plan(kernels, mask, q.shape[0], length)
    assert padded.segment_ids is not None and padded.key_ids is not None

    def fill(x: Array, ids: Array) -> Array:
        tail = (0, ids.shape[1] - x.shape[1])
        width_tail = (0, kernels.choose_width(x.shape[3]) - x.shape[3])
        return jnp.pad(x, [(0, 0), tail, (0, 0), width_tail])

    options = Options(
        mask.causal, mask.window, softcap, scale, interpret, mask.offset, has_padding
    )
    ids = Ids(padded.segment_ids, padded.prompt_ids, padded.key_ids)
    out = _attend(
        kernels,
        options,
        fill(q, ids.segments),
        fill(k, ids.keys),
        fill(v, ids.keys),
        sinks,
        ids,
        schedule,
    )
    # Rows of padding are zero here, because no key has their ids.
    return out[:, :length, :, : v.shape[3]]


def plan(
    kernels: Kernels, mask: Mask, batch: int, length: int, keys: int | None = None
) -> Schedule:
    """Make the schedule of a batch; layers with the same mask can share it.

    Of `length` queries, and so many `keys` where these are others.
    """
    mask = _with_keys(mask, batch, length, length if keys is None else keys)
    padded = padded_mask(kernels, mask, batch, length)
    assert padded.segment_ids is not None and padded.key_ids is not None
    block_q, block_k = _choose_blocks(kernels, mask, length)
    lengths = (padded.segment_ids.shape[1], padded.key_ids.shape[1])
    return make_schedule(padded, batch, *lengths, block_q=block_q, block_k=block_k)


def _with_keys(mask: Mask, batch: int, length: int, keys: int) -> Mask:
    """The mask, with ids of the keys where there are not as many as queries."""
    if keys == length or mask.key_ids is not None:
        return mask
    return dataclasses.replace(mask, key_ids=jnp.ones((batch, keys), jnp.int32))


def padded_mask(kernels: Kernels, mask: Mask, batch: int, length: int) -> Mask:
    """Return the mask with explicit segments, padded to whole blocks."""
    block_q, block_k = _choose_blocks(kernels, mask, length)
    segments, prompts, keys = mask.segment_ids, mask.prompt_ids, mask.key_ids
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    if keys is None:
        keys = segments
        block_q = block_k = math.lcm(block_q, block_k)

    def fill(ids: Array, block: int) -> Array:
        return jnp.pad(ids, [(0, 0), (0, -ids.shape[1] % block)])

    return dataclasses.replace(
        mask,
        segment_ids=fill(segments, block_q),
        prompt_ids=None if prompts is None else fill(prompts, block_q),
        key_ids=fill(keys, block_k),
    )


def _choose_blocks(kernels: Kernels, mask: Mask, length: int) -> tuple[int, int]:
    """Block sizes for the queries and for the keys; there may be more keys."""
    keys = length if mask.key_ids is None else mask.key_ids.shape[1]
    return kernels.choose_blocks(length)[0], kernels.choose_blocks(keys)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernels: Kernels, options: Options, *inputs: Any) -> Array:
    return _attend_forward(kernels, options, *inputs)[0]


def _attend_forward(
    kernels: Kernels,
    options: Options,
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    ids: Ids,
    schedule: Schedule,
) -> tuple[Array, tuple]:
    if options.has_padding:
        # Here, not outside: the kernels leave 0 as the derivatives of padding, which
        # need no pass of their own over dq, dk and dv then.
        (q,) = zero_padding(ids.segments, q)
        k, v = zero_padding(ids.keys, k, v)
    out, lse = _run_forward(kernels, options, q, k, v, ids, schedule)
    if sinks is not None:
        out, lse = _add_sinks(out, lse, sinks)
    # With both kept, rematerialization need not run the kernel again.
    out = checkpoint_name(out, "attention_residuals")
    lse = checkpoint_name(lse, "attention_residuals")
    return out, (q, k, v, sinks, out, lse, ids, schedule)


def _add_sinks(
    out: Float[Array, "B T N V"], lse: Float[Array, "B N T"], sinks: Float[Array, "N"]
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Add one more logit per head to the softmax denominators of a kernel's result.

    A sink has no value vector, so `out` is only multiplied by the weight that remains
    for the keys. The backward kernels compute weights from the new `lse` and therefore
    need not know about sinks. For a query without keys `lse` does not change, because
    it is larger than any sum.
    """
    logits = sinks.astype(jnp.float32)[:, None] * LOG2_E
    share = jax.nn.sigmoid((lse - logits) / LOG2_E).swapaxes(1, 2)[..., None]
    out = (out.astype(jnp.float32) * share).astype(out.dtype)
    return out, jnp.logaddexp2(lse, logits)


def _sink_gradient(
    lse: Float[Array, "B N T"], delta: Float[Array, "B N T"], sinks: Float[Array, "N"]
) -> Float[Array, "N"]:
    """-sum p delta for each head, where p is the weight of its sink."""
    weights = jnp.exp2(sinks.astype(jnp.float32)[:, None] * LOG2_E - lse)
    return -(weights * delta).sum(axis=(0, 2)).astype(sinks.dtype)


# Functions of their own, so that a program in which each layer calls them holds, and
# compiles, one of each: lowering a kernel takes a second.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_forward(kernels: Kernels, options: Options, *arrays: Any) -> Any:
    return kernels.forward(options, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_backward(kernels: Kernels, options: Options, *arrays: Any) -> Any:
    return kernels.backward(options, *arrays)


def _attend_backward(
    kernels: Kernels, options: Options, residuals: tuple, d_out: Array
) -> tuple[Array, Array, Array, Array | None, None, None]:
    q, k, v, sinks, out, lse, ids, schedule = residuals
    if options.has_padding:  # which may send back NaN, and 0 * NaN would leak it
        (d_out,) = zero_padding(ids.segments, d_out)
    delta = jnp.einsum("BTNH,BTNH->BNT", out, d_out, preferred_element_type=jnp.float32)
    saved = Saved(q, k, v, lse, delta, d_out)
    dq, dk, dv = _run_backward(kernels, options, saved, ids, schedule)
    d_sinks = None if sinks is None else _sink_gradient(lse, delta, sinks)
    return dq, dk, dv, d_sinks, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def id_rows(ids: Ids) -> tuple[Array, Array, Array]:
    """(query ids, prompt ids, key ids): equal where a query may read a key.

    Queries of padding get -1, which no key has; keys of padding keep 0, which no query
    has. So kernels compare twice and test nothing else.
    """
    segments = ids.segments
    prompts = segments if ids.prompts is None else ids.prompts
    padding = segments == 0
    prompts = jnp.where(padding | (prompts == 0), -1, prompts)
    return jnp.where(padding, -1, segments), prompts, ids.keys


def estimate_cost(
    options: Options,
    arrays: tuple[Array, Array, Array],
    lengths: tuple[int, int],
    blocks: tuple[int, int],
    *,
    products: tuple[int, int],
) -> dict[str, int]:
    """Estimate the cost of one pass, as the arguments of Pallas's `CostEstimate`.

    Tiles that only the ids mask out are counted too, since ids are not known yet.

    Args:
        arrays: q, k and v of one device; the last axis is the width of a head.
        lengths, blocks: number of tokens and size of a block, of queries and of keys.
        products: how many matrix products the kernel computes for each visited tile:
            those as wide as a key, and those as wide as a value.
    """
    q, k, v = arrays

    rule = Mask(causal=options.causal, window=options.window, offset=options.offset)
    width = q.shape[-1]
    tile = blocks[0] * blocks[1]
    entries = (
        q.size // (lengths[0] * width) * count_visits(rule, lengths, blocks) * tile
    )
    return {
        "flops": 2 * entries * (products[0] * width + products[1] * v.shape[-1]),
        "transcendentals": entries,
        "bytes_accessed": (q.size + k.size) * sum(products) * q.dtype.itemsize,
    }


def scale_scores(options: Options, raw: Array) -> Array:
    """Turn raw products q k into scaled and capped logits in units of log 2."""
    if options.softcap is None:
        return raw * (options.scale * LOG2_E)
    bent = jnp.tanh(raw * (options.scale / options.softcap))
    return bent * (options.softcap * LOG2_E)


def bend_slope(options: Options, logits: Array, slope: Array) -> Array:
    """Turn d loss / d logit into d loss / d raw product, without the factor `scale`.

    The caller multiplies its sums by `scale` once, at the end.
    """
    if options.softcap is None:
        return slope
    bent = logits * (1 / (options.softcap * LOG2_E))
    return slope * (1 - bent * bent)
