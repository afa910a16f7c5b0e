"""Rules of devices and of the mesh: which sizes fit, and what is split over them."""

import math
from dataclasses import asdict, replace
from typing import Any

from jaxtrain.config.mesh_shape import nearest_mesh_shape
from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import DevicesSection, MeshSection

# What a complaint about the whole shape rests on: one size follows from the others.
_SHAPE = tuple(f"mesh.{axis}" for axis in ("data", "fsdp", "context", "tensor"))
_RESERVED = {
    "expert": (
        "every device applies its part of all experts",
        "set 1: mesh.fsdp splits a mixture's weights, mesh.tensor its work",
    ),
    "stage": (
        "layers are not split into stages: one scan runs them all",
        "set 1, and split layers' weights by mesh.fsdp or mesh.tensor",
    ),
}


def resolve_devices(
    devices: DevicesSection, present: int | None, found: Resolution
) -> DevicesSection:
    """Settle all but the ZeRO stage, which depends on the mesh."""
    chosen = {devices.dataloader_pin_memory, devices.pin_memory} - {None}
    if len(chosen) > 1:
        found.add(
            "pin_memory",
            f"dataloader_pin_memory = {devices.dataloader_pin_memory}, and both name"
            " the same thing",
            "set one of them, or both alike",
        )
    states: dict[str, Any] = {}
    for name in ("offload_optimizer", "offload_param"):
        offloaded = getattr(devices.deepspeed, name)
        if devices.cpu_offload and offloaded is False:
            found.add(
                f"deepspeed.{name}",
                "cpu_offload = true offloads it",
                "remove it, or set cpu_offload = false and choose by deepspeed",
            )
        states[name] = bool(offloaded or devices.cpu_offload)
    if devices.num_gpus and present and devices.num_gpus > present:
        found.add(
            "num_gpus",
            f"only {present} devices are present",
            f"set {present} or fewer, or unset it to use all",
        )
    return replace(
        devices,
        dataloader_pin_memory=chosen != {False},
        pin_memory=chosen != {False},
        deepspeed=replace(devices.deepspeed, **states),
    )


def resolve_mesh(
    mesh: MeshSection, devices: DevicesSection, present: int | None, found: Resolution
) -> tuple[MeshSection, DevicesSection]:
    """Settle the sizes of the mesh, and which state is split over it.

    deepspeed.zero_stage is 3 if and only if mesh.fsdp is above 1.
    """
    for axis, size in asdict(mesh).items():
        if size is not None and size != -1 and size < 1:
            found.add(
                f"mesh.{axis}",
                "not a size",
                "set a positive integer, or -1 for the rest of the devices",
            )
            return mesh, devices
    for axis, (problem, fix) in _RESERVED.items():
        if getattr(mesh, axis) != 1:
            found.add(f"mesh.{axis}", problem, fix)
    mesh = _give_the_rest(mesh, devices.deepspeed.zero_stage)
    wildcards = [f"mesh.{axis}" for axis, size in mesh.sizes.items() if size == -1]
    if len(wildcards) > 1:
        found.add(
            wildcards[0],
            f"{', '.join(wildcards[1:])} is -1 too",
            "leave one axis at -1: it takes the devices that remain",
        )
        return mesh, devices
    mesh = _fill_mesh(mesh, devices.num_gpus, present, found)
    _check_context(mesh.context, found)
    _check_slices(mesh, found)
    return mesh, _resolve_zero_stage(mesh, devices, found)


def _give_the_rest(mesh: MeshSection, stage: int | None) -> MeshSection:
    """Let the first unset axis take the rest; fsdp only where stage 3 asks for it."""
    for axis in ("fsdp", "data") if stage == 3 else ("data", "fsdp"):
        if getattr(mesh, axis) is None:
            may_grow = axis == "data" or stage == 3
            is_taken = -1 in mesh.sizes.values()
            mesh = replace(mesh, **{axis: -1 if may_grow and not is_taken else 1})
    return mesh


def _fill_mesh(
    mesh: MeshSection, wanted: int | None, present: int | None, found: Resolution
) -> MeshSection:
    """Replace the -1, where the number of devices is known."""
    count = wanted or present
    if count is None:
        return mesh
    source = found.origin["num_gpus"] if wanted else "the number of devices"
    fixed = math.prod(size for size in mesh.sizes.values() if size != -1)
    free = next((axis for axis, size in mesh.sizes.items() if size == -1), None)
    if free and count % fixed == 0:
        return replace(mesh, **{free: count // fixed})
    nearest = _shape(nearest_mesh_shape(mesh.sizes, count)) or "all 1"
    if free:
        problem = f"{source} is {count}, not divisible by {fixed}"
        fix = f"set sizes that divide it; the nearest are {nearest}"
    elif fixed != count:
        problem = f"uses {fixed} devices, but {source} is {count}"
        fix = (
            "set one axis to -1, or training.num_gpus to the mesh's size; the nearest"
            f" for {count} is {nearest}"
        )
    else:
        return mesh
    causes = (*_SHAPE, "num_gpus")
    found.add("mesh", problem, fix, value=_shape(mesh.sizes), causes=causes)
    return mesh


def _shape(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _check_context(context: int, found: Resolution) -> None:
    """Rows are padded to 64 tokens, and a device takes two parts of a row."""
    if context != -1 and 32 % context:
        nearest = 1 << min(5, max(0, context.bit_length() - 1))
        found.add(
            "mesh.context",
            "rows are multiples of 64 tokens, cut into two parts for each device",
            f"set 1, 2, 4, 8, 16 or 32: the nearest is {nearest}",
            value=context,
            causes=(*_SHAPE, "num_gpus"),
        )


def _check_slices(mesh: MeshSection, found: Resolution) -> None:
    """An axis goes over whole slices."""
    for axis, slices in mesh.slices.items():
        size = mesh.sizes[axis]
        if size != -1 and size % slices:
            found.add(
                f"mesh.dcn_{axis}",
                f"mesh.{axis} = {size} does not divide over so many slices",
                f"set {math.gcd(size, slices)}, or another mesh.{axis}",
                causes=(*_SHAPE, "num_gpus", "deepspeed.zero_stage"),
            )


def _resolve_zero_stage(
    mesh: MeshSection, devices: DevicesSection, found: Resolution
) -> DevicesSection:
    stage = devices.deepspeed.zero_stage
    if stage is None:
        stage = 0 if mesh.fsdp == 1 else 3
    elif stage == 3 and mesh.fsdp == 1 and mesh.data != 1:
        found.add(
            "deepspeed.zero_stage",
            "parameters are split over mesh.fsdp, which has size 1 as mesh.data ="
            f" {mesh.data}",
            "unset mesh.data and mesh.fsdp, or set mesh.fsdp = -1",
            causes=_SHAPE,
        )
    elif stage < 3 and mesh.fsdp != 1:
        found.add(
            "mesh.fsdp",
            f"this axis splits parameters, which zero_stage = {stage} keeps whole",
            "use mesh.data, or deepspeed.zero_stage = 3",
            value=mesh.fsdp,
        )
    return replace(devices, deepspeed=replace(devices.deepspeed, zero_stage=stage))
