"""The chunked delta rule for TPU through Pallas Mosaic.

A program takes one chunk of one head; the state stays in fast memory while the last
axis of the grid walks over the chunks of a row, in the backward pass from the last.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from jaxtrain.kernels.delta_rule.chunks import LENGTH, Chunk, run_chunk
from jaxtrain.kernels.delta_rule.passes import Passes, sum_over_group


class _Specs:
    """How the blocks of program (b, n, c) lie: chunk c, or c-th from the last."""

    def __init__(self, rows: Chunk, backwards: bool = False) -> None:
        batch, length, self.heads, self.value_width = rows.v.shape
        self.batch, self.count = batch, length // LENGTH
        kv_heads, self.key_width = rows.k.shape[2:]
        group, last = self.heads // kv_heads, self.count - 1
        self.grid = (batch, self.heads, self.count)

        def chunk(c: Array) -> Array:
            return last - c if backwards else c

        def features(width: int, group: int) -> pl.BlockSpec:
            return pl.BlockSpec(
                (None, None, LENGTH, width),
                lambda b, n, c: (b, jax.lax.div(n, group), chunk(c), 0),
            )

        def tokens(per_head: bool) -> pl.BlockSpec:
            return pl.BlockSpec(
                (None, None, None, 1, LENGTH),
                lambda b, n, c: (b, n if per_head else 0, chunk(c), 0, 0),
            )

        key = features(self.key_width, group)
        self.value = features(self.value_width, 1)
        self.own_key = features(self.key_width, 1)
        self.token = tokens(True)
        self.rows = [key, key, self.value, self.token, self.token, tokens(False)]
        sizes = (self.key_width, self.value_width)
        self.state = pl.BlockSpec((None, None, *sizes), lambda b, n, c: (b, n, 0, 0))
        self.states = pl.BlockSpec(
            (None, None, None, *sizes), lambda b, n, c: (b, n, chunk(c), 0, 0)
        )
        self.scratch = [pltpu.VMEM(sizes, jnp.float32)]

    def shape_of_state(self, *count: int) -> jax.ShapeDtypeStruct:
        shape = (self.batch, self.heads, *count, self.key_width, self.value_width)
        return jax.ShapeDtypeStruct(shape, jnp.float32)


def make_passes(*, interpret: bool = False) -> Passes:
    """The kernels; interpreted, they run anywhere."""
    return Passes(
        functools.partial(_forward, interpret),
        functools.partial(_states, interpret),
        functools.partial(_backward, interpret),
    )


def _forward(interpret: bool, rows: Chunk, state: Array) -> tuple[Array, Array]:
    specs, laid = _Specs(rows), _heads_first(rows)
    out, last = _call(interpret, specs, _forward_kernel, "delta_rule_forward")(
        [*specs.rows, specs.state],
        [specs.value, specs.state],
        [_like(laid.v), specs.shape_of_state()],
    )(*laid, state)
    return out.swapaxes(1, 2), last


def _forward_kernel(*refs: Array) -> None:
    *inputs, first_ref, out_ref, last_ref, state_ref = refs
    _start(state_ref, first_ref)
    state, out = run_chunk(state_ref[...], _read(inputs))
    out_ref[...] = out.astype(out_ref.dtype)
    state_ref[...] = last_ref[...] = state


def _states(interpret: bool, rows: Chunk, state: Array) -> Array:
    specs, laid = _Specs(rows), _heads_first(rows)
    return _call(interpret, specs, _states_kernel, "delta_rule_states")(
        [*specs.rows, specs.state], specs.states, specs.shape_of_state(specs.count)
    )(*laid, state)


def _states_kernel(*refs: Array) -> None:
    *inputs, first_ref, states_ref, state_ref = refs
    _start(state_ref, first_ref)
    states_ref[...] = state_ref[...]
    state_ref[...], _ = run_chunk(state_ref[...], _read(inputs))


def _backward(
    interpret: bool, rows: Chunk, states: Array, d_out: Array, d_last: Array
) -> tuple[Array, ...]:
    specs, laid = _Specs(rows, backwards=True), _heads_first(rows)
    own_keys = jax.ShapeDtypeStruct((*laid.v.shape[:3], specs.key_width), rows.k.dtype)
    token = _like(laid.decays)
    dq, dk, dv, d_decays, d_betas, d_first = _call(
        interpret, specs, _backward_kernel, "delta_rule_backward"
    )(
        [*specs.rows, specs.states, specs.value, specs.state],
        [specs.own_key] * 2 + [specs.value] + [specs.token] * 2 + [specs.state],
        [own_keys, own_keys, _like(laid.v), token, token, specs.shape_of_state()],
    )(*laid, states, d_out.swapaxes(1, 2), d_last)
    dq, dk = (sum_over_group(x.swapaxes(1, 2), rows.k.shape[2]) for x in (dq, dk))
    d_decays, d_betas = (x.reshape(rows.decays.shape) for x in (d_decays, d_betas))
    return dq, dk, dv.swapaxes(1, 2), d_decays, d_betas, d_first


def _backward_kernel(*refs: Array) -> None:
    *inputs, states_ref, d_out_ref, d_last_ref = refs[:9]
    *d_refs, d_first_ref, d_state_ref = refs[9:]
    _start(d_state_ref, d_last_ref)
    chunk = _read(inputs)
    resets = chunk.resets
    _, transpose = jax.vjp(
        lambda state, q, k, v, decays, betas: run_chunk(
            state, Chunk(q, k, v, decays, betas, resets)
        ),
        states_ref[...],
        *chunk[:-1],
    )
    cotangents = (d_state_ref[...], d_out_ref[...].astype(jnp.float32))
    d_state, *d_parts = transpose(cotangents)
    for ref, d_part in zip(d_refs, d_parts, strict=True):
        ref[...] = d_part.astype(ref.dtype)
    d_state_ref[...] = d_first_ref[...] = d_state


def _start(state_ref: Array, first_ref: Array) -> None:
    """At a row's first program, put what is given where the walk keeps its own."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        state_ref[...] = first_ref[...]


def _read(refs: list[Array]) -> Chunk:
    q, k, v, decays, betas, resets = (ref[...] for ref in refs)
    return Chunk(q, k, v, decays, betas, resets)


def _heads_first(rows: Chunk) -> Chunk:
    """[B T N H] -> [B N T H], and [B N C L] -> [B N C 1 L]: tiles of whole lanes."""
    q, k, v = (x.swapaxes(1, 2) for x in rows[:3])
    decays, betas, resets = (x[:, :, :, None] for x in rows[3:])
    return Chunk(q, k, v, decays, betas, resets)


def _like(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _call(
    interpret: bool, specs: _Specs, kernel: Callable[..., None], name: str
) -> Callable[..., Callable[..., Array]]:
    """`pl.pallas_call` with what all three have in common."""

    def call(in_specs: list, out_specs: object, out_shape: object) -> Callable:
        return pl.pallas_call(
            kernel,
            grid=specs.grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=specs.scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
            interpret=interpret,
            name=name,
        )

    return call
