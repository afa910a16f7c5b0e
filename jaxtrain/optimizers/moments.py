"""An optimizer's moments in fewer bits: bfloat16, or 8 bits each.

What is kept between steps is rounded; the update itself computes in float32. Matrices'
moments alone are rounded: those of norms and biases are few.

Rounding is stochastic, to one of the two nearest values with the odds that keep the
mean. It has to be: with beta2 = 0.999 a second moment falls by at most a thousandth a
step, less than half of bfloat16's spacing, and rounding to the nearest would hold it up
for good. The draw is a hash of the step's number and the place in a layer's matrix:
runs on other devices, layers updated one by one and a resumed run draw alike.

8 bits are a logarithmic scale below the largest value of each row or column of a matrix
(the shorter of the two, so that a token's embedding is one). Adam divides one moment by
the root of the other, number by number, so what matters is an error relative to each
number and not to its block's largest. First moments have a sign, 127 levels over 16
octaves, each 1.092 times the one below, and what is smaller is rounded to 0 or to the
least level. Second moments have 255 levels over 24 octaves, each 1.068 times the one
below, and none but a true 0 is stored as 0, for the update divides by it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, BFloat16, Float32, Int, Int8, UInt8, UInt32

from jaxtrain.optimizers.paths import Path, matrix_rank, names_of, parameter_of

MOMENT_DTYPES = ("float32", "bfloat16", "int8")
# By the codes' type: levels above 0, and the octaves from the least to the largest.
_SCALES = {jnp.dtype(jnp.int8): (127, 16.0), jnp.dtype(jnp.uint8): (255, 24.0)}


class EightBits(NamedTuple):
    """A matrix's moment: codes of its shape, and the largest value of each block.

    `scale` has the length 1 along the axis of the blocks. Codes are int8 with the
    value's sign, or uint8 where no value is negative.
    """

    codes: Int8[Array, "*L I O"] | UInt8[Array, "*L I O"]
    scale: Float32[Array, "*L I 1"] | Float32[Array, "*L 1 O"]


class CompactState(NamedTuple):
    """An optimizer's state with its moments rounded, and the steps taken."""

    steps: Int[Array, ""]
    inner: Any


def with_compact_moments(
    optimizer: optax.GradientTransformation, dtype: str
) -> optax.GradientTransformation:
    """The same optimizer, which keeps its moments of matrices in `dtype`.

    Args:
        optimizer: its state is float32. As in optax, second moments are called `nu`.
        dtype: one of `MOMENT_DTYPES`; "float32" changes nothing.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in MOMENT_DTYPES:
        raise ValueError(
            f"moment_dtype = {dtype!r} is unknown: choose from {list(MOMENT_DTYPES)}"
        )
    if dtype == "float32":
        return optimizer

    def init(params: Any) -> CompactState:
        # Else XLA computes the codes of all these zeros itself, for minutes.
        inner = jax.lax.optimization_barrier(optimizer.init(params))
        steps = jnp.zeros((), jnp.int32)
        return CompactState(steps, _compress(inner, inner, dtype, steps))

    def update(
        grads: Any, state: CompactState, params: Any = None
    ) -> tuple[Any, CompactState]:
        updates, inner = optimizer.update(grads, _restore(state.inner), params)
        # A scale is known only when all moments of its block are. Computed once for
        # both uses, they would be written to memory in float32 and read again, more
        # traffic than without rounding: so the compiler must not see that both are one.
        again = jax.lax.optimization_barrier((grads, state.inner))
        _, scaled = optimizer.update(again[0], _restore(again[1]), params)
        steps = state.steps + 1
        return updates, CompactState(steps, _compress(inner, scaled, dtype, steps))

    return optax.GradientTransformation(init, update)


def _compress(state: Any, scaled: Any, dtype: str, steps: Array) -> Any:
    """The state with each matrix's moment rounded to `dtype`.

    Args:
        scaled: the same state, of which scales of 8 bits are taken.
    """

    def compress(path: Path, leaf: Array, same: Array) -> Any:
        is_moment = jnp.issubdtype(leaf.dtype, jnp.floating)
        if not is_moment or matrix_rank(parameter_of(path), leaf) < 2:
            return leaf
        is_second = ".nu" in names_of(path)
        draw = _draw_bits(leaf.shape[-2:], 2 * steps + is_second)
        if dtype == "bfloat16":
            return to_bfloat16(leaf, draw)
        return to_eight_bits(leaf, scales_of(same), draw, signed=not is_second)

    return jax.tree.map_with_path(compress, state, scaled)


def _restore(state: Any) -> Any:
    """The state in float32."""

    def restore(leaf: Any) -> Any:
        if isinstance(leaf, EightBits):
            return from_eight_bits(leaf)
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf

    return jax.tree.map(restore, state, is_leaf=lambda x: isinstance(x, EightBits))


def to_bfloat16(
    x: Float32[Array, "*L I O"], draw: UInt32[Array, "I O"]
) -> BFloat16[Array, "*L I O"]:
    """Round float32 to bfloat16 by random bits."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # A draw below one unit of what is kept is added, and what is not kept is cut off.
    rounded = (bits + (draw >> 16)) & jnp.uint32(0xFFFF0000)
    whole = jax.lax.bitcast_convert_type(rounded, jnp.float32)
    return jnp.where(jnp.isfinite(x), whole, x).astype(jnp.bfloat16)


def scales_of(x: Float32[Array, "*L I O"]) -> Float32[Array, "*L P Q"]:
    """The largest size in each block, which is along the shorter axis of a matrix."""
    axis = -2 if x.shape[-2] < x.shape[-1] else -1
    return jnp.abs(x).max(axis, keepdims=True)


def to_eight_bits(
    x: Float32[Array, "*L I O"],
    scale: Float32[Array, "*L P Q"],
    draw: UInt32[Array, "I O"],
    *,
    signed: bool,
) -> EightBits:
    """Round float32 to 8 bits by random bits.

    Args:
        scale: as `scales_of` gives them.
        signed: whether values may be negative.
    """
    dtype = jnp.dtype(jnp.int8 if signed else jnp.uint8)
    levels, octaves = _SCALES[dtype]
    share = jnp.abs(x) / jnp.where(scale > 0, scale, 1.0)
    place = levels + jnp.log2(share) * ((levels - 1) / octaves)
    below = jnp.clip(jnp.floor(place), 0, levels - 1)
    low, high = _share_of(below, dtype), _share_of(below + 1, dtype)
    odds = (draw >> 8).astype(jnp.float32) * 2.0**-24
    code = below + (odds < (share - low) / (high - low))
    if signed:
        code = jnp.copysign(code, x)
    else:
        code = jnp.where(x > 0, jnp.maximum(code, 1), 0)
    return EightBits(code.astype(dtype), scale)


def from_eight_bits(kept: EightBits) -> Float32[Array, "*L I O"]:
    """The float32 values that the codes stand for."""
    code = kept.codes.astype(jnp.float32)
    return jnp.sign(code) * _share_of(jnp.abs(code), kept.codes.dtype) * kept.scale


def _share_of(code: Array, dtype: Any) -> Array:
    """What share of its block's largest value a code stands for, less the sign."""
    levels, octaves = _SCALES[jnp.dtype(dtype)]
    share = jnp.exp2((code - levels) * (octaves / (levels - 1)))
    return jnp.where(code > 0, share, 0.0)


def _draw_bits(shape: tuple[int, ...], number: Array) -> UInt32[Array, "I O"]:
    """32 bits for each place of a matrix, others for each `number`.

    The last mixing of MurmurHash3, of which a GPU computes as many as it reads moments;
    `jax.random` would take longer than the update.
    """
    rows = jax.lax.broadcasted_iota(jnp.uint32, shape, 0)
    bits = rows * jnp.uint32(shape[1]) + jax.lax.broadcasted_iota(jnp.uint32, shape, 1)
    bits ^= number.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
