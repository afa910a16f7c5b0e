"""The log of a run: what its steps measured, once they are done, and how fast."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from jaxtrain.batch import AnyBatch
from jaxtrain.record.usage import usage
from jaxtrain.run.bad_steps import BadSteps, PendingSteps
from jaxtrain.run.progress import Progress
from jaxtrain.run.window import MetricWindow
from jaxtrain.types import Metrics

# Steps that may be on their way to the device at once: enough to keep it busy.
STEPS_AHEAD = 2


class StepLog:
    """Takes in what steps measure, and writes a record of them where one is due.

    A record is taken once the devices have the next step to work on. Else they would
    have nothing to do while the host reads the metrics and hands over that step: 30 ms
    of each log on two GPUs.
    """

    def __init__(
        self, parts: Any, progress: Progress, directory: pathlib.Path, writer: Any
    ) -> None:
        """Start with no step.

        Args:
            parts: `loop.Parts`.
            directory: of the checkpoints.
            writer: of `record.writers`.
        """
        self._parts, self._progress, self._writer = parts, progress, writer
        self._next_scale: Any = None  # on the device, after the newest step
        self._pending = PendingSteps(STEPS_AHEAD)
        self._bad_steps = BadSteps(parts.run.loop, directory)
        self._is_owed = False  # a record up to the newest step, or the one before it
        self._unwritten: tuple[int, dict[str, Any]] | None = None

    def add(self, metrics: Metrics, batch: AnyBatch, next_scale: Any) -> None:
        """Note the newest step, which was handed to the devices.

        `next_scale`: the loss scale behind it; None without loss scaling.
        """
        self._next_scale = next_scale
        self._pending.add(self._progress.step, metrics, batch)

    def ask(self, *, is_last: bool) -> None:
        """A record of the steps up to the newest is due; `is_last`: no step follows.

        It is taken at once where a callback may stop the run then, or where the state
        has to tell the loss scale.
        """
        self._is_owed = True
        if is_last or self._progress.callbacks or self._next_scale is not None:
            self.take()

    def write(self, ahead: int = 0) -> None:
        """Write the record that is owed or was taken; `ahead`: as for `take`."""
        if self._is_owed:
            self.take(ahead)
        if self._unwritten is not None:
            (step, record), self._unwritten = self._unwritten, None
            share = {"goodput_share": self._progress.goodput.share()}
            self._writer.write(step, record | share | usage(jax.local_devices()[0]))

    def take_rest(self) -> None:
        """Take a record of the steps that none was taken of, if there are any."""
        if self._pending or self._progress.window:
            self.take()

    def take(self, ahead: int = 0) -> None:
        """Take the means since the last record, and rates, to be written by and by.

        The newest `ahead` steps, which may be in flight, are left to the next one.
        """
        self._is_owed = False
        self.fetch(ahead)
        progress, step = self._progress, self._progress.step - ahead
        window, progress.window = progress.window, MetricWindow()
        record = window.means(**self._parts.measured) if window.steps else {}
        record["epoch"] = self._parts.epochs_done(step)
        record["num_tokens"] = progress.num_tokens
        record |= progress.callbacks.take_logged()
        if window.skipped:
            record["skipped_steps"] = window.skipped
        if window.steps:
            progress.logged = record
        self._unwritten = (step, record | self._parts.meter.report(ahead))

    def fetch(self, ahead: int = 0) -> None:
        """Wait for all steps but the newest `ahead`, and bring their metrics here.

        Raises:
            FloatingPointError: see `BadSteps.judge`.
        """
        self._parts.meter.wait(ahead)
        pending, progress = self._pending.take(ahead), self._progress
        scales = self._next_scales([sums for _, sums, _ in pending])
        for (step, sums, batch), scale in zip(pending, scales, strict=True):
            if "num_tokens" in sums:
                progress.num_tokens += float(sums["num_tokens"].total)
            skipped, measured = self._bad_steps.judge(step, sums, batch, scale)
            progress.window.skipped += skipped
            progress.skipped_steps += skipped
            if measured:
                progress.window.add(sums)
                progress.callbacks.after_step(step, sums)

    def _next_scales(self, fetched: Sequence[Metrics]) -> list[float | None]:
        """The loss scale after each of these steps, of which the last is the newest."""
        if self._next_scale is None or not fetched:
            return [None] * len(fetched)
        scales = [sums["loss_scale"].total for sums in fetched[1:]]
        return [float(scale) for scale in (*scales, self._next_scale)]
