"""The metrics of the steps since the last record of the log, added up as they come."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain.evaluation.held_out import (
    add_metrics,
    perplexity,
    to_float,
    to_floats,
    without_added,
)
from jaxtrain.types import Metrics, WeightedSum

# Of the last step, as the Hugging Face Trainer logs them, and not a mean of steps.
_OF_THE_LAST = ("learning_rate", "loss_scale")
_NORM = "grad_norm"
_SUMS = ("_total", "_last", "_norms")


class MetricWindow:
    """A record of the log in the making.

    Sums are added in the order of the steps and divided when the record is written. So
    a checkpoint inside a window keeps them, and the record of a run that was killed
    there is that of a run that was not, to the bit.
    """

    def __init__(self) -> None:
        self.steps = 0  # whose metrics count
        self.skipped = 0
        self._losses = 0.0  # the sum of the steps' mean losses
        self._total: Metrics = {}
        self._last: Metrics = {}
        # Of the last step whose gradient did not overflow, where loss scaling is on.
        self._norms: Metrics = {}

    def __bool__(self) -> bool:
        """Whether there is anything to log."""
        return bool(self.steps or self.skipped)

    def add(self, sums: Metrics) -> None:
        """Take a step in: its sums by metric, on the host."""
        sums = {name: _as_float32(x.total, x.weight) for name, x in sums.items()}
        self._total = add_metrics(self._total or None, sums)
        self._losses += to_float(sums["loss"])
        self._last = {n: x for n, x in sums.items() if n.startswith(_OF_THE_LAST)}
        if np.isfinite(sums[_NORM].total):
            self._norms = {n: x for n, x in sums.items() if n.startswith(_NORM)}
        self.steps += 1

    def means(
        self, *, with_perplexity: bool, added_losses: Mapping[str, float]
    ) -> dict[str, float]:
        """The metrics as one record; the arguments are those of `held_out.evaluate`."""
        means = to_floats(self._total)
        means["loss"] = self._losses / self.steps
        means = {n: x for n, x in means.items() if not n.startswith(_NORM)}
        means |= to_floats(self._last) | to_floats(self._norms)
        if with_perplexity:
            means["perplexity"] = perplexity(without_added(means, added_losses))
        return means

    def get_state(self) -> dict[str, Any]:
        """The sums for a checkpoint's record, as JSON gives them back."""
        sums = {
            name: {
                metric: [as_json(x.total), as_json(x.weight)]
                for metric, x in getattr(self, name).items()
            }
            for name in _SUMS
        }
        losses = as_json(self._losses)
        return {"steps": self.steps, "skipped": self.skipped, "losses": losses, **sums}

    def set_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `get_state` gave; {} is an empty window."""
        self.steps, self.skipped = saved.get("steps", 0), saved.get("skipped", 0)
        self._losses = float(saved.get("losses", 0.0))
        for name in _SUMS:
            sums = saved.get(name, {}).items()
            setattr(self, name, {metric: _as_float32(*pair) for metric, pair in sums})


def as_json(value: Any) -> float | str:
    """A number for strict JSON, which has no NaN and no infinity; `float` reads it."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _as_float32(total: Any, weight: Any) -> WeightedSum:
    """A sum on the host of the one type that is kept."""
    values: Any = [np.float32(float(x)) for x in (total, weight)]
    return WeightedSum(*values)
