"""Descriptions of NVIDIA GPUs that are not attached, for ahead-of-time compilation.

A topology is a string such as "h200:8". XLA can compile for a GPU from a description
alone, a protocol buffer in text form (`stream_executor.GpuTargetConfigProto`), and this
module writes it. The figures are those that CUDA reports (NVIDIA's tuning guides, the
CUDA programming guide and data sheets).
"""

import dataclasses
import re
from typing import Any

import jax
from jax.experimental import topologies

from jaxtrain.aot.report import CHIPS, Chip
from jaxtrain.kernels.attention import hopper


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A kind of GPU: jax's name for it, and what the compiler needs to know.

    `cores`: number of streaming multiprocessors. `shared_memory`: bytes in each of
    them; a block of threads may use all but 1 KiB. `links`: number of active NVLinks.
    """

    name: str
    capability: str
    cores: int
    shared_memory: int
    l2_cache: int
    clock_ghz: float
    fpus: int = 128
    threads: int = 2048
    links: int = 0


_HOPPER = _Kind(
    "NVIDIA H100 80GB HBM3", "9.0a", hopper.MULTIPROCESSORS, 233_472, 52_428_800, 1.98,
    links=18,
)  # fmt: skip
_A100 = _Kind(
    "NVIDIA A100-SXM4-40GB", "8.0", 108, 167_936, 41_943_040, 1.41, fpus=64, links=12
)
_KINDS = {
    "l4": _Kind("NVIDIA L4", "8.9", 58, 102_400, 50_331_648, 2.04, threads=1536),
    "rtx4090": _Kind(
        "NVIDIA GeForce RTX 4090", "8.9", 128, 102_400, 75_497_472, 2.52, threads=1536
    ),
    "a100-40": _A100,
    "a100-80": dataclasses.replace(_A100, name="NVIDIA A100-SXM4-80GB"),
    "h100": _HOPPER,
    "h200": dataclasses.replace(_HOPPER, name="NVIDIA H200"),
}
NAMES = tuple(_KINDS)


def describe_gpus(topology: str) -> list[Any]:
    """Return the devices of a topology such as "h200:16", with one process per host.

    Raises:
        ValueError: the topology is not valid, the CUDA plugin is not installed, or jax
            is too old.
    """
    name, _, number = topology.partition(":")
    kind = _KINDS[name]
    chip = CHIPS[kind.name]
    count = int(number) if re.fullmatch(r"[1-9]\d*", number) else 0
    per_host = chip.per_host or 1
    hosts = max(1, count // per_host)
    if count != hosts * min(count, per_host) or count == 0:
        raise ValueError(
            f"topology = {topology!r}: name a number of GPUs, {':N, '.join(_KINDS)}:N,"
            f" with N up to {per_host} or a multiple of it"
        )
    try:
        description = topologies.get_topology_desc(
            platform="cuda",
            topology=f"1x{hosts}x{count // hosts}",
            target_config=_target(kind, chip),
        )
    except Exception as error:  # NotImplementedError, JaxRuntimeError, by version
        raise ValueError(
            f"topology = {topology!r}: {error}. Install jax's CUDA plugin (pip install"
            " jax-cuda13-plugin jax-cuda13-pjrt, of jax's version); no GPU is needed"
        ) from error
    if not hopper.TELLS_COST:
        raise ValueError(
            f"topology = {topology!r}: with jax {jax.__version__} a kernel for GPUs"
            " does not report its FLOPs, so the bound would be wrong; install jax 0.12"
        )
    return list(description.devices)


def _target(kind: _Kind, chip: Chip) -> str:
    """Describe one GPU as a protocol buffer in text form."""
    major, minor = kind.capability.rstrip("a").split(".")
    feature = "feature_extension: ACCELERATED_FEATURES" * kind.capability.endswith("a")
    return f"""
        platform_name: "CUDA"
        device_description_str: "{kind.name}"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        gpu_device_info {{
          name: "{kind.name}" device_vendor: "NVIDIA Corporation"
          platform_version: "Compute Capability {kind.capability}"
          model_str: "sm_{kind.capability}"
          driver_version: "13.0.0" runtime_version: "13.0.0"
          compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
          cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
          core_count: {kind.cores} fpus_per_core: {kind.fpus}
          clock_rate_ghz: {kind.clock_ghz}
          threads_per_warp: 32
          threads_per_block_limit: 1024 threads_per_core_limit: {kind.threads}
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {kind.shared_memory - 1024}
          shared_memory_per_core: {kind.shared_memory} l2_cache_size: {kind.l2_cache}
          memory_bandwidth: {chip.memory_rate:.0f}
          device_memory_size: {chip.memory_bytes:.0f}
          device_address_bits: 64 pcie_bandwidth: 63000000000
          device_interconnect_info {{ active_links: {kind.links} }}
        }}
    """
