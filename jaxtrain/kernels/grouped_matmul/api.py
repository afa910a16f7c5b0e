"""One grouped product for every platform; "auto" picks an implementation, logged."""

import functools
import importlib
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.attention.cudnn import compute_capability
from jaxtrain.kernels.grouped_matmul.plan import Plan, make_plan

IMPLEMENTATIONS = ("auto", "xla", "pallas_gpu")
# Fewer, as in generation, are a tile or two that meet all groups one after the other,
# and reading the weights is all that XLA's way costs.
_MANY_ROWS = 256
_logger = logging.getLogger(__name__)


def grouped_matmul(
    rows: Float[Array, "M D"],
    weights: Float[Array, "E D F"],
    sizes: Int32[Array, "E"],
    *,
    implementation: str = "auto",
    device: jax.Device | None = None,
) -> Float[Array, "M F"]:
    """out[m] = rows[m] @ weights[e], e being the group of row m; sums are float32.

    The first `sizes[0]` rows are group 0's, the next `sizes[1]` group 1's, and so on.
    Rows behind all groups must be finite numbers; they give zeros, as their gradients
    do, and count in no other gradient. An empty group's weights get zeros.

    `device` is one that the program is for, where it is not the first local one.

    Raises:
        ValueError: shapes or types do not fit together, or the name is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    (out,) = grouped_matmuls(
        rows, (weights,), sizes, implementation=implementation, device=device
    )
    return out


def grouped_matmuls(
    rows: Float[Array, "M D"],
    weights: tuple[Float[Array, "E D F"], ...],
    sizes: Int32[Array, "E"],
    *,
    implementation: str = "auto",
    device: jax.Device | None = None,
) -> tuple[Float[Array, "M F"], ...]:
    """`grouped_matmul` of the same rows with several weights of one shape, together."""
    for each in weights:
        _check(rows, each, sizes, implementation)
    if implementation == "auto":
        implementation = choose_implementation(rows, weights[0], device)
    elif implementation == "pallas_gpu" and (reason := _refusal(rows, device)):
        raise NotImplementedError(
            f"grouped product implementation 'pallas_gpu' refuses: {reason}; use 'auto'"
            " or 'xla'"
        )
    if implementation == "xla":
        platform = _platform(device)
        return tuple(_ragged_dot(rows, each, sizes, platform) for each in weights)
    return multiply_groups(_load_kernels(), rows, weights, sizes)


def _ragged_dot(rows: Array, weights: Array, sizes: Array, platform: str) -> Array:
    """XLA's: a kernel of groups on TPUs, elsewhere all rows times every matrix."""
    if platform != "tpu":
        return jax.lax.ragged_dot(rows, weights, sizes)
    # That kernel writes no tile behind all groups, neither of the result nor of the
    # rows' gradient.
    is_own = jnp.arange(len(rows))[:, None] < sizes.sum()
    out = jax.lax.ragged_dot(jnp.where(is_own, rows, 0), weights, sizes)
    return jnp.where(is_own, out, 0)


class Kernels(NamedTuple):
    """The three products of a backend, and what sizes must be multiples of.

    `multiply(rows, weights, plan)` gives a result for each of several weights of one
    shape, `multiply_transposed(d_outs, weights, plan)` the sum of those by the
    transposed matrices, `multiply_rows(rows, d_outs, plan)` one for each of `d_outs`,
    over each group's rows.
    """

    multiply: Any
    multiply_transposed: Any
    multiply_rows: Any
    row_multiple: int
    width_multiple: int


def multiply_groups(
    kernels: Kernels,
    rows: Float[Array, "M D"],
    weights: tuple[Float[Array, "E D F"], ...],
    sizes: Int32[Array, "E"],
) -> tuple[Float[Array, "M F"], ...]:
    """The products by these kernels, with their derivatives."""
    length, width = len(rows), weights[0].shape[2]
    by = kernels.width_multiple
    rows = _fill(rows, (kernels.row_multiple, by))
    weights = tuple(_fill(each, (1, by, by)) for each in weights)
    plan = make_plan(sizes, len(rows))
    outs = _multiply(kernels, rows, weights, plan)
    return tuple(out[:length, :width] for out in outs)


Arrays = tuple[Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(kernels: Kernels, rows: Array, weights: Arrays, plan: Plan) -> Arrays:
    outs: Arrays = kernels.multiply(rows, weights, plan)
    return outs


def _multiply_forward(
    kernels: Kernels, rows: Array, weights: Arrays, plan: Plan
) -> tuple[Arrays, tuple[Array, Arrays, Plan]]:
    return _multiply(kernels, rows, weights, plan), (rows, weights, plan)


def _multiply_backward(
    kernels: Kernels, kept: tuple[Array, Arrays, Plan], d_outs: Arrays
) -> tuple[Array, Arrays, None]:
    rows, weights, plan = kept
    d_rows = kernels.multiply_transposed(d_outs, weights, plan)
    d_weights = kernels.multiply_rows(rows, d_outs, plan)
    return d_rows, d_weights, None


_multiply.defvjp(_multiply_forward, _multiply_backward)


def _fill(x: Array, multiples: tuple[int, ...]) -> Array:
    """x with zeros behind it, so that its sizes are multiples of these."""
    tails = [(0, -size % by) for size, by in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, tails) if any(tail for _, tail in tails) else x


@functools.cache
def _load_kernels() -> Kernels:
    """Import only on demand: a CPU or a TPU needs none of it."""
    module = importlib.import_module("jaxtrain.kernels.grouped_matmul.hopper")
    return module.make_kernels()


def choose_implementation(
    rows: Array, weights: Array, device: jax.Device | None
) -> str:
    """What "auto" stands for: this platform's fastest that serves the call."""
    name, reason = "xla", None
    if _platform(device) == "gpu" and len(rows) >= _MANY_ROWS:
        reason = _refusal(rows, device)
        name = "xla" if reason else "pallas_gpu"
    _log_choice(name, weights.shape, rows.dtype.name, reason)
    return name


def _platform(device: jax.Device | None) -> str:
    return jax.default_backend() if device is None else device.platform


def _refusal(rows: Array, device: jax.Device | None) -> str | None:
    """Why Hopper's kernels cannot serve the call; None where they can."""
    if int(compute_capability(device) or 0) != 9:
        return "it needs a Hopper GPU"
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {rows.dtype.name}"
    return None


@functools.cache
def _log_choice(
    name: str, shape: tuple[int, ...], dtype: str, reason: str | None
) -> None:
    """One line for each new choice; a warning where every group costs all rows."""
    told = "grouped products: auto chose %s for %d matrices of %d x %d, %s"
    _logger.info(told, name, *shape, dtype)
    if reason:
        _logger.warning(
            "grouped products: no kernel serves this call (%s), and XLA multiplies all"
            " rows by each group's matrix: %d times the work, and much memory",
            reason,
            shape[0],
        )


def _check(rows: Array, weights: Array, sizes: Array, implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"grouped product implementation {implementation!r} is unknown; use one of"
            f" {', '.join(IMPLEMENTATIONS)}"
        )
    fits = rows.ndim == 2 and weights.ndim == 3 and sizes.ndim == 1
    if not fits or (len(sizes), rows.shape[1]) != weights.shape[:2]:
        raise ValueError(
            f"rows {rows.shape}, weights {weights.shape} and sizes {sizes.shape} do not"
            " fit: they need to be [M D], [E D F] and [E]"
        )
    if rows.dtype != weights.dtype:
        raise ValueError(
            f"rows of {rows.dtype.name} and weights of {weights.dtype.name}: cast one"
        )
