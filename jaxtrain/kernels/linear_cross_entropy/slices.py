"""A loss head's vocabulary in slices: what each slice holds, reads and writes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Fewer entries a slice than this leave a matrix unit idle, and so does a number of
# them that is no multiple of its tile (measured: 1.4 times the time on an H200).
_FEWEST_ENTRIES = 512
_TILE = 128

Sums = dict[str, Array]  # what a walk over the slices carries, by name


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


ONE_DEVICE = TokenShards()


class Options(NamedTuple):
    """What a head computes and how, as static values; see `api.linear_log_probs`.

    `slices`: how many, each of `width` entries of every shard. `with_direction`: the
    forward pass takes up the direction of each token's log-prob, too.
    """

    vocab_axis: int
    scale: float
    softcap: float | None
    shards: int
    slices: int
    width: int
    with_collision: bool
    with_log_total: bool = False
    with_direction: bool = False
    in_registers: "InRegisters | None" = None
    token_shards: TokenShards = ONE_DEVICE
    width_axes: tuple[str, ...] = ()

    @property
    def of_table(self) -> tuple[int, float]:
        """The axis of the vocabulary, and the scale of logits."""
        return self.vocab_axis, self.scale

    @property
    def sums_apart(self) -> bool:
        """Whether each device's part of the table's gradient is kept until the end."""
        return self.slices > 1 and self.token_shards.constrain is not None


class InRegisters(NamedTuple):
    """That kernels keep the logits: by which tiles, by how many slices backward.

    `chunk`: as `linear_log_probs` was given it.
    """

    tiles: Any
    slices: int
    width: int
    chunk: int | None = None


def choose_chunk(width: int) -> int:
    """Tokens whose logits exist at once, for hidden states of `width`.

    A logit takes 6 bytes of temporaries (float32, and its derivative in bfloat16), an
    entry of the table 2 * width: up to 0.4 * width the former are under 1.2 times the
    latter. More than 512 is no faster, fewer than 64 much slower
    (benchmarks/RESULTS.md).
    """
    fitting = 2 ** int(math.log2(max(1, 0.4 * width)))
    return max(64, min(512, fitting))


def choose_slices(entries: int, wanted: int) -> tuple[int, int]:
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


def walk(slices: int, body: Any, carry: dict[str, Array]) -> dict[str, Array]:
    """`body` over every slice; the only slice needs no loop."""
    if slices == 1:
        return body(jnp.int32(0), carry)

    def step(carry: dict[str, Array], turn: Array) -> tuple[dict[str, Array], None]:
        return body(turn, carry), None

    return jax.lax.scan(step, carry, jnp.arange(slices, dtype=jnp.int32))[0]


def first_of(options: Options, entries: int, turn: Array) -> tuple[Array, Array]:
    """Where in a shard's entries a slice starts, and the first that no other has.

    From the shard's end to its start: the last slice is moved to end with the shard, so
    it overlaps its neighbour. It comes first, counts none of what both have, and what
    it writes there the neighbour then overwrites.
    """
    own = (options.slices - 1 - turn) * options.width
    return jnp.minimum(own, entries - options.width), own


def entries_of(options: Options, vocab: int, turn: Array) -> tuple[Array, Array]:
    """Vocabulary ids [1 W] of a slice, and which of them count in this slice."""
    entries = vocab // options.shards
    start, own = first_of(options, entries, turn)
    within = start + jnp.arange(options.width, dtype=jnp.int32)
    shards = jnp.arange(options.shards, dtype=jnp.int32)[:, None] * entries
    real = jnp.broadcast_to(within >= own, (options.shards, options.width))
    return (shards + within).reshape(1, -1), real.reshape(1, -1)


def take(options: Options, table: Array, turn: Array) -> Array:
    """A slice's entries of `table`, whose axis `vocab_axis` is the vocabulary."""
    if options.slices == 1:
        return table
    split, axis = _split(options, table), options.vocab_axis + 1
    start, _ = first_of(options, split.shape[axis], turn)
    part = jax.lax.dynamic_slice_in_dim(split, start, options.width, axis)
    return _join(options, part)


def put(options: Options, table: Array, part: Array, turn: Array) -> Array:
    """The table with a slice's entries written."""
    part = part.astype(table.dtype)
    if options.slices == 1:
        return part
    split, axis = _split(options, table), options.vocab_axis + 1
    start, _ = first_of(options, split.shape[axis], turn)
    part = _split(options, part)
    split = jax.lax.dynamic_update_slice_in_dim(split, part, start, axis)
    return _join(options, split)


def zero_sums(options: Options, table: Array, dtype: jnp.dtype) -> Array:
    """Zeros for the table's gradient; for that of each device if `sums_apart`."""
    if not options.sums_apart:
        return jnp.zeros(table.shape, dtype)
    shape = (options.token_shards.number, *table.shape)
    return _pin_sums(options, jnp.zeros(shape, dtype))


def _pin_sums(options: Options, sums: Array) -> Array:
    """Each device's part of the table's gradient, on that device."""
    constrain = options.token_shards.constrain
    assert constrain is not None  # as `sums_apart` says
    table_axes = ("vocab", "embed") if options.vocab_axis == 0 else ("embed", "vocab")
    return constrain(sums, ("tokens", *table_axes))


def put_sum(
    options: Options, table: Array, factors: tuple[Array, Array], turn: Array
) -> Array:
    """The table with a slice's sums over tokens written: of factors [M W] and [M D]."""
    left, right = factors
    if not options.sums_apart:
        part = jnp.einsum("ma,mb->ab", left, right, preferred_element_type=jnp.float32)
        return put(options, table, part, turn)
    count = options.token_shards.number
    left, right = (x.reshape(count, -1, x.shape[-1]) for x in factors)
    part = jnp.einsum("nma,nmb->nab", left, right, preferred_element_type=jnp.float32)
    behind = options._replace(vocab_axis=options.vocab_axis + 1)
    return _pin_sums(options, put(behind, table, part, turn))


def _split(options: Options, table: Array) -> Array:
    """The vocabulary's axis as two: shards, and entries of a shard."""
    shape, axis = list(table.shape), options.vocab_axis
    shape[axis : axis + 1] = [options.shards, shape[axis] // options.shards]
    return table.reshape(shape)


def _join(options: Options, table: Array) -> Array:
    shape, axis = list(table.shape), options.vocab_axis
    shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    return table.reshape(shape)


def times_part(options: Options, left: Array, part: Array) -> Array:
    """[M W] of a slice times its entries of the table: [M D] in float32."""
    dims = (((1,), (options.vocab_axis,)), ((), ()))
    return jax.lax.dot_general(left, part, dims, preferred_element_type=jnp.float32)


def logits_of(
    options: Options,
    hidden: Array,
    table: Array,
    adapter: HeadAdapter | None,
    turn: Array,
) -> tuple[Array, Array | float, Array]:
    """Logits [M W] of a slice in float32, and what their derivatives need.

    That is their derivative by the product, and the product before any gain.
    """
    part = take(options, table, turn).astype(hidden.dtype)
    dims = (((1,), (1 - options.vocab_axis,)), ((), ()))
    logits = jax.lax.dot_general(hidden, part, dims, preferred_element_type=jnp.float32)
    if adapter is not None:
        up = take(options._replace(vocab_axis=1), adapter.up, turn)
        logits += jnp.matmul(
            adapter.low, up.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
    plain = logits
    if adapter is not None and adapter.gain is not None:
        gain = take(options._replace(vocab_axis=0), adapter.gain, turn)
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
