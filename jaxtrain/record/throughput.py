"""How fast the loop goes: `ThroughputMeter`, and the peak that MFU is a share of."""

import collections
import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np

from jaxtrain.record.finish_times import FinishTimes

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
    (r"\brtx 4090\b", 165e12),
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


@dataclasses.dataclass(frozen=True)
class _Step:
    """A dispatched step: its work, and what its time holds beside computing."""

    finished: Future[float]
    tokens: float
    samples: float
    slots: float
    waited_secs: float
    paused_secs: float
    counts: bool


class ThroughputMeter:
    """Rates and step times since the last report.

        for ...:
            with meter.waiting_for_data():
                batch = next(batches)
            state, metrics = train_step(state, batch)
            meter.dispatched(metrics["loss"], tokens=..., samples=...)
            meter.wait(ahead=2)
            with meter.paused():
                evaluate or save
            writer.write(step, meter.report())

    JAX dispatches steps asynchronously, so a step counts only once its result has been
    waited for. Its time runs from the finish of the step before it to its own finish,
    as `FinishTimes` notes them on the clock, without what was paused in between.
    """

    def __init__(
        self,
        *,
        flops_per_token: float | None = None,
        device_count: int = 1,
        peak_flops_per_device: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        finish_times: FinishTimes | None = None,
    ) -> None:
        """Without FLOPs of the model and of the device, MFU is left out.

        Args:
            flops_per_token: forward and backward of one trained token.
            device_count: devices that share the work, of all processes.
            peak_flops_per_device: see `peak_flops`.
            clock: seconds, monotonic.
            finish_times: what tells when a result is ready, on the same clock.
        """
        self._clock = clock
        self._flops_per_token = flops_per_token
        self._peak_flops = (peak_flops_per_device or 0.0) * device_count
        self._finish_times = finish_times or FinishTimes(clock)
        self._in_flight: collections.deque[_Step] = collections.deque()
        self._last_finish = clock()
        # Of the step that is dispatched next.
        self._waited_secs = 0.0
        self._paused_secs = 0.0
        self._counted: list[tuple[_Step, float]] = []  # with the seconds of each
        self._rates: list[float] = []  # tokens/s, one a report
        self.on_step: Callable[[float], None] = lambda secs: None
        """Called with the seconds of each step that counts."""

    def dispatched(
        self,
        result: Any,
        *,
        tokens: float,
        samples: float,
        slots: float = 0.0,
        counts: bool = True,
    ) -> None:
        """A step was handed to the device and is not waited for yet.

        Args:
            result: an array that it computes.
            tokens: trained tokens of all processes.
            samples: rows of all processes; examples where a micro-batch's share rows.
            slots: tokens that were computed, padding included; 0 if not known.
            counts: whether it enters the rates. A step that compiles, or that is
                traced by a profiler, does not: neither its tokens nor the time since
                the step before it finished.
        """
        finished = self._finish_times.watch(result)
        waited, self._waited_secs = self._waited_secs, 0.0
        paused, self._paused_secs = self._paused_secs, 0.0
        self._in_flight.append(
            _Step(finished, tokens, samples, slots, waited, paused, counts)
        )

    def wait(self, ahead: int = 0) -> None:
        """Wait for all steps but the newest `ahead` of them, and count these steps."""
        while len(self._in_flight) > ahead:
            step = self._in_flight[0]
            finish = step.finished.result()
            self._in_flight.popleft()
            secs = finish - self._last_finish - step.paused_secs
            self._last_finish = finish
            if step.counts:
                self._counted.append((step, secs))
                self.on_step(secs)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """What of the time inside no step computes counts as waiting for data.

        It is part of the time of the step that is dispatched next. While steps are in
        flight the device does not wait, so no time counts up to the newest's finish.
        """
        start = self._clock()
        try:
            yield
        finally:
            end = self._clock()
            self._waited_secs += end - min(max(start, self._idle_since()), end)

    def _idle_since(self) -> float:
        """When the device finished all that it was given; infinite while it works."""
        if not self._in_flight:
            return self._last_finish
        newest = self._in_flight[-1].finished
        is_known = newest.done() and newest.exception() is None
        return newest.result() if is_known else float("inf")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside counts nowhere: evaluation, a blocking save.

        Steps in flight are waited for first: their time is not part of the pause.
        """
        self.wait()
        start = self._clock()
        try:
            yield
        finally:
            self._paused_secs += self._clock() - start

    def report(self, ahead: int = 0) -> dict[str, float]:
        """Metrics of the steps since the last report; empty if none of them counts.

        Waits for all steps but the newest `ahead`, which the next report has.
        `tokens_per_sec`, `samples_per_sec`, `step_time_{p50,p90,p99}_secs`,
        `data_wait_share` (0 to 1: the share of time in which the devices had nothing to
        do because rows were not there), `useful_token_share` (0 to 1: of the computed
        tokens, those that are not padding), and `mfu` =
        tokens/s * FLOPs a token / peak FLOP/s (0 to 1, arXiv:2204.02311).
        """
        self.wait(ahead)
        counted, self._counted = self._counted, []
        if not counted:
            return {}
        step_secs = [secs for _, secs in counted]
        total_secs = sum(step_secs)
        metrics = {}
        if total_secs > 0:
            tokens = sum(step.tokens for step, _ in counted)
            samples = sum(step.samples for step, _ in counted)
            waited_secs = sum(step.waited_secs for step, _ in counted)
            metrics["tokens_per_sec"] = tokens / total_secs
            metrics["samples_per_sec"] = samples / total_secs
            metrics["data_wait_share"] = waited_secs / total_secs
            if slots := sum(step.slots for step, _ in counted):
                metrics["useful_token_share"] = tokens / slots
            self._rates.append(metrics["tokens_per_sec"])
            if self._flops_per_token and self._peak_flops:
                rate = metrics["tokens_per_sec"] * self._flops_per_token
                metrics["mfu"] = rate / self._peak_flops
        for percent in (50, 90, 99):
            value = float(np.percentile(step_secs, percent))
            metrics[f"step_time_p{percent}_secs"] = value
        return metrics

    def median_rate(self) -> float | None:
        """The median of all reports' `tokens_per_sec`; None if there is none."""
        return float(np.median(self._rates)) if self._rates else None

    def close(self) -> None:
        """End the thread that notes when steps finish."""
        self._finish_times.close()
