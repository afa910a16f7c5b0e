"""The training loop: steps, logging, evaluation, checkpoints, early stopping."""

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxtrain.batch import AnyBatch
from jaxtrain.checkpoint import CheckpointManager
from jaxtrain.config import LoopSection, RunConfig, diff
from jaxtrain.data.batches.pipeline import BatchIterator
from jaxtrain.data.stream.batches import StreamIterator, join_states
from jaxtrain.evaluation.held_out import (
    add_metrics,
    evaluate,
    perplexity,
    to_floats,
    without_added,
)
from jaxtrain.record.diagnostics import save_batch
from jaxtrain.record.goodput import Goodput
from jaxtrain.record.throughput import (
    ThroughputMeter,
    device_memory,
    device_utilization,
    host_memory,
)
from jaxtrain.run.preemption import Preempted, PreemptionWatch, Watchdog
from jaxtrain.step import EvalStep, TrainStep
from jaxtrain.tree import overlay, select
from jaxtrain.types import Metrics, TrainState

logger = logging.getLogger(__name__)

# Steps that may be on their way to the device at once: enough to keep it busy.
_STEPS_AHEAD = 2
# Then skipping does not help: the model or the data is broken.
_MOST_SKIPS_IN_A_ROW = 20


@dataclasses.dataclass
class BestMetric:
    """The best evaluation so far, and how many followed it without improvement."""

    greater_is_better: bool
    threshold: float = 0.0
    patience: int | None = None
    value: float | None = None
    step: int = 0
    evaluations_since: int = 0

    def update(self, value: float, step: int) -> bool:
        """Take note of an evaluation; True if it is the best by over `threshold`."""
        sign = 1 if self.greater_is_better else -1
        improves = self.value is None or sign * (value - self.value) > self.threshold
        if improves:
            self.value, self.step, self.evaluations_since = value, step, 0
        else:
            self.evaluations_since += 1
        return improves

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self.evaluations_since >= self.patience


@dataclasses.dataclass
class Loop:
    """One run of the train step over the data. `restore`, then `run_to_end`."""

    run: RunConfig
    config: dict[str, Any]
    state: TrainState
    train_step: TrainStep
    eval_step: EvalStep
    train_batches: BatchIterator | StreamIterator
    eval_batches: Callable[[], Iterator[Any]] | None
    place: Callable[..., Any]
    checkpoints: CheckpointManager
    steps_per_epoch: int
    epochs_done: Callable[[int], float]
    meter: ThroughputMeter
    sync_reference: Callable[[TrainState], TrainState] | None = None
    sampler: Callable[[TrainState], tuple[dict[str, float], dict[str, str]]] | None = (
        None  # generation metrics and sample texts
    )
    bad_batches: pathlib.Path = pathlib.Path("bad_batches")
    readers: int = 1  # processes, or groups of them, that read rows of their own
    added_losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    writer: Any = None
    step: int = 0

    def __post_init__(self) -> None:
        settings = self.settings
        self.total_steps = self.train_batches.num_steps
        self.best = BestMetric(
            settings.greater_is_better,
            settings.early_stopping_threshold,
            settings.early_stopping_patience,
        )
        self.num_tokens = 0.0
        self.goodput = Goodput()
        self._watchdog = Watchdog(settings.step_timeout_secs)
        self._started = 0.0
        self.logged: dict[str, float] = {}
        self.evaluated: dict[str, float] = {}
        self.evaluated_step: int | None = None
        # Steps whose metrics are still on the device, with their rows on the host.
        self._pending: list[tuple[int, Metrics, AnyBatch]] = []
        self._skipped = 0  # steps since the last log
        self._skipped_in_a_row = 0
        self._unlogged: list[Metrics] = []  # one a step, on the host

    @property
    def settings(self) -> LoopSection:
        return self.run.loop

    # --- checkpoints ---------------------------------------------------------------

    def restore(self) -> None:
        """Continue from the newest checkpoint in the work directory, if there is one.

        Raises:
            ValueError: there is one and `resume_from_checkpoint` is "never", or it
                does not fit the model or the data.
        """
        latest = self.checkpoints.latest_step()
        if latest is None:
            return
        if self.settings.resume_from_checkpoint == "never":
            raise ValueError(
                "training.resume_from_checkpoint = 'never', but"
                f" {self.checkpoints.directory} holds step {latest}: use a new"
                " workdir, or 'auto' to continue"
            )
        restored = self.checkpoints.restore(self._saved_part(self.state))
        for line in diff(restored.config, self.config):
            logger.warning("resuming with another config: %s", line)
        self.state = dataclasses.replace(
            restored.state, frozen=overlay(self.state.frozen, restored.state.frozen)
        )
        data_states = [state or {} for state in restored.data_states]
        data_state = data_states[0]  # all but the position is the same for all
        self.train_batches.set_state(join_states([s["batches"] for s in data_states]))
        self.step = restored.step
        self.num_tokens = data_state["num_tokens"]
        self.goodput.set_state(restored.clock)
        for name, value in data_state["best"].items():
            setattr(self.best, name, value)
        logger.info("resumed from step %d of %d", self.step, self.total_steps)

    def save(self) -> None:
        """Start to save this step; the loop goes on meanwhile."""
        if self.checkpoints.latest_step() == self.step:
            return
        with self.meter.paused():
            self._fetch_pending()  # raises before a broken state is saved
            self._save()
        self._watchdog.feed()

    def _save(self) -> None:
        at_this_step = self.evaluated if self.evaluated_step == self.step else {}
        best = ("value", "step", "evaluations_since")
        self.checkpoints.save(
            self.step,
            self._saved_part(self.state),
            data_state={
                # Batches are read ahead; what counts is what was trained on.
                "batches": self.train_batches.get_state(self.step),
                "num_tokens": self.num_tokens,
                "best": {name: getattr(self.best, name) for name in best},
            },
            config=self.config,
            metrics=at_this_step,
            clock=self.goodput.get_state(),
        )

    def _saved_part(self, state: TrainState) -> TrainState:
        """What a checkpoint holds: all but frozen weights that can be loaded again."""
        frozen = {}
        if self.sync_reference is not None:
            frozen = select(state.frozen, state.trainable)
        return dataclasses.replace(state, frozen=frozen)

    # --- the loop ------------------------------------------------------------------

    def run_to_end(self) -> dict[str, Any]:
        """Train up to the last step, or an early stop; the results by name.

        Raises:
            Preempted: SIGTERM came; a checkpoint is saved.
        """
        with (
            self._watchdog,
            PreemptionWatch() as preemption,
            contextlib.closing(self.train_batches),  # whatever ends the run
        ):
            return self._run_to_end(preemption)

    def _run_to_end(self, preemption: PreemptionWatch) -> dict[str, Any]:
        settings = self.settings
        if settings.eval_on_start and self.step == 0:
            self.evaluate()
        first_step, self._started = self.step, time.perf_counter()
        for placed, batch in self._placed_batches():
            self.state, metrics = self.train_step(self.state, placed)
            self.step += 1
            self._pending.append((self.step, metrics, batch))
            if self.step == first_step + 1:
                self._report_compilation(metrics)
            else:
                self._wait_for_the_device()
                tokens, samples = _count(batch, self.readers)
                self.goodput.add(self.meter.step(tokens=tokens, samples=samples))
            self._watchdog.feed()
            if self._is_due(settings.logging_steps):
                self.log()
            if self.sync_reference is not None and self._is_sync_due():
                self.state = self.sync_reference(self.state)
            if self._is_due(settings.eval_steps):
                self.evaluate()
            if self._is_due(settings.save_steps):
                self.save()
            if preemption.requested(self.step):
                self._leave()
            if self.best.should_stop:
                logger.info(
                    "early stop at step %d: %s has not improved on %.4g of step %d",
                    self.step,
                    settings.metric_for_best_model,
                    self.best.value,
                    self.best.step,
                )
                break
        return self._finish()

    def _leave(self) -> None:
        """Save whatever `save_steps` says, and go: the next start goes on from here."""
        if self._pending or self._unlogged:
            self.log()
        self.save()
        self.checkpoints.wait()
        self.train_batches.close()
        logger.warning("preempted: step %d is saved, start again to go on", self.step)
        raise Preempted(self.step)

    def _finish(self) -> dict[str, Any]:
        settings = self.settings
        if self._pending or self._unlogged:
            self.log()
        if settings.eval_steps != 0 and self.evaluated_step != self.step:
            self.evaluate()
        if settings.save_steps != 0:
            self.save()
        self.checkpoints.wait()
        self.train_batches.close()
        return {
            **self.logged,
            **self.evaluated,
            "final_loss": self.logged.get("loss", math.nan),
            "global_step": self.step,
            "best_metric": self.best.value,
        }

    def _placed_batches(self) -> Iterator[tuple[Any, AnyBatch]]:
        """Batches on the devices and on the host, one ahead of the running step."""
        ahead = 1 if self.run.devices.dataloader_pin_memory else 0
        queue: collections.deque[tuple[Any, AnyBatch]] = collections.deque()
        while True:
            while len(queue) <= ahead:
                with self.meter.waiting_for_data():
                    batch = next(self.train_batches, None)
                if batch is None:
                    break
                queue.append((self.place(batch, leading_axes=1), batch))
            if not queue:
                return
            yield queue.popleft()

    def _report_compilation(self, metrics: Metrics) -> None:
        """The first step compiles; it counts in no rate."""
        jax.block_until_ready(metrics["loss"].total)
        seconds = time.perf_counter() - self._started
        logger.info("first step took %.1f s, compilation included", seconds)
        self.meter.start()

    def _wait_for_the_device(self) -> None:
        """Let the host run ahead a little, so that step times are the device's."""
        if len(self._pending) > _STEPS_AHEAD:
            _, metrics, _ = self._pending[-1 - _STEPS_AHEAD]
            jax.block_until_ready(metrics["loss"].total)

    def _is_due(self, every: int | None) -> bool:
        """Every so many steps; after each epoch if None; never if 0."""
        if every is None:
            return self.step % self.steps_per_epoch == 0
        return every > 0 and self.step % every == 0

    def _is_sync_due(self) -> bool:
        dpo = self.run.dpo
        return dpo is not None and self.step % dpo.ref_model_sync_steps == 0

    # --- metrics -------------------------------------------------------------------

    def log(self) -> None:
        """Write the means of the metrics since the last log, and rates."""
        self._fetch_pending()
        steps, self._unlogged = self._unlogged, []
        skipped, self._skipped = self._skipped, 0
        if not steps:
            self.writer.write(self.step, {"skipped_steps": skipped})
            return
        means = to_floats(functools.reduce(add_metrics, steps))
        # As the Hugging Face Trainer logs them: a mean of steps, and the last step's.
        losses = [to_floats({"loss": step["loss"]})["loss"] for step in steps]
        means["loss"] = sum(losses) / len(losses)
        last = ("learning_rate", "grad_norm")
        means |= to_floats({n: v for n, v in steps[-1].items() if n.startswith(last)})
        means["epoch"] = self.epochs_done(self.step)
        means["num_tokens"] = self.num_tokens
        if skipped:
            means["skipped_steps"] = skipped
        if self.run.objective == "next_token":
            means["perplexity"] = perplexity(without_added(means, self.added_losses))
        self.logged = means
        device = jax.local_devices()[0]
        self.writer.write(
            self.step,
            means
            | self.meter.report()
            | {"goodput_share": self.goodput.share()}
            | device_memory(device)
            | device_utilization(device)
            | host_memory(),
        )

    def _fetch_pending(self) -> None:
        """Bring finished steps' metrics to the host.

        Raises:
            FloatingPointError: a gradient was not finite or a loss spiked, and nothing
                skipped it.
        """
        pending, self._pending = self._pending, []
        for step, metrics, batch in pending:
            sums: Metrics = jax.device_get(dict(metrics))
            if "num_tokens" in sums:
                self.num_tokens += float(sums["num_tokens"].total)
            # Loss scaling finds its scale by such steps: they are no one's mistake.
            is_nonfinite = sums.pop("nonfinite").total and self.state.loss_scale is None
            is_spike = "spike" in sums and sums.pop("spike").total
            loss = to_floats({"loss": sums["loss"]})["loss"]
            if is_nonfinite:
                problem = f"the gradient is not finite (loss {loss:.4g})"
                self._report_bad_step(step, batch, problem, "on_nonfinite")
            elif is_spike:
                problem = (
                    f"the loss {loss:.4g} lies over spike_threshold ="
                    f" {self.settings.spike_threshold:g} standard deviations above the"
                    f" mean of the last {self.settings.spike_window}"
                )
                self._report_bad_step(step, batch, problem, "on_spike")
            else:
                self._unlogged.append(sums)
                self._skipped_in_a_row = 0

    def _report_bad_step(
        self, step: int, batch: AnyBatch, problem: str, key: str
    ) -> None:
        """Save the step's batch; say what was skipped, or stop as `key` wants it."""
        process = f".process_{jax.process_index()}" if jax.process_count() > 1 else ""
        path = save_batch(self.bad_batches, step, batch, process)
        self._skipped += 1
        self._skipped_in_a_row += 1
        if getattr(self.settings, key) == "skip":
            logger.warning("step %d skipped: %s; its batch is %s", step, problem, path)
            if self._skipped_in_a_row < _MOST_SKIPS_IN_A_ROW:
                return
            problem += f"; {_MOST_SKIPS_IN_A_ROW} steps in a row were skipped"
        raise FloatingPointError(
            f"step {step}: {problem}. Its batch is {path}; earlier checkpoints in"
            f" {self.checkpoints.directory} are whole. Look at these rows, lower the"
            f" learning rate, or set training.{key} = 'skip'"
        )

    def evaluate(self) -> None:
        """Evaluate, log the result and see whether it is the best so far."""
        if self.eval_batches is None:
            return
        with self.meter.paused():
            self._fetch_pending()
            self.evaluated = evaluate(
                self.eval_step,
                self.state,
                self._placed_eval_batches(self.eval_batches()),
                with_perplexity=self.run.objective == "next_token",
                added_losses=self.added_losses,
            )
            if self.sampler is not None:
                self._watchdog.feed()
                scores, texts = self.sampler(self.state)
                self.evaluated |= {f"eval_{name}": v for name, v in scores.items()}
                self.writer.write_text(self.step, texts)
        self.evaluated_step = self.step
        self.writer.write(self.step, self.evaluated)
        key = self.settings.best_metric
        if key not in self.evaluated:
            raise ValueError(
                f"training.metric_for_best_model ="
                f" {self.settings.metric_for_best_model!r} is no evaluation metric;"
                f" these are: {', '.join(sorted(self.evaluated))}"
            )
        if self.best.update(self.evaluated[key], self.step):
            logger.info("%s = %.4g, the best so far", key, self.evaluated[key])

    def _placed_eval_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._watchdog.feed()
            yield self.place(batch)


def _count(batch: AnyBatch, readers: int) -> tuple[float, float]:
    """(tokens, rows) of a global batch; other processes' are taken to be like ours."""
    segment_ids = [side.segment_ids for side in batch.sides().values()]
    tokens = sum(np.count_nonzero(ids) for ids in segment_ids)
    rows = np.count_nonzero(segment_ids[0].any(-1))
    return float(tokens * readers), float(rows * readers)
