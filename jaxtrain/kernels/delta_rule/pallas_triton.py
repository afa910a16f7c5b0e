"""The chunked delta rule for NVIDIA GPUs through Pallas' Triton lowering.

A program walks over the chunks of one head of a row, backwards in the backward pass,
and keeps some columns of the state, those of `Tiles.values` values, in registers.
Columns need nothing of each other but what queries and keys give, which each program
computes for itself.
"""

import dataclasses
import functools
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
    run_chunk,
)
from jaxtrain.kernels.delta_rule.passes import Passes, sum_over_group

# Three products of 10 mantissa bits each: nearly float32, on the tensor cores.
THREE_PARTS = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What can be chosen of a kernel without changing what it computes."""

    values: int = 64
    warps: int = 4
    stages: int = 1
    precision: Any = THREE_PARTS


FORWARD, BACKWARD = Tiles(), Tiles(values=32, warps=8)


def refuse_widths(key_width: int, value_width: int) -> str | None:
    """Why heads of these widths cannot be served."""
    for width in (key_width, value_width):
        if width not in (16, 32, 64, 128, 256):
            return f"a head's width is {width}, not a power of 2 from 16 to 256"
    return None


def make_passes(
    *, interpret: bool = False, forward: Tiles = FORWARD, backward: Tiles = BACKWARD
) -> Passes:
    """The kernels; interpreted, they run anywhere."""
    if interpret:
        forward, backward = (
            dataclasses.replace(tiles, precision=EXACT.precision)
            for tiles in (forward, backward)
        )
    return Passes(
        functools.partial(_forward, forward, interpret),
        functools.partial(_states, forward, interpret),
        functools.partial(_backward, backward, interpret),
    )


class _Specs:
    """How the blocks of program (s, n, b) lie: columns s of head n of row b."""

    def __init__(self, rows: Chunk, tiles: Tiles) -> None:
        self.batch, self.length, self.heads, width = rows.v.shape
        self.count = self.length // LENGTH
        kv_heads, self.key_width = rows.k.shape[2:]
        self.columns = min(tiles.values, width)
        self.value_width, self.splits = width, width // self.columns
        self.grid = (self.splits, self.heads, self.batch)
        group = self.heads // kv_heads
        key = pl.BlockSpec(
            (None, self.length, None, self.key_width),
            lambda s, n, b: (b, 0, jax.lax.div(n, jnp.int32(group)), 0),
        )
        self.value = pl.BlockSpec(
            (None, self.length, None, self.columns), lambda s, n, b: (b, 0, n, s)
        )
        chunks = (self.count, LENGTH)
        token = pl.BlockSpec((None, None, *chunks), lambda s, n, b: (b, n, 0, 0))
        resets = pl.BlockSpec((None, None, *chunks), lambda s, n, b: (b, 0, 0, 0))
        self.rows = [key, key, self.value, token, token, resets]
        # Gradients that are sums over columns: each program's own part.
        self.key_part = pl.BlockSpec(
            (None, None, self.length, None, self.key_width),
            lambda s, n, b: (s, b, 0, n, 0),
        )
        self.token_part = pl.BlockSpec(
            (None, None, None, *chunks), lambda s, n, b: (s, b, n, 0, 0)
        )
        sizes = (self.key_width, self.columns)
        self.state = pl.BlockSpec((None, None, *sizes), lambda s, n, b: (b, n, 0, s))
        self.states = pl.BlockSpec(
            (None, None, self.count, *sizes), lambda s, n, b: (b, n, 0, 0, s)
        )

    def shape_of_state(self, *count: int) -> jax.ShapeDtypeStruct:
        shape = (self.batch, self.heads, *count, self.key_width, self.value_width)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def call(
        self, kernel: Any, tiles: Tiles, interpret: bool, name: str, **specs: Any
    ) -> Any:
        """`pl.pallas_call` with what all three have in common."""
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            compiler_params=plgpu.CompilerParams(
                num_warps=tiles.warps, num_stages=tiles.stages
            ),
            interpret=interpret,
            name=name,
            **specs,
        )


def _forward(
    tiles: Tiles, interpret: bool, rows: Chunk, state: Array
) -> tuple[Array, Array]:
    specs = _Specs(rows, tiles)
    out, last = specs.call(
        functools.partial(_forward_kernel, tiles.precision, specs.count),
        tiles,
        interpret,
        "delta_rule_forward",
        in_specs=[*specs.rows, specs.state],
        out_specs=[specs.value, specs.state],
        out_shape=[
            jax.ShapeDtypeStruct(rows.v.shape, rows.v.dtype),
            specs.shape_of_state(),
        ],
    )(*rows, state)
    return out, last


def _forward_kernel(precision: Any, count: int, *refs: Array) -> None:
    *inputs, first_ref, out_ref, last_ref = refs
    plain = Arithmetic(precision, has_rules=False)

    def visit(c: Array, state: Array) -> Array:
        state, out = run_chunk(state, _read(inputs, c), plain)
        out_ref[_tokens(c), :] = out.astype(out_ref.dtype)
        return state

    last_ref[...] = jax.lax.fori_loop(0, count, visit, first_ref[...])


def _states(tiles: Tiles, interpret: bool, rows: Chunk, state: Array) -> Array:
    specs = _Specs(rows, tiles)
    return specs.call(
        functools.partial(_states_kernel, tiles.precision, specs.count),
        tiles,
        interpret,
        "delta_rule_states",
        in_specs=[*specs.rows, specs.state],
        out_specs=specs.states,
        out_shape=specs.shape_of_state(specs.count),
    )(*rows, state)


def _states_kernel(precision: Any, count: int, *refs: Array) -> None:
    *inputs, first_ref, states_ref = refs
    plain = Arithmetic(precision, has_rules=False)

    def visit(c: Array, state: Array) -> Array:
        states_ref[c, :, :] = state
        state, _ = run_chunk(state, _read(inputs, c), plain)
        return state

    jax.lax.fori_loop(0, count, visit, first_ref[...])


def _backward(
    tiles: Tiles,
    interpret: bool,
    rows: Chunk,
    states: Array,
    d_out: Array,
    d_last: Array,
) -> tuple[Array, ...]:
    specs = _Specs(rows, tiles)
    keys = (specs.splits, *rows.v.shape[:3], specs.key_width)
    tokens = (specs.splits, *rows.decays.shape)
    key = jax.ShapeDtypeStruct(keys, rows.k.dtype if specs.splits == 1 else jnp.float32)
    token = jax.ShapeDtypeStruct(tokens, jnp.float32)
    dq, dk, dv, d_decays, d_betas, d_first = specs.call(
        functools.partial(_backward_kernel, tiles.precision, specs.count),
        tiles,
        interpret,
        "delta_rule_backward",
        in_specs=[*specs.rows, specs.states, specs.value, specs.state],
        out_specs=[
            specs.key_part,
            specs.key_part,
            specs.value,
            specs.token_part,
            specs.token_part,
            specs.state,
        ],
        out_shape=[
            key,
            key,
            jax.ShapeDtypeStruct(rows.v.shape, rows.v.dtype),
            token,
            token,
            specs.shape_of_state(),
        ],
    )(*rows, states, d_out, d_last)
    dq, dk = (
        sum_over_group(x.sum(axis=0), rows.k.shape[2]).astype(rows.k.dtype)
        for x in (dq, dk)
    )
    return dq, dk, dv, d_decays.sum(axis=0), d_betas.sum(axis=0), d_first


def _backward_kernel(precision: Any, count: int, *refs: Array) -> None:
    *inputs, states_ref, d_out_ref, d_last_ref = refs[:9]
    arithmetic = Arithmetic(precision)
    *d_feature_refs, d_decays_ref, d_betas_ref, d_first_ref = refs[9:]

    def visit(step: Array, d_state: Array) -> Array:
        c = count - 1 - step
        chunk = _read(inputs, c)
        state = states_ref[c, :, :]
        _, transpose = jax.vjp(
            lambda state, *parts: run_chunk(
                state, Chunk(*parts, chunk.resets), arithmetic
            ),
            state,
            *chunk[:-1],
        )
        d_out = d_out_ref[_tokens(c), :].astype(jnp.float32)
        d_state, *d_features, d_decays, d_betas = transpose((d_state, d_out))
        for ref, d_feature in zip(d_feature_refs, d_features, strict=True):
            ref[_tokens(c), :] = d_feature.astype(ref.dtype)
        d_decays_ref[pl.ds(c, 1), :] = d_decays
        d_betas_ref[pl.ds(c, 1), :] = d_betas
        return d_state

    d_first_ref[...] = jax.lax.fori_loop(0, count, visit, d_last_ref[...])


def _read(refs: list[Array], c: Array) -> Chunk:
    features = (ref[_tokens(c), :] for ref in refs[:3])
    return Chunk(*features, *(ref[pl.ds(c, 1), :] for ref in refs[3:]))


def _tokens(c: Array) -> Any:
    return pl.ds(c * LENGTH, LENGTH)
