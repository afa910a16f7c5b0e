"""How far a run has come, as its checkpoints record it."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from jaxtrain.config.sections import LoopSection
from jaxtrain.record.goodput import Goodput
from jaxtrain.run.callbacks import Callbacks
from jaxtrain.run.window import MetricWindow, as_json

logger = logging.getLogger(__name__)

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
        """Take note of an evaluation; True if it is the best by over `threshold`.

        One that is NaN or infinite is never the best: it is no improvement.
        """
        sign = 1 if self.greater_is_better else -1
        improves = math.isfinite(value) and (
            self.value is None or sign * (value - self.value) > self.threshold
        )
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
    """How far a run has come, apart from its state and its position in the data.

    `window`: metrics that are not logged yet. `logged`: the last record of steps.
    `evaluated`: the evaluation of `step`, empty if there was none.
    """

    best: BestMetric
    step: int = 0
    window: MetricWindow = dataclasses.field(default_factory=MetricWindow)
    logged: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluated: dict[str, float] = dataclasses.field(default_factory=dict)
    num_tokens: float = 0.0
    skipped_steps: int = 0
    goodput: Goodput = dataclasses.field(default_factory=Goodput)
    callbacks: Callbacks = dataclasses.field(default_factory=Callbacks)

    @property
    def should_stop(self) -> bool:
        """Whether the run ends early: it does not improve, or a callback wants it."""
        return self.best.should_stop or bool(self.callbacks.reasons)

    def why_it_stops(self, metric: str) -> str:
        """What the log says of an early stop; `metric` is what evaluations rank by."""
        if self.callbacks.reasons:
            return "; ".join(self.callbacks.reasons)
        value = math.nan if self.best.value is None else self.best.value
        return f"{metric} has not improved on {value:.4g} of step {self.best.step}"

    def get_state(self) -> dict[str, Any]:
        """The numbers that a checkpoint's record keeps, for JSON."""
        best = {name: getattr(self.best, name) for name in _BEST_STATE}
        return {
            "num_tokens": self.num_tokens,
            "skipped_steps": self.skipped_steps,
            "best": best,
            "window": self.window.get_state(),
            "logged": {name: as_json(value) for name, value in self.logged.items()},
            "callbacks": self.callbacks.get_state(),
        }

    def set_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `get_state` gave."""
        self.num_tokens = saved["num_tokens"]
        self.skipped_steps = saved.get("skipped_steps", 0)  # older ones do not say
        self.best = dataclasses.replace(self.best, **saved["best"])
        if self.best.value is not None and not math.isfinite(self.best.value):
            self.best.value = None  # an older version took infinity for the best
        self.window.set_state(saved.get("window", {}))
        self.logged = {name: float(x) for name, x in saved.get("logged", {}).items()}
        self.callbacks.set_state(saved.get("callbacks", {}))

    def is_over(self, total_steps: int) -> bool:
        """Whether a run that is started at this point has nothing left to train."""
        return self.step >= total_steps or (self.step > 0 and self.should_stop)

    def heed_changes(self, saved: Mapping[str, Any], settings: LoopSection) -> None:
        """Forget what other settings than those of the checkpoint make void.

        An early stop is final, unless the run was given more patience or more steps. A
        best value is one of a certain metric.

        Args:
            saved: the section `training` of the checkpoint's configuration.
        """
        saved = dataclasses.asdict(settings) | dict(saved)  # older ones lack keys
        if _calls_others(saved, settings) or _what_is_longer(saved, settings):
            self.callbacks.reasons = []
        name = f"eval_{saved['metric_for_best_model'].removeprefix('eval_')}"
        before = (name, saved["greater_is_better"])
        if before != (settings.best_metric, settings.greater_is_better):
            fresh = BestMetric(self.best.greater_is_better)
            changes = {key: getattr(fresh, key) for key in _BEST_STATE}
            self.best = dataclasses.replace(self.best, **changes)
            return
        patience = saved["early_stopping_patience"]
        if patience is None or self.best.evaluations_since < patience:
            return
        if not self.best.should_stop:
            changed = "training.early_stopping_patience"
        elif changed := _what_is_longer(saved, settings):
            self.best.evaluations_since = 0
        else:
            return
        logger.info(
            "goes on after its early stop at step %d: %s is another", self.step, changed
        )


def _calls_others(saved: Mapping[str, Any], settings: LoopSection) -> bool:
    """Whether other callbacks, or others of their arguments, are named."""
    same = saved["function_kwargs"] == settings.function_kwargs
    return not same or list(saved["callbacks"]) != list(settings.callbacks)


def _what_is_longer(saved: Mapping[str, Any], settings: LoopSection) -> str:
    """The key by which a run has more steps than it had; "" if by none."""
    key = "max_steps" if settings.max_steps > 0 else "num_train_epochs"
    counted_alike = (saved["max_steps"] > 0) == (settings.max_steps > 0)
    is_longer = not counted_alike or getattr(settings, key) > saved[key]
    return f"training.{key}" if is_longer else ""
