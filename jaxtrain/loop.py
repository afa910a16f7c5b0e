"""The training loop: steps, logging, evaluation, checkpoints, early stopping."""

import collections
import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxtrain.batch import AnyBatch, rows_of
from jaxtrain.config import RunConfig, diff
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.batches.pipeline import BatchIterator
from jaxtrain.data.stream.batches import StreamIterator, join_states
from jaxtrain.evaluation.held_out import (
    add_metrics,
    evaluate,
    perplexity,
    to_floats,
    without_added,
)
from jaxtrain.models.load import LoadedModel
from jaxtrain.record.diagnostics import save_batch
from jaxtrain.record.goodput import Goodput
from jaxtrain.record.throughput import ThroughputMeter, usage
from jaxtrain.run.checkpoint import CheckpointManager
from jaxtrain.run.feed import Feed, Prepared
from jaxtrain.run.preemption import Preempted, PreemptionWatch, Watchdog
from jaxtrain.run.preflight import refuse_never
from jaxtrain.step import EvalStep, TrainStep
from jaxtrain.tree import overlay, select
from jaxtrain.types import Metrics, Params, TrainState

logger = logging.getLogger(__name__)

# Steps that may be on their way to the device at once: enough to keep it busy.
_STEPS_AHEAD = 2
# Then skipping does not help: the model or the data is broken.
_MOST_SKIPS_IN_A_ROW = 20
_BEST_STATE = ("value", "step", "evaluations_since")


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
class Progress:
    """How far a run has come, apart from its state and its position in the data."""

    best: BestMetric
    step: int = 0
    num_tokens: float = 0.0
    goodput: Goodput = dataclasses.field(default_factory=Goodput)

    def get_state(self) -> dict[str, Any]:
        """The numbers that a checkpoint's record keeps, for JSON."""
        best = {name: getattr(self.best, name) for name in _BEST_STATE}
        return {"num_tokens": self.num_tokens, "best": best}

    def set_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `get_state` gave."""
        self.num_tokens = saved["num_tokens"]
        self.best = dataclasses.replace(self.best, **saved["best"])


@dataclasses.dataclass(frozen=True)
class Parts:
    """What `build` makes of a configuration, a model and rows, for the loop to run."""

    run: RunConfig
    model: LoadedModel
    state: TrainState
    train_step: TrainStep
    eval_step: EvalStep
    feed: Feed
    train_data: Prepared
    train_batches: BatchIterator | StreamIterator
    eval_data: PreparedDataset | None
    steps_per_epoch: int
    epochs_done: Callable[[int], float]
    meter: ThroughputMeter
    # TR-DPO's update of the reference, and what generates held-out texts.
    sync_reference: Callable[[TrainState], TrainState] | None
    sampler: Callable[[TrainState], tuple[dict[str, float], dict[str, str]]] | None
    added_losses: Mapping[str, float]  # weights of what is added to the objective

    @property
    def total_steps(self) -> int:
        return self.train_batches.num_steps

    def saved(self, state: TrainState) -> TrainState:
        """What a checkpoint holds: all but frozen weights that can be loaded again."""
        frozen: Params = {}
        if self.sync_reference is not None:
            frozen = select(state.frozen, state.trainable)
        return dataclasses.replace(state, frozen=frozen)


def restore(parts: Parts, checkpoints: CheckpointManager) -> tuple[Parts, Progress]:
    """Return the parts as the newest checkpoint has them, and the progress it tells.

    Without a checkpoint, both are at their start.

    Raises:
        ValueError: there is a checkpoint and `resume_from_checkpoint` is "never", or it
            does not fit the model or the data.
    """
    settings, state = parts.run.loop, parts.state
    threshold = settings.early_stopping_threshold
    patience = settings.early_stopping_patience
    progress = Progress(BestMetric(settings.greater_is_better, threshold, patience))
    latest = checkpoints.latest_step()
    if latest is None:
        return parts, progress
    if settings.resume_from_checkpoint == "never":
        raise refuse_never(checkpoints.directory, latest)
    restored = checkpoints.restore(parts.saved(state))
    for line in diff(restored.config, parts.run.to_dict()):
        logger.warning("resuming with another config: %s", line)
    data_states = [state or {} for state in restored.data_states]
    parts.train_batches.set_state(join_states([s["batches"] for s in data_states]))
    progress.step = restored.step
    progress.set_state(data_states[0])  # all but the position is the same for all
    progress.goodput.set_state(restored.clock)
    logger.info("resumed from step %d of %d", restored.step, parts.total_steps)
    frozen = overlay(state.frozen, restored.state.frozen)
    state = dataclasses.replace(restored.state, frozen=frozen)
    return dataclasses.replace(parts, state=state), progress


class Loop:
    """One run of the train step over the data, from `progress` to the end."""

    def __init__(
        self,
        parts: Parts,
        progress: Progress,
        checkpoints: CheckpointManager,
        writer: Any,
    ) -> None:
        self.parts, self.progress, self.state = parts, progress, parts.state
        self.checkpoints, self.writer = checkpoints, writer
        self.run, self.settings = parts.run, parts.run.loop
        self.logged: dict[str, float] = {}
        self.evaluated: dict[str, float] = {}
        self.evaluated_step: int | None = None
        self._meter, self._best = parts.meter, progress.best
        self._watchdog = Watchdog(self.settings.step_timeout_secs)
        # Steps whose metrics are still on the device, with their rows on the host.
        self._pending: list[tuple[int, Metrics, AnyBatch]] = []
        self._skipped = 0  # steps since the last log
        self._skipped_in_a_row = 0
        self._unlogged: list[Metrics] = []  # one a step, on the host

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    # --- checkpoints ---------------------------------------------------------------

    def save(self) -> None:
        """Start to save this step; the loop goes on meanwhile."""
        if self.checkpoints.latest_step() == self.step:
            return
        with self._meter.paused():
            self._fetch_pending()  # raises before a broken state is saved
            # Batches are read ahead; what counts is what was trained on.
            batches = self.parts.train_batches.get_state(self.step)
            self.checkpoints.save(
                self.step,
                self.parts.saved(self.state),
                data_state={"batches": batches, **self.progress.get_state()},
                config=self.run.to_dict(),
                metrics=self.evaluated if self.evaluated_step == self.step else {},
                clock=self.progress.goodput.get_state(),
            )
        self._watchdog.feed()

    # --- the loop ------------------------------------------------------------------

    def run_to_end(self) -> dict[str, Any]:
        """Train up to the last step, or an early stop; the results by name.

        Raises:
            Preempted: SIGTERM came; a checkpoint is saved.
        """
        with (
            self._watchdog,
            PreemptionWatch() as preemption,
            contextlib.closing(self.parts.train_batches),  # whatever ends the run
        ):
            return self._run_to_end(preemption)

    def _run_to_end(self, preemption: PreemptionWatch) -> dict[str, Any]:
        if self.settings.eval_on_start and self.step == 0:
            self.evaluate()
        first_step, started = self.step, time.perf_counter()
        for placed, batch in self._placed_batches():
            self.state, metrics = self.parts.train_step(self.state, placed)
            self.progress.step += 1
            self._pending.append((self.step, metrics, batch))
            if self.step == first_step + 1:
                self._report_compilation(metrics, started)
            else:
                self._wait_for_the_device()
                tokens, samples = _count(batch, self.parts.feed.readers)
                seconds = self._meter.step(tokens=tokens, samples=samples)
                self.progress.goodput.add(seconds)
            self._watchdog.feed()
            self._do_what_is_due()
            if preemption.requested(self.step):
                self._leave()
            if self._best.should_stop:
                logger.info(
                    "early stop at step %d: %s has not improved on %.4g of step %d",
                    *(self.step, self.settings.metric_for_best_model),
                    *(self._best.value, self._best.step),
                )
                break
        return self._finish()

    def _do_what_is_due(self) -> None:
        """Log, move the reference, evaluate and save, each every so many steps."""
        if self._is_due(self.settings.logging_steps):
            self.log()
        sync_reference, dpo = self.parts.sync_reference, self.run.dpo
        if sync_reference and dpo and self._is_due(dpo.ref_model_sync_steps):
            self.state = sync_reference(self.state)
        if self._is_due(self.settings.eval_steps):
            self.evaluate()
        if self._is_due(self.settings.save_steps):
            self.save()

    def _leave(self) -> None:
        """Save regardless of `save_steps` and stop; the next run resumes from there."""
        self._log_the_rest()
        self.save()
        self.checkpoints.wait()
        logger.warning("preempted: step %d is saved, start again to go on", self.step)
        raise Preempted(self.step)

    def _finish(self) -> dict[str, Any]:
        settings = self.settings
        self._log_the_rest()
        if settings.eval_steps != 0 and self.evaluated_step != self.step:
            self.evaluate()
        if settings.save_steps != 0:
            self.save()
        self.checkpoints.wait()
        return {
            **self.logged,
            **self.evaluated,
            "final_loss": self.logged.get("loss", math.nan),
            "global_step": self.step,
            "best_metric": self._best.value,
        }

    def _placed_batches(self) -> Iterator[tuple[Any, AnyBatch]]:
        """Batches on the devices and on the host, one ahead of the running step."""
        ahead = 1 if self.run.devices.dataloader_pin_memory else 0
        queue: collections.deque[tuple[Any, AnyBatch]] = collections.deque()
        while True:
            while len(queue) <= ahead:
                with self._meter.waiting_for_data():
                    batch = next(self.parts.train_batches, None)
                if batch is None:
                    break
                queue.append((self.parts.feed.place(batch, leading_axes=1), batch))
            if not queue:
                return
            yield queue.popleft()

    def _report_compilation(self, metrics: Metrics, started: float) -> None:
        """The first step compiles; it counts in no rate."""
        jax.block_until_ready(metrics["loss"].total)
        seconds = time.perf_counter() - started
        logger.info("first step took %.1f s, compilation included", seconds)
        self._meter.start()

    def _wait_for_the_device(self) -> None:
        """Let the host run ahead a little, so that step times are the device's."""
        if len(self._pending) > _STEPS_AHEAD:
            _, metrics, _ = self._pending[-1 - _STEPS_AHEAD]
            jax.block_until_ready(metrics["loss"].total)

    def _is_due(self, every: int | None) -> bool:
        """Every so many steps; after each epoch if None; never if 0."""
        if every is None:
            return self.step % self.parts.steps_per_epoch == 0
        return every > 0 and self.step % every == 0

    # --- metrics -------------------------------------------------------------------

    def _log_the_rest(self) -> None:
        if self._pending or self._unlogged:
            self.log()

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
        means["epoch"] = self.parts.epochs_done(self.step)
        means["num_tokens"] = self.progress.num_tokens
        if skipped:
            means["skipped_steps"] = skipped
        if self.run.objective == "next_token":
            likelihood = without_added(means, self.parts.added_losses)
            means["perplexity"] = perplexity(likelihood)
        self.logged = means
        rates = self._meter.report() | {"goodput_share": self.progress.goodput.share()}
        self.writer.write(self.step, means | rates | usage(jax.local_devices()[0]))

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
                self.progress.num_tokens += float(sums["num_tokens"].total)
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
        path = save_batch(
            self.checkpoints.directory.with_name("bad_batches"), step, batch, process
        )
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
        if self.parts.eval_data is None:
            return
        batches = self.parts.feed.eval_batches(self.parts.eval_data)
        with self._meter.paused():
            self._fetch_pending()
            self.evaluated = evaluate(
                self.parts.eval_step,
                self.state,
                self._placed_eval_batches(batches),
                with_perplexity=self.run.objective == "next_token",
                added_losses=self.parts.added_losses,
            )
            if self.parts.sampler is not None:
                self._watchdog.feed()
                scores, texts = self.parts.sampler(self.state)
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
        if self._best.update(self.evaluated[key], self.step):
            logger.info("%s = %.4g, the best so far", key, self.evaluated[key])

    def _placed_eval_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._watchdog.feed()
            yield self.parts.feed.place(batch)


def _count(batch: AnyBatch, readers: int) -> tuple[float, float]:
    """(tokens, rows) of a global batch; other processes' are taken to be like ours."""
    segment_ids = [rows.segment_ids for rows in rows_of(batch)]
    tokens = sum(np.count_nonzero(ids) for ids in segment_ids)
    rows = np.count_nonzero(segment_ids[0].any(-1))
    return float(tokens * readers), float(rows * readers)
