"""What a compiled step needs of each device, if it fits, what would change that."""

import dataclasses
import math
from collections.abc import Mapping

from jaxtrain.aot.hlo_cost import ProgramCost
from jaxtrain.config import RunConfig
from jaxtrain.run.out_of_memory import advise

_GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of one jax device.

    `flops`: dense bfloat16 FLOP/s. `memory_bytes`, `memory_rate`: HBM and bytes/s.
    `link_rate`: bytes/s that all its inter-chip links bring in together.
    `slice_rate`: its share of its host's network, to other slices. `per_host`: devices
    that the links join, where they join those of a host and the network the hosts.
    """

    name: str
    flops: float
    memory_bytes: float
    memory_rate: float
    link_rate: float
    slice_rate: float
    per_host: int | None = None


# By the makers' documentation (cloud.google.com/tpu/docs; the network of v4, v5p and
# v7x: jax-ml.github.io/scaling-book). A v7x chip is two devices.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * _GIB, 1.23e12, 270e9, 6.25e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * _GIB, 0.82e12, 180e9, 3.125e9),
    "TPU v5": Chip("v5p", 459e12, 95 * _GIB, 2.77e12, 540e9, 6.25e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * _GIB, 1.64e12, 360e9, 12.5e9),
    "TPU7x": Chip("v7x core", 1153e12, 96 * _GIB, 3.69e12, 300e9, 6.25e9),
    # NVIDIA's data sheets: SXM, NVLink 4 one way, one adapter of 400 Gb/s for each GPU
    # (DGX). Memory is what CUDA gives to programs.
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12, 79 * _GIB, 3.35e12, 450e9, 50e9, 8),
    "NVIDIA H200": Chip("H200", 989e12, 139 * _GIB, 4.8e12, 450e9, 50e9, 8),
    # NVLink 3 (DGX A100: an adapter of 200 Gb/s for each).
    "NVIDIA A100-SXM4-40GB": Chip(
        "A100 40 GB", 312e12, 39 * _GIB, 1.555e12, 300e9, 25e9, 8
    ),
    "NVIDIA A100-SXM4-80GB": Chip(
        "A100 80 GB", 312e12, 79 * _GIB, 2.039e12, 300e9, 25e9, 8
    ),
    # No NVLink: PCIe 4.0 of 16 lanes; a network of 100 Gb/s for eight (Google's
    # g2-standard-96).
    "NVIDIA L4": Chip("L4", 121e12, 22 * _GIB, 0.3e12, 31.5e9, 1.56e9, 8),
    # Likewise, and a network of 25 Gb/s for a host of eight. FLOP/s: of the Ada
    # architecture's white paper, with sums in float32.
    "NVIDIA GeForce RTX 4090": Chip(
        "RTX 4090", 165e12, 23.5 * _GIB, 1.008e12, 31.5e9, 0.4e9, 8
    ),
}


_NOTHING = ProgramCost(0.0, {}, {}, 0)


@dataclasses.dataclass(frozen=True)
class Report:
    """One step of one run on one topology; bytes and FLOPs are of one device.

    `flops` counts what is computed (recomputation too), `model_flops` what the model
    needs. A step that does not fit has no more than `refusal`.
    """

    topology: str
    device_count: int
    chip: Chip
    tokens: int
    run: RunConfig
    compile_secs: float = 0.0
    refusal: str | None = None
    argument_bytes: float = 0.0
    temporary_bytes: float = 0.0
    code_bytes: float = 0.0
    host_bytes: float = 0.0
    flops: float = 0.0
    model_flops: float = 0.0
    cost: ProgramCost = _NOTHING

    @property
    def device_bytes(self) -> float:
        """Peak of device memory: arguments (outputs take their place) and the rest."""
        return self.argument_bytes + self.temporary_bytes + self.code_bytes

    @property
    def needed(self) -> float:
        """The same; infinite where the compiler ran out of memory."""
        return self.device_bytes if self.refusal is None else math.inf

    @property
    def room(self) -> float:
        return self.chip.memory_bytes

    @property
    def fits(self) -> bool:
        return self.needed <= self.room

    @property
    def secs(self) -> dict[str, float]:
        """The least time for each resource, were the others free.

        Under training.fp8 products are taken at twice the rate of bfloat16's, the peak
        of all these chips, though not all are in eight bits.
        """
        secs = {
            "compute": self.flops / self.chip.flops / (1 + self.run.precision.fp8),
            "memory": self.cost.bytes_accessed / self.chip.memory_rate,
            "links": _total_bytes(self.cost.collectives) / self.chip.link_rate,
        }
        if self.cost.between_slices:
            received = _total_bytes(self.cost.between_slices)
            secs["network"] = received / self.chip.slice_rate
        return secs

    @property
    def step_secs(self) -> float:
        """A lower bound on the seconds of a step.

        Every resource is taken at its peak, and all of them fully overlapped.
        """
        return max(self.secs.values())

    @property
    def mfu(self) -> float:
        """An upper bound on the model FLOPs utilization (arXiv:2204.02311).

        It is that of bfloat16's peak, as in a run's log, and so may exceed 1 under fp8.
        """
        return self.model_flops / self.chip.flops / self.step_secs


def _total_bytes(received: Mapping[str, tuple[float, float]]) -> float:
    return sum(size for _, size in received.values())


def describe(report: Report) -> str:
    """What `main` prints."""
    run, chip = report.run, report.chip
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.sizes.items())
    cost = report.cost
    lines = [
        f"{report.topology}: {report.device_count} devices of {chip.name}, mesh {mesh}",
        f"{run.training_type}, {report.tokens} tokens a step, rematerialization"
        f" {run.precision.remat!r}, attention {run.model.attention!r}"
        f" ({cost.kernels or 'no'} Pallas kernels in the program)",
    ]
    if report.refusal:
        return "\n".join([*lines, "DOES NOT FIT:", report.refusal, *_advice(run)])
    share = report.device_bytes / chip.memory_bytes
    lines += [
        f"compiled in {report.compile_secs:.0f} s",
        "memory a device:",
        f"  state and batch    {report.argument_bytes / _GIB:9.2f} GiB",
        f"  temporaries        {report.temporary_bytes / _GIB:9.2f} GiB",
        f"  program            {report.code_bytes / _GIB:9.2f} GiB",
        f"  sum                {report.device_bytes / _GIB:9.2f} GiB of"
        f" {chip.memory_bytes / _GIB:.0f} ({share:.0%})",
        f"  pinned host        {report.host_bytes / _GIB:9.2f} GiB",
        "work a device and step:",
        f"  FLOPs              {report.flops / 1e12:9.2f} T"
        f" ({report.model_flops / 1e12:.2f} T without recomputation)",
        f"  device memory      {cost.bytes_accessed / 1e9:9.2f} GB read and written",
    ]
    for kind, (count, size) in sorted(cost.collectives.items()):
        lines.append(f"  {kind:18s} {size / 1e9:9.2f} GB in {count:.0f} calls")
    for kind, (count, size) in sorted(cost.between_slices.items()):
        name = f"{kind}, {'hosts' if chip.per_host else 'slices'}"
        lines.append(f"  {name:18s} {size / 1e9:9.2f} GB in {count:.0f} calls")
    times = ", ".join(f"{name} {secs:.3f} s" for name, secs in report.secs.items())
    lines += [
        f"roofline: {times}",
        f"bound: no step under {report.step_secs:.3f} s"
        f" ({report.tokens / report.step_secs:,.0f} tokens/s), MFU at most"
        f" {report.mfu:.0%}",
    ]
    verdict = ["FITS"] if report.fits else ["DOES NOT FIT:", *_advice(run)]
    return "\n".join([*lines, *verdict])


def _advice(run: RunConfig) -> list[str]:
    return [f"  try {line}" for line in (*advise(run), "a larger topology")]
