"""What the forward and backward Hopper kernels share: tiles, masks, small helpers.

Every kernel runs three warpgroups a block of threads: two compute, each on 64 rows of
a tile of 128, and one feeds them through a ring of buffers in shared memory by TMA.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxtrain.kernels.attention.blocked import (
    LOG2_E,
    Options,
    estimate_cost,
    scale_scores,
)
from jaxtrain.kernels.attention.schedule import Schedule

Ref = Any  # a reference to memory of the kernel, or to a barrier

BLOCK = 128  # of the schedule, queries and keys
ROWS = 64  # of one warpgroup: the height of a wgmma tile
GROUPS = BLOCK // ROWS  # computing warpgroups
FEEDER = GROUPS  # index of the warpgroup that copies
MULTIPROCESSORS = 132  # of an H100 or H200 (SXM)

TELLS_COST = "cost_estimate" in inspect.signature(plgpu.kernel).parameters

TILE = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


# Plain rows up to here, and packed ones, are short walks: benchmarks/RESULTS.md.
_SHORT_ROW = 2048


class Interpretable(Protocol):
    """What says whether a kernel is interpreted, in any kernel's options."""

    @property
    def interpret(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Entries of a block taken in one turn, and buffers in the ring, of each kernel.

    `*_columns` of a result leave at once: what shared memory has room for.
    `*_programs` run side by side; None: one a multiprocessor, and no more than tiles.
    """

    forward_step: int = 128
    forward_stages: int = 2
    forward_columns: int = 128
    forward_programs: int | None = None
    dq_step: int = 128
    dq_stages: int = 2
    dq_columns: int = 64
    dq_programs: int | None = None
    dkv_step: int = 64
    dkv_stages: int = 2
    joint_dkv: bool = True  # dk and dv by one kernel: both accumulators in registers
    take_turns: bool = True  # one group's softmax runs under the other's products


def choose_tiles(options: Options, q: Array, v: Array) -> Tiles:
    """Tiles that fit 227 KiB of shared memory and 240 registers a thread."""
    length, width = q.shape[1], max(q.shape[3], v.shape[3])
    if width <= 64:
        return Tiles()
    if width <= 128:
        if options.has_padding or length <= _SHORT_ROW:
            return Tiles(dq_step=64, dq_stages=4)
        return Tiles(dq_programs=sys.maxsize)
    if width <= 192 and v.shape[3] <= 128:
        return Tiles(forward_step=64, forward_stages=3, dq_step=64, joint_dkv=False)
    # A step below 64 is no wgmma depth, so one buffer has to do in the backward pass.
    return Tiles(
        forward_step=64,
        forward_columns=64,
        dq_step=64,
        dq_stages=1,
        dkv_stages=1,
        joint_dkv=False,
    )


def count_programs(options: Options, q: Array, wanted: int | None) -> int:
    """How many run side by side, each over several tiles of q [B T N H]."""
    batch, length, heads, _ = q.shape
    if wanted is None:
        # Interpreted: few, so that each has several tiles.
        wanted = 2 if options.interpret else count_multiprocessors()
    return min(wanted, batch * heads * (length // BLOCK))


def count_multiprocessors() -> int:
    """Of the GPU that is here; of an H100 or H200 where none is."""
    if jax.default_backend() != "gpu":
        return MULTIPROCESSORS
    return jax.local_devices()[0].core_count


def choose_blocks(length: int) -> tuple[int, int]:
    """The blocks of the schedule, whatever the length."""
    return BLOCK, BLOCK


def choose_width(width: int) -> int:
    """Head widths the 128-byte swizzle takes: 64, 128, 192 or 256."""
    for allowed in (64, 128, 192, 256):
        if width <= allowed:
            return allowed
    raise NotImplementedError(
        f"pallas_gpu refuses head width {width}: at most 256; use 'xla'"
    )


def matrix_memory(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Shared memory for wgmma operands and TMA: 8 x 64 tiles, 128-byte swizzle."""
    # Any: from jax 0.12 on their annotations claim that they are abstract.
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    transforms = (tiling((8, 64)), swizzle(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def vector_memory(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
    """Shared memory for a vector: one number for each row, or column, of a tile."""
    return plgpu.SMEM(shape, dtype)


def make_interpreter(wanted: bool) -> Any:
    """What `plgpu.kernel` takes to interpret a kernel on a CPU; None to compile it.

    Raises:
        NotImplementedError: this jax cannot interpret such kernels.
    """
    if not wanted:
        return None
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError("this jax has no interpreter for Mosaic GPU")
    return plgpu.InterpretGPUParams()


def call(
    options: Options,
    body: Callable[..., None],
    *,
    out_type: object,
    scratch: list,
    grid: dict[str, int],
    products: tuple[int, int],
) -> Callable:
    """The compiled kernel over a grid of named axes.

    Its first arguments are q, k and v; it computes `products` of each tile, as wide as
    a key and as a value, for which `jaxpr_cost` counts it, where this jax has a place
    for that.
    """
    make = functools.partial(
        plgpu.kernel,
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=make_interpreter(options.interpret),
    )
    if not TELLS_COST:
        return make()

    def run(q: Array, k: Array, v: Array, *others: Array) -> Any:
        arrays, lengths = (q, k, v), (q.shape[1], k.shape[1])
        cost = estimate_cost(
            options, arrays, lengths, (BLOCK, BLOCK), products=products
        )
        return make(cost_estimate=pl.CostEstimate(**cost))(*arrays, *others)

    return run


def product(
    left: Ref, right: Ref, shape: tuple, issued: Callable[[], Any] = lambda: None
) -> tuple[Array, Any]:
    """left @ right by wgmma into fresh float32 registers, and what `issued` returns.

    That runs once the product is on its way, before it is waited for.
    """

    def compute(ref: Ref) -> tuple[Array, Any]:
        plgpu.wgmma(ref, left, right)
        meanwhile = issued()
        return ref[...], meanwhile

    return pl.run_scoped(compute, plgpu.ACC(shape, jnp.float32))


def add_product(options: Options, total: Array, left: Array, right: Ref) -> Array:
    """total + left @ right, left and total in registers, right in shared memory."""
    if options.interpret:  # the interpreter's wgmma reads shared memory only
        dims = (((1,), (0,)), ((), ()))
        return total + jax.lax.dot_general(
            left, right[...], dims, preferred_element_type=jnp.float32
        )
    accumulate = pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))
    return accumulate(plgpu.ACC.init(total))


def wait_for_slot(barriers: Ref, turn: Array, slot: Array | int, stages: int) -> None:
    """Waits until the buffers of `slot` were read; its first use needs no wait."""
    pl.when(turn >= stages)(lambda: plgpu.barrier_wait(barriers.at[slot]))


def constant(options: Interpretable, shape: tuple, value: float, layout: Any) -> Array:
    """A float32 array in registers."""
    return place(options, jnp.full(shape, value, jnp.float32), layout)


def place(options: Interpretable, x: Array, layout: Any) -> Array:
    """`x` in the given register layout; the interpreter has none."""
    return x if options.interpret else plgpu.layout_cast(x, layout)


def over_rows(x: Array, shape: tuple) -> Array:
    """One number a row, repeated along columns."""
    return jax.lax.broadcast_in_dim(x, shape, [0])


def over_columns(x: Array, shape: tuple) -> Array:
    """One number a column, repeated along rows."""
    return jax.lax.broadcast_in_dim(x, shape, [1])


def iota(options: Interpretable, shape: tuple, axis: int) -> Array:
    """Row or column number of each entry of a tile."""
    if options.interpret:
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)


def logit_factor(options: Options) -> float:
    """What `unscaled_logits` leave out, above 0: applied where it costs nothing."""
    plain = options.softcap is None and options.scale > 0
    return options.scale * LOG2_E if plain else 1.0


def unscaled_logits(options: Options, raw: Array) -> Array:
    """Logits in units of log 2, divided by `logit_factor`."""
    return raw if logit_factor(options) != 1.0 else scale_scores(options, raw)


def within_reach(options: Options, distance: Array) -> Array | None:
    """Where the causal rule and the window allow query index - key index.

    The query's index counts from the first query here, which may not start the row.
    """
    if not options.causal:
        return None
    # The first query's place in the row shifts the bounds: it costs no addition.
    near = distance >= -options.offset
    if options.window is not None:
        near &= distance < options.window - options.offset
    return near


def divide(x: Array, by: int) -> Array:
    """x // by of non-negative integers, without floor's sign handling."""
    return jax.lax.div(x, jnp.int32(by))


def remainder(x: Array, by: int) -> Array:
    """x % by of non-negative integers."""
    return jax.lax.rem(x, jnp.int32(by))


def check_schedule(schedule: Schedule) -> None:
    """Refuses a schedule made for another implementation."""
    if (schedule.block_q, schedule.block_k) != (BLOCK, BLOCK):
        raise ValueError(
            f"the schedule has blocks of {schedule.block_q} and {schedule.block_k}, but"
            f" pallas_gpu needs {BLOCK} for both: call plan_attention with"
            " implementation='pallas_gpu'"
        )
