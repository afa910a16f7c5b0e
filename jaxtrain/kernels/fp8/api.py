"""Matrix products in eight bits: current scaling by tensors, with its derivative.

A tensor x is kept as codes c of an 8-bit float type and one float32 number s, so that
x ~ c s. 1/s is the largest power of two by which no entry of x leaves the range of the
type, so that nothing but the codes is rounded. s is found anew for each tensor (current
scaling): there is no history, and a step stays a function of its inputs. As is usual
(arXiv:2209.05433), inputs and weights are e4m3, with three bits of mantissa, and
gradients e5m2, which reaches further.

Both operands of a product stand with the axis that is summed over last, the only order
that Hopper's tensor cores take in eight bits. A tensor that two products sum over along
different axes is therefore kept in both orders.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

INPUT, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
RESIDUALS = "fp8_residuals"  # what remat policies may keep in eight bits
# Names in compiled programs.
SCOPE, FORWARD, OF_INPUT, OF_KERNEL = "fp8", "forward", "input", "kernel"
# Beyond it a scale's reciprocal would leave the normal range of float32.
_LARGEST_SCALE = 2.0**100
_EXPONENT = 0x7F800000  # the bits of a float32's exponent


class Quantized(NamedTuple):
    """A tensor as codes [*B K], and the same in the order [K *B], times `unit`."""

    codes: Array
    transposed: Array
    unit: Float32[Array, ""]


class Weight(NamedTuple):
    """A kernel in eight bits, or a stack of them, and where its gradient goes.

    `master` is the kernel itself, which no product reads; None where it is frozen.
    """

    master: Float[Array, "*L I O"] | None
    codes: Float[Array, "*L I O"]
    unit: Float32[Array, "*L"]


def _as_kept(codes: Array) -> Array:
    return codes


@dataclasses.dataclass(frozen=True)
class Site:
    """Which product it is: its name in compiled programs, and where its codes lie.

    `gather` takes codes [I O] as they are kept to how products read them, where devices
    keep a part each. `of_codes`: the codes themselves are multiplied, as XLA's compiler
    for TPUs wants it, and not the numbers that they stand for.
    """

    name: str = "kernel"
    gather: Callable[[Array], Array] = _as_kept
    of_codes: bool = False


def find_scale(x: Float[Array, "*dims"], dtype: DTypeLike) -> Float32[Array, ""]:
    """The largest power of two that keeps all of x in the range of an 8-bit type.

    1 for a tensor of zeros; NaN where x has one, or an infinity, so that its codes show
    it too.
    """
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    limit = float(jnp.finfo(dtype).max)
    ratio = jnp.minimum(limit / largest, _LARGEST_SCALE)
    # The exponent alone: rounded down to a power of two, with no logarithm.
    bits = lax.bitcast_convert_type(ratio, jnp.int32) & _EXPONENT
    scale = lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(largest == 0, 1.0, jnp.where(largest < jnp.inf, scale, jnp.nan))


def cast(
    x: Float[Array, "*dims"], scale: Float32[Array, ""], dtype: DTypeLike
) -> Float[Array, "*dims"]:
    """x * scale, clipped to the range of the type, to the nearest of its values."""
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(x.astype(jnp.float32) * scale, -limit, limit).astype(dtype)


def quantize(x: Float[Array, "*B K"], dtype: DTypeLike) -> Quantized:
    """x in both orders; the compiler leaves out one that nothing reads.

    Behind the barrier the second order is made of codes. At once, by one of XLA's
    kernels for GPUs, both take longer than one by one (benchmarks/RESULTS.md).
    """
    scale = find_scale(x, dtype)
    codes = lax.optimization_barrier(cast(x, scale, dtype))
    return Quantized(codes, jnp.moveaxis(codes, -1, 0), 1 / scale)


class Shared(NamedTuple):
    """An input that several kernels read, quantized once; `value` has its gradient."""

    value: Float[Array, "*B I"]
    quantized: Quantized


def _share(x: Float[Array, "*B I"]) -> Shared:
    codes, transposed, unit = quantize(x, INPUT)
    # Behind names, so that remat policies can keep what the backward pass reads; as
    # bytes, for jax rounds floats that it keeps by rules under which e4m3 would have
    # infinities, and codes above 240 would be NaN.
    kept = lax.bitcast_convert_type(transposed, jnp.uint8)
    kept = checkpoint_name(kept, RESIDUALS)
    transposed = lax.bitcast_convert_type(kept, INPUT)
    unit = checkpoint_name(unit, RESIDUALS)
    return Shared(x, Quantized(codes, transposed, unit))


@jax.custom_vjp
def share(x: Float[Array, "*B I"]) -> Shared:
    """Quantize an input for all the products that read it."""
    return _share(x)


share.defvjp(lambda x: (_share(x), None), lambda _, gradient: (gradient.value,))


def quantize_kernel(kernel: Float[Array, "*L I O"]) -> Weight:
    """A kernel, or one for each layer with a scale of its own, that has no gradient."""

    def quantize_one(matrix: Array) -> tuple[Array, Array]:
        scale = find_scale(matrix, INPUT)
        return cast(matrix, scale, INPUT), 1 / scale

    if kernel.ndim == 2:
        return Weight(None, *quantize_one(kernel))
    return Weight(None, *jax.vmap(quantize_one)(kernel))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(site: Site, x: Shared, weight: Weight) -> Float[Array, "*B O"]:
    """x W by codes, in the type of x, and its gradients by codes of theirs.

    Sums are float32. Within a tensor core those of the forward product may have fewer
    bits, which makes it faster, and those of gradients not. In the compiled program
    the three products are called `fp8/NAME/forward`, `.../input` and `.../kernel`.
    """
    quantized = x.quantized
    last = quantized.codes.ndim - 1
    codes, weight_unit = _as_read(site, weight.codes, weight.unit)
    with jax.named_scope(f"{SCOPE}/{site.name}/{FORWARD}"):
        return _multiply(
            (quantized.codes, quantized.unit),
            (codes.T, weight_unit),
            ((last,), (1,)),
            (x.value.dtype, lax.Precision.DEFAULT),
            of_codes=site.of_codes,
        )


def _project_forward(site: Site, x: Shared, weight: Weight) -> tuple[Array, Any]:
    # Zeros of no size tell the types; a frozen kernel has no gradient, and needs no x.
    master = None if weight.master is None else jnp.zeros(0, weight.master.dtype)
    read = None if master is None else (x.quantized.transposed, x.quantized.unit)
    return project(site, x, weight), (read, master, weight.codes, weight.unit)


def _project_backward(site: Site, residuals: Any, dy: Array) -> tuple[Shared, Weight]:
    read, master, codes, unit = residuals
    gradient = quantize(dy, GRADIENT)
    codes, unit = _as_read(site, codes, unit)
    last, exact = dy.ndim - 1, lax.Precision.HIGHEST
    with jax.named_scope(f"{SCOPE}/{site.name}/{OF_INPUT}"):
        dx = _multiply(
            (gradient.codes, gradient.unit),
            (codes, unit),
            ((last,), (1,)),
            (dy.dtype, exact),
            of_codes=site.of_codes,
        )
    dw, tokens = None, tuple(range(1, dy.ndim))
    if master is not None:
        with jax.named_scope(f"{SCOPE}/{site.name}/{OF_KERNEL}"):
            dw = _multiply(
                read,
                (gradient.transposed, gradient.unit),
                (tokens, tokens),
                (dy.dtype, exact),
                of_codes=site.of_codes,
            ).astype(master.dtype)
    nothing: Any = None  # codes have no gradient
    return Shared(dx, nothing), Weight(dw, nothing, nothing)


project.defvjp(_project_forward, _project_backward)


def _as_read(site: Site, codes: Array, unit: Array) -> tuple[Array, Array]:
    """A kernel's codes and unit, gathered.

    Without the barrier XLA would move conversions of a layer's codes before the cut out
    of all layers' codes, where it does not find its pattern.
    """
    read: tuple[Array, Array] = lax.optimization_barrier((site.gather(codes), unit))
    return read


def _multiply(
    left: tuple[Array, Array],
    right: tuple[Array, Array],
    summed: tuple[tuple[int, ...], tuple[int, ...]],
    result: tuple[DTypeLike, lax.Precision],
    *,
    of_codes: bool,
) -> Array:
    """The product of two tensors (codes, unit) over the axes `summed` of each.

    It is written as one of numbers in the type of the result, which hold codes times a
    power of two exactly. XLA's compiler for GPUs makes it a product of the codes (its
    pattern: convert, multiply by a scalar, dot); that for CPUs computes it as it
    stands. That for TPUs would, too, and is given a product of the codes.
    """
    dtype, precision = result
    if of_codes:
        product = lax.dot_general(
            left[0], right[0], (summed, ((), ())), preferred_element_type=jnp.float32
        )
        return (product * left[1] * right[1]).astype(dtype)
    a, b = (codes.astype(dtype) * unit.astype(dtype) for codes, unit in (left, right))
    return lax.dot_general(
        a, b, (summed, ((), ())), precision=precision, preferred_element_type=dtype
    )
