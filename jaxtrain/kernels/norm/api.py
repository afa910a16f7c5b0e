"""A residual sum with its RMSNorm: when kernels compute both, and their gradients.

The stream of a decoder takes up what a layer adds to it, and the next layer reads the
norm of the sum. XLA makes several kernels of that, each of which reads the stream again
(benchmarks/RESULTS.md). What `choose_tiles` refuses the caller leaves to XLA.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxtrain.kernels.attention.cudnn import compute_capability
from jaxtrain.kernels.attention.partition import Layout

if TYPE_CHECKING:
    from jaxtrain.kernels.norm.pallas_triton import Tiles

# Fewer tokens, as in generation, are not worth kernels of their own.
_MANY_TOKENS = 1024
_WIDTH_MULTIPLE = 8  # 16 bytes, as much as a thread reads at once
_WIDEST = 8192  # of wider rows a program's registers hold none
_logger = logging.getLogger(__name__)


class _Options(NamedTuple):
    epsilon: float
    tiles: "Tiles"
    layout: Layout
    copies: int


def choose_tiles(
    x: Float[Array, "B T D"] | jax.ShapeDtypeStruct, device: jax.Device | None
) -> "Tiles | None":
    """How kernels cut a stream like `x`; None where XLA shall compute it.

    `device` is one that the program is for, where it is not the first local one.
    """
    if int(compute_capability(device) or 0) != 9:
        return None  # not measured there
    if x.shape[0] * x.shape[1] < _MANY_TOKENS:
        return None
    reason = _refusal(x)
    _log_choice(x.shape[2], reason)
    return None if reason else _kernels().Tiles.of_width(x.shape[2])


def _refusal(x: Array | jax.ShapeDtypeStruct) -> str | None:
    """Why the kernels cannot serve this stream; None where they can."""
    width = x.shape[2]
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"they take bfloat16 or float16, not {x.dtype.name}"
    if width % _WIDTH_MULTIPLE or width > _WIDEST:
        return f"a width must be a multiple of {_WIDTH_MULTIPLE} up to {_WIDEST}"
    return None


def add_and_norm(
    x: Float[Array, "B T D"],
    added: Float[Array, "B T D"] | None,
    scale: Float[Array, "D"],
    *,
    epsilon: float,
    tiles: "Tiles",
    layout: Layout | None = None,
    copies: int = 1,
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T D"], ...]]:
    """x + added, and sum / rms(sum) * scale of that sum as it is rounded, by kernels.

    All is computed in float32 and rounded to the type of `x`. Where `added` is None, x
    is the sum. A stream is best read through this alone: the gradients of the sum and
    of its norm are added up in the same pass. So are those of several `copies` of the
    norm, which are one array. `layout` says how a mesh splits rows and tokens, where
    there is one.
    """
    total, *norms = _add_and_norm(
        _Options(epsilon, tiles, layout or Layout(), copies),
        x,
        added,
        scale.astype(jnp.float32),
    )
    return total, tuple(norms)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add_and_norm(
    options: _Options, x: Array, added: Array | None, scale: Array
) -> tuple[Array, ...]:
    def run(x: Array, added: Array | None, scale: Array) -> tuple[Array, ...]:
        flat = None if added is None else _as_rows(added)
        results = _kernels().forward(
            _as_rows(x), flat, scale, options.epsilon, options.tiles
        )
        return tuple(result.reshape(x.shape) for result in results)

    stream, whole = _specs(options.layout, x)
    outputs = (stream,) if added is None else (stream, stream)
    results = _on_shards(options.layout, run, (stream, stream, whole), outputs)(
        x, added, scale
    )
    total = x if added is None else results[0]
    return total, *[results[-1]] * options.copies


def _forward_rule(
    options: _Options, x: Any, added: Any, scale: Any
) -> tuple[tuple[Array, ...], tuple[Any, ...]]:
    values = jax.tree.map(lambda argument: argument.value, (x, added, scale))
    outputs = _add_and_norm(options, *values)
    # As trees, for residuals are arrays.
    adds = None if added is None else ()
    trains = () if scale.perturbed else None
    return outputs, (outputs[0], scale.value, adds, trains)


def _backward_rule(
    options: _Options, residuals: tuple[Any, ...], cotangents: tuple[Any, ...]
) -> tuple[Array | None, Array | None, Array | None]:
    total, scale, adds, trains = residuals
    of_total, *of_out = (None if isinstance(c, SymbolicZero) else c for c in cotangents)
    of_out = [gradient for gradient in of_out if gradient is not None]
    if not of_out:
        return of_total, None if adds is None else of_total, None

    def run(
        total: Array, scale: Array, of_total: Array | None, of_out: list[Array]
    ) -> tuple[Array, ...]:
        found, of_scale = _kernels().backward(
            _as_rows(total),
            scale,
            None if of_total is None else _as_rows(of_total),
            [_as_rows(gradient) for gradient in of_out],
            options.epsilon,
            options.tiles,
            with_scale=trains is not None,
        )
        found = found.reshape(total.shape)
        return (found,) if of_scale is None else (found, of_scale[None])

    stream, whole = _specs(options.layout, total)
    outputs = (stream,) if trains is None else (stream, _of_parts(stream))
    found, *of_scale = _on_shards(
        options.layout, run, (stream, whole, stream, stream), outputs
    )(total, scale, of_total, of_out)
    # One part of each device that has tokens of its own.
    summed = of_scale[0].sum(axis=0) if of_scale else None
    return found, None if adds is None else found, summed


_add_and_norm.defvjp(_forward_rule, _backward_rule, symbolic_zeros=True)


def _as_rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _specs(layout: Layout, x: Array) -> tuple[PartitionSpec, PartitionSpec]:
    """How a mesh splits the stream, and what every device has whole."""
    rows = layout.fitting(layout.rows, x.shape[0])
    tokens = layout.tokens if layout.token_shards(x.shape[1]) > 1 else ()
    return PartitionSpec(rows or None, tokens or None), PartitionSpec()


def _of_parts(stream: PartitionSpec) -> PartitionSpec:
    """The layout of [N D], one row of each device that the stream is split over."""
    return PartitionSpec(tuple(jax.tree.leaves(tuple(stream))) or None)


def _on_shards(
    layout: Layout,
    run: Callable[..., Any],
    inputs: tuple[PartitionSpec, ...],
    outputs: tuple[PartitionSpec, ...],
) -> Callable[..., Any]:
    """`run` on each device for its own tokens: a kernel cannot be cut otherwise."""
    if layout.mesh is None or layout.mesh.size == 1:
        return run
    return jax.shard_map(
        run,
        mesh=layout.mesh,
        in_specs=inputs,
        out_specs=outputs,
        check_vma=False,  # a kernel does not say over which axes its outputs vary
    )


@functools.cache
def _log_choice(width: int, reason: str | None) -> None:
    name = f"XLA, for {reason}" if reason else "kernels with their residual sums"
    _logger.info("norms of width %d: auto chose %s", width, name)


@functools.cache
def _kernels() -> Any:
    """Imported on demand: a CPU or a TPU needs none of it."""
    return importlib.import_module("jaxtrain.kernels.norm.pallas_triton")
