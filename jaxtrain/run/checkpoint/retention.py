"""Which checkpoints are kept: the newest, and the best."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers as managers


@dataclasses.dataclass(frozen=True)
class NewestAndBest(managers.PreservationPolicy):
    """Retention: the newest `save_total_limit` checkpoints, and the best.

    `metrics_of` gives the metrics of a step, of one that is being saved too.
    """

    save_total_limit: int | None
    best_metric: str | None
    greater_is_better: bool
    metrics_of: Callable[[int], Mapping[str, float]]

    def should_preserve(
        self, checkpoints: Sequence[managers.PolicyCheckpointInfo], **_: Any
    ) -> Sequence[bool]:
        """Whether to keep each of `checkpoints`, which ascend by step."""
        surplus = self.surplus([info.step for info in checkpoints])
        return [info.step not in surplus for info in checkpoints]

    def surplus(self, steps: Sequence[int]) -> list[int]:
        """Those of `steps`, which ascend, that are not to be kept."""
        kept = {*steps[-(self.save_total_limit or 0) :]}  # no limit: all of them
        return [step for step in steps if step not in kept | {self.best(steps)}]

    def best(self, steps: Sequence[int]) -> int | None:
        """The step with the best metric, the earliest on ties; None if none has it."""
        if self.best_metric is None:
            return None
        sign = 1 if self.greater_is_better else -1
        scores = {s: self.metrics_of(s).get(self.best_metric, math.nan) for s in steps}
        # A diverged evaluation (NaN, infinite) is never the best.
        ranked = [(sign * x, -step) for step, x in scores.items() if math.isfinite(x)]
        return -max(ranked)[1] if ranked else None


class PreserveAll(managers.PreservationPolicy):
    """Orbax is to delete nothing."""

    def should_preserve(
        self, checkpoints: Sequence[managers.PolicyCheckpointInfo], **_: Any
    ) -> Sequence[bool]:
        """True for each."""
        return [True] * len(checkpoints)
