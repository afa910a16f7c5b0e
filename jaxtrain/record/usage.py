"""What a run uses of its machine now: memory, and how busy its devices are.

Nothing is invented: what a backend does not tell is left out of the metrics.
"""

import contextlib
import functools
import importlib
import os
import pathlib
from typing import Any

_GIB = 2.0**30


def device_memory(device: Any) -> dict[str, float]:
    """`device_memory_gib` and `device_memory_peak_gib`, where the backend gives them.

    Args:
        device: a `jax.Device`.
    """
    names = {
        "bytes_in_use": "device_memory_gib",
        "peak_bytes_in_use": "device_memory_peak_gib",
    }
    found = device.memory_stats() or {}
    return {name: found[key] / _GIB for key, name in names.items() if key in found}


@functools.cache
def _open_nvml() -> Any:
    """The NVML library, or None where it or a driver is missing."""
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
    except Exception:  # of the package's own type, which there may be none of
        return None
    return pynvml


@functools.cache
def _open_tpu_monitoring() -> Any:
    """The monitoring part of libtpu, or None where this one has none."""
    try:
        return importlib.import_module("libtpu.sdk").tpumonitoring
    except Exception:  # its own kinds, and AttributeError of an old one
        return None


def device_utilization(device: Any = None) -> dict[str, float]:
    """How busy this host's accelerators of `device`'s kind are; see the two below."""
    is_tpu = getattr(device, "platform", None) == "tpu"
    return tpu_utilization() if is_tpu else gpu_utilization()


def tpu_utilization() -> dict[str, float]:
    """`tpu_utilization` and `tpu_duty_cycle` (0 to 1): means over this host's TPUs.

    The TensorCores' share of their peak, and the share of time in which a program ran,
    over libtpu's last sample period. Without what this libtpu does not tell. Call it
    with TPUs only: elsewhere libtpu asks a metadata server for a minute.
    """
    monitoring = _open_tpu_monitoring()
    if monitoring is None:
        return {}
    names = {"tpu_utilization": "tensorcore_util", "tpu_duty_cycle": "duty_cycle_pct"}
    found = {}
    for name, metric in names.items():
        with contextlib.suppress(Exception):  # of libtpu's own kinds
            percents = [float(text) for text in monitoring.get_metric(metric).data()]
            if percents:
                found[name] = sum(percents) / len(percents) / 100
    return found


def gpu_utilization() -> dict[str, float]:
    """`gpu_utilization` (0 to 1) and `gpu_power_watts`: means over this host's GPUs.

    Those that CUDA_VISIBLE_DEVICES names, as NVML sees them over its last sample
    period. Empty without NVIDIA's driver or the package nvidia-ml-py, and without what
    a device does not tell (a MIG slice has no utilization).
    """
    nvml = _open_nvml()
    if nvml is None:
        return {}
    found: dict[str, list[float]] = {}
    for device in _visible_gpus(nvml):
        with contextlib.suppress(nvml.NVMLError):
            share = nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100
            found.setdefault("gpu_utilization", []).append(share)
        with contextlib.suppress(nvml.NVMLError):
            watts = nvml.nvmlDeviceGetPowerUsage(device) / 1000
            found.setdefault("gpu_power_watts", []).append(watts)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _visible_gpus(nvml: Any) -> list[Any]:
    """NVML handles of the devices that this process may use."""
    every = ",".join(map(str, range(nvml.nvmlDeviceGetCount())))
    names = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
    handles = []
    for name in filter(None, map(str.strip, names)):
        with contextlib.suppress(nvml.NVMLError):
            handles.append(
                nvml.nvmlDeviceGetHandleByIndex(int(name))
                if name.isdigit()
                else nvml.nvmlDeviceGetHandleByUUID(name)
            )
    return handles


def host_memory() -> dict[str, float]:
    """`host_memory_gib`: this process's resident memory; empty if not on Linux."""
    statm = pathlib.Path("/proc/self/statm")
    if not statm.is_file():
        return {}
    pages = int(statm.read_text().split()[1])
    return {"host_memory_gib": pages * os.sysconf("SC_PAGE_SIZE") / _GIB}


def usage(device: Any) -> dict[str, float]:
    """What this host and its devices, of which `device` is one, are using now."""
    return device_memory(device) | device_utilization(device) | host_memory()
