"""The compiled programs of a run's train step, one for each shape of its batches."""

import abc
import concurrent.futures
import logging
import os
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from jaxtrain.batch import AnyBatch
from jaxtrain.run import collector
from jaxtrain.run.kept_programs import KeptPrograms, keep_programs
from jaxtrain.run.mosaic_programs import compile_program
from jaxtrain.sharding import ShardingPlan
from jaxtrain.types import Metrics, TrainState

logger = logging.getLogger(__name__)


class StepPrograms:
    """A jitted train step that compiles known shapes ahead, side by side.

    `kept`: what knows steps that an earlier run traced, if anything does.
    `is_for_gpus`: the step may have kernels that compile beside it.
    """

    def __init__(
        self,
        train_step: Any,
        kept: KeptPrograms | None = None,
        *,
        is_for_gpus: bool = False,
    ) -> None:
        self._train_step, self._kept = train_step, kept
        self._fewest = 1 if is_for_gpus or kept is not None else 2
        self._compiled: dict[Hashable, Any] = {}
        self._seen: set[Hashable] = set()

    def compile(self, state: TrainState, batches: Sequence[AnyBatch]) -> None:
        """Compile for the shapes of these placed batches, several at once.

        They are lowered one after another, since that is Python and threads would only
        wait for one another; XLA compiles the first ones meanwhile. A single shape is
        left to the first step, which compiles it as well, where nothing is gained here.
        """
        if len(batches) < self._fewest:
            return
        started = time.perf_counter()
        workers = min(len(batches), os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            programs = [
                pool.submit(compile_program, self._lower(state, batch))
                for batch in batches
            ]
            traced = time.perf_counter() - started
        for batch, program in zip(batches, programs, strict=True):
            self._compiled[shape_of(batch)] = program.result()
        self._seen |= self._compiled.keys()
        told = (
            "compiled the train step for %d shape%s of rows in %.1f s, of which tracing"
            " took %.1f s%s"
        )
        plural = "s" * (len(batches) > 1)
        secs = time.perf_counter() - started
        found = self._kept.found if self._kept else []
        earlier = f"; an earlier run had traced {len(found)}" if found else ""
        logger.info(told, len(batches), plural, secs, traced, earlier)

    def _lower(self, state: TrainState, batch: AnyBatch) -> Any:
        lower = lower_anew if self._kept is None else self._kept.lower
        with collector.paused():
            return lower(self._train_step, state, batch)

    def compiles(self, batch: AnyBatch) -> bool:
        """Whether the step of a batch compiles first; asked once for each step."""
        shape = shape_of(batch)
        is_new, is_first = shape not in self._seen, not self._seen
        self._seen.add(shape)
        if is_new and not is_first:
            logger.info("a batch of a new shape comes: its step compiles first")
        return is_new

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        program = self._compiled.get(shape_of(batch), self._train_step)
        stepped: tuple[TrainState, Metrics] = program(state, batch)
        return stepped


def make_programs(train_step: Any, plan: ShardingPlan) -> StepPrograms:
    """The programs of a jitted train step on this mesh, kept on disk where they can."""
    is_for_gpus = plan.platform == "gpu"
    return StepPrograms(train_step, keep_programs(plan), is_for_gpus=is_for_gpus)


class OwnPrograms(abc.ABC):
    """A train step that makes its programs of jitted steps, one for each shape.

    It is called, and compiled ahead by `lower(state, batch).compile()`, as a jitted
    step is.
    """

    def __init__(self) -> None:
        self._programs: dict[Hashable, Any] = {}

    def __call__(self, state: Any, batch: Any) -> Any:
        shape = shape_of(batch)
        if shape not in self._programs:
            self._programs[shape] = self.lower(state, batch).compile()
        return self._programs[shape](state, batch)

    def lower(self, state: Any, batch: Any) -> Any:
        """As of a jitted function; `state` and `batch`: arrays, or descriptions."""
        return self.lower_by(lower_anew, state, batch)

    @abc.abstractmethod
    def lower_by(self, lower: Callable[..., Any], state: Any, batch: Any) -> Any:
        """`lower`, where `lower(step, state, batch)` lowers one of the jitted steps."""


def lower_anew(train_step: Any, state: Any, batch: Any) -> Any:
    """Trace and lower a step, whatever was kept of an earlier run."""
    return train_step.lower(state, batch)


def shape_of(batch: Any) -> Hashable:
    """The shapes of a batch's arrays: batches of equal shapes share a compiled step."""
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))
