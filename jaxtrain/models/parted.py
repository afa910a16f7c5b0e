"""Weights that each device needs whole, kept and updated in parts.

Devices that each have all weights would all add up all gradients, and update all
weights. Instead each keeps a part of every matrix and of its moments: a step begins by
gathering the matrices, in the compute type, and their gradients are scattered as they
come. This moves as many bytes over the links as sums do, half of them ahead of the
forward pass, and divides the update and what is kept for it: ZeRO's stage 1
(arXiv:1910.02054), and what arXiv:2004.13336 does for the update alone.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxtrain.config import RunConfig
from jaxtrain.models.fp8 import quantize_once
from jaxtrain.models.quantization import is_kept
from jaxtrain.models.stacks import LAYERS
from jaxtrain.sharding import ShardingPlan
from jaxtrain.types import LogicalAxes, Params

AXIS = "data"  # of the mesh: at each of its places are all weights
# These treat each number by itself, so a part of a matrix is enough for them.
_BY_NUMBER = ("adamw", "lion", "sgd")

Read = Callable[[Params], Params]


def serves(run: RunConfig, plan: ShardingPlan) -> bool:
    """Whether a run's weights are kept in parts: where it can be and was measured.

    On two GPUs of one host a step of 0.5B takes 1.8% less (benchmarks/RESULTS.md).
    Links between hosts and TPUs were not measured. Adapters are small. Gradients that
    are to be added up in float32 would be rounded first, and in float16 the sum of a
    token's might be too large.
    """
    processes = {device.process_index for device in plan.mesh.devices.flat}
    offloads = plan.offload_params or plan.offload_optimizer
    precision = run.precision
    wide = precision.reduce_dtype != "float32" and not precision.fp16
    whole = plan.mesh.shape[AXIS] == plan.mesh.size > 1 and plan.zero_stage < 3
    near = plan.platform != "tpu" and len(processes) == 1
    plain = run.lora is None and not (precision.fp8 or offloads)
    by_number = run.optimizer.optimizer in _BY_NUMBER
    return whole and near and plain and wide and by_number


def lay_out(
    plan: ShardingPlan, abstract: Params, logical_axes: Params
) -> tuple[Params, Params]:
    """Where weights that train, and moments of them, are kept: trees of shardings.

    In parts a matrix is split along the first axis, behind the one of layers, that
    divides: in memory one part follows the other. Vectors are whole.
    """
    if not plan.parted:
        moments = plan.optimizer_moments(abstract, logical_axes)
        return plan.parameters(abstract, logical_axes), moments
    count = plan.mesh.shape[AXIS]

    def shard(leaf: Any, axes: LogicalAxes) -> NamedSharding:
        first = axes[0] == LAYERS
        named = [name for name in axes[first:] if name is not None]
        fitting = [n for n in range(first, leaf.ndim) if leaf.shape[n] % count == 0]
        spec: list[str | None] = [None] * leaf.ndim
        if len(named) > 1 and fitting:
            spec[fitting[0]] = AXIS
        return NamedSharding(plan.mesh, PartitionSpec(*spec))

    layouts = jax.tree.map(shard, abstract, logical_axes)
    return layouts, layouts


def preparation(
    run: RunConfig, plan: ShardingPlan, layouts: Params
) -> Callable[[Params], Read]:
    """What a step makes of its weights once, as `StepOptions.prepare`.

    Args:
        layouts: where each weight that trains is kept, as a tree of shardings.
    """
    if plan.fp8:
        return quantize_once
    if not plan.parted:
        return lambda params: lambda tree: tree
    return functools.partial(gather_once, layouts, run.precision.compute_dtype)


def gather_once(layouts: Params, compute_dtype: str, params: Params) -> Read:
    """Gather what is in parts; what is returned puts it into a tree like `params`.

    Its gradient, in the compute type too, is left in parts.
    """

    def gather(path: Any, leaf: Array, layout: NamedSharding) -> Array:
        if layout.is_fully_replicated:
            return leaf
        own = leaf if is_kept(path) else leaf.astype(compute_dtype)
        # Else XLA would gather first, which is twice as much, and then cast.
        own = jax.lax.optimization_barrier(_pin(own, layout))
        return _pin(own, NamedSharding(layout.mesh, PartitionSpec()))

    whole = jax.tree_util.tree_map_with_path(gather, params, layouts)

    def read(params: Params) -> Params:
        return jax.tree.map(
            lambda leaf, whole, layout: (
                leaf if layout.is_fully_replicated else _as_whole(layout, leaf, whole)
            ),
            *(params, whole, layouts),
        )

    return read


_pin = jax.lax.with_sharding_constraint


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _as_whole(layout: NamedSharding, part: Array, whole: Array) -> Array:
    """`whole`, whose gradient is that of `part`."""
    return whole


def _forward(layout: NamedSharding, part: Array, whole: Array) -> tuple[Array, Array]:
    return whole, jnp.zeros((), part.dtype)


def _backward(
    layout: NamedSharding, like: Array, gradient: Array
) -> tuple[Array, None]:
    return _pin(gradient, layout).astype(like.dtype), None


_as_whole.defvjp(_forward, _backward)
