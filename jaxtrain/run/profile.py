"""`training.profile`: trace a range of steps for TensorBoard or xprof."""

import contextlib
import logging
import pathlib
import shlex
from collections.abc import Iterator

import jax

from jaxtrain.config.sections import ProfileSection
from jaxtrain.record.throughput import ThroughputMeter

logger = logging.getLogger(__name__)


def check_profile(settings: ProfileSection, total_steps: int) -> None:
    """Check the settings against this run, before it starts.

    Raises:
        ValueError: steps after the last one of the run, or a process that does not
            exist.
    """
    if not settings.enabled:
        return
    found = settings.find_problem(total_steps)
    if found is not None:
        key, text = found
        value = getattr(settings, key)
        raise ValueError(f"training.profile.{key} = {value!r}: {text}")
    count = jax.process_count()
    if not all(index < count for index in settings.processes):
        raise ValueError(
            f"training.profile.processes = {settings.processes!r}: this run has"
            f" {count} process(es); choose numbers from 0 to {count - 1}"
        )


class StepProfiler:
    """Traces a range of this process's steps with `jax.profiler`.

    It does nothing if no steps are configured, or none for this process. The trace
    holds exactly the configured steps: earlier steps that are still running are waited
    for before it starts, and its own steps before it stops. The meter leaves the traced
    steps, and the time for starting and stopping, out of its rates.
    """

    def __init__(
        self,
        settings: ProfileSection,
        folder: pathlib.Path,
        meter: ThroughputMeter,
        *,
        done: int,
    ) -> None:
        """Prepare to trace those of the configured steps that are still to come.

        Args:
            folder: the trace is `plugins/profile/<steps>/<host>.xplane.pb` below it.
            done: number of steps that the run had taken when it started or resumed.
        """
        self._folder, self._meter = folder, meter
        self._steps = range(0)
        self._traced: list[int] = []
        if not settings.enabled or jax.process_index() not in settings.processes:
            return
        steps = settings.steps
        self._steps = range(max(steps.start, done + 1), steps.stop)
        if not self._steps:
            logger.info(
                "training.profile: nothing to trace, because steps %d to %d were done"
                " before this start, which resumes after step %d",
                *(steps[0], steps[-1], done),
            )

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[bool]:
        """Mark the block as `step` if it is traced; yields whether it is."""
        if step not in self._steps:
            yield False
            return
        if not self._traced:
            self._start()
        self._traced.append(step)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield True

    def stop_after(self, step: int) -> None:
        """Write the trace if `step` was the last one to be traced."""
        if self._steps and step == self._steps[-1]:
            self.close()

    def close(self) -> None:
        """Write the trace, if there is one; called when the run ends."""
        if not self._traced:
            return
        first, last = self._traced[0], self._traced[-1]
        self._traced, self._steps = [], range(0)
        try:
            self._meter.wait()
        except BaseException:  # the device's; a trace left open would block the next
            jax.profiler.stop_trace()
            raise
        with self._meter.paused():
            jax.profiler.stop_trace()
        here, folder = pathlib.Path.cwd(), self._folder
        shown = folder.relative_to(here) if folder.is_relative_to(here) else folder
        logger.info(
            "steps %d to %d are profiled: xprof --port 8791 %s (or tensorboard"
            " --logdir)",
            *(first, last, shlex.quote(str(shown))),
        )

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        # One folder for all hosts; processes that share a host have one each, for the
        # file in it is named after the host alone.
        options.session_id = f"steps_{self._steps[0]}_to_{self._steps[-1]}"
        if jax.process_index() > 0:
            options.session_id += f"_process_{jax.process_index()}"
        with self._meter.paused():
            jax.profiler.start_trace(self._folder, profiler_options=options)
