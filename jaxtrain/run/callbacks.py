"""Callbacks: a user's own code at the steps, evaluations and saves of a run.

`training.callbacks` names classes as `module:Class`. An object of each is made, with
its keyword arguments of `training.function_kwargs`, and asked at three points. It may
log numbers and stop the run. Nothing of it is traced or compiled.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jaxtrain.config.own_parts import bind_own
from jaxtrain.config.sections import LoopSection
from jaxtrain.evaluation.held_out import to_floats
from jaxtrain.types import Metrics

_KEY = "training.callbacks"
_POINTS = ("after_step", "after_evaluation", "on_save")
_STATE = ("get_state", "set_state")


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where a run is when it asks a callback, and what that may answer.

    Attributes:
        step: optimizer steps done.
        metrics: at a step, the step's own; at an evaluation, all `eval_` metrics; at a
            save, none.
        directory: the folder of the checkpoints.
    """

    step: int
    metrics: Mapping[str, float]
    directory: Path
    _logged: dict[str, float]
    _reasons: list[str]

    def log(self, name: str, value: float) -> None:
        """Put a number into the next record of the log; at an evaluation, into its own.

        What is logged at the last save of a run has no record to go into.

        Raises:
            ValueError: the run has a metric of that name.
        """
        if name in self.metrics:
            raise ValueError(f"{name!r} is a metric of the run: log another name")
        self._logged[name] = float(value)

    def stop(self, reason: str) -> None:
        """End the run after this step, as an early stop does: evaluated and saved."""
        self._reasons.append(reason)


class Callback(Protocol):
    """What a class may have; each method is optional, but there must be one.

    All processes of a run have the same callbacks, which see the same numbers. So
    what decides whether to stop must not depend on the clock or on the process.
    """

    def after_step(self, moment: Moment) -> None:
        """Called for each step, in order, once its metrics are on the host.

        That is when the step is logged or saved (`training.logging_steps`): waiting for
        each step would slow the device down.
        """

    def after_evaluation(self, moment: Moment) -> None:
        """Called after each evaluation of the held-out rows, before it is logged."""

    def on_save(self, moment: Moment) -> None:
        """Called before the checkpoint of `moment.step` is written."""

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback: JSON values."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_state` gave; called before the first step."""


class Callbacks:
    """The callbacks of a run, and what they have asked for."""

    def __init__(
        self, callbacks: Mapping[str, Any] | None = None, directory: Path = Path()
    ) -> None:
        """`callbacks`: by their names in the configuration."""
        self._callbacks = dict(callbacks or {})
        self._directory = directory
        self._logged: dict[str, float] = {}
        self.reasons: list[str] = []  # to stop

    def after_step(self, step: int, sums: Metrics) -> None:
        """Tell of a step, whose metrics are sums on the host."""
        if self._callbacks:
            self._ask("after_step", step, to_floats(sums))

    def after_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Tell of an evaluation; what is logged joins its metrics."""
        before, self._logged = self._logged, {}
        self._ask("after_evaluation", step, metrics)
        metrics |= self.take_logged()
        self._logged = before

    def on_save(self, step: int) -> None:
        """Tell of a checkpoint that is about to be written."""
        self._ask("on_save", step, {})

    def take_logged(self) -> dict[str, float]:
        """The numbers for the next record."""
        taken, self._logged = self._logged, {}
        return taken

    def get_state(self) -> dict[str, Any]:
        """What a checkpoint's record keeps, for JSON; empty without callbacks."""
        if not self._callbacks:
            return {}
        states = {
            name: callback.get_state()
            for name, callback in self._callbacks.items()
            if hasattr(callback, "get_state")
        }
        logged = {name: str(value) for name, value in self._logged.items()}
        return {"states": states, "logged": logged, "reasons": self.reasons}

    def set_state(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `get_state` gave; a callback that is new starts anew."""
        for name, state in saved.get("states", {}).items():
            if name in self._callbacks:
                self._callbacks[name].set_state(state)
        self._logged = {n: float(x) for n, x in saved.get("logged", {}).items()}
        self.reasons = list(saved.get("reasons", []))

    def _ask(self, point: str, step: int, metrics: Mapping[str, float]) -> None:
        for name, callback in self._callbacks.items():
            method = getattr(callback, point, None)
            if method is None:
                continue
            reasons: list[str] = []
            moment = Moment(step, metrics, self._directory, self._logged, reasons)
            method(moment)
            self.reasons += [f"{name}: {reason}" for reason in reasons]


def make_callbacks(settings: LoopSection, directory: Path) -> Callbacks:
    """Import the classes that the configuration names, and make an object of each.

    Args:
        directory: the folder of the checkpoints.

    Raises:
        ValueError: a class cannot be imported, takes other arguments, or has no method
            that a run calls.
    """
    made = {}
    for path in settings.callbacks:
        made[path] = bind_own(_KEY, path, settings.function_kwargs)()
        _check_methods(path, made[path])
    return Callbacks(made, directory)


def _check_methods(path: str, callback: Any) -> None:
    public = [name for name in dir(callback) if not name.startswith("_")]
    has = [name for name in (*_POINTS, *_STATE) if name in public]
    if len([name for name in _STATE if name in has]) == 1:
        raise ValueError(
            f"{_KEY} = {path!r}: it has one of get_state and set_state; add the other,"
            " so that a run that goes on has the callback as it was"
        )
    # A method that no run calls was meant for one that it does call.
    likely = ("on_", "after_", "before_")
    for name in public:
        if name.startswith(likely) and name not in has:
            close = difflib.get_close_matches(name, _POINTS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(
                f"{_KEY} = {path!r}: no run calls {name}; {hint}these are called:"
                f" {', '.join(_POINTS)}"
            )
    if not set(has) & {*_POINTS}:
        raise ValueError(
            f"{_KEY} = {path!r}: the class has none of the methods that a run calls;"
            f" add one of {', '.join(_POINTS)}"
        )
