"""Sizes of the device mesh: which axes there are, and what divides. No jax."""

import math
from collections.abc import Mapping

# From the slowest links to the fastest. `stage` (pipeline) and `expert` are reserved:
# they have size 1 (docs/scaling.md).
MESH_AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")


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
            f"mesh = {dict(sizes)} needs {'a multiple of' if wildcards else 'exactly'}"
            f" {fixed} devices, but {device_count} are present; the nearest sizes that"
            f" divide them are {nearest_mesh_shape(shape, device_count)}"
        )
    return shape


def nearest_mesh_shape(sizes: Mapping[str, int], device_count: int) -> dict[str, int]:
    """`sizes`, each shrunk to the largest that still divides what is left.

    What is left in the end goes to the axis of size -1, else to `fsdp` where weights
    are split, else to `data`. Axes of size 1 are left out of the result.
    """
    shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    nearest, left = {}, device_count
    for axis in reversed(MESH_AXES):  # tensor first: it is chosen for fit
        wanted = 1 if shape[axis] == -1 else min(shape[axis], left)
        nearest[axis] = next(n for n in range(wanted, 0, -1) if left % n == 0)
        left //= nearest[axis]
    free = next((axis for axis in MESH_AXES if shape[axis] == -1), None)
    nearest[free or ("data" if shape["fsdp"] == 1 else "fsdp")] *= left
    return {axis: nearest[axis] for axis in MESH_AXES if nearest[axis] > 1}
