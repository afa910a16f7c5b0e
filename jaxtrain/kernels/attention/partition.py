"""Runs a kernel on each device of a mesh for the rows and heads that lie there.

The compiler cannot cut a kernel by itself: it would gather every input on every
device. Rows (B) and key-value heads (K) are independent, so along these two a kernel
runs where its inputs are; anything else an input is sharded over is gathered.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

# Letters of the axes: b rows, k key-value heads, g query heads of a group, t tokens,
# h head width, i query blocks, j key blocks.
QUERY, KEY, STAT, IDS = "b t k g h", "b t k h", "b k g t", "b t"
SCHEDULE = ("b i", "b i", "b i j", "b j", "b j", "b j i")
_CUT = ("b", "k")


def run_on_shards(
    kernel: Callable[..., tuple[Array, ...]],
    key: Any,
    operands: tuple[Array, ...],
    axes: tuple[str, ...],
    result_axes: tuple[str, ...],
) -> tuple[Array, ...]:
    """`kernel(*operands)`, on each device for its rows and key-value heads.

    `axes` name the axes of each operand. `key` is hashable, and equal keys mean equal
    kernels: one partitioned function is kept for each.
    """
    return _partitioned(_Kernel(kernel, key), axes, result_axes)(*operands)


class _Kernel:
    """A kernel that compares by its key: closures over options are made anew."""

    def __init__(self, call: Callable[..., tuple[Array, ...]], key: Any) -> None:
        self.call, self.key = call, key

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Kernel) and self.key == other.key


@functools.cache
def _partitioned(
    kernel: _Kernel, axes: tuple[str, ...], result_axes: tuple[str, ...]
) -> Callable[..., tuple[Array, ...]]:
    function = custom_partitioning(kernel.call)

    def shardings(
        mesh: Mesh, arguments: tuple[jax.ShapeDtypeStruct, ...], wanted: tuple[str, ...]
    ) -> tuple[NamedSharding, ...]:
        """As the keys are cut (operand 1, `KEY`): the queries have to follow them."""
        spec = arguments[1].sharding.spec
        names = dict(zip(KEY.split(), tuple(spec) + (None,) * 4, strict=False))
        return tuple(
            NamedSharding(
                mesh,
                PartitionSpec(*(names[a] if a in _CUT else None for a in one.split())),
            )
            for one in wanted
        )

    def partition(mesh: Mesh, arguments: tuple, results: tuple) -> tuple:
        return (
            mesh,
            kernel.call,
            shardings(mesh, arguments, result_axes),
            shardings(mesh, arguments, axes),
        )

    def infer(mesh: Mesh, arguments: tuple, results: tuple) -> tuple:
        return shardings(mesh, arguments, result_axes)

    # In the order of their first appearance, as the compiler numbers them.
    letters = dict.fromkeys(" ".join(axes + result_axes).split())
    function.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{', '.join(axes)} -> {', '.join(result_axes)}",
        need_replication_factors=tuple(a for a in letters if a not in _CUT),
    )
    return function
