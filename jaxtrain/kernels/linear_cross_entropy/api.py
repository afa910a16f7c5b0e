"""Per-token log-probs of a linear head, without the logits of the whole batch.

Forward and backward walk over slices of the vocabulary; each slice holds the logits
of every token for a part of the entries, and is thrown away. The alternative, slices
of tokens, would carry a float32 gradient of the whole unembedding through the loop,
and add it up over devices in every turn.

Where devices share the tokens, each has its own part of the unembedding's gradient. A
device that holds the whole unembedding keeps its part until all slices are done, so
that the parts are added up over the links once, and not slice by slice. Within a
`shard_map` (partition.py) a device brings the whole unembedding together, in the type
of the hidden states, and scatters what it has added up of its gradient, in its own.

Where the unembedding is frozen, as under LoRA, the backward pass walks over nothing: a
token's gradient is its cotangent times a direction in the hidden states,
W[target] - sum_v p_v W_v, whose sum the forward pass takes up beside the softmax's, as
attention takes up values. That is two products with the table in place of three. The
unembedding's own gradient is no such thing, for it adds up tokens whose cotangents, and
whose softmax's denominators, are known only at the end.

With kernels that keep logits in registers, a walk over the tokens does so too, and if
told beforehand what each log-prob counts in the loss, it takes up the unembedding's
gradient as well (one_walk.py).
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.linear_cross_entropy import fused, one_walk, slices
from jaxtrain.kernels.linear_cross_entropy.slices import (
    ONE_DEVICE,
    HeadAdapter,
    InRegisters,
    Options,
    Sums,
    TokenShards,
)

_NEVER = -1e30  # finite: exp(_NEVER - _NEVER) is 1, not NaN


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
    with_collision: bool = False,
    with_log_total: bool = False,
    adapter: HeadAdapter | None = None,
    shards: int = 1,
    fuse: bool = False,
    device: jax.Device | None = None,
    token_shards: TokenShards = ONE_DEVICE,
    width_axes: tuple[str, ...] = (),
    shares: Float[Array, "M"] | None = None,
) -> tuple[Float[Array, "M"], ...]:
    """(logps, entropy, correct, mean_logit) of each token, float32.

    Logits are `hidden @ unembedding` in float32, with what `adapter` adds, times
    `scale`, then `softcap * tanh(logits / softcap)`. `logps`: log softmax at the
    target (nats); `entropy`: of the softmax (nats); `correct`: 1 where the first argmax
    is the target; `mean_logit`: over the vocabulary. `with_collision` appends
    log sum_v p_v^2, and `with_log_total` the log of the softmax's denominator. Only
    `logps` and that last one carry a gradient, to an adapter's parts too. XLA leaves
    out what of this is not used.

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
    `shares`: what each log-prob counts in the loss, up to a factor that all have in
    common. Then the last output is the sum [1] of shares times log-probs, and it alone
    need carry a gradient: the kernels compute it on the way forward.

    Raises:
        ValueError: shapes or options do not fit together.
    """
    own_chunk = chunk
    chunk = slices.choose_chunk(hidden.shape[-1]) if chunk is None else chunk
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
    count, width = slices.choose_slices(vocab // shards, -(-own_tokens // chunk))
    in_registers = None
    plain = adapter is None and softcap is None and scale > 0 and not with_collision
    if fuse and plain and shards == 1:
        in_registers = _keep_in_registers(hidden, vocab, chunk, device)
    if in_registers is not None:
        in_registers = in_registers._replace(chunk=own_chunk)
        hidden, targets = fused.pad_rows(hidden, targets)
    options = Options(
        vocab_axis=vocab_axis,
        scale=scale,
        softcap=softcap,
        shards=shards,
        slices=count,
        width=width,
        with_collision=with_collision,
        with_log_total=with_log_total,
        in_registers=in_registers,
        token_shards=token_shards,
        width_axes=width_axes,
    )
    if shares is not None and not with_log_total and _walks_once(options, hidden):
        padded = jnp.pad(shares, (0, len(hidden) - tokens))
        *scores, total = _weighed(options, hidden, unembedding, targets, padded)
        return (*(score[:tokens] for score in scores), total)
    outputs = _linear_log_probs(options, hidden, unembedding, targets, adapter)
    if len(hidden) > tokens:
        outputs = tuple(output[:tokens] for output in outputs)
    outputs = (outputs[:5] if with_collision else outputs[:4]) + outputs[5:]
    if shares is not None:
        outputs += ((outputs[0] * shares).sum()[None],)
    return outputs


def _keep_in_registers(
    hidden: Array, vocab: int, chunk: int, device: jax.Device | None
) -> InRegisters | None:
    """How kernels would run this head; None where none serves it."""
    tiles = fused.choose_tiles(hidden, vocab, device)
    if tiles is None:
        return None
    # Of a logit there is only its slope, of 2 bytes in place of 6.
    return InRegisters(
        tiles, *slices.choose_slices(vocab, -(-len(hidden) // (3 * chunk)))
    )


def _walks_once(options: Options, hidden: Array) -> bool:
    """Whether one walk over the tokens serves: float16 has too few exponents."""
    return options.in_registers is not None and hidden.dtype == jnp.bfloat16


class _Inputs(NamedTuple):
    hidden: Float[Array, "M D"]
    unembedding: Float[Array, "V D"] | Float[Array, "D V"]
    targets: Int32[Array, "M"]
    adapter: HeadAdapter | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_log_probs(options: Options, *inputs: Any) -> tuple[Array, ...]:
    given = _Inputs(*inputs)
    table = _gather(options, given.unembedding, given.hidden.dtype)
    return _forward(options, given._replace(unembedding=table))[0]


def _gather(options: Options, part: Array, dtype: jnp.dtype) -> Array:
    """The whole unembedding of all devices' parts of its width."""
    if not options.width_axes:
        return part
    axis = 1 - options.vocab_axis
    return jax.lax.all_gather(
        part.astype(dtype), options.width_axes, axis=axis, tiled=True
    )


def _scatter(options: Options, gradient: Array) -> Array:
    """A device's part of the unembedding's gradient, summed over devices."""
    if not options.width_axes:
        return gradient
    axis = 1 - options.vocab_axis
    return jax.lax.psum_scatter(
        gradient, options.width_axes, scatter_dimension=axis, tiled=True
    )


def _forward(options: Options, inputs: _Inputs) -> tuple[tuple[Array, ...], Array]:
    """The outputs, and the log of the softmax's denominator; the table is whole.

    `with_direction`: in its place, the direction of each token's log-prob.
    """
    if options.in_registers is not None and not options.with_direction:
        return _forward_in_registers(options, inputs)
    hidden, unembedding, targets, _ = inputs
    vocab = unembedding.shape[options.vocab_axis]
    start = _start(options, hidden, vocab)
    add = functools.partial(_add_slice, options, inputs)
    end = slices.walk(options.slices, add, start)
    log_total = end["max"] + jnp.log(end["sum"])
    logps = end["target"] - log_total
    entropy = log_total - end["weighted"] / end["sum"]
    correct = (end["best"] == targets).astype(jnp.float32)
    mean_logit = end["plain"] / vocab
    collision = start["sum"]  # zeros
    if options.with_collision:
        collision = jnp.log(end["squares"]) - 2 * jnp.log(end["sum"])
    outputs = (logps, entropy, correct, mean_logit, collision)
    if options.with_direction:
        own = jnp.take(unembedding, targets, axis=options.vocab_axis)
        own = own if options.vocab_axis == 0 else own.T
        own = own.astype(hidden.dtype).astype(jnp.float32)
        direction = (end["others"] * end["chain"])[:, None] * own - end["pull"]
        return outputs, direction / end["sum"][:, None]
    return outputs + (log_total,) * options.with_log_total, log_total


def _start(options: Options, hidden: Array, vocab: int) -> Sums:
    """The sums of each token before the first slice."""
    zeros = jnp.zeros((hidden.shape[0],), jnp.float32)
    carry = {"max": jnp.full_like(zeros, _NEVER), "sum": zeros, "target": zeros}
    carry |= {"weighted": zeros, "plain": zeros}
    carry["best"] = jnp.full(zeros.shape, vocab, jnp.int32)
    if options.with_collision:
        carry["squares"] = zeros
    if options.with_direction:
        carry["pull"] = jnp.zeros(hidden.shape, jnp.float32)
        carry |= {"others": zeros, "chain": zeros}
    return carry


def _add_slice(options: Options, inputs: _Inputs, turn: Array, carry: Sums) -> Sums:
    """The sums after one more slice of the logits."""
    hidden, unembedding, targets, adapter = inputs
    vocab = unembedding.shape[options.vocab_axis]
    entries, real = slices.entries_of(options, vocab, turn)
    logits, chain, _ = slices.logits_of(options, hidden, unembedding, adapter, turn)
    logits = jnp.where(real, logits, _NEVER)
    new = dict(carry)
    slice_max = logits.max(axis=-1)
    new["max"] = highest = jnp.maximum(carry["max"], slice_max)
    fade = jnp.exp(carry["max"] - highest)
    weights = jnp.exp(logits - highest[:, None])
    new["sum"] = carry["sum"] * fade + weights.sum(axis=-1)
    hit = real & (entries == targets[:, None])
    new["target"] = carry["target"] + jnp.where(hit, logits, 0.0).sum(axis=-1)
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
        part = slices.take(options, unembedding, turn).astype(hidden.dtype)
        pulled = slices.times_part(options, others, part)
        new["pull"] = carry["pull"] * fade[:, None] + pulled
        slopes = jnp.where(hit, chain, 0.0).sum(axis=-1)
        new["chain"] = carry["chain"] + slopes
    return new


def _forward_in_registers(
    options: Options, inputs: _Inputs
) -> tuple[tuple[Array, ...], Array]:
    """The same by kernels, over the whole vocabulary at once."""
    hidden, unembedding, targets, _ = inputs
    assert options.in_registers is not None
    tiles = options.in_registers.tiles
    sums = fused.sum_logits(tiles, hidden, unembedding, targets, options.of_table)
    log_total = sums.highest + jnp.log(sums.total)
    logps = sums.target - log_total
    zeros, mean_logit = jnp.zeros_like(logps), _mean_logit(options, hidden, unembedding)
    entropy = log_total - sums.weighted / sums.total
    last = (log_total,) if options.with_log_total else ()
    return (logps, entropy, sums.is_first, mean_logit, zeros, *last), log_total


def _mean_logit(options: Options, hidden: Array, table: Array) -> Array:
    """The mean of products is the product with the mean."""
    mean = table.astype(hidden.dtype).mean(options.vocab_axis, jnp.float32)
    exact = jax.lax.Precision.HIGHEST  # GPUs round factors to TF32 otherwise
    logits = jnp.matmul(hidden.astype(jnp.float32), mean, precision=exact)
    return logits * options.scale


def _walk_once(
    options: Options, inputs: _Inputs, shares: Array | None, *, trained: bool
) -> tuple[tuple[Array, ...], one_walk.Found]:
    """The first four outputs, and the gradients by the hidden states and the table."""
    hidden, table, targets, _ = inputs
    assert options.in_registers is not None
    tiles, _, _, chunk = options.in_registers
    vocab = table.shape[options.vocab_axis]
    rows = one_walk.choose_rows(len(hidden), vocab, chunk, trained=trained)
    head = one_walk.Head(
        hidden, table.astype(hidden.dtype), targets, shares, options.of_table
    )
    found = one_walk.walk(tiles, head, rows, trained=trained)
    mean_logit = _mean_logit(options, hidden, table)
    return (found.logps, found.entropy, found.correct, mean_logit), found


def _forward_rule(
    options: Options, hidden: Any, unembedding: Any, targets: Any, adapter: Any
) -> tuple[tuple[Array, ...], tuple]:
    """The outputs and what the backward pass needs; notes which inputs it serves."""
    added = adapter and HeadAdapter(*(leaf and leaf.value for leaf in adapter))
    table = _gather(options, unembedding.value, hidden.value.dtype)
    inputs = _Inputs(hidden.value, table, targets.value, added)
    only_hidden = hidden.perturbed and not unembedding.perturbed and adapter is None
    if only_hidden and options.shards == 1 and not options.with_log_total:
        if _walks_once(options, inputs.hidden):
            outputs, found = _walk_once(options, inputs, None, trained=False)
            outputs += (jnp.zeros_like(found.logps),)
            direction = found.hidden
        else:
            options = options._replace(with_direction=True)
            outputs, direction = _forward(options, inputs)
        like = jnp.zeros((0,), hidden.value.dtype)
        return outputs, (_Direction(direction, like),)
    outputs, log_total = _forward(options, inputs)
    # None and () differ in tree structure, so they stay static.
    flags = tuple(() if each.perturbed else None for each in (hidden, unembedding))
    # The gradient is summed in the type of the part, whatever the whole one has.
    like = jnp.zeros((0,), unembedding.value.dtype) if options.width_axes else table
    return outputs, (inputs, log_total, like, flags)


def _backward_rule(
    options: Options, residuals: tuple, cotangents: tuple[Any, ...]
) -> tuple[Array | None, Array | None, None, HeadAdapter | None]:
    """d logps / d logits is onehot(target) - softmax(logits); of log_total, softmax."""
    gradient, of_total = cotangents[0], None
    if isinstance(residuals[0], _Direction):
        rows, like = residuals[0]
        if isinstance(gradient, SymbolicZero):
            return None, None, None, None
        return (rows * gradient[:, None]).astype(like.dtype), None, None, None
    inputs, log_total, like, flags = residuals
    wanted = tuple(flag is not None for flag in flags)
    if options.with_log_total:
        gradient, of_total = _as_array(gradient), _as_array(cotangents[5])
    wants_any = any(wanted) or inputs.adapter is not None
    if isinstance(gradient, SymbolicZero) or not wants_any:
        return None, None, None, None
    if options.in_registers is not None:
        _, count, width, _ = options.in_registers
        options = options._replace(slices=count, width=width)
    gradients = _Gradients(
        *(options, inputs, wanted, like.dtype, log_total, gradient, of_total)
    )
    return gradients.finish(
        slices.walk(options.slices, gradients.add, gradients.start())
    )


class _Gradients(NamedTuple):
    """Gradients that are added up as the backward pass walks over the slices.

    `wanted`: whether that of the hidden states is, and that of the unembedding, which
    is added up in `table_dtype`.
    `gradient`, `of_total`: the cotangents of log-probs and of `log_total`, if it has
    one.
    """

    options: Options
    inputs: _Inputs
    wanted: tuple[bool, ...]
    table_dtype: jnp.dtype
    log_total: Float[Array, "M"]
    gradient: Float[Array, "M"]
    of_total: Float[Array, "M"] | None

    def start(self) -> Sums:
        """Zeros for all that is wanted."""
        adapter, carry = self.inputs.adapter, {}
        if self.wanted[0]:
            carry["hidden"] = jnp.zeros(self.inputs.hidden.shape, jnp.float32)
        if self.wanted[1]:
            carry["table"] = slices.zero_sums(
                self.options, self.inputs.unembedding, self.table_dtype
            )
        if adapter is not None:
            carry["low"] = jnp.zeros(adapter.low.shape, jnp.float32)
            carry["up"] = jnp.zeros_like(adapter.up)
            if adapter.gain is not None:
                carry["gain"] = jnp.zeros_like(adapter.gain)
        return carry

    def add(self, turn: Array, carry: Sums) -> Sums:
        """Take a slice in."""
        options, new = self.options, dict(carry)
        hidden, unembedding, _, adapter = self.inputs
        slope = self._slopes(turn, new)
        if adapter is not None:
            by_column = options._replace(vocab_axis=1)
            up = slices.take(by_column, adapter.up, turn).astype(hidden.dtype)
            new["low"] = carry["low"] + jnp.matmul(
                slope, up.T, preferred_element_type=jnp.float32
            )
            d_up = jnp.matmul(adapter.low.T, slope, preferred_element_type=jnp.float32)
            new["up"] = slices.put(by_column, carry["up"], d_up, turn)
        if self.wanted[0]:
            part = slices.take(options, unembedding, turn).astype(hidden.dtype)
            new["hidden"] = carry["hidden"] + slices.times_part(options, slope, part)
        if self.wanted[1]:
            factors = (slope, hidden) if options.vocab_axis == 0 else (hidden, slope)
            new["table"] = slices.put_sum(options, carry["table"], factors, turn)
        return new

    def _slopes(self, turn: Array, new: Sums) -> Array:
        """The slopes of a slice's logits; puts an adapter's gain's into `new`."""
        options = self.options
        hidden, unembedding, targets, adapter = self.inputs
        if options.in_registers is not None:
            return self._slopes_in_registers(options.in_registers.tiles, turn)
        entries, real = slices.entries_of(options, self._vocab, turn)
        logits, chain, plain = slices.logits_of(
            options, hidden, unembedding, adapter, turn
        )
        hit = entries == targets[:, None]
        slope = hit.astype(jnp.float32) - jnp.exp(logits - self.log_total[:, None])
        slope = jnp.where(real, slope * chain, 0.0) * self.gradient[:, None]
        if self.of_total is not None:
            share = jnp.exp(logits - self.log_total[:, None])
            slope += jnp.where(real, share * chain, 0.0) * self.of_total[:, None]
        if adapter is not None and adapter.gain is not None:
            by_row = options._replace(vocab_axis=0)
            own = (slope * plain).sum(axis=0)
            new["gain"] = slices.put(by_row, new["gain"], own, turn)
            slope *= slices.take(by_row, adapter.gain, turn)
        return slope.astype(hidden.dtype)

    def _slopes_in_registers(self, tiles: Any, turn: Array) -> Array:
        options, gradient = self.options, self.gradient
        hidden, unembedding, targets, _ = self.inputs
        start, own = slices.first_of(options, self._vocab, turn)
        share = gradient if self.of_total is None else gradient - self.of_total
        slope = fused.describe_slope(
            targets - start, self.log_total, gradient, share, own - start
        )
        part = slices.take(options, unembedding, turn).astype(hidden.dtype)
        return fused.make_slopes(tiles, hidden, part, slope, options.of_table)

    @property
    def _vocab(self) -> int:
        return self.inputs.unembedding.shape[self.options.vocab_axis]

    def finish(
        self, end: Sums
    ) -> tuple[Array | None, Array | None, None, HeadAdapter | None]:
        """The gradients of the inputs, after the last slice."""
        hidden, _, _, adapter = self.inputs
        d_hidden = d_adapter = None
        if self.wanted[0]:
            d_hidden = end["hidden"].astype(hidden.dtype)
        if adapter is not None:
            d_adapter = HeadAdapter(
                end["low"].astype(adapter.low.dtype), end["up"], end.get("gain")
            )
        d_table = end.get("table")
        if d_table is not None and self.options.sums_apart:
            d_table = d_table.sum(axis=0)
        if d_table is not None:
            d_table = _scatter(self.options, d_table)
        return d_hidden, d_table, None, d_adapter


_linear_log_probs.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighed(
    options: Options, hidden: Array, unembedding: Array, targets: Array, shares: Array
) -> tuple[Array, ...]:
    """The first four outputs, and the sum [1] of shares times log-probs."""
    outputs = _linear_log_probs(options, hidden, unembedding, targets, None)[:4]
    return (*outputs, (outputs[0] * shares).sum()[None])


def _weighed_forward(
    options: Options, hidden: Any, unembedding: Any, targets: Any, shares: Any
) -> tuple[tuple[Array, ...], tuple[Array, Array | None]]:
    """The outputs and both gradients of the sum."""
    table = _gather(options, unembedding.value, hidden.value.dtype)
    inputs = _Inputs(hidden.value, table, targets.value, None)
    trained = unembedding.perturbed
    outputs, found = _walk_once(options, inputs, shares.value, trained=trained)
    of_table = None
    if found.table is not None:
        of_table = _scatter(options, found.table.astype(unembedding.value.dtype))
    total = (found.logps * shares.value).sum()[None]
    return (*outputs, total), (found.hidden, of_table)


def _weighed_backward(
    options: Options, gradients: tuple[Array, Array | None], cotangents: tuple[Any, ...]
) -> tuple[Array | None, Array | None, None, None]:
    of_total, (of_hidden, of_table) = cotangents[4], gradients
    if isinstance(of_total, SymbolicZero):
        return None, None, None, None
    of_hidden = (of_hidden * of_total).astype(of_hidden.dtype)
    if of_table is not None:
        of_table = (of_table * of_total).astype(of_table.dtype)
    return of_hidden, of_table, None, None


_weighed.defvjp(_weighed_forward, _weighed_backward, symbolic_zeros=True)


def _as_array(cotangent: Any) -> Array:
    """A cotangent that is zero everywhere as an array."""
    if isinstance(cotangent, SymbolicZero):
        return jnp.zeros(cotangent.shape, jnp.float32)
    return cotangent


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
    width = unembedding.shape[1 - vocab_axis] * parts
    if hidden.ndim != 2 or width != hidden.shape[-1]:
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
