"""The gated delta rule within one chunk of tokens, as matrix products.

A head keeps a matrix S [K V]. Token t multiplies it by exp(g_t), moves what the key
reads there towards the value by a share beta, and reads it with the query
(arXiv:2412.06464):

    S_t = exp(g_t) S_{t-1};  S_t += k_t beta_t (v_t - k_t S_t);  o_t = q_t S_t

Within a chunk (arXiv:2406.06484), with d_ij the decay from token j to i and e_i that
from the chunk's start, A_ij = beta_i (k_i k_j) d_ij for j < i, and X = (I + A)^-1:

    n = X beta (v - e (k S));  o = e (q S) + ((q k) d) n;  S' = e_L S + k (d_L n)

Every backend runs these functions, those in Pallas on one chunk of one head, XLA on
many at once. Documents are kept apart by `resets`: d and e are 0 across a reset.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

LENGTH = 64  # tokens of a chunk
# Stands for minus infinity: its exponential is 0, and a difference is not NaN.
_NEVER = -1e30


class Chunk(NamedTuple):
    """The tokens of a chunk; any dimensions may stand before those named.

    `decays` is g, the log of what a token multiplies the state by, and `resets` how
    many tokens from the chunk's first to each start with an empty state.
    """

    q: Float[Array, "... L K"]
    k: Float[Array, "... L K"]
    v: Float[Array, "... L V"]
    decays: Float32[Array, "... 1 L"]
    betas: Float32[Array, "... 1 L"]
    resets: Int32[Array, "... 1 L"]


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """How a backend multiplies matrices.

    `precision` is that of products of float32; those of other types are exact there.
    Where not `has_rules`, products and inverses are the same without derivative rules
    of their own, which Triton's lowering does not take.
    """

    precision: Any = jax.lax.Precision.HIGHEST
    has_rules: bool = True

    def multiply(self, left: Array, right: Array) -> Float32[Array, "..."]:
        """left @ right, summed in float32."""
        product = _multiply_with_rule if self.has_rules else _multiply
        return product(self.precision, left, right)

    def invert_unit_lower(self, strict: Array) -> Float32[Array, "... L L"]:
        """(I + A)^-1 of a strictly lower triangular A [... L L]; L is a power of 2."""
        invert = _invert_with_rule if self.has_rules else _invert
        return invert(self.precision, strict)


EXACT = Arithmetic()


class Prepared(NamedTuple):
    """What a chunk needs that does not depend on the state.

    `solve` is X beta, `scores` (q k) d, `enter` e, `leave` d_L and `keep` e_L.
    """

    solve: Float[Array, "... L L"]
    scores: Float[Array, "... L L"]
    enter: Float32[Array, "... L 1"]
    leave: Float32[Array, "... L 1"]
    keep: Float32[Array, "... 1 1"]


def prepare(chunk: Chunk, arithmetic: Arithmetic = EXACT) -> Prepared:
    """The part of a chunk's work that chunks can do side by side."""
    system, scores = relate(chunk, arithmetic)
    solve = arithmetic.invert_unit_lower(system) * chunk.betas
    return Prepared(solve.astype(chunk.q.dtype), scores, *fade(chunk))


def relate(
    chunk: Chunk, arithmetic: Arithmetic = EXACT
) -> tuple[Float32[Array, "... L L"], Float[Array, "... L L"]]:
    """A and (q k) d: what the tokens of a chunk are to each other."""
    q, k, _, decays, betas, resets = chunk
    row, column = _indices(q.shape[-2])
    joined = (row >= column) & (_transposed(resets) == resets)
    # Each sum of the decays between two tokens by itself: a difference of two sums from
    # the start would lose digits wherever decays are fast.
    up_to, behind = jnp.where(row >= column, decays, 0.0), row > column
    since = _multiply(arithmetic.precision, up_to, behind.astype(jnp.float32))
    decay = jnp.exp(jnp.where(joined, since, _NEVER))
    system = arithmetic.multiply(k, _transposed(k)) * decay * _transposed(betas)
    scores = arithmetic.multiply(q, _transposed(k)) * decay
    return jnp.where(behind, system, 0.0), scores.astype(q.dtype)


def fade(chunk: Chunk) -> tuple[Array, Array, Array]:
    """`enter`, `leave` and `keep`: what tokens are to the states on either side."""
    decays, resets = chunk.decays, _transposed(chunk.resets)
    row, column = _indices(decays.shape[-1])

    def summed(mask: Array) -> Array:
        return jnp.sum(jnp.where(mask, decays, 0.0), axis=-1, keepdims=True)

    all_resets = jnp.max(resets, axis=-2, keepdims=True)
    enter = jnp.where(resets == 0, summed(column <= row), _NEVER)
    leave = jnp.where(resets == all_resets, summed(column > row), _NEVER)
    all_decays = jnp.sum(decays, axis=-1, keepdims=True)
    keep = jnp.where(all_resets == 0, all_decays, _NEVER)
    enter, leave, keep = jnp.exp(enter), jnp.exp(leave), jnp.exp(keep)
    return enter, leave, keep


def advance(
    state: Float32[Array, "... K V"],
    chunk: Chunk,
    prepared: Prepared,
    arithmetic: Arithmetic = EXACT,
) -> tuple[Float32[Array, "... K V"], Float32[Array, "... L V"]]:
    """The state behind the chunk, and what its tokens read."""
    q, k, v = chunk.q, chunk.k, chunk.v
    solve, scores, enter, leave, keep = prepared
    multiply = arithmetic.multiply
    carried = state.astype(q.dtype)
    missing = v.astype(jnp.float32) - enter * multiply(k, carried)
    new = multiply(solve, missing.astype(q.dtype))
    out = enter * multiply(q, carried) + multiply(scores, new.astype(q.dtype))
    added = multiply(_transposed(k), (leave * new).astype(q.dtype))
    return keep * state + added, out


def run_chunk(
    state: Float32[Array, "... K V"], chunk: Chunk, arithmetic: Arithmetic = EXACT
) -> tuple[Float32[Array, "... K V"], Float32[Array, "... L V"]]:
    """Both parts: the state behind the chunk, and what its tokens read."""
    return advance(state, chunk, prepare(chunk, arithmetic), arithmetic)


def _multiply(precision: Any, left: Array, right: Array) -> Array:
    return jnp.matmul(
        left,
        right,
        precision=precision if left.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _multiply_forward(precision: Any, left: Array, right: Array) -> tuple:
    return _multiply(precision, left, right), (left, right)


def _multiply_backward(
    precision: Any, factors: tuple[Array, Array], cotangent: Array
) -> tuple[Array, Array]:
    """As without a rule, but in products of the factors' own type."""
    left, right = factors
    cotangent = cotangent.astype(left.dtype)
    d_left = _multiply(precision, cotangent, _transposed(right))
    d_right = _multiply(precision, _transposed(left), cotangent)
    return _sum_to(d_left, left), _sum_to(d_right, right)


def _sum_to(x: Array, like: Array) -> Array:
    """The sum over axes along which `like` has size 1, in its type."""
    axes = [
        i
        for i, (a, b) in enumerate(zip(x.shape, like.shape, strict=True))
        if b == 1 != a
    ]
    return (x.sum(axes, keepdims=True) if axes else x).astype(like.dtype)


_multiply_with_rule = jax.custom_vjp(_multiply, nondiff_argnums=(0,))
_multiply_with_rule.defvjp(_multiply_forward, _multiply_backward)


def _invert(precision: Any, strict: Array) -> Array:
    """Joins inverted diagonal blocks to blocks of twice the size.

    This is block forward substitution, which stays accurate where powers of A would
    grow. A mask picks the blocks, so that every product is of whole matrices.
    """
    length = strict.shape[-1]
    row, column = _indices(length)
    identity = jnp.where(row == column, 1.0, 0.0)
    inverse = identity - jnp.where(_same(row, column, 1), strict, 0.0)
    for level in range(1, length.bit_length() - 1):
        joins = _same(row, column, level + 1) & ~_same(row, column, level)
        below = jnp.where(joins, strict, 0.0)
        left = _multiply(precision, inverse, below)
        inverse -= _multiply(precision, left, inverse)
    return inverse


def _invert_forward(precision: Any, strict: Array) -> tuple[Array, Array]:
    inverse = _invert(precision, strict)
    return inverse, inverse


def _invert_backward(precision: Any, inverse: Array, cotangent: Array) -> tuple[Array]:
    upper = _transposed(inverse)
    left = _multiply(precision, upper, cotangent)
    return (-_multiply(precision, left, upper),)


_invert_with_rule = jax.custom_vjp(_invert, nondiff_argnums=(0,))
_invert_with_rule.defvjp(_invert_forward, _invert_backward)


def _same(row: Array, column: Array, level: int) -> Array:
    """Whether entries lie in one diagonal block of 2 ** level."""
    return (row >> level) == (column >> level)


def _indices(length: int) -> tuple[Array, Array]:
    shape = (length, length)
    return (
        jax.lax.broadcasted_iota(jnp.int32, shape, 0),
        jax.lax.broadcasted_iota(jnp.int32, shape, 1),
    )


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)
