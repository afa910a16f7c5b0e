"""The chunked delta rule for NVIDIA GPUs through Pallas' Triton lowering.

What does not need the state is done for all chunks at once: a program each finds how
tokens weigh on each other. Then programs walk over the chunks of a row with some
columns of a head's state in registers, those of `Tiles.values` values; columns need
nothing of each other. The backward pass walks once more for the state before each chunk
and back for the gradient of the state behind it, and knowing both, finds all other
gradients again with a program for each chunk.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from jaxtrain.kernels.delta_rule.chunks import (
    EXACT,
    LENGTH,
    Arithmetic,
    Chunk,
    Prepared,
    advance,
    fade,
    relate,
)
from jaxtrain.kernels.delta_rule.passes import Passes, sum_over_group

# Three products of 10 mantissa bits each: nearly float32, on the tensor cores.
THREE_PARTS = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What may be chosen of a kernel: values at a time, warps and stages."""

    values: int = 64
    warps: int = 4
    stages: int = 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the kernels are compiled, without a change of what they compute."""

    weigh: Tiles = Tiles()
    walk: Tiles = Tiles()
    gradients: Tiles = Tiles(values=32, warps=8)
    precision: Any = THREE_PARTS
    interpret: bool = False

    @property
    def plain(self) -> Arithmetic:
        """Products without derivative rules, which Triton's lowering does not take."""
        return Arithmetic(self.precision, has_rules=False)


def refuse_widths(key_width: int, value_width: int) -> str | None:
    """Why heads of these widths cannot be served."""
    for width in (key_width, value_width):
        if width not in (16, 32, 64, 128, 256):
            return f"a head's width is {width}, not a power of 2 from 16 to 256"
    return None


def make_passes(settings: Settings | None = None, *, interpret: bool = False) -> Passes:
    """The kernels; interpreted, they run anywhere."""
    settings = settings or Settings()
    if interpret:
        settings = dataclasses.replace(
            settings, precision=EXACT.precision, interpret=True
        )
    return Passes(
        functools.partial(_forward, settings),
        functools.partial(_states, settings),
        functools.partial(_backward, settings),
    )


class _Specs:
    """Shapes, and the blocks of a program (s, n, b) or, by chunk, (c, n, b).

    That is columns s or chunk c of head n of row b.
    """

    def __init__(self, rows: Chunk, values: int) -> None:
        self.batch, self.length, self.heads, self.value_width = rows.v.shape
        self.count, self.dtype = self.length // LENGTH, rows.v.dtype
        kv_heads, self.key_width = rows.k.shape[2:]
        self.columns = min(values, self.value_width)
        self.group = self.heads // kv_heads

    def features(
        self, width: int, *, shared: bool = False, split: bool = False
    ) -> pl.BlockSpec:
        """The block of a walk that holds features of all tokens of one head.

        `shared`: the heads of a group read the same. `split`: a walk has a part of the
        columns.
        """
        group = self.group if shared else 1
        return pl.BlockSpec(
            (None, self.length, None, width),
            lambda s, n, b: (b, 0, jax.lax.div(n, jnp.int32(group)), s if split else 0),
        )

    def tokens(self, *tail: int, per_head: bool = True) -> pl.BlockSpec:
        """The block of a walk that holds numbers of all tokens, chunk by chunk."""
        return pl.BlockSpec(
            (None, None, self.count, LENGTH, *tail),
            lambda s, n, b: (b, n if per_head else 0, 0, 0) + (0,) * len(tail),
        )

    def state(self, *count: int) -> pl.BlockSpec:
        """The block of a walk that holds columns of a state, or of each chunk's."""
        return pl.BlockSpec(
            (None, None, *count, self.key_width, self.columns),
            lambda s, n, b: (b, n, *(0,) * len(count), 0, s),
        )

    @property
    def walk(self) -> tuple[int, int, int]:
        return self.value_width // self.columns, self.heads, self.batch

    @property
    def walked_rows(self) -> list[pl.BlockSpec]:
        key = self.features(self.key_width, shared=True)
        value = self.features(self.columns, split=True)
        return [key, key, value, *[self.tokens()] * 2, self.tokens(per_head=False)]

    def chunk_features(self, width: int, *, shared: bool = False) -> pl.BlockSpec:
        """The tokens of one chunk of a head."""
        group = self.group if shared else 1
        return pl.BlockSpec(
            (None, LENGTH, None, width),
            lambda c, n, b: (b, c, jax.lax.div(n, jnp.int32(group)), 0),
        )

    def chunk(self, *sizes: int, per_head: bool = True) -> pl.BlockSpec:
        """What belongs to one chunk of a head."""
        return pl.BlockSpec(
            (None, None, None, *sizes),
            lambda c, n, b: (b, n if per_head else 0, c, *(0,) * len(sizes)),
        )

    @property
    def by_chunk(self) -> tuple[int, int, int]:
        return self.count, self.heads, self.batch

    @property
    def chunk_rows(self) -> list[pl.BlockSpec]:
        key = self.chunk_features(self.key_width, shared=True)
        value = self.chunk_features(self.value_width)
        row = self.chunk(1, LENGTH)
        return [key, key, value, row, row, self.chunk(1, LENGTH, per_head=False)]

    def of_chunks(self, *sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        """An array of something for each chunk of each head."""
        shape = (self.batch, self.heads, self.count, *sizes)
        return jax.ShapeDtypeStruct(shape, dtype)

    @property
    def states(self) -> jax.ShapeDtypeStruct:
        """A state for each chunk, in the type that products take it in."""
        return self.of_chunks(self.key_width, self.value_width, dtype=self.dtype)

    @property
    def one_state(self) -> jax.ShapeDtypeStruct:
        shape = (self.batch, self.heads, self.key_width, self.value_width)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def head_features(self, width: int) -> jax.ShapeDtypeStruct:
        shape = (self.batch, self.length, self.heads, width)
        return jax.ShapeDtypeStruct(shape, self.dtype)


def _call(
    kernel: Callable[..., None],
    name: str,
    settings: Settings,
    tiles: Tiles,
    **specs: Any,
) -> Callable[..., Any]:
    """`pl.pallas_call` with what all kernels have in common."""
    return pl.pallas_call(
        functools.partial(kernel, settings),
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        interpret=settings.interpret,
        name=f"delta_rule_{name}",
        **specs,
    )


def _weigh(settings: Settings, rows: Chunk) -> tuple[Array, Array]:
    """X, the inverse, and (q k) d of all chunks: two arrays [B N C L L]."""
    specs = _Specs(rows, settings.walk.values)
    weights = specs.of_chunks(LENGTH, LENGTH, dtype=specs.dtype)
    inputs = [
        spec for i, spec in enumerate(specs.chunk_rows) if i != Chunk._fields.index("v")
    ]
    return _call(
        _weigh_kernel,
        "weigh",
        settings,
        settings.weigh,
        grid=specs.by_chunk,
        in_specs=inputs,
        out_specs=[specs.chunk(LENGTH, LENGTH)] * 2,
        out_shape=[weights] * 2,
    )(rows.q, rows.k, *map(_with_row_axis, rows[3:]))


def _weigh_kernel(settings: Settings, *refs: Any) -> None:
    *inputs, inverse_ref, scores_ref = refs
    q, k, *tokens = (ref[...] for ref in inputs)
    system, scores_ref[...] = relate(Chunk(q, k, q, *tokens), settings.plain)
    inverse = settings.plain.invert_unit_lower(system)
    inverse_ref[...] = inverse.astype(inverse_ref.dtype)


def _forward(settings: Settings, rows: Chunk, state: Array) -> tuple[Array, Array]:
    specs = _Specs(rows, settings.walk.values)
    return _call(
        _forward_kernel,
        "forward",
        settings,
        settings.walk,
        grid=specs.walk,
        in_specs=[*specs.walked_rows, *[specs.tokens(LENGTH)] * 2, specs.state()],
        out_specs=[specs.features(specs.columns, split=True), specs.state()],
        out_shape=[specs.head_features(specs.value_width), specs.one_state],
    )(*rows, *_weigh(settings, rows), state)


def _forward_kernel(settings: Settings, *refs: Any) -> None:
    *inputs, first_ref, out_ref, last_ref = refs

    def visit(c: Array, state: Array) -> Array:
        state, out = advance(state, *_read(inputs, c), settings.plain)
        out_ref[_tokens(c), :] = out.astype(out_ref.dtype)
        return state

    count = inputs[3].shape[0]
    last_ref[...] = jax.lax.fori_loop(0, count, visit, first_ref[...])


def _states(settings: Settings, rows: Chunk, state: Array) -> tuple[Array, ...]:
    """The weights of all chunks, and the state before each, [B N C H V]."""
    specs, weights = _Specs(rows, settings.walk.values), _weigh(settings, rows)
    states = _call(
        _states_kernel,
        "states",
        settings,
        settings.walk,
        grid=specs.walk,
        in_specs=[*specs.walked_rows, *[specs.tokens(LENGTH)] * 2, specs.state()],
        out_specs=specs.state(specs.count),
        out_shape=specs.states,
    )(*rows, *weights, state)
    return (*weights, states)


def _states_kernel(settings: Settings, *refs: Any) -> None:
    *inputs, first_ref, states_ref = refs

    def visit(c: Array, state: Array) -> Array:
        states_ref[c, :, :] = state.astype(states_ref.dtype)
        return advance(state, *_read(inputs, c), settings.plain)[0]

    jax.lax.fori_loop(0, inputs[3].shape[0], visit, first_ref[...])


def _backward(
    settings: Settings,
    rows: Chunk,
    found: tuple[Array, ...],
    d_out: Array,
    d_last: Array,
) -> tuple[Array, ...]:
    *weights, states = found
    specs = _Specs(rows, settings.walk.values)
    d_states, d_first = _call(
        _state_gradients_kernel,
        "state_gradients",
        settings,
        settings.walk,
        grid=specs.walk,
        in_specs=[
            *specs.walked_rows,
            *[specs.tokens(LENGTH)] * 2,
            specs.features(specs.columns, split=True),
            specs.state(),
        ],
        out_specs=[specs.state(specs.count), specs.state()],
        out_shape=[specs.states, specs.one_state],
    )(*rows, *weights, d_out, d_last)
    key, value = map(specs.chunk_features, (specs.key_width, specs.value_width))
    row, state = specs.chunk(1, LENGTH), specs.chunk(*states.shape[3:])
    of_keys, of_tokens = (
        specs.head_features(specs.key_width),
        specs.of_chunks(1, LENGTH),
    )
    dq, dk, dv, d_decays, d_betas = _call(
        _gradients_kernel,
        "gradients",
        settings,
        settings.gradients,
        grid=specs.by_chunk,
        in_specs=[
            *specs.chunk_rows,
            *[specs.chunk(LENGTH, LENGTH)] * 2,
            state,
            state,
            value,
        ],
        out_specs=[key, key, value, row, row],
        out_shape=[
            of_keys,
            of_keys,
            specs.head_features(specs.value_width),
            of_tokens,
            of_tokens,
        ],
    )(*rows[:3], *map(_with_row_axis, rows[3:]), *weights, states, d_states, d_out)
    dq, dk = (sum_over_group(x, rows.k.shape[2]) for x in (dq, dk))
    return dq, dk, dv, d_decays[:, :, :, 0], d_betas[:, :, :, 0], d_first


def _state_gradients_kernel(settings: Settings, *refs: Any) -> None:
    """The gradient of the state behind each chunk, from the last chunk on."""
    *inputs, d_out_ref, d_last_ref, d_states_ref, d_first_ref = refs
    count = inputs[3].shape[0]

    def visit(step: Array, d_state: Array) -> Array:
        c = count - 1 - step
        d_states_ref[c, :, :] = d_state.astype(d_states_ref.dtype)
        chunk, prepared = _read(inputs, c)

        def run(state: Array) -> tuple[Array, Array]:
            return advance(state, chunk, prepared, Arithmetic(settings.precision))

        # It is the same for every state.
        _, transpose = jax.vjp(run, jnp.zeros_like(d_state))
        d_out = d_out_ref[_tokens(c), :].astype(jnp.float32)
        return transpose((d_state, d_out))[0]

    d_first_ref[...] = jax.lax.fori_loop(0, count, visit, d_last_ref[...])


def _gradients_kernel(settings: Settings, *refs: Any) -> None:
    """All gradients of one chunk but that of the state, some values at a time."""
    *inputs, inverse_ref, scores_ref = refs[:8]
    states_ref, d_states_ref, d_out_ref = refs[8:11]
    dq_ref, dk_ref, dv_ref, d_decays_ref, d_betas_ref = refs[11:]
    arithmetic = Arithmetic(settings.precision)
    q, k = inputs[0][...], inputs[1][...]
    tokens = [ref[...] for ref in inputs[3:]]
    chunk = Chunk(q, k, q, *tokens)
    inverse = inverse_ref[...]
    known = (q, k, _solve(inverse, chunk), scores_ref[...], *fade(chunk))
    columns = min(settings.gradients.values, dv_ref.shape[1])

    def visit(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        some = pl.ds(i * columns, columns)

        def run(v: Array, q: Array, k: Array, *prepared: Array) -> tuple[Array, Array]:
            state = states_ref[:, some].astype(jnp.float32)
            own = Chunk(q, k, v, *tokens)
            return advance(state, own, Prepared(*prepared), arithmetic)

        _, transpose = jax.vjp(run, inputs[2][:, some], *known)
        d_state, d_out = (
            ref[:, some].astype(jnp.float32) for ref in (d_states_ref, d_out_ref)
        )
        dv, *others = transpose((d_state, d_out))
        dv_ref[:, some] = dv.astype(dv_ref.dtype)
        return tuple(
            total + other.astype(jnp.float32)
            for total, other in zip(totals, others, strict=True)
        )

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in known)
    totals = jax.lax.fori_loop(0, dv_ref.shape[1] // columns, visit, zeros)

    def relate_and_fade(q: Array, k: Array, decays: Array, betas: Array) -> tuple:
        own = Chunk(q, k, q, decays, betas, chunk.resets)
        return (*relate(own, arithmetic), *fade(own))

    # The inverse is known: that of A = X^-1 - I is -X' (the gradient of X) X'.
    d_solve, d_scores, *d_fades = totals[2:]
    multiply, d_inverse = settings.plain.multiply, d_solve * chunk.betas
    left = multiply(inverse.T, d_inverse.astype(inverse.dtype))
    d_system = -multiply(left.astype(inverse.dtype), inverse.T)
    _, transpose = jax.vjp(relate_and_fade, q, k, chunk.decays, chunk.betas)
    d_known = (d_system, d_scores.astype(scores_ref.dtype), *d_fades)
    dq, dk, d_decays, d_betas = transpose(d_known)
    d_betas += jnp.sum(d_solve * inverse.astype(jnp.float32), axis=0, keepdims=True)
    dq_ref[...] = (totals[0] + dq.astype(jnp.float32)).astype(dq_ref.dtype)
    dk_ref[...] = (totals[1] + dk.astype(jnp.float32)).astype(dk_ref.dtype)
    d_decays_ref[...], d_betas_ref[...] = d_decays, d_betas


def _read(refs: Sequence[Any], c: Array) -> tuple[Chunk, Prepared]:
    """Chunk c of a walk, and what is known of it: rows first, then weights."""
    q, k, v = (ref[_tokens(c), :] for ref in refs[:3])
    decays, betas, resets = (ref[pl.ds(c, 1), :] for ref in refs[3:6])
    chunk = Chunk(q, k, v, decays, betas, resets)
    inverse, scores = (ref[c, :, :] for ref in refs[6:])
    return chunk, Prepared(_solve(inverse, chunk), scores, *fade(chunk))


def _solve(inverse: Array, chunk: Chunk) -> Array:
    """X beta, of which kernels are given X."""
    return (inverse.astype(jnp.float32) * chunk.betas).astype(inverse.dtype)


def _with_row_axis(x: Array) -> Array:
    """[B N C L] -> [B N C 1 L]."""
    return x[:, :, :, None]


def _tokens(c: Array) -> Any:
    return pl.ds(c * LENGTH, LENGTH)
