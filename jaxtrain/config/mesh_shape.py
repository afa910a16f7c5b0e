"""Sizes of the device mesh: its axes, and which sizes fit the devices. No jax."""

import math
from collections.abc import Mapping

# From the slowest links to the fastest. `stage` (pipeline) is reserved: its size is
# always 1 (docs/scaling.md).
MESH_AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")


def resolve_mesh_shape(sizes: Mapping[str, int], device_count: int) -> dict[str, int]:
    """Return the size of every mesh axis; a size of -1 takes the remaining devices.

    Raises:
        ValueError: the product of the sizes is not `device_count`; the message names
            the nearest sizes that fit.
    """
    shape = {axis: sizes.get(axis, 1) for axis in MESH_AXES}
    wildcards = [axis for axis, size in shape.items() if size == -1]
    if len(wildcards) > 1:
        keys = " and ".join(f"mesh.{axis}" for axis in wildcards)
        raise ValueError(f"{keys} are -1: only one axis may take the remaining devices")
    fixed = math.prod(size for size in shape.values() if size != -1)
    if wildcards and device_count % fixed == 0:
        shape[wildcards[0]] = device_count // fixed
    elif wildcards or fixed != device_count:
        raise ValueError(
            f"mesh = {dict(sizes)} needs {'a multiple of' if wildcards else 'exactly'}"
            f" {fixed} devices, but {device_count} are present; the nearest sizes that"
            f" fit are {nearest_mesh_shape(shape, device_count)}"
        )
    return shape


def nearest_mesh_shape(sizes: Mapping[str, int], device_count: int) -> dict[str, int]:
    """Reduce each size to the largest one that divides the devices not yet assigned.

    Devices that remain go to the axis of size -1, else to `fsdp` if weights are split,
    else to `data`. Axes of size 1 are left out of the result.
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
