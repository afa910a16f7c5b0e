"""Weights of a softmax whose tiles have bases of their own, brought to one of each row.

Where a model is of any use there is nothing to do, and the programs end at once. In
Pallas' Triton lowering, which can write into the array that it reads.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float

from jaxtrain.kernels.attention.hopper import Ref, divide

_ROWS, _PART = 128, 64  # of a block: rows and entries are multiples of them
_PROGRAMS = 16  # on the same rows


def level(
    weights: Float[Array, "M V"],
    fade: Float[Array, "P M"],
    is_far: Bool[Array, "M"],
    columns: int,
    *,
    interpret: bool,
) -> Float[Array, "M V"]:
    """The weights times the `fade` of their tile, P tiles of `columns`, in place.

    Args:
        fade: 1 throughout in rows that are not far.
        is_far: near rows are changed, by factors of 1, where a row beside them is far.
    """
    rows, _ = weights.shape
    return pl.pallas_call(
        functools.partial(_kernel, columns // _PART),
        out_shape=jax.ShapeDtypeStruct(weights.shape, weights.dtype),
        grid=(rows // _ROWS, _PROGRAMS),
        input_output_aliases={0: 0},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="level_weights",
    )(weights, fade, is_far.reshape(-1, _ROWS).any(axis=1).astype(jnp.int32))


def _kernel(
    parts_of_tile: int, weights_ref: Ref, fade_ref: Ref, is_far_ref: Ref, out_ref: Ref
) -> None:
    """Every 16th part of 64 columns of 128 rows."""
    block, program = pl.program_id(0), pl.program_id(1)
    rows, parts = pl.ds(block * _ROWS, _ROWS), weights_ref.shape[1] // _PART
    end = is_far_ref[block] * parts

    def scale(turn: Array, _: None) -> None:
        part = program + turn * _PROGRAMS
        columns = pl.ds(part * _PART, _PART)
        fade = fade_ref[divide(part, parts_of_tile), rows]
        faded = weights_ref[rows, columns].astype(jnp.float32) * fade[:, None]
        out_ref[rows, columns] = faded.astype(out_ref.dtype)

    turns = divide(end - program + _PROGRAMS - 1, _PROGRAMS)
    jax.lax.fori_loop(0, turns, scale, None)
