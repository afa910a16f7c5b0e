"""NVIDIA GPUs that are not there, as XLA's compiler takes them: "h200:8".

XLA compiles for a GPU from a description of it alone, a protocol buffer in text form
(`stream_executor.GpuTargetConfigProto`), which this writes. The figures are those that
CUDA reports of the SXM modules (NVIDIA's Hopper tuning guide and data sheets).
"""

import re
from typing import Any

import jax
from jax.experimental import topologies

from jaxtrain.aot.report import CHIPS, Chip
from jaxtrain.kernels.attention import hopper

_KINDS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}  # as jax names them


def is_gpu(topology: str) -> bool:
    """Whether the name begins as those of GPUs do."""
    return topology.split(":")[0] in _KINDS


def describe_gpus(topology: str) -> list[Any]:
    """So many GPUs, eight to a host, one process a host.

    Raises:
        ValueError: the name or the number is none; the CUDA plugin is not installed;
            jax is too old.
    """
    name, _, number = topology.partition(":")
    kind = _KINDS[name]
    chip = CHIPS[kind]
    count = int(number) if re.fullmatch(r"[1-9]\d*", number) else 0
    per_host = chip.per_host or 1
    hosts = max(1, count // per_host)
    if count != hosts * min(count, per_host) or count == 0:
        raise ValueError(
            f"topology = {topology!r}: name a number of GPUs, h100:N or h200:N, with N"
            f" up to {per_host} or a multiple of it"
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
            " cannot tell its FLOPs, and no bound would hold; install jax 0.12"
        )
    return list(description.devices)


def _target(name: str, chip: Chip) -> str:
    """One GPU of compute capability 9.0, as a text protocol buffer."""
    return f"""
        platform_name: "CUDA"
        device_description_str: "{name}"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        gpu_device_info {{
          name: "{name}" device_vendor: "NVIDIA Corporation"
          platform_version: "Compute Capability 9.0a" model_str: "sm_9.0a"
          driver_version: "13.0.0" runtime_version: "13.0.0"
          compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
          cuda_compute_capability {{
            major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES
          }}
          core_count: {hopper.MULTIPROCESSORS} fpus_per_core: 128 clock_rate_ghz: 1.98
          threads_per_warp: 32
          threads_per_block_limit: 1024 threads_per_core_limit: 2048
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
          shared_memory_per_core: 233472 l2_cache_size: 52428800
          memory_bandwidth: {chip.memory_rate:.0f}
          device_memory_size: {chip.memory_bytes:.0f}
          device_address_bits: 64 pcie_bandwidth: 63000000000
          device_interconnect_info {{ active_links: 18 }}
        }}
    """
