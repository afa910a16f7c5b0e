"""How fast the loop goes and how much memory it takes: `ThroughputMeter`.

Nothing is invented: what a backend does not tell (peak FLOP/s of a CPU, memory
statistics) is left out of the metrics.
"""

import contextlib
import functools
import importlib
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_GIB = 2.0**30

# Dense peak FLOP/s of one device for bfloat16 (float16 on T4 and V100, which have no
# bfloat16), from the makers' data sheets. The first pattern that is found counts.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"\bmig\b", 0.0),  # a slice of a GPU: no figure of its own
    (r"h200 nvl|h100 nvl", 835e12),
    (r"h100 pcie", 756e12),
    (r"\b(g?h200|g?h100)\b", 989e12),
    (r"\ba100\b", 312e12),
    (r"\ba10g?\b", 125e12),
    (r"\bl40s\b", 362e12),
    (r"\bl4\b", 121e12),
    (r"\bt4\b", 65e12),
    (r"\bv100\b", 125e12),
    (r"tpu v6( lite|e)", 918e12),
    (r"tpu v5( lite|e)", 197e12),
    (r"tpu v5p?$", 459e12),
    (r"tpu v4$", 275e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device, by jax's `device_kind`; None if unknown."""
    kind = device_kind.lower()
    found = (flops for pattern, flops in _PEAK_FLOPS if re.search(pattern, kind))
    return next(found, 0.0) or None


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


class ThroughputMeter:
    """Rates and step times since the last report.

        meter.start()
        for ...:
            with meter.waiting_for_data():
                batch = next(batches)
            state, metrics = train_step(state, batch)
            meter.step(tokens=..., samples=...)
            with meter.paused():
                evaluate or save
            writer.write(step, meter.report())

    jax dispatches steps asynchronously. So block on a step's result before `report`,
    or on the step before last in each step; then rates and percentiles are the
    device's and not the dispatcher's.
    """

    def __init__(
        self,
        *,
        flops_per_token: float | None = None,
        device_count: int = 1,
        peak_flops_per_device: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Without FLOPs of the model and of the device, MFU is left out.

        Args:
            flops_per_token: forward and backward of one trained token.
            device_count: devices that share the work, of all processes.
            peak_flops_per_device: see `peak_flops`.
            clock: seconds, monotonic.
        """
        self._clock = clock
        self._flops_per_token = flops_per_token
        self._peak_flops = (peak_flops_per_device or 0.0) * device_count
        self.start()

    def start(self) -> None:
        """Forget everything and count from now: call it after compiling."""
        self._step_start = self._clock()
        self._step_secs: list[float] = []
        self._waited_secs = 0.0
        self._paused_secs = 0.0
        self._tokens = 0.0
        self._samples = 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The time inside counts as waiting for data, and as part of the step."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited_secs += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside counts nowhere: evaluation, a blocking save."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused_secs += self._clock() - start

    def step(self, *, tokens: float, samples: float) -> float:
        """One step ended, after so many seconds.

        `tokens` and `samples` are those of all processes.
        """
        now = self._clock()
        secs = now - self._step_start - self._paused_secs
        self._step_secs.append(secs)
        self._step_start, self._paused_secs = now, 0.0
        self._tokens += tokens
        self._samples += samples
        return secs

    def report(self) -> dict[str, float]:
        """Metrics since the last report, then start anew; empty if no step ended.

        `tokens_per_sec`, `samples_per_sec`, `step_time_{p50,p90,p99}_secs`,
        `data_wait_share` (0 to 1), and `mfu` = tokens/s * FLOPs a token / peak FLOP/s
        (0 to 1, arXiv:2204.02311).
        """
        if not self._step_secs:
            return {}
        secs = sum(self._step_secs)
        metrics = {}
        if secs > 0:
            metrics["tokens_per_sec"] = self._tokens / secs
            metrics["samples_per_sec"] = self._samples / secs
            metrics["data_wait_share"] = self._waited_secs / secs
            if self._flops_per_token and self._peak_flops:
                rate = metrics["tokens_per_sec"] * self._flops_per_token
                metrics["mfu"] = rate / self._peak_flops
        for percent in (50, 90, 99):
            value = float(np.percentile(self._step_secs, percent))
            metrics[f"step_time_p{percent}_secs"] = value
        # What was paused since the last step belongs to the step that is under way.
        start, paused = self._step_start, self._paused_secs
        self.start()
        self._step_start, self._paused_secs = start, paused
        return metrics
