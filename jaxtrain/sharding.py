"""Where arrays live: the device mesh, logical-axis rules, host memory. No model names.

A parameter names its axes ("embed", "heads", ...) and one table says over which mesh
axes each is split. ZeRO's stages are choices of table: stage 3 splits parameters and
optimizer state, stages 1 and 2 only the optimizer state (gradients never outlive the
step, so XLA scatters them where stage 2 would), stage 0 nothing (arXiv:1910.02054).
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

LogicalAxes = tuple[str | None, ...]
MeshAxes = tuple[str, ...]

# Parameters: which mesh axes split each logical axis.
PARAMETER_RULES: Mapping[str, MeshAxes] = {
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}
# Optimizer state under ZeRO 1 and 2, whose parameters are whole on every device.
OPTIMIZER_RULES: Mapping[str, MeshAxes] = {
    **PARAMETER_RULES,
    "embed": ("data", "fsdp"),
}
# Activations: rows over every data-parallel device; their width stays whole.
ACTIVATION_RULES: Mapping[str, MeshAxes] = {
    "batch": BATCH_AXES,
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
}


def resolve_mesh_shape(sizes: Mapping[str, int], device_count: int) -> dict[str, int]:
    """Sizes of every mesh axis; one size of -1 takes the devices that remain.

    Raises:
        ValueError: the sizes do not multiply to `device_count`; it names the nearest
            sizes that do.
    """
    shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    wildcards = [axis for axis, size in shape.items() if size == -1]
    if len(wildcards) > 1:
        raise ValueError(f"mesh.{wildcards} = -1: only one axis may be -1 (the rest)")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if wildcards and device_count % fixed == 0:
        shape[wildcards[0]] = device_count // fixed
    elif wildcards or fixed != device_count:
        raise ValueError(
            f"mesh = {dict(sizes)} needs a multiple of {fixed} devices"
            f"{'' if wildcards else ' (exactly that many)'}, but {device_count} are"
            f" present; the nearest that divides is {_nearest(shape, device_count)}"
        )
    return shape


def _nearest(shape: Mapping[str, int], device_count: int) -> dict[str, int]:
    """Shrink each axis to the largest size that still divides what is left."""
    nearest, left = {}, device_count
    for axis in reversed(MESH_AXES):  # keep tensor parallelism: it is chosen for fit
        wanted = left if shape[axis] == -1 else min(shape[axis], left)
        nearest[axis] = next(n for n in range(wanted, 0, -1) if left % n == 0)
        left //= nearest[axis]
    nearest["fsdp"] *= left
    return {axis: nearest[axis] for axis in MESH_AXES}


def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of `devices` (all of them by default) with axes `MESH_AXES`.

    Devices that are not present serve to compile for them (jaxtrain/aot.py).
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve_mesh_shape(sizes, len(devices))
    dimensions = tuple(shape.values())
    present = jax.devices()
    if len(devices) == len(present) or devices[0] not in present:
        # Follows the interconnect's topology, so near mesh neighbours are near chips.
        return jax.make_mesh(
            dimensions,
            MESH_AXES,
            axis_types=(jax.sharding.AxisType.Auto,) * 3,
            devices=devices,
        )
    return Mesh(np.asarray(devices).reshape(dimensions), MESH_AXES)


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """How one run lays out parameters, optimizer state, batches and activations.

    `zero_stage`: see the module's docstring. `offload_*` keep that state in pinned
    host memory between steps; the step brings it to the device while it needs it.
    """

    mesh: Mesh
    zero_stage: int = 3
    offload_optimizer: bool = False
    offload_params: bool = False

    @property
    def batch_shards(self) -> int:
        """Number of data-parallel shards that a batch's rows are split into."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def parameters(self, abstract: Any, logical_axes: Any) -> Any:
        """Shardings of a parameter tree as it is stored between steps."""
        shardings = self._tree(abstract, logical_axes, self._parameter_rules)
        return _in_host_memory(shardings) if self.offload_params else shardings

    def optimizer_moments(self, abstract: Any, logical_axes: Any) -> Any:
        """Shardings of arrays shaped like the parameters, as the optimizer keeps them.

        Host memory is applied by `store_optimizer`, because scalars stay on device.
        """
        rules = OPTIMIZER_RULES if self.zero_stage in (1, 2) else self._parameter_rules
        return self._tree(abstract, logical_axes, rules)

    def store_optimizer(self, shardings: Any) -> Any:
        """Optimizer-state shardings as stored between steps."""
        return _in_host_memory(shardings) if self.offload_optimizer else shardings

    def batch(self, leading_axes: int = 0) -> NamedSharding:
        """Rows over the data-parallel devices, behind `leading_axes` whole axes."""
        spec = PartitionSpec(*([None] * leading_axes), BATCH_AXES)
        return NamedSharding(self.mesh, spec)

    def constrain(self, x: jax.Array, logical_axes: LogicalAxes) -> jax.Array:
        """Pin an activation's layout, by its logical axes."""
        if self.mesh.size == 1:
            return x
        spec = _partition_spec(x.shape, logical_axes, ACTIVATION_RULES, self.mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    @property
    def _parameter_rules(self) -> Mapping[str, MeshAxes]:
        if self.zero_stage >= 3:
            return PARAMETER_RULES
        return {**PARAMETER_RULES, "embed": ()}

    def _tree(
        self, abstract: Any, logical_axes: Any, rules: Mapping[str, MeshAxes]
    ) -> Any:
        def shard(leaf: Any, axes: LogicalAxes) -> NamedSharding:
            spec = _partition_spec(leaf.shape, axes, rules, self.mesh)
            return NamedSharding(self.mesh, spec)

        return jax.tree.map(shard, abstract, logical_axes)


def _partition_spec(
    shape: Sequence[int],
    logical_axes: LogicalAxes,
    rules: Mapping[str, MeshAxes],
    mesh: Mesh,
) -> PartitionSpec:
    """Split each axis by its rule, each mesh axis once; else keep it whole."""
    if len(shape) != len(logical_axes):
        raise ValueError(f"shape {tuple(shape)} has not the axes {logical_axes}")
    used: set[str] = set()
    entries: list[Any] = []
    for size, name in zip(shape, logical_axes, strict=True):
        axes = tuple(
            axis
            for axis in rules.get(name or "", ())
            if axis not in used and mesh.shape[axis] > 1
        )
        if size % math.prod(mesh.shape[axis] for axis in axes):
            _log_whole(name, size, axes)
            axes = ()
        used.update(axes)
        entries.append(axes or None)
    return PartitionSpec(*entries)


@functools.cache
def _log_whole(name: str, size: int, axes: MeshAxes) -> None:
    logger.info(
        "axis %r of size %d does not divide over %s: kept whole there",
        name, size, axes,
    )  # fmt: skip


def _in_host_memory(shardings: Any) -> Any:
    return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), shardings)


def on_device(shardings: Any) -> Any:
    """The same layouts in device memory."""
    return jax.tree.map(lambda s: s.with_memory_kind("device"), shardings)


def make_transfer(shardings: Any) -> Callable[[Any], Any]:
    """A function, for use under jit, that moves a tree to `shardings`' memory."""
    return lambda tree: jax.tree.map(jax.device_put, tree, shardings)


def place_batch(batch: Any, sharding: NamedSharding) -> Any:
    """This process's rows of a batch, as arrays over all devices of all processes."""
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
    )
