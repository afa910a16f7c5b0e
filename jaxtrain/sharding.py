"""Where arrays live: the device mesh, logical-axis rules, host memory. No model names.

A parameter names its axes ("embed", "heads", ...) and one table says over which mesh
axes each is split. ZeRO's stages are choices of table: stage 3 splits parameters and
optimizer state, stages 1 and 2 only the optimizer state (gradients never outlive the
step, so XLA scatters them where stage 2 would), stage 0 nothing (arXiv:1910.02054).
"""

import collections
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.config.mesh_shape import MESH_AXES, resolve_mesh_shape
from jaxtrain.kernels import xla_options
from jaxtrain.types import LogicalAxes

logger = logging.getLogger(__name__)

BATCH_AXES = ("data", "fsdp", "expert")

MeshAxes = tuple[str, ...]
Rules = Mapping[str, MeshAxes]

_SHARED = ("fsdp", "expert", "context")
_WIDTHS = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp"), ("tensor",))
# Parameters: which mesh axes split each logical axis.
PARAMETER_RULES: Rules = {
    **_WIDTHS,
    # Devices that share rows would hold the same weights otherwise.
    "embed": _SHARED,
    # Over fsdp too where their number divides; else "embed" of that array is split.
    "experts": ("expert", "fsdp"),
}
# Optimizer state under ZeRO 1 and 2, whose parameters are whole on every device.
OPTIMIZER_RULES: Rules = {**PARAMETER_RULES, "embed": ("data", *_SHARED)}
# Activations: rows over every data-parallel device, tokens over `context`; their width
# stays whole. "tokens" are those of all rows in one axis.
ACTIVATION_RULES: Rules = {
    **_WIDTHS,
    "batch": BATCH_AXES,
    "sequence": ("context",),
    "tokens": (*BATCH_AXES, "context"),
    "experts": ("expert",),
}


def make_mesh(
    sizes: Mapping[str, int],
    devices: Sequence[jax.Device] | None = None,
    *,
    slices: Mapping[str, int] | None = None,
) -> Mesh:
    """The mesh of `devices` (all of them by default) with axes `MESH_AXES`.

    For devices that are not present, programs can only be compiled (jaxtrain/aot).
    `slices`: by the name of an axis, over how many slices it extends. If it is not
    given and there are several slices, `data` and `fsdp` extend over all of them.

    Raises:
        ValueError: the sizes do not fit the devices, or `slices` not their slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve_mesh_shape(sizes, len(devices))
    over = _axes_over_slices(shape, devices, slices or {})
    present = jax.devices()
    if math.prod(over.values()) > 1:
        arranged = mesh_utils.create_hybrid_device_mesh(
            [shape[axis] // over.get(axis, 1) for axis in MESH_AXES],
            [over.get(axis, 1) for axis in MESH_AXES],
            devices,
            process_is_granule=not _have_slices(devices),
            allow_split_physical_axes=True,
        )
    elif len(devices) == len(present) or devices[0] not in present:
        # Follows the interconnect's topology, so near mesh neighbours are near chips.
        # An axis that no axes of the torus make up (32 on 8x16x16) takes part of one,
        # which `jax.make_mesh` refuses.
        arranged = mesh_utils.create_device_mesh(
            tuple(shape.values()), devices, allow_split_physical_axes=True
        )
    else:
        arranged = np.asarray(devices).reshape(tuple(shape.values()))
    return Mesh(arranged, MESH_AXES)


def _have_slices(devices: Sequence[jax.Device]) -> bool:
    """Whether devices name their slice; if not, each process counts as a slice."""
    return len({getattr(device, "slice_index", 0) for device in devices}) > 1


def _axes_over_slices(
    shape: Mapping[str, int], devices: Sequence[jax.Device], wanted: Mapping[str, int]
) -> dict[str, int]:
    """Over how many slices each axis extends; their product is the number of slices."""
    attribute = "slice_index" if _have_slices(devices) else "process_index"
    count = len({getattr(device, attribute) for device in devices})
    if not wanted and attribute == "process_index":
        return {}  # jax.make_mesh keeps the devices of a process together
    over = dict(wanted)
    if not over:
        over["data"] = math.gcd(shape["data"], count)
        over["fsdp"] = math.gcd(shape["fsdp"], count // over["data"])
    for axis, slices in over.items():
        if shape[axis] % slices:
            raise ValueError(
                f"mesh.dcn_{axis} = {slices} does not divide mesh.{axis} ="
                f" {shape[axis]}; set {math.gcd(shape[axis], slices)}"
            )
    if math.prod(over.values()) != count:
        named = " x ".join(f"{axis} {slices}" for axis, slices in over.items())
        kind = "slices" if attribute == "slice_index" else "processes"
        raise ValueError(
            f"mesh.dcn_*: {named} is not the number of {kind}, {count}: let mesh.data"
            f" or mesh.fsdp be a multiple of {count}, or unset mesh.dcn_*"
        )
    return over


@dataclasses.dataclass(frozen=True)
class ShardingPlan:
    """How one run lays out parameters, optimizer state, batches and activations.

    `zero_stage`: see the module's docstring. `offload_*` keep that state in pinned
    host memory between steps, and steps fetch it. `unrolled`: programs compile each
    layer on its own. `fp8`: they multiply so. `parted`: see models/parted.py.
    """

    mesh: Mesh
    zero_stage: int = 3
    offload_optimizer: bool = False
    offload_params: bool = False
    unrolled: bool = False
    fp8: bool = False
    parted: bool = False
    deterministic: bool = False
    adapters: bool = False

    @property
    def batch_axes(self) -> MeshAxes:
        """The mesh axes that split a batch's rows; `expert` only where it acts."""
        return BATCH_AXES if self.mesh.shape["expert"] > 1 else BATCH_AXES[:-1]

    @property
    def weight_axes(self) -> MeshAxes:
        """The mesh axes that may split the width of weights, if they are not whole."""
        return self._parameter_rules["embed"]

    @property
    def batch_shards(self) -> int:
        """Number of data-parallel shards that a batch's rows are split into."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def fill_up(self, rows: int) -> int:
        """Round `rows` up to a multiple of `batch_shards`."""
        return -(-rows // self.batch_shards) * self.batch_shards

    @property
    def readers(self) -> tuple[int, int]:
        """Which share of a batch's rows this process reads, and of how many.

        Processes whose devices split the same rows (`context`, `tensor`) read the same.

        Raises:
            ValueError: the processes' rows overlap only in part, or differ in number.
        """
        rows_of = collections.defaultdict(set)
        for place, device in np.ndenumerate(self.mesh.devices):
            at = dict(zip(MESH_AXES, place, strict=True))
            rows_of[device.process_index].add(tuple(at[axis] for axis in BATCH_AXES))
        shares = list(dict.fromkeys(frozenset(rows_of[p]) for p in sorted(rows_of)))
        if sum(map(len, shares)) != self.batch_shards or len({*map(len, shares)}) > 1:
            raise ValueError(
                f"mesh = {dict(self.mesh.shape)}: a batch's rows cannot be divided"
                f" evenly among {len(rows_of)} processes; choose mesh.data x mesh.fsdp"
                " x mesh.expert as a multiple or a divisor of their number"
            )
        own = frozenset(rows_of[jax.process_index()])
        return shares.index(own), len(shares)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def compiler_options(self) -> xla_options.Options | None:
        """What XLA has to be told about programs on this mesh, for `jax.jit`."""
        shape = self.mesh.shape
        if self.platform == "tpu":
            gathers = math.prod(shape[a] for a in _SHARED) > 1 and shape["tensor"] == 1
            return xla_options.for_tpus(gathers=gathers)
        if self.platform == "gpu":
            what: xla_options.Sums = "adapters" if self.adapters else "weights"
            return xla_options.for_gpus(
                unrolled=self.unrolled,
                sums=what if self._has_whole_weights else None,
                fp8=self.fp8,
                deterministic=self.deterministic,
            )
        return None

    @property
    def copies(self) -> int:
        """How often the mesh has all weights, were each expert on all devices."""
        shape = self.mesh.shape
        if self.zero_stage >= 3:
            return shape["data"]
        return self.mesh.size // (shape["tensor"] * shape["stage"])

    @property
    def _has_whole_weights(self) -> bool:
        """Whether there are several devices, and each has all weights."""
        has_all_experts = self.mesh.shape["expert"] == 1
        return has_all_experts and self.copies == self.mesh.size > 1

    @property
    def platform(self) -> str:
        """The mesh's platform, even of absent devices: "cpu", "gpu" or "tpu"."""
        return str(self.mesh.devices.flat[0].platform)

    def jit(self, program: Callable, **options: Any) -> Any:
        """`jax.jit` for this mesh: with `compiler_options`."""
        return jax.jit(program, compiler_options=self.compiler_options, **options)

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
        spec = PartitionSpec(*([None] * leading_axes), self.batch_axes)
        return NamedSharding(self.mesh, spec)

    def constrain(self, x: jax.Array, logical_axes: LogicalAxes) -> jax.Array:
        """Pin an activation's layout, by its logical axes."""
        if self.mesh.size == 1:
            return x
        spec = _partition_spec(x.shape, logical_axes, ACTIVATION_RULES, self.mesh)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def axes_of(self, shape: Sequence[int], logical_axes: LogicalAxes) -> MeshAxes:
        """The mesh axes that split an activation of this shape."""
        spec = _partition_spec(shape, logical_axes, ACTIVATION_RULES, self.mesh)
        return tuple(jax.tree.leaves(tuple(spec)))

    def map_shards(
        self,
        function: Callable[..., jax.Array],
        arguments: tuple[LogicalAxes, ...],
        result: LogicalAxes,
        summed: str,
    ) -> Callable[..., jax.Array]:
        """`function` on each device's own part of its arguments, by their logical axes.

        For what the compiler would not see to be local, such as sorting each row. Axes
        of the result are split as the arguments' of the same name. `function` sums over
        the axis named `summed`; where that is split, the parts are added up.
        """
        if self.mesh.size == 1:
            return function

        def mapped(*arrays: jax.Array) -> jax.Array:
            specs = [
                _partition_spec(array.shape, axes, ACTIVATION_RULES, self.mesh)
                for array, axes in zip(arrays, arguments, strict=True)
            ]
            split = {
                name: entry
                for axes, spec in zip(arguments, specs, strict=True)
                for name, entry in zip(axes, spec, strict=True)
            }

            def add_up(*parts: jax.Array) -> jax.Array:
                over, partial = split[summed], function(*parts)
                return partial if over is None else jax.lax.psum(partial, over)

            return jax.shard_map(
                add_up,
                mesh=self.mesh,
                in_specs=tuple(specs),
                out_specs=PartitionSpec(*(split[name] for name in result)),
                check_vma=False,  # GPU kernels cannot say over which axes they vary
            )(*arrays)

        return mapped

    @property
    def _parameter_rules(self) -> Rules:
        if self.zero_stage >= 3:
            return PARAMETER_RULES
        return {**PARAMETER_RULES, "embed": (), "experts": ("expert",)}

    def _tree(self, abstract: Any, logical_axes: Any, rules: Rules) -> Any:
        def shard(leaf: Any, axes: LogicalAxes) -> NamedSharding:
            spec = _partition_spec(leaf.shape, axes, rules, self.mesh)
            return NamedSharding(self.mesh, spec)

        return jax.tree.map(shard, abstract, logical_axes)


def _partition_spec(
    shape: Sequence[int], logical_axes: LogicalAxes, rules: Rules, mesh: Mesh
) -> PartitionSpec:
    """Split each axis by its rule, each mesh axis once, over as many as divide it."""
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
        while size % math.prod(mesh.shape[axis] for axis in axes):
            _log_whole(name, size, axes)
            axes = axes[:-1]
        used.update(axes)
        entries.append(axes or None)
    return PartitionSpec(*entries)


@functools.cache
def _log_whole(name: str, size: int, axes: MeshAxes) -> None:
    message = "axis %r of size %d does not divide over %s: kept whole there"
    logger.info(message, name, size, axes)


def _in_host_memory(shardings: Any) -> Any:
    return jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), shardings)


def layouts_of(tree: Any) -> Any:
    """Where each array of a tree lies, or is described to lie: a tree of shardings."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def on_device(shardings: Any) -> Any:
    """The same layouts in device memory."""
    return jax.tree.map(lambda s: s.with_memory_kind("device"), shardings)


def place_batch(batch: Any, sharding: NamedSharding) -> Any:
    """Make arrays over all devices of all processes from this process's own rows."""
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
    )


def to_host(array: Any) -> np.ndarray:
    """Copy an array to host memory; a collective call if processes share the array."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        if array.is_fully_replicated:
            return np.asarray(array.addressable_data(0))
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
