"""Per-token log-probs of a linear head, without the logits of the whole batch.

Forward and backward walk over slices of the vocabulary; each slice holds the logits
of every token for a part of the entries, and is thrown away. The alternative, slices
of tokens, would carry a float32 gradient of the whole unembedding through the loop,
and add it up over devices in every turn.

Where devices share the tokens, each has its own part of the unembedding's gradient. A
device that holds the whole unembedding keeps its part until all slices are done, so
that the parts are added up over the links once, and not slice by slice. Within a
`shard_map` (partition.py) a device brings the whole unembedding together, in the type
of the hidden states, and scatters what it has added up of its gradient, in float32.

Where the unembedding is frozen, as under LoRA, the backward pass walks over nothing: a
token's gradient is its cotangent times a direction in the hidden states,
W[target] - sum_v p_v W_v, whose sum the forward pass takes up beside the softmax's, as
attention takes up values. That is two products with the table in place of three. The
unembedding's own gradient is no such thing, for it adds up tokens whose cotangents, and
whose softmax's denominators, are known only at the end.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.linear_cross_entropy import fused

# Fewer entries a slice than this leave a matrix unit idle, and so does a number of
# them that is no multiple of its tile (measured: 1.4 times the time on an H200).
_FEWEST_ENTRIES = 512
_TILE = 128
_NEVER = -1e30  # finite: exp(_NEVER - _NEVER) is 1, not NaN


class HeadAdapter(NamedTuple):
    """What is added to a head's logits: `(h W + low up) * gain`, all before any cap.

    `low`: the hidden states in the adapter's rank, scaled (h A s). `gain`: DoRA's
    change of each entry's length, or None for 1.
    """

    low: Float[Array, "M R"]
    up: Float[Array, "R V"]
    gain: Float[Array, "V"] | None = None


class TokenShards(NamedTuple):
    """How devices share the tokens: `number` of them, one after another, equal shares.

    `constrain` pins an array's layout by the names of its axes, among them "tokens",
    of this number. It is given where every device holds the whole unembedding, and its
    gradient is then added up over devices once. None: slice by slice.
    """

    number: int = 1
    constrain: Callable[[Array, tuple[str, ...]], Array] | None = None


_ONE_DEVICE = TokenShards()


class _Options(NamedTuple):
    vocab_axis: int
    scale: float
    softcap: float | None
    shards: int
    slices: int
    width: int
    with_stats: bool
    with_collision: bool
    with_log_total: bool = False
    with_direction: bool = False
    in_registers: "_InRegisters | None" = None
    token_shards: TokenShards = _ONE_DEVICE
    width_axes: tuple[str, ...] = ()

    @property
    def of_table(self) -> tuple[int, float]:
        return self.vocab_axis, self.scale

    @property
    def sums_apart(self) -> bool:
        """Whether each device's part of the table's gradient is kept until the end."""
        return self.slices > 1 and self.token_shards.constrain is not None


class _InRegisters(NamedTuple):
    """That kernels keep the logits: by which tiles, by how many slices backward."""

    tiles: Any
    slices: int
    width: int


class _Direction(NamedTuple):
    """What a backward pass needs that only scales rows.

    `rows`: d logps / d hidden, each token's. `like`: nothing, in the type of `hidden`.
    """

    rows: Float[Array, "M D"]
    like: Float[Array, "0"]


def linear_log_probs(
    hidden: Float[Array, "M D"],
    unembedding: Float[Array, "V D"] | Float[Array, "D V"],
    targets: Int32[Array, "M"],
    *,
    vocab_axis: Literal[0, 1] = 0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    with_stats: bool = True,
    with_collision: bool = False,
    with_log_total: bool = False,
    adapter: HeadAdapter | None = None,
    shards: int = 1,
    fuse: bool = False,
    device: jax.Device | None = None,
    token_shards: TokenShards = _ONE_DEVICE,
    width_axes: tuple[str, ...] = (),
) -> tuple[Float[Array, "M"], ...]:
    """(logps, entropy, correct, mean_logit) of each token, float32.

    Logits are `hidden @ unembedding` in float32, with what `adapter` adds, times
    `scale`, then `softcap * tanh(logits / softcap)`. `logps`: log softmax at the
    target (nats); `entropy`: of the softmax (nats); `correct`: 1 where the first argmax
    is the target; `mean_logit`: over the vocabulary. `with_collision` appends
    log sum_v p_v^2, and `with_log_total` the log of the softmax's denominator. Without
    `with_stats` all but `logps` are zeros. Only `logps` and that last one carry a
    gradient, to an adapter's parts too.

    `vocab_axis` is 0 for an embedding table [V D] (tied), 1 for a kernel [D V].
    `chunk` bounds memory: a device holds no more than about `chunk * V` logits at once.
    None: 512, less for narrow models, so that all temporaries are under 1.2 times the
    inputs. `shards`: devices that the vocabulary is split over; a slice takes as many
    entries of each, so that none waits and no table is gathered. `token_shards`: those
    that the tokens are split over.
    `fuse`: take kernels that keep logits in registers, where the GPU that the program
    is for has some (fused.py): `device`, or the first local one. A program for several
    devices has to call this within a `shard_map` then. There `width_axes` are the
    mesh's axes that split the unembedding's width, of which each device gives its part.

    Raises:
        ValueError: shapes or options do not fit together.
    """
    chunk = _choose_chunk(hidden.shape[-1]) if chunk is None else chunk
    parts = math.prod(map(jax.lax.axis_size, width_axes))
    _check(hidden, unembedding, targets, (vocab_axis, parts), softcap, chunk)
    vocab, tokens = unembedding.shape[vocab_axis], hidden.shape[0]
    if shards < 1 or vocab % shards:
        raise ValueError(f"shards={shards} does not divide a vocabulary of {vocab}")
    if token_shards.number < 1 or tokens % token_shards.number:
        raise ValueError(
            f"token_shards.number={token_shards.number} does not divide {tokens} tokens"
        )
    own_tokens = tokens // token_shards.number
    slices, width = _choose_slices(vocab // shards, -(-own_tokens // chunk))
    in_registers = None
    plain = adapter is None and softcap is None and scale > 0 and not with_collision
    if fuse and plain and shards == 1:
        in_registers = _keep_in_registers(hidden, vocab, chunk, device)
    if in_registers is not None:
        hidden, targets = fused.pad_rows(hidden, targets)
    options = _Options(
        vocab_axis=vocab_axis,
        scale=scale,
        softcap=softcap,
        shards=shards,
        slices=slices,
        width=width,
        with_stats=with_stats,
        with_collision=with_collision,
        with_log_total=with_log_total,
        in_registers=in_registers,
        token_shards=token_shards,
        width_axes=width_axes,
    )
    outputs = _linear_log_probs(options, hidden, unembedding, targets, adapter)
    if len(hidden) > tokens:
        outputs = tuple(output[:tokens] for output in outputs)
    return (outputs[:5] if with_collision else outputs[:4]) + outputs[5:]


def _keep_in_registers(
    hidden: Array, vocab: int, chunk: int, device: jax.Device | None
) -> _InRegisters | None:
    """How kernels would run this head; None where none serves it."""
    tiles = fused.choose_tiles(hidden, vocab, device)
    if tiles is None:
        return None
    # Of a logit there is only its slope, of 2 bytes in place of 6.
    return _InRegisters(tiles, *_choose_slices(vocab, -(-len(hidden) // (3 * chunk))))


def _choose_chunk(width: int) -> int:
    """Tokens whose logits exist at once, for hidden states of `width`.

    A logit takes 6 bytes of temporaries (float32, and its derivative in bfloat16), an
    entry of the table 2 * width: up to 0.4 * width the former are under 1.2 times the
    latter. More than 512 is no faster, fewer than 64 much slower
    (benchmarks/RESULTS.md).
    """
    fitting = 2 ** int(math.log2(max(1, 0.4 * width)))
    return max(64, min(512, fitting))


def _choose_slices(entries: int, wanted: int) -> tuple[int, int]:
    """How many slices to cut a shard's entries into, near `wanted`, and their width.

    Whole tiles, and of the counts near `wanted` the one whose slices overlap least.
    """
    wanted = max(1, min(wanted, entries // _FEWEST_ENTRIES))
    if wanted == 1:
        return 1, entries
    best = (2 * entries, 0, 0)
    for count in range(wanted, wanted + wanted // 4 + 2):
        width = min(entries, -(-entries // (count * _TILE)) * _TILE)
        count = -(-entries // width)
        best = min(best, (count * width, count, width))
    return best[1:]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_log_probs(
    options: _Options,
    hidden: Array,
    unembedding: Array,
    targets: Array,
    adapter: HeadAdapter | None,
) -> tuple[Array, ...]:
    whole = _gather(options, unembedding, hidden.dtype)
    return _forward(options, hidden, whole, targets, adapter)[0]


def _gather(options: _Options, part: Array, dtype: jnp.dtype) -> Array:
    """The whole unembedding of all devices' parts of its width."""
    if not options.width_axes:
        return part
    axis = 1 - options.vocab_axis
    return jax.lax.all_gather(
        part.astype(dtype), options.width_axes, axis=axis, tiled=True
    )


def _scatter(options: _Options, gradient: Array) -> Array:
    """A device's part of the unembedding's gradient, summed over devices."""
    if not options.width_axes:
        return gradient
    axis = 1 - options.vocab_axis
    return jax.lax.psum_scatter(
        gradient, options.width_axes, scatter_dimension=axis, tiled=True
    )


def _forward(
    options: _Options,
    hidden: Array,
    unembedding: Array,
    targets: Array,
    adapter: HeadAdapter | None,
) -> tuple[tuple[Array, ...], Array]:
    """The outputs, and the log of the softmax's denominator; the table is whole.

    `with_direction`: in its place, the direction of each token's log-prob.
    """
    if options.in_registers is not None and not options.with_direction:
        return _forward_in_registers(options, hidden, unembedding, targets)
    tokens = hidden.shape[0]
    vocab = unembedding.shape[options.vocab_axis]

    def body(turn: Array, carry: dict[str, Array]) -> dict[str, Array]:
        entries, real = _entries(options, vocab, turn)
        logits, chain, _ = _slice_logits(options, hidden, unembedding, adapter, turn)
        logits = jnp.where(real, logits, _NEVER)
        new = dict(carry)
        slice_max = logits.max(axis=-1)
        new["max"] = highest = jnp.maximum(carry["max"], slice_max)
        fade = jnp.exp(carry["max"] - highest)
        weights = jnp.exp(logits - highest[:, None])
        new["sum"] = carry["sum"] * fade + weights.sum(axis=-1)
        hit = real & (entries == targets[:, None])
        new["target"] = carry["target"] + jnp.where(hit, logits, 0.0).sum(axis=-1)
        if options.with_stats:
            finite = jnp.where(real, logits, 0.0)
            new["weighted"] = carry["weighted"] * fade + (weights * finite).sum(-1)
            new["plain"] = carry["plain"] + finite.sum(axis=-1)
            at_max = real & (logits == slice_max[:, None])
            first = jnp.where(at_max, entries, vocab).min(axis=-1)
            tied = jnp.minimum(carry["best"], first)
            new["best"] = jnp.where(
                slice_max > carry["max"],
                first,
                jnp.where(slice_max == carry["max"], tied, carry["best"]),
            )
        if options.with_collision:
            squares = (weights * weights).sum(axis=-1)
            new["squares"] = carry["squares"] * fade * fade + squares
        if options.with_direction:
            # Without the target's, whose share near 1 would cancel W[target].
            others = jnp.where(hit, 0.0, weights)
            new["others"] = carry["others"] * fade + others.sum(axis=-1)
            others = (others * chain).astype(hidden.dtype)
            part = _take(options, unembedding, turn).astype(hidden.dtype)
            pulled = _times_part(options, others, part)
            new["pull"] = carry["pull"] * fade[:, None] + pulled
            slopes = jnp.where(hit, chain, 0.0).sum(axis=-1)
            new["chain"] = carry["chain"] + slopes
        return new

    zeros = jnp.zeros((tokens,), jnp.float32)
    carry = {"max": jnp.full_like(zeros, _NEVER), "sum": zeros, "target": zeros}
    if options.with_stats:
        carry |= {"weighted": zeros, "plain": zeros}
        carry["best"] = jnp.full((tokens,), vocab, jnp.int32)
    if options.with_collision:
        carry["squares"] = zeros
    if options.with_direction:
        carry["pull"] = jnp.zeros(hidden.shape, jnp.float32)
        carry |= {"others": zeros, "chain": zeros}
    end = _walk(options.slices, body, carry)

    log_total = end["max"] + jnp.log(end["sum"])
    logps = end["target"] - log_total
    entropy = correct = mean_logit = collision = zeros
    if options.with_stats:
        entropy = log_total - end["weighted"] / end["sum"]
        correct = (end["best"] == targets).astype(jnp.float32)
        mean_logit = end["plain"] / vocab
    if options.with_collision:
        collision = jnp.log(end["squares"]) - 2 * jnp.log(end["sum"])
    last = (log_total,) if options.with_log_total else ()
    if options.with_direction:
        own = jnp.take(unembedding, targets, axis=options.vocab_axis)
        own = own if options.vocab_axis == 0 else own.T
        own = own.astype(hidden.dtype).astype(jnp.float32)
        direction = (end["others"] * end["chain"])[:, None] * own - end["pull"]
        direction /= end["sum"][:, None]
        return (logps, entropy, correct, mean_logit, collision), direction
    return (logps, entropy, correct, mean_logit, collision, *last), log_total


def _forward_in_registers(
    options: _Options, hidden: Array, unembedding: Array, targets: Array
) -> tuple[tuple[Array, ...], Array]:
    """The same by kernels, over the whole vocabulary at once."""
    assert options.in_registers is not None
    tiles = options.in_registers.tiles
    sums = fused.sum_logits(tiles, hidden, unembedding, targets, options.of_table)
    log_total = sums.highest + jnp.log(sums.total)
    logps = sums.target - log_total
    zeros = jnp.zeros_like(logps)
    stats = (zeros,) * 4
    if options.with_stats:
        # The mean of products is the product with the mean.
        mean = unembedding.astype(hidden.dtype).mean(options.vocab_axis, jnp.float32)
        exact = jax.lax.Precision.HIGHEST  # GPUs round factors to TF32 otherwise
        mean_logit = jnp.matmul(hidden.astype(jnp.float32), mean, precision=exact)
        mean_logit *= options.scale
        entropy = log_total - sums.weighted / sums.total
        stats = (entropy, sums.is_first, mean_logit, zeros)
    last = (log_total,) if options.with_log_total else ()
    return (logps, *stats, *last), log_total


def _forward_rule(
    options: _Options, hidden: Any, unembedding: Any, targets: Any, adapter: Any
) -> tuple[tuple[Array, ...], tuple]:
    """The outputs and what the backward pass needs; notes which inputs it serves."""
    wanted = (hidden.perturbed or None, unembedding.perturbed or None)
    table = _gather(options, unembedding.value, hidden.value.dtype)
    inputs = (hidden.value, table, targets.value)
    added = adapter and HeadAdapter(*(leaf and leaf.value for leaf in adapter))
    only_hidden = hidden.perturbed and not unembedding.perturbed and adapter is None
    if only_hidden and options.shards == 1 and not options.with_log_total:
        options = options._replace(with_direction=True)
        outputs, direction = _forward(options, *inputs, None)
        like = jnp.zeros((0,), hidden.value.dtype)
        return outputs, (_Direction(direction, like),)
    outputs, log_total = _forward(options, *inputs, added)
    # None and True differ in tree structure, so they stay static.
    flags = tuple(None if flag is None else () for flag in wanted)
    # The gradient is summed in the type of the part, whatever the whole one has.
    like = jnp.zeros((0,), unembedding.value.dtype) if options.width_axes else table
    return outputs, (*inputs, added, log_total, like, flags)


def _backward_rule(
    options: _Options, residuals: tuple, cotangents: tuple[Any, ...]
) -> tuple[Array | None, Array | None, None, HeadAdapter | None]:
    """d logps / d logits is onehot(target) - softmax(logits); of log_total, softmax."""
    if isinstance(residuals[0], _Direction):
        rows, like = residuals[0]
        if isinstance(cotangents[0], SymbolicZero):
            return None, None, None, None
        return (rows * cotangents[0][:, None]).astype(like.dtype), None, None, None
    hidden, unembedding, targets, adapter, log_total, like, flags = residuals
    wants_hidden, wants_table = (flag is not None for flag in flags)
    gradient, of_total = cotangents[0], None
    if options.with_log_total:
        gradient, of_total = _as_array(gradient), _as_array(cotangents[5])
    wants_any = wants_hidden or wants_table or adapter is not None
    if isinstance(gradient, SymbolicZero) or not wants_any:
        return None, None, None, None
    vocab = unembedding.shape[options.vocab_axis]
    if options.in_registers is not None:
        tiles, slices, width = options.in_registers
        options = options._replace(slices=slices, width=width)
    by_column = options._replace(vocab_axis=1)
    by_row = options._replace(vocab_axis=0)

    def slopes_in_registers(turn: Array) -> Array:
        start, own = _first(options, vocab, turn)
        share = gradient if of_total is None else gradient - of_total
        slope = fused.describe_slope(
            targets - start, log_total, gradient, share, own - start
        )
        part = _take(options, unembedding, turn).astype(hidden.dtype)
        return fused.make_slopes(tiles, hidden, part, slope, options.of_table)

    def slopes(turn: Array, new: dict[str, Array]) -> Array:
        """The slopes of a slice's logits; puts an adapter's gradients into `new`."""
        if options.in_registers is not None:
            return slopes_in_registers(turn)
        entries, real = _entries(options, vocab, turn)
        logits, chain, plain = _slice_logits(
            options, hidden, unembedding, adapter, turn
        )
        hit = entries == targets[:, None]
        slope = hit.astype(jnp.float32) - jnp.exp(logits - log_total[:, None])
        slope = jnp.where(real, slope * chain, 0.0) * gradient[:, None]
        if of_total is not None:
            share = jnp.exp(logits - log_total[:, None])
            slope += jnp.where(real, share * chain, 0.0) * of_total[:, None]
        if adapter is not None and adapter.gain is not None:
            own = (slope * plain).sum(axis=0)
            new["gain"] = _put(by_row, new["gain"], own, turn)
            slope *= _take(by_row, adapter.gain, turn)
        return slope.astype(hidden.dtype)

    def body(turn: Array, carry: dict[str, Array]) -> dict[str, Array]:
        new = dict(carry)
        slope = slopes(turn, new)
        if adapter is not None:
            up = _take(by_column, adapter.up, turn).astype(hidden.dtype)
            new["low"] = carry["low"] + jnp.matmul(
                slope, up.T, preferred_element_type=jnp.float32
            )
            d_up = jnp.matmul(adapter.low.T, slope, preferred_element_type=jnp.float32)
            new["up"] = _put(by_column, carry["up"], d_up, turn)
        if wants_hidden:
            part = _take(options, unembedding, turn).astype(hidden.dtype)
            new["hidden"] = carry["hidden"] + _times_part(options, slope, part)
        if wants_table:
            left, right = (
                (slope, hidden) if options.vocab_axis == 0 else (hidden, slope)
            )
            new["table"] = _put_sum(options, carry["table"], (left, right), turn)
        return new

    carry = {}
    if wants_hidden:
        carry["hidden"] = jnp.zeros(hidden.shape, jnp.float32)
    if wants_table:
        carry["table"] = _zero_sums(options, unembedding, like.dtype)
    if adapter is not None:
        carry["low"] = jnp.zeros(adapter.low.shape, jnp.float32)
        carry["up"] = jnp.zeros_like(adapter.up)
        if adapter.gain is not None:
            carry["gain"] = jnp.zeros_like(adapter.gain)
    end = _walk(options.slices, body, carry)
    d_hidden = d_adapter = None
    if wants_hidden:
        d_hidden = end["hidden"].astype(hidden.dtype)
    if adapter is not None:
        d_adapter = HeadAdapter(
            end["low"].astype(adapter.low.dtype), end["up"], end.get("gain")
        )
    d_table = end.get("table")
    if d_table is not None and options.sums_apart:
        d_table = d_table.sum(axis=0)
    if d_table is not None:
        d_table = _scatter(options, d_table)
    return d_hidden, d_table, None, d_adapter


_linear_log_probs.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _as_array(cotangent: Any) -> Array:
    """A cotangent that is zero everywhere as an array."""
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros(cotangent.shape, jnp.float32)
    return cotangent


def _walk(slices: int, body: Any, carry: dict[str, Array]) -> dict[str, Array]:
    """`body` over every slice; the only slice needs no loop."""
    if slices == 1:
        return body(jnp.int32(0), carry)

    def step(carry: dict[str, Array], turn: Array) -> tuple[dict[str, Array], None]:
        return body(turn, carry), None

    return jax.lax.scan(step, carry, jnp.arange(slices, dtype=jnp.int32))[0]


def _first(options: _Options, entries: int, turn: Array) -> tuple[Array, Array]:
    """Where in a shard's entries a slice starts, and the first that no other has.

    From the shard's end to its start: the last slice is moved to end with the shard, so
    it overlaps its neighbour. It comes first, counts none of what both have, and what
    it writes there the neighbour then overwrites.
    """
    own = (options.slices - 1 - turn) * options.width
    return jnp.minimum(own, entries - options.width), own


def _entries(options: _Options, vocab: int, turn: Array) -> tuple[Array, Array]:
    """Vocabulary ids [1 W] of a slice, and which of them count in this slice."""
    entries = vocab // options.shards
    start, own = _first(options, entries, turn)
    within = start + jnp.arange(options.width, dtype=jnp.int32)
    shards = jnp.arange(options.shards, dtype=jnp.int32)[:, None] * entries
    real = jnp.broadcast_to(within >= own, (options.shards, options.width))
    return (shards + within).reshape(1, -1), real.reshape(1, -1)


def _take(options: _Options, table: Array, turn: Array) -> Array:
    """A slice's entries of `table`, whose axis `vocab_axis` is the vocabulary."""
    if options.slices == 1:
        return table
    split, axis = _split(options, table), options.vocab_axis + 1
    start, _ = _first(options, split.shape[axis], turn)
    part = jax.lax.dynamic_slice_in_dim(split, start, options.width, axis)
    return _join(options, part)


def _put(options: _Options, table: Array, part: Array, turn: Array) -> Array:
    """The table with a slice's entries written."""
    part = part.astype(table.dtype)
    if options.slices == 1:
        return part
    split, axis = _split(options, table), options.vocab_axis + 1
    start, _ = _first(options, split.shape[axis], turn)
    part = _split(options, part)
    split = jax.lax.dynamic_update_slice_in_dim(split, part, start, axis)
    return _join(options, split)


def _zero_sums(options: _Options, table: Array, dtype: jnp.dtype) -> Array:
    """Zeros for the table's gradient; for that of each device if `sums_apart`."""
    if not options.sums_apart:
        return jnp.zeros(table.shape, dtype)
    shape = (options.token_shards.number, *table.shape)
    return _pin_sums(options, jnp.zeros(shape, dtype))


def _pin_sums(options: _Options, sums: Array) -> Array:
    """Each device's part of the table's gradient, on that device."""
    constrain = options.token_shards.constrain
    assert constrain is not None  # as `sums_apart` says
    table_axes = ("vocab", "embed") if options.vocab_axis == 0 else ("embed", "vocab")
    return constrain(sums, ("tokens", *table_axes))


def _put_sum(
    options: _Options, table: Array, factors: tuple[Array, Array], turn: Array
) -> Array:
    """The table with a slice's sums over tokens written: of factors [M W] and [M D]."""
    left, right = factors
    if not options.sums_apart:
        part = jnp.einsum("ma,mb->ab", left, right, preferred_element_type=jnp.float32)
        return _put(options, table, part, turn)
    count = options.token_shards.number
    left, right = (x.reshape(count, -1, x.shape[-1]) for x in factors)
    part = jnp.einsum("nma,nmb->nab", left, right, preferred_element_type=jnp.float32)
    behind = options._replace(vocab_axis=options.vocab_axis + 1)
    return _pin_sums(options, _put(behind, table, part, turn))


def _split(options: _Options, table: Array) -> Array:
    """The vocabulary's axis as two: shards, and entries of a shard."""
    shape, axis = list(table.shape), options.vocab_axis
    shape[axis : axis + 1] = [options.shards, shape[axis] // options.shards]
    return table.reshape(shape)


def _join(options: _Options, table: Array) -> Array:
    shape, axis = list(table.shape), options.vocab_axis
    shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    return table.reshape(shape)


def _times_part(options: _Options, left: Array, part: Array) -> Array:
    """[M W] of a slice times its entries of the table: [M D] in float32."""
    dims = (((1,), (options.vocab_axis,)), ((), ()))
    return jax.lax.dot_general(left, part, dims, preferred_element_type=jnp.float32)


def _slice_logits(
    options: _Options,
    hidden: Array,
    table: Array,
    adapter: HeadAdapter | None,
    turn: Array,
) -> tuple[Array, Array | float, Array]:
    """Logits [M W] of a slice in float32, and what their derivatives need.

    That is their derivative by the product, and the product before any gain.
    """
    part = _take(options, table, turn).astype(hidden.dtype)
    dims = (((1,), (1 - options.vocab_axis,)), ((), ()))
    logits = jax.lax.dot_general(hidden, part, dims, preferred_element_type=jnp.float32)
    if adapter is not None:
        up = _take(options._replace(vocab_axis=1), adapter.up, turn)
        logits += jnp.matmul(
            adapter.low, up.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
    plain = logits
    if adapter is not None and adapter.gain is not None:
        gain = _take(options._replace(vocab_axis=0), adapter.gain, turn)
        logits = logits * gain
    chain: Array | float = options.scale
    if options.scale != 1.0:
        logits = logits * options.scale
    if options.softcap is not None:
        bent = jnp.tanh(logits / options.softcap)
        logits = options.softcap * bent
        chain = 1 - bent * bent
        if options.scale != 1.0:
            chain = chain * options.scale
    return logits, chain, plain


def _check(
    hidden: Array,
    unembedding: Array,
    targets: Array,
    of_table: tuple[int, int],
    softcap: float | None,
    chunk: int,
) -> None:
    """`of_table`: its axis of the vocabulary, and how many parts its width has."""
    vocab_axis, parts = of_table
    if vocab_axis not in (0, 1):
        raise ValueError(f"vocab_axis={vocab_axis} must be 0 ([V D]) or 1 ([D V])")
    if (
        hidden.ndim != 2
        or unembedding.shape[1 - vocab_axis] * parts != (hidden.shape[-1])
    ):
        raise ValueError(
            f"hidden {hidden.shape} and unembedding {unembedding.shape} do not fit "
            f"with vocab_axis={vocab_axis}: flatten hidden to [M D], check the flag"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {targets.shape} must have shape {hidden.shape[:1]}")
    if chunk < 1:
        raise ValueError(f"chunk={chunk} must be at least 1")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be above 0; pass None for no cap")
