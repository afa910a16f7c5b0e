"""What every blocked kernel shares: padding, the schedule, the derivative rule."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.partition import (
    IDS,
    KEY,
    QUERY,
    SCHEDULE,
    STAT,
    run_on_shards,
)
from jaxtrain.kernels.attention.reference import zero_padding
from jaxtrain.kernels.attention.schedule import Schedule, make_schedule

# Kernels work in base 2: exp2 is the machine's own exponential.
LOG2_E = math.log2(math.e)
# Stands for minus infinity where a difference of two of them must not be NaN.
NEVER = -1e30


class Options(NamedTuple):
    """What a kernel is compiled for, beside shapes."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    interpret: bool


class Ids(NamedTuple):
    """Segment of each token, and the prompt's segment it reads besides (0: none)."""

    segments: Int32[Array, "B T"]
    prompts: Int32[Array, "B T"] | None


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One implementation: its two passes and the tiles they work on.

    `forward(options, q, k, v, ids, schedule) -> (out, lse)`; `backward(options, q, k,
    v, lse, delta, d_out, ids, schedule) -> (dq, dk, dv)`. `lse` and `delta` are
    [B N T]: the base-2 log of the softmax's denominator (-NEVER for a query without
    keys) and the sum of out * d_out over H.
    """

    name: str
    forward: Callable[..., tuple[Array, Array]]
    backward: Callable[..., tuple[Array, Array, Array]]
    choose_blocks: Callable[[int], tuple[int, int]]
    choose_width: Callable[[int], int]
    # Whether the interpreter calls back to the host, which no mesh can cut.
    interpreted_on_host: bool = False


def attention_blocked(
    kernels: Kernels,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Mask,
    *,
    softcap: float | None,
    scale: float,
    schedule: Schedule | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Attention by `kernels`, rows and heads padded to whole tiles."""
    batch, length, _, width = q.shape
    if k.shape[1] != length:
        raise NotImplementedError(f"{kernels.name} refuses cross attention; use 'xla'")
    padded = padded_mask(kernels, mask, batch, length)
    if schedule is None:
        schedule = plan(kernels, mask, batch, length)
    assert padded.segment_ids is not None
    full_length = padded.segment_ids.shape[1]
    q, k, v = zero_padding(mask.segment_ids, q, k, v)
    tail = [(0, 0), (0, full_length - length), (0, 0)]
    tail.append((0, kernels.choose_width(width) - width))
    q, k, v = (jnp.pad(x, tail) for x in (q, k, v))
    options = Options(mask.causal, mask.window, softcap, scale, interpret)
    ids = Ids(padded.segment_ids, padded.prompt_ids)
    out = _attend(kernels, options, q, k, v, ids, schedule)
    # Rows of padding are zeros here: no key answers their ids.
    return out[:, :length, :, :width]


def plan(kernels: Kernels, mask: Mask, batch: int, length: int) -> Schedule:
    """The schedule of a batch, to be shared by the layers that use the same mask."""
    padded = padded_mask(kernels, mask, batch, length)
    assert padded.segment_ids is not None
    block_q, block_k = kernels.choose_blocks(length)
    return make_schedule(
        padded, batch, padded.segment_ids.shape[1], block_q=block_q, block_k=block_k
    )


def padded_mask(kernels: Kernels, mask: Mask, batch: int, length: int) -> Mask:
    """The mask with explicit segments, its rows filled up to whole blocks."""
    tail = -length % math.lcm(*kernels.choose_blocks(length))
    segments, prompts = mask.segment_ids, mask.prompt_ids
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    segments = jnp.pad(segments, [(0, 0), (0, tail)])
    if prompts is not None:
        prompts = jnp.pad(prompts, [(0, 0), (0, tail)])
    return dataclasses.replace(mask, segment_ids=segments, prompt_ids=prompts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    kernels: Kernels,
    options: Options,
    q: Array,
    k: Array,
    v: Array,
    ids: Ids,
    schedule: Schedule,
) -> Array:
    return _attend_forward(kernels, options, q, k, v, ids, schedule)[0]


def _attend_forward(
    kernels: Kernels,
    options: Options,
    q: Array,
    k: Array,
    v: Array,
    ids: Ids,
    schedule: Schedule,
) -> tuple[Array, tuple]:
    lists, rest, structure = _flatten(ids, schedule)

    def forward(q: Array, k: Array, v: Array, *lists: Array) -> tuple[Array, ...]:
        ids, schedule = jax.tree.unflatten(structure, lists)
        out, lse = kernels.forward(options, _join(q), k, v, ids, schedule)
        return _split(out, k), _split(lse, k, axis=1)

    out, lse = _run(
        forward,
        ("forward", kernels, options, structure),
        (_split(q, k), k, v, *lists),
        (QUERY, KEY, KEY, *rest),
        (QUERY, STAT),
    )
    return _join(out), (q, k, v, out, lse, ids, schedule)


def _attend_backward(
    kernels: Kernels, options: Options, residuals: tuple, d_out: Array
) -> tuple[Array, Array, Array, None, None]:
    q, k, v, out, lse, ids, schedule = residuals
    lists, rest, structure = _flatten(ids, schedule)
    # What padding sends back may be NaN, and 0 * NaN would leak it.
    d_out = _split(zero_padding(ids.segments, d_out)[0], k)
    delta = jnp.einsum(
        "BTKGH,BTKGH->BKGT", out, d_out, preferred_element_type=jnp.float32
    )

    def backward(
        q: Array,
        k: Array,
        v: Array,
        lse: Array,
        delta: Array,
        d_out: Array,
        *lists: Array,
    ) -> tuple[Array, ...]:
        ids, schedule = jax.tree.unflatten(structure, lists)
        stats = (_join(lse, axis=1), _join(delta, axis=1))
        dq, dk, dv = kernels.backward(
            options, _join(q), k, v, *stats, _join(d_out), ids, schedule
        )
        return _split(dq, k), dk, dv

    dq, dk, dv = _run(
        backward,
        ("backward", kernels, options, structure),
        (_split(q, k), k, v, lse, delta, d_out, *lists),
        (QUERY, KEY, KEY, STAT, STAT, QUERY, *rest),
        (QUERY, KEY, KEY),
    )
    return _join(dq), dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _run(
    kernel: Callable[..., tuple[Array, ...]],
    key: tuple,
    operands: tuple[Array, ...],
    axes: tuple[str, ...],
    result_axes: tuple[str, ...],
) -> tuple[Array, ...]:
    _, kernels, options, _ = key
    if options.interpret and kernels.interpreted_on_host:
        return kernel(*operands)
    return run_on_shards(kernel, key, operands, axes, result_axes)


def _flatten(
    ids: Ids, schedule: Schedule
) -> tuple[list[Array], tuple[str, ...], jax.tree_util.PyTreeDef]:
    """The arrays of both, the names of their axes, and how to put them together."""
    arrays, structure = jax.tree.flatten((ids, schedule))
    return arrays, (IDS,) * (len(arrays) - len(SCHEDULE)) + SCHEDULE, structure


def _split(x: Array, k: Array, axis: int = 2) -> Array:
    """N query heads as K groups of N // K: the groups of a device follow its keys."""
    shape = (*x.shape[:axis], k.shape[2], -1, *x.shape[axis + 1 :])
    return x.reshape(shape)


def _join(x: Array, axis: int = 2) -> Array:
    """K groups of query heads as N heads."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def id_rows(ids: Ids) -> tuple[Array, Array, Array]:
    """(query ids, prompt ids, key ids): equal where a query may read a key.

    Queries of padding get -1, which no key has; keys of padding keep 0, which no query
    has. So kernels compare twice and test nothing else.
    """
    segments = ids.segments
    prompts = segments if ids.prompts is None else ids.prompts
    padding = segments == 0
    prompts = jnp.where(padding | (prompts == 0), -1, prompts)
    return jnp.where(padding, -1, segments), prompts, segments


def scale_scores(options: Options, raw: Array) -> Array:
    """Raw products q k to logits in units of log 2: scaled, capped."""
    if options.softcap is None:
        return raw * (options.scale * LOG2_E)
    bent = jnp.tanh(raw * (options.scale / options.softcap))
    return bent * (options.softcap * LOG2_E)


def bend_slope(options: Options, logits: Array, slope: Array) -> Array:
    """d loss / d raw product, but for the factor `scale`, from d loss / d logit.

    The sums over a walk take the factor once, at their end.
    """
    if options.softcap is None:
        return slope
    bent = logits * (1 / (options.softcap * LOG2_E))
    return slope * (1 - bent * bent)
