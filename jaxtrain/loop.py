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

import numpy as np

from jaxtrain.batch import AnyBatch, PairBatch, rows_of
from jaxtrain.config import RunConfig, diff
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.batches.pipeline import BatchIterator
from jaxtrain.data.stream.batches import StreamIterator, join_states
from jaxtrain.evaluation.sets import add_scores, evaluate_sets
from jaxtrain.models.load import LoadedModel
from jaxtrain.record.throughput import ThroughputMeter
from jaxtrain.run import base_weights
from jaxtrain.run.callbacks import make_callbacks
from jaxtrain.run.checkpoint import CheckpointManager, restore_newest
from jaxtrain.run.feed import Feed, Prepared
from jaxtrain.run.preemption import Preempted, PreemptionWatch, Watchdog
from jaxtrain.run.preflight import explain_mismatch, refuse_never
from jaxtrain.run.profile import StepProfiler
from jaxtrain.run.progress import BestMetric, Progress
from jaxtrain.run.step_log import STEPS_AHEAD, StepLog
from jaxtrain.run.step_programs import make_programs
from jaxtrain.step import EvalStep, TrainStep
from jaxtrain.tree import overlay, select
from jaxtrain.types import Params, TrainState

logger = logging.getLogger(__name__)


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
    eval_data: Mapping[str, PreparedDataset]  # the sets by name
    steps_per_epoch: int
    epochs_done: Callable[[int], float]
    meter: ThroughputMeter
    # TR-DPO's update of the reference, and what generates held-out texts.
    sync_reference: Callable[[TrainState], TrainState] | None
    sampler: Callable[[TrainState], tuple[dict[str, float], dict[str, str]]] | None
    added_losses: Mapping[str, float]  # weights of what is added to the objective
    base_weights: str | None = None  # the fingerprint of what the run starts from

    @property
    def total_steps(self) -> int:
        return self.train_batches.num_steps

    @property
    def measured(self) -> dict[str, Any]:
        """What sums become besides means, of steps as of evaluations."""
        is_likelihood = self.run.objective == "next_token"
        return {"with_perplexity": is_likelihood, "added_losses": self.added_losses}

    def where(self, step: int) -> dict[str, Any]:
        """What a checkpoint's record keeps of the data and the model before it."""
        # Batches are read ahead; what counts is what was trained on.
        batches = self.train_batches.get_state(step)
        model = base_weights.describe_model(self.model.config)
        return {"batches": batches, "base_weights": self.base_weights, "model": model}

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
            does not fit the model, its frozen weights or the data.
    """
    settings, state = parts.run.loop, parts.state
    base = base_weights.identify_base(parts.run, parts.model)
    parts = dataclasses.replace(parts, base_weights=base)
    threshold = settings.early_stopping_threshold
    patience = settings.early_stopping_patience
    progress = Progress(BestMetric(settings.greater_is_better, threshold, patience))
    progress.callbacks = make_callbacks(settings, checkpoints.directory)
    latest = checkpoints.latest_step()
    if latest is None:
        return parts, progress
    if settings.resume_from_checkpoint == "never":
        raise refuse_never(checkpoints.directory, latest)
    explain = functools.partial(explain_mismatch, parts.run, checkpoints.directory)
    restored = restore_newest(checkpoints, parts.saved(state), explain)
    changes = diff(restored.config, parts.run.to_dict())
    for line in changes:
        logger.warning("resuming with another config: %s", line)
    data_states = [state or {} for state in restored.data_states]
    recorded, model = data_states[0], parts.model
    names = ("model.name_or_path:", "model.revision:")
    # Whole training reads no base again, whatever became of it under the same name.
    if state.frozen or any(line.startswith(names) for line in changes):
        base_weights.check_base(recorded.get("base_weights"), base, model.directory)
    stretched = any(line.startswith("model.rope_scaling") for line in changes)
    base_weights.check_model(recorded.get("model"), model, stretched=stretched)
    parts.train_batches.set_state(join_states([s["batches"] for s in data_states]))
    progress.step = restored.step
    progress.set_state(recorded)  # all but the position is the same for all
    progress.goodput.set_state(restored.clock)
    progress.heed_changes(restored.config.get("training", {}), settings)
    if not any(line.startswith(("data.", "training.generation.")) for line in changes):
        progress.evaluated = restored.metrics
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
        self.evaluated = progress.evaluated
        self.evaluated_step = self.step if self.evaluated else None
        self._meter, self._best = parts.meter, progress.best
        self._meter.on_step = progress.goodput.add
        self._profiler = StepProfiler(
            self.run.profile, checkpoints.beside("profile"), self._meter, done=self.step
        )
        self._watchdog = Watchdog(self.settings.step_timeout_secs)
        self._log = StepLog(parts, progress, checkpoints.directory, writer)
        self._has_stepped = self._has_synced = False
        self._programs = make_programs(parts.train_step, parts.model.plan)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress.step

    # --- checkpoints ---------------------------------------------------------------

    def save(self) -> None:
        """Start to save this step; the loop goes on meanwhile."""
        if self.checkpoints.latest_step() == self.step:
            return
        self._log.write()  # a run that goes on from here does not log it again
        with self._meter.paused():
            self._log.fetch()  # raises before a broken state is saved
            self.progress.callbacks.on_save(self.step)
            self.checkpoints.save(
                self.step,
                self.parts.saved(self.state),
                data_state=self.parts.where(self.step) | self.progress.get_state(),
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
            FloatingPointError: a step was bad and not skipped; see `BadSteps.judge`.
        """
        with (
            self._watchdog,
            PreemptionWatch() as preemption,
            contextlib.closing(self.parts.train_batches),  # whatever ends the run
            contextlib.closing(self._meter),
            contextlib.closing(self._profiler),
        ):
            try:
                return self._run_to_end(preemption)
            finally:
                self._log.write()

    def _run_to_end(self, preemption: PreemptionWatch) -> dict[str, Any]:
        if self.settings.eval_on_start and self.step == 0:
            self.evaluate()
        ending = "finished"
        batches = self._placed_batches()
        if self.step >= self.parts.total_steps:
            ending = "nothing left"
            _say_nothing_is_left(self.step, self.parts)
        elif self.progress.is_over(self.parts.total_steps):
            ending, batches = self._stop_early(), iter(())
        else:
            self._compile_ahead()
        for placed, batch in batches:
            self._start_step(placed, batch)
            self._watchdog.feed()
            self._do_what_is_due()
            if preemption.requested(self.step):
                self._leave()
            if self.progress.should_stop:
                ending = self._stop_early()
                break
        return self._finish(ending)

    def _stop_early(self) -> str:
        why = self.progress.why_it_stops(self.settings.best_metric)
        logger.info("early stop at step %d: %s", self.step, why)
        return "stopped early"

    def _compile_ahead(self) -> None:
        feed, batches = self.parts.feed, self.parts.train_batches.empty_batches()
        self._programs.compile(self.state, [feed.place(each, 1) for each in batches])

    def _do_what_is_due(self) -> None:
        """Log, move the reference, evaluate and save, each every so many steps.

        A checkpoint comes last: what is logged after it would be logged once more by
        the run that goes on from it.
        """
        if self._is_due(self.settings.logging_steps):
            self._log.ask(is_last=self.step == self.parts.total_steps)
        sync_reference, dpo = self.parts.sync_reference, self.run.dpo
        if sync_reference and dpo and self.step % dpo.ref_model_sync_steps == 0:
            # The first call compiles, and so counts in no rate.
            compiles, self._has_synced = not self._has_synced, True
            with self._meter.paused() if compiles else contextlib.nullcontext():
                self.state = sync_reference(self.state)
        if self._is_due(self.settings.eval_steps):
            self.evaluate()
        if self.progress.should_stop:
            self._log.take_rest()
        if self._is_due(self.settings.save_steps):
            self.save()

    def _leave(self) -> None:
        """Save regardless of `save_steps` and stop; the next run resumes from there."""
        self.save()
        self.checkpoints.wait()
        logger.warning("preempted: step %d is saved, start again to go on", self.step)
        raise Preempted(self.step, self._results("preempted"))

    def _finish(self, ending: str) -> dict[str, Any]:
        settings = self.settings
        self._log.take_rest()
        if settings.eval_steps != 0 and self.evaluated_step != self.step:
            self.evaluate()
        if settings.save_steps != 0:
            self.save()
        self.checkpoints.wait()
        return self._results(ending)

    def _results(self, ending: str) -> dict[str, Any]:
        """The last metrics, and what `record.summary` tells of the whole run."""
        return {
            **self.progress.logged,
            **self.evaluated,
            "final_loss": self.progress.logged.get("loss", math.nan),
            "global_step": self.step,
            "total_steps": self.parts.total_steps,
            "ending": ending,
            "best_metric": self._best.value,
            "best_metric_name": self.settings.best_metric,
            "best_step": self._best.step,
            "saved_steps": self.checkpoints.all_steps(),
            "num_tokens": self.progress.num_tokens,
            "skipped_steps": self.progress.skipped_steps,
            "wall_secs": self.progress.goodput.secs_since_start(),
            "median_tokens_per_sec": self._meter.median_rate(),
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

    def _start_step(self, placed: Any, batch: AnyBatch) -> None:
        """Hand one step to the device, and wait for the one `STEPS_AHEAD` before it.

        The first step compiles, and so does one whose batch has a new shape: these
        count in no rate.
        """
        is_first, compiles = not self._has_stepped, self._programs.compiles(placed)
        self._has_stepped, started = True, time.perf_counter()
        with self._profiler.step(self.step + 1) as is_profiled:
            self.state, metrics = self._programs(self.state, placed)
        self.progress.step += 1
        scaling = self.state.loss_scale
        self._log.add(metrics, batch, scaling and scaling.scale)
        self._meter.dispatched(
            metrics["loss"].total,
            **_count(batch, self.parts.feed),
            counts=not (compiles or is_profiled),
        )
        self._log.write(ahead=1)  # while the devices work on this step
        self._meter.wait(ahead=0 if is_first else STEPS_AHEAD)
        if is_first:
            seconds = time.perf_counter() - started
            included = ", compilation included" if compiles else ""
            logger.info("first step took %.1f s%s", seconds, included)
        self._profiler.stop_after(self.step)

    def _is_due(self, every: int | None) -> bool:
        """Every so many steps, after each epoch if None, and at the end; never if 0."""
        if every == 0:
            return False
        is_end = self.step == self.parts.total_steps or self.progress.should_stop
        return is_end or self.step % (every or self.parts.steps_per_epoch) == 0

    def evaluate(self) -> None:
        """Evaluate, log the result and see whether it is the best so far."""
        sets = self.parts.eval_data.items()
        if not sets:
            return
        self._log.write()
        with self._meter.paused():
            self._log.fetch()
            self.evaluated = evaluate_sets(
                self.parts.eval_step,
                self.state,
                {name: self._placed_eval_batches(data) for name, data in sets},
                **self.parts.measured,
            )
            if self.parts.sampler is not None:
                self._watchdog.feed()
                scores, texts = self.parts.sampler(self.state)
                add_scores(self.evaluated, scores)
                self.writer.write_text(self.step, texts)
            self.progress.callbacks.after_evaluation(self.step, self.evaluated)
            self.writer.write(self.step, self.evaluated)
        self.evaluated_step = self.step
        key = self.settings.best_metric
        if key not in self.evaluated:
            raise ValueError(
                f"training.metric_for_best_model ="
                f" {self.settings.metric_for_best_model!r} is not an evaluation metric;"
                f" these are: {', '.join(sorted(self.evaluated))}"
            )
        if self._best.update(self.evaluated[key], self.step):
            logger.info("%s = %.4g, the best so far", key, self.evaluated[key])

    def _placed_eval_batches(self, data: PreparedDataset) -> Iterator[Any]:
        for batch in self.parts.feed.eval_batches(data):
            self._watchdog.feed()
            yield self.parts.feed.place(batch)


def _say_nothing_is_left(step: int, parts: Parts) -> None:
    by_steps = parts.run.loop.max_steps > 0
    logger.info(
        "nothing left to train: step %d of %d; raise training.%s or use a new workdir",
        *(step, parts.total_steps),
        "max_steps" if by_steps else "num_train_epochs",
    )


def _count(batch: AnyBatch, feed: Feed) -> dict[str, float]:
    """Tokens, samples and slots of a global batch; other processes' are taken alike."""
    segment_ids = [rows.segment_ids for rows in rows_of(batch)]
    tokens = sum(np.count_nonzero(ids) for ids in segment_ids)
    slots = sum(ids.size for ids in segment_ids)
    rows = np.count_nonzero(segment_ids[0].any(-1))
    if feed.packs_batches:  # a pair that shares its prompt has three segments
        shares = isinstance(batch, PairBatch) and batch.shared is not None
        rows = segment_ids[0].max(-1).sum() // (3 if shares else 1)
    counts = {"tokens": tokens, "samples": rows, "slots": slots}
    return {name: float(count * feed.readers) for name, count in counts.items()}
