"""Steps that were not applied: name them, keep their rows, stop where they go on."""

import logging
import math
import pathlib
from typing import NamedTuple

import jax

from jaxtrain.batch import AnyBatch
from jaxtrain.config.sections import LoopSection
from jaxtrain.evaluation.held_out import to_float
from jaxtrain.record.diagnostics import save_batch
from jaxtrain.run.buffer import beside
from jaxtrain.types import Metrics

logger = logging.getLogger(__name__)

# Then skipping does not help: the model or the data is broken.
_MOST_SKIPS_IN_A_ROW = 20
# Loss scaling starts at 65536 and halves at each overflow. From 1 on it no longer
# multiplies the gradient, so few gradients that overflow there will ever be finite.
_LEAST_LOSS_SCALE = 1.0


class Verdict(NamedTuple):
    """`skipped`: the step left the weights alone. `measured`: its loss counts."""

    skipped: bool
    measured: bool


class PendingSteps:
    """Steps whose metrics are still on the device, with the rows that may be saved.

    Rows are kept of steps in flight and of bad ones, which alone are ever saved: so
    the host's memory does not depend on how rarely metrics are logged.
    """

    def __init__(self, ahead: int) -> None:
        """`ahead`: so many steps before the one that is added may be in flight."""
        self._ahead = ahead
        self._steps: list[tuple[int, Metrics, AnyBatch | None]] = []

    def __bool__(self) -> bool:
        return bool(self._steps)

    def add(self, step: int, metrics: Metrics, batch: AnyBatch) -> None:
        """Take a step that was handed to the device."""
        for number in jax.tree.leaves(metrics):
            number.copy_to_host_async()  # one by one, later, the devices would wait
        self._steps.append((step, metrics, batch))
        at = len(self._steps) - 2 - self._ahead
        if at >= 0:  # it is done: at a log the devices need not wait for many of them
            self._steps[at] = _fetch(*self._steps[at])

    def take(self, ahead: int = 0) -> list[tuple[int, Metrics, AnyBatch | None]]:
        """All but the newest `ahead`, their metrics on the host, once they are done."""
        end = len(self._steps) - ahead
        taken, self._steps = self._steps[:end], self._steps[end:]
        return [(step, jax.device_get(dict(m)), batch) for step, m, batch in taken]


def _fetch(
    step: int, metrics: Metrics, batch: AnyBatch | None
) -> tuple[int, Metrics, AnyBatch | None]:
    """A step that is done, with its rows only if they may be saved."""
    fetched: Metrics = jax.device_get(dict(metrics))
    return step, fetched, batch if _is_bad(fetched) else None


def _is_bad(metrics: Metrics) -> bool:
    """Whether `BadSteps.judge` may save the rows of a step that is done."""
    signs = (metrics[name] for name in ("nonfinite", "spike") if name in metrics)
    return any(bool(sign.total) for sign in signs)


class BadSteps:
    """Judges each step by its metrics, in order."""

    def __init__(self, settings: LoopSection, directory: pathlib.Path) -> None:
        """`directory`: of the checkpoints; bad batches are saved beside it."""
        self._settings = settings
        self._checkpoints = directory
        self._skipped_in_a_row = 0
        self._overflows_in_a_row = 0  # at `_LEAST_LOSS_SCALE` or below

    def judge(
        self, step: int, sums: Metrics, batch: AnyBatch | None, next_scale: float | None
    ) -> Verdict:
        """Whether the step was skipped; the log then says why.

        Args:
            sums: the step's metrics on the host; `nonfinite` and `spike` are taken out.
            batch: its rows; None only if it is not bad (`PendingSteps`).
            next_scale: the loss scale after the step; None without loss scaling.

        Raises:
            FloatingPointError: a gradient was not finite or a loss spiked, and nothing
                skipped it; or too many steps in a row were skipped.
        """
        is_nonfinite = bool(sums.pop("nonfinite").total)
        is_spike = "spike" in sums and bool(sums.pop("spike").total)
        loss = to_float(sums["loss"])
        if is_nonfinite and next_scale is not None:
            # Loss scaling finds its scale by such steps: they are no one's mistake.
            scale = float(sums["loss_scale"].total)
            self._note_overflow(step, batch, scale, next_scale)
            # As a rule only the backward pass has overflowed.
            return Verdict(skipped=True, measured=math.isfinite(loss))
        if is_nonfinite:
            problem = f"the gradient is not finite (loss {loss:.4g})"
            self._note_skip(step, batch, problem, "on_nonfinite")
        elif is_spike:
            problem = (
                f"the loss {loss:.4g} lies over spike_threshold ="
                f" {self._settings.spike_threshold:g} standard deviations above the"
                f" mean of the last {self._settings.spike_window}"
            )
            self._note_skip(step, batch, problem, "on_spike")
        else:
            self._skipped_in_a_row = self._overflows_in_a_row = 0
            return Verdict(skipped=False, measured=True)
        return Verdict(skipped=True, measured=False)

    def _note_overflow(
        self, step: int, batch: AnyBatch | None, scale: float, next_scale: float
    ) -> None:
        """Name both scales; stop where smaller ones do not help either."""
        logger.warning(
            "step %d skipped: the gradient overflowed float16; loss scale %g -> %g",
            *(step, scale, next_scale),
        )
        self._overflows_in_a_row += scale <= _LEAST_LOSS_SCALE
        if self._overflows_in_a_row >= _MOST_SKIPS_IN_A_ROW:
            problem = (
                f"the gradient is not finite in {_MOST_SKIPS_IN_A_ROW} steps in a row"
                f" at loss scales of {_LEAST_LOSS_SCALE:g} and below"
            )
            path = self._save_batch(step, batch)
            raise self._error(step, problem, path, "training.bf16 in place of fp16")

    def _note_skip(
        self, step: int, batch: AnyBatch | None, problem: str, key: str
    ) -> None:
        """Save the step's batch; say what was skipped, or stop as `key` wants it."""
        path = self._save_batch(step, batch)
        self._skipped_in_a_row += 1
        if getattr(self._settings, key) == "skip":
            logger.warning(
                "step %d skipped: %s; its batch is saved as %s", step, problem, path
            )
            if self._skipped_in_a_row < _MOST_SKIPS_IN_A_ROW:
                return
            problem += f"; {_MOST_SKIPS_IN_A_ROW} steps in a row were skipped"
        raise self._error(step, problem, path, f"training.{key} = 'skip'")

    def _save_batch(self, step: int, batch: AnyBatch | None) -> pathlib.Path:
        assert batch is not None  # the rows of bad steps are kept
        process = f".process_{jax.process_index()}" if jax.process_count() > 1 else ""
        folder = beside(self._checkpoints, "bad_batches")
        return save_batch(folder, step, batch, process)

    def _error(
        self, step: int, problem: str, path: pathlib.Path, setting: str
    ) -> FloatingPointError:
        return FloatingPointError(
            f"step {step}: {problem}. Its batch is {path}; earlier checkpoints in"
            f" {self._checkpoints} are whole. Look at these rows, lower the"
            f" learning rate, or set {setting}"
        )
