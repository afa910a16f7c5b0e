"""Rates, percentiles and MFU on an injected clock; device figures."""

import os
import subprocess
import sys
import threading
import types
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.record import usage
from jaxtrain.record.finish_times import FinishTimes
from jaxtrain.record.throughput import ThroughputMeter, peak_flops
from jaxtrain.record.usage import device_memory


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ReadyAtOnce:
    """Finish times of steps whose results are there as soon as they are asked for."""

    def __init__(self, clock) -> None:
        self.clock = clock

    def watch(self, result) -> Future:
        finished: Future = Future()
        finished.set_result(self.clock())
        return finished


def make_meter(**options) -> tuple[ThroughputMeter, Clock]:
    clock = Clock()
    options["finish_times"] = ReadyAtOnce(clock)
    return ThroughputMeter(clock=clock, **options), clock


def test_rates_count_steps_and_data_but_no_pauses():
    meter, clock = make_meter(
        flops_per_token=6e9, device_count=4, peak_flops_per_device=1e12
    )
    counted = []
    meter.on_step = counted.append
    clock.now += 50
    meter.dispatched(None, tokens=7, samples=7, counts=False)  # it compiled
    for compute in (2.0, 4.0):
        with meter.waiting_for_data():
            clock.now += 1
        clock.now += compute
        meter.dispatched(None, tokens=1000, samples=8)
        with meter.paused():
            clock.now += 100
    report = meter.report()
    assert counted == [3.0, 5.0]
    assert report["tokens_per_sec"] == pytest.approx(2000 / 8)
    assert report["samples_per_sec"] == pytest.approx(16 / 8)
    assert report["data_wait_share"] == pytest.approx(2 / 8)
    assert report["mfu"] == pytest.approx(250 * 6e9 / 4e12)
    for percent in (50, 90, 99):
        expected = np.percentile([3.0, 5.0], percent)
        assert report[f"step_time_p{percent}_secs"] == pytest.approx(expected)


def test_each_report_starts_anew_and_loses_no_time_between():
    meter, clock = make_meter()
    clock.now += 2
    meter.dispatched(None, tokens=10, samples=1)
    with meter.paused():
        clock.now += 7
    clock.now += 1
    assert meter.report()["tokens_per_sec"] == pytest.approx(10 / 2)
    assert meter.report() == {}
    clock.now += 3
    meter.dispatched(None, tokens=30, samples=1)
    assert meter.report()["tokens_per_sec"] == pytest.approx(30 / 4)
    assert meter.median_rate() == pytest.approx((10 / 2 + 30 / 4) / 2)


@pytest.mark.parametrize(
    "known", [{}, {"flops_per_token": 1.0}, {"peak_flops_per_device": 1.0}]
)
def test_mfu_is_left_out_where_it_would_be_a_guess(known):
    meter, clock = make_meter(**known)
    clock.now += 1
    meter.dispatched(None, tokens=1, samples=1)
    assert "mfu" not in meter.report()


def test_a_clock_that_stands_still_gives_no_rate_and_no_error():
    meter, _ = make_meter()
    meter.dispatched(None, tokens=1, samples=1)
    report = meter.report()
    assert "tokens_per_sec" not in report and report["step_time_p50_secs"] == 0
    assert meter.median_rate() is None


class Slow:
    """A result that is ready when the test says so, or that fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.is_ready, self.error = threading.Event(), error

    def block_until_ready(self):
        assert self.is_ready.wait(10)
        if self.error is not None:
            raise self.error


def test_finish_times_are_noted_while_the_caller_is_busy():
    clock = Clock()
    times = FinishTimes(clock)
    first, second, failing = Slow(), Slow(), Slow(RuntimeError("device lost"))
    finishes = [times.watch(result) for result in (first, second, failing)]
    first.is_ready.set()
    assert finishes[0].result(10) == 100.0
    clock.now = 107.0
    assert not finishes[1].done()
    second.is_ready.set()
    assert finishes[1].result(10) == 107.0
    failing.is_ready.set()
    with pytest.raises(RuntimeError, match="device lost"):
        finishes[2].result(10)
    later = times.watch(jnp.ones(2) + 1)  # a failure is no end
    clock.now = 109.0
    assert later.result(10) in (107.0, 109.0)
    before = threading.active_count()
    times.close()
    assert threading.active_count() == before - 1
    times.close()


def test_a_step_that_fails_on_the_device_fails_where_it_is_waited_for():
    meter = ThroughputMeter()
    failing = Slow(RuntimeError("device lost"))
    failing.is_ready.set()
    meter.dispatched(failing, tokens=1, samples=1)
    with meter.waiting_for_data():
        pass  # not here
    with pytest.raises(RuntimeError, match="device lost"):
        meter.wait()
    meter.close()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A10G", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("cpu", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("TPU v4 lite", None),
    ],
)
def test_peak_flops_by_device_kind(kind, expected):
    assert peak_flops(kind) == expected


class FakeDevice:
    """A device with memory statistics, as a GPU gives them."""

    def __init__(self, statistics) -> None:
        self.statistics = statistics

    def memory_stats(self):
        return self.statistics


def test_device_memory_is_what_the_backend_tells():
    full = FakeDevice({"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30})
    assert device_memory(full) == {
        "device_memory_gib": 1.0,
        "device_memory_peak_gib": 3.0,
    }
    assert device_memory(FakeDevice({"bytes_in_use": 0})) == {"device_memory_gib": 0.0}
    assert device_memory(FakeDevice(None)) == {}
    assert device_memory(jax.devices("cpu")[0]) == {}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_host_memory_grows_by_what_is_allocated():
    """In a process of its own: this one may give memory back meanwhile."""
    program = """
import numpy as np
from jaxtrain.record.usage import host_memory
before = host_memory()["host_memory_gib"]
block = np.ones(2**27 // 8)  # 128 MiB, touched
print(host_memory()["host_memory_gib"] - before, block.size)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert 0.1 < float(done.stdout.split()[0]) < 0.3


class FakeNvml:
    """Two GPUs: the second is a MIG slice, which tells no utilization."""

    class NVMLError(Exception):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-abc":
            raise self.NVMLError
        return 0

    def nvmlDeviceGetUtilizationRates(self, handle):
        if handle == 1:
            raise self.NVMLError
        return types.SimpleNamespace(gpu=80)

    def nvmlDeviceGetPowerUsage(self, handle):
        return 300_000 + 100_000 * handle


def test_gpu_utilization_is_of_the_visible_devices(monkeypatch):
    monkeypatch.setattr(usage, "_open_nvml", FakeNvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert usage.device_utilization() == {
        "gpu_utilization": 0.8,
        "gpu_power_watts": 350.0,
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert usage.device_utilization() == {"gpu_power_watts": 400.0}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,GPU-gone")
    assert usage.device_utilization() == {
        "gpu_utilization": 0.8,
        "gpu_power_watts": 300.0,
    }


def test_without_a_driver_nothing_is_said_of_gpus(monkeypatch):
    monkeypatch.setattr(usage, "_open_nvml", lambda: None)
    assert usage.device_utilization() == {}


class FakeTpuMonitoring:
    """libtpu.sdk.tpumonitoring: a list of percents as text, one a chip."""

    def __init__(self, **metrics):
        self.metrics = metrics

    def get_metric(self, name):
        if name not in self.metrics:
            raise RuntimeError(f"unknown metric {name}")
        return types.SimpleNamespace(data=lambda: self.metrics[name])


def test_tpu_utilization_is_the_mean_of_what_libtpu_tells(monkeypatch):
    tpu = types.SimpleNamespace(platform="tpu")
    monkeypatch.setattr(usage, "_open_nvml", lambda: None)
    monitoring = FakeTpuMonitoring(
        tensorcore_util=["40.00", "60.00"], duty_cycle_pct=["90.00", "100.00"]
    )
    monkeypatch.setattr(usage, "_open_tpu_monitoring", lambda: monitoring)
    assert usage.device_utilization(tpu) == {
        "tpu_utilization": 0.5,
        "tpu_duty_cycle": 0.95,
    }
    # Libtpu must not be asked on a machine without TPUs.
    assert usage.device_utilization(types.SimpleNamespace(platform="cpu")) == {}
    monitoring.metrics = {"duty_cycle_pct": [], "tensorcore_util": ["n/a"]}
    assert usage.device_utilization(tpu) == {}
    monkeypatch.setattr(usage, "_open_tpu_monitoring", lambda: None)
    assert usage.device_utilization(tpu) == {}
