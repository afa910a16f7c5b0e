"""When the loss head runs by kernels that keep its logits in registers, and how.

hopper.py has the kernels. What they cannot do, such as a soft cap or an adapter, XLA's
products and sums in api.py do.
"""

import functools
import importlib
import logging
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.attention.cudnn import compute_capability

if TYPE_CHECKING:
    from jaxtrain.kernels.linear_cross_entropy.hopper import Slope, Sums, Tiles, Weights

ROW_MULTIPLE = 128
_WIDTH_MULTIPLE = 64
# Fewer tokens read the table faster than they multiply by it.
_MANY_ROWS = 512
_logger = logging.getLogger(__name__)


def choose_tiles(
    hidden: Float[Array, "M D"] | jax.ShapeDtypeStruct,
    entries: int,
    device: jax.Device | None,
) -> "Tiles | None":
    """How the kernels cut this head's logits; None where XLA computes them.

    `device` is one that the program is for, where it is not the first local one.
    """
    if int(compute_capability(device) or 0) != 9 or hidden.shape[0] < _MANY_ROWS:
        return None
    reason = refusal(hidden, entries)
    _log_choice(hidden.shape[1], entries, reason)
    return None if reason else _kernels().Tiles()


def refusal(
    hidden: Float[Array, "M D"] | jax.ShapeDtypeStruct, entries: int
) -> str | None:
    """Why the kernels cannot serve these shapes and types; None where they can."""
    if hidden.dtype not in (jnp.bfloat16, jnp.float16):
        return f"they take bfloat16 or float16, not {hidden.dtype.name}"
    if hidden.shape[1] % _WIDTH_MULTIPLE or entries % _WIDTH_MULTIPLE:
        return f"a width and a vocabulary need to be multiples of {_WIDTH_MULTIPLE}"
    return None


def sum_logits(
    tiles: "Tiles",
    hidden: Float[Array, "M D"],
    table: Array,
    targets: Int32[Array, "M"],
    of_table: tuple[int, float],
) -> "Sums":
    """Each row's sums over the vocabulary; `of_table`: its vocabulary's axis, scale."""
    table = table.astype(hidden.dtype)
    sums: Sums = _run("sum_logits", tiles, of_table, (hidden, table), targets)
    return sums


def weigh_logits(
    tiles: "Tiles",
    hidden: Float[Array, "M D"],
    table: Array,
    targets: Int32[Array, "M"],
    base: Float[Array, "M"],
    of_table: tuple[int, float],
) -> "Weights":
    """exp(logit - base), with each row's sums over the vocabulary."""
    weights: Weights = _run(
        "weigh_logits", tiles, of_table, (hidden, table), targets, base
    )
    return weights


def make_slopes(
    tiles: "Tiles",
    hidden: Float[Array, "M D"],
    part: Array,
    slope: "Slope",
    of_table: tuple[int, float],
) -> Float[Array, "M W"]:
    """d loss / d logits of a slice `part` of the table, in the type of `hidden`."""
    slopes: Array = _run("make_slopes", tiles, of_table, (hidden, part), slope)
    return slopes


# A function of its own, as attention's are (blocked.py): a step that scores by two
# models holds, and compiles, one of each kernel.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    name: str,
    tiles: "Tiles",
    of_table: tuple[int, float],
    operands: tuple[Array, Array],
    *arguments: Any,
) -> Any:
    """A function of `hopper`'s, on hidden states and a table."""
    kernels = _kernels()
    head = kernels.Head(*operands, *of_table)
    return getattr(kernels, name)(head, *arguments, tiles)


def describe_slope(*parts: Array) -> "Slope":
    """A `Slope` of its fields."""
    slope: Slope = _kernels().Slope(*parts)
    return slope


def pad_rows(
    hidden: Float[Array, "M D"], targets: Int32[Array, "M"]
) -> tuple[Float[Array, "N D"], Int32[Array, "N"]]:
    """Both with zeros behind them, up to whole tiles of rows."""
    tail = -len(hidden) % ROW_MULTIPLE
    if not tail:
        return hidden, targets
    return jnp.pad(hidden, ((0, tail), (0, 0))), jnp.pad(targets, (0, tail))


@functools.cache
def _log_choice(width: int, entries: int, reason: str | None) -> None:
    name = f"XLA's products, for {reason}" if reason else "Hopper's kernels"
    _logger.info("loss head of %d x %d: auto chose %s", width, entries, name)


@functools.cache
def _kernels() -> Any:
    """Imported on demand: a CPU or a TPU needs none of it."""
    return importlib.import_module("jaxtrain.kernels.linear_cross_entropy.hopper")
