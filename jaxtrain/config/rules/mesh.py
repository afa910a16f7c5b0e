"""Rules of devices and of the mesh: which sizes fit, and what is split over them."""

import math
from dataclasses import asdict, replace
from typing import Any

from jaxtrain.config.mesh_shape import nearest_mesh_shape
from jaxtrain.config.rules.resolution import Resolution

# What a complaint about the whole shape rests on: one size follows from the others.
_SHAPE = tuple(
    f"mesh.{axis}" for axis in ("data", "fsdp", "expert", "context", "tensor")
)
_NO_STAGES = (
    "layers are not split into stages: one scan runs them all; set 1, and split layers'"
    " weights by mesh.fsdp or mesh.tensor"
)


def resolve_devices(run: Resolution) -> None:
    """Settle all but the ZeRO stage, which depends on the mesh."""
    devices = run.devices
    chosen = {devices.dataloader_pin_memory, devices.pin_memory} - {None}
    pins = chosen != {False}
    if len(chosen) > 1:
        run.problem(
            "pin_memory",
            f"dataloader_pin_memory = {devices.dataloader_pin_memory}, and both name"
            " the same thing; set one of them, or both alike",
        )
    states: dict[str, Any] = {}
    for name in ("offload_optimizer", "offload_param"):
        offloaded = getattr(devices.deepspeed, name)
        if devices.cpu_offload and offloaded is False:
            run.problem(
                f"deepspeed.{name}",
                "cpu_offload = true offloads it; remove it, or set cpu_offload = false"
                " and choose by deepspeed",
            )
        states[name] = bool(offloaded or devices.cpu_offload)
    wanted, present = devices.num_gpus, run.device_count
    if wanted and present and wanted > present:
        run.problem(
            "num_gpus",
            f"only {present} devices are present; set {present} or fewer, or unset it"
            " to use all",
        )
    deepspeed = replace(devices.deepspeed, **states)
    run.devices = replace(
        devices, dataloader_pin_memory=pins, pin_memory=pins, deepspeed=deepspeed
    )


def resolve_mesh(run: Resolution) -> None:
    """Settle the sizes of the mesh, and which state is split over it.

    deepspeed.zero_stage is 3 where mesh.fsdp is above 1; where that is 1, only if the
    run asks for it and mesh.expert is above 1.
    """
    for axis, size in asdict(run.mesh).items():
        if size is not None and size != -1 and size < 1:
            fix = "set a positive integer, or -1 for the rest of the devices"
            run.problem(f"mesh.{axis}", f"not a size; {fix}")
            return
    if run.mesh.stage != 1:
        run.problem("mesh.stage", _NO_STAGES)
    _give_the_rest(run)
    wildcards = [f"mesh.{n}" for n, size in run.mesh.sizes.items() if size == -1]
    if len(wildcards) > 1:
        run.problem(
            wildcards[0],
            f"{', '.join(wildcards[1:])} is -1 too; leave one axis at -1: it takes the"
            " devices that remain",
        )
        return
    _fill_mesh(run)
    _check_context(run)
    _check_slices(run)
    _resolve_zero_stage(run)


def _give_the_rest(run: Resolution) -> None:
    """Let the first unset axis take the rest; fsdp only where stage 3 asks for it."""
    splits = run.devices.deepspeed.zero_stage == 3
    for axis in ("fsdp", "data") if splits else ("data", "fsdp"):
        if getattr(run.mesh, axis) is None:
            grows = (axis == "data" or splits) and -1 not in run.mesh.sizes.values()
            run.mesh = replace(run.mesh, **{axis: -1 if grows else 1})


def _fill_mesh(run: Resolution) -> None:
    """Replace the -1, where the number of devices is known."""
    wanted, sizes = run.devices.num_gpus, run.mesh.sizes
    count = wanted or run.device_count
    if count is None:
        return
    source = run.origin["num_gpus"] if wanted else "the number of devices"
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = next((axis for axis, size in sizes.items() if size == -1), None)
    nearest = _shape(nearest_mesh_shape(sizes, count)) or "all 1"
    if free and count % fixed == 0:
        run.mesh = replace(run.mesh, **{free: count // fixed})
        return
    if fixed == count:
        return
    if free:
        text = (
            f"{source} is {count}, not divisible by {fixed}; set sizes that divide it;"
            f" the nearest are {nearest}"
        )
    else:
        text = (
            f"uses {fixed} devices, but {source} is {count}; set one axis to -1, or"
            f" training.num_gpus to the mesh's size; the nearest for {count} is"
            f" {nearest}"
        )
    run.problem("mesh", text, value=_shape(sizes), causes=(*_SHAPE, "num_gpus"))


def _shape(sizes: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items())


def _check_context(run: Resolution) -> None:
    """Rows are padded to 64 tokens, and a device takes two parts of a row."""
    context = run.mesh.context
    if context != -1 and 32 % context:
        nearest = 1 << min(5, max(0, context.bit_length() - 1))
        run.problem(
            "mesh.context",
            "rows are multiples of 64 tokens, cut into two parts for each device;"
            f" set 1, 2, 4, 8, 16 or 32: the nearest is {nearest}",
            value=context,
            causes=(*_SHAPE, "num_gpus"),
        )


def _check_slices(run: Resolution) -> None:
    """An axis goes over whole slices."""
    for axis, slices in run.mesh.slices.items():
        size = run.mesh.sizes[axis]
        if size != -1 and size % slices:
            run.problem(
                f"mesh.dcn_{axis}",
                f"mesh.{axis} = {size} does not divide over so many slices; set"
                f" {math.gcd(size, slices)}, or another mesh.{axis}",
                causes=(*_SHAPE, "num_gpus", "deepspeed.zero_stage"),
            )


def _resolve_zero_stage(run: Resolution) -> None:
    mesh, deepspeed = run.mesh, run.devices.deepspeed
    stage = deepspeed.zero_stage
    if stage is None:
        stage = 0 if mesh.fsdp == 1 else 3
    elif stage == 3 and mesh.fsdp * mesh.expert == 1 and mesh.data != 1:
        run.problem(
            "deepspeed.zero_stage",
            "parameters are split over mesh.fsdp, which has size 1 as mesh.data ="
            f" {mesh.data}; unset mesh.data and mesh.fsdp, or set mesh.fsdp = -1",
            causes=_SHAPE,
        )
    elif stage < 3 and mesh.fsdp != 1:
        run.problem(
            "mesh.fsdp",
            f"this axis splits parameters, which zero_stage = {stage} keeps whole;"
            " use mesh.data, or deepspeed.zero_stage = 3",
            value=mesh.fsdp,
        )
    deepspeed = replace(deepspeed, zero_stage=stage)
    run.devices = replace(run.devices, deepspeed=deepspeed)
