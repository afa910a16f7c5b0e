"""How far a run has come, as its checkpoints record it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtrain.record.goodput import Goodput

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
    skipped_steps: int = 0
    goodput: Goodput = dataclasses.field(default_factory=Goodput)

    def get_state(self) -> dict[str, Any]:
        """The numbers that a checkpoint's record keeps, for JSON."""
        best = {name: getattr(self.best, name) for name in _BEST_STATE}
        return {
            "num_tokens": self.num_tokens,
            "skipped_steps": self.skipped_steps,
            "best": best,
        }

    def set_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `get_state` gave."""
        self.num_tokens = saved["num_tokens"]
        self.skipped_steps = saved.get("skipped_steps", 0)  # older ones do not say
        self.best = dataclasses.replace(self.best, **saved["best"])
