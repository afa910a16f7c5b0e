"""Callbacks: a user's own code that runs at steps, evaluations and saves.

`training.callbacks` names classes as `module:Class`. One object of each is made, with
its keyword arguments from `training.function_kwargs`, and its methods are called at
three points of a run. A callback may log numbers and stop the run. It is plain Python:
nothing in it is traced or compiled.
"""

import dataclasses
import difflib
import json
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
    """The state of a run at the time of a call, and what a callback may do in reply.

    Attributes:
        step: the number of optimizer steps that have been taken.
        metrics: after a step, the metrics of that step; after an evaluation, all
            `eval_` metrics; at a save, empty.
        directory: the folder of the checkpoints.
    """

    step: int
    metrics: Mapping[str, float]
    directory: Path
    _logged: dict[str, float]
    _reasons: list[str]

    def log(self, name: str, value: float) -> None:
        """Add a number to the next record of the log.

        During an evaluation it is added to the evaluation's record. A number logged at
        the last save of a run is lost, because no record follows.

        Raises:
            ValueError: the run already has a metric of this name, or `value` is no
                number.
        """
        if name in self.metrics:
            raise ValueError(f"{name!r} is a metric of the run: log another name")
        try:
            self._logged[name] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"log({name!r}, {value!r}): not a number") from error

    def stop(self, reason: str) -> None:
        """End the run after this step, with a last evaluation and a checkpoint."""
        self._reasons.append(reason)


class Callback(Protocol):
    """The methods of a callback. Each is optional, but a class must have at least one.

    Every process of a run has the same callbacks, and they see the same numbers. So the
    decision to stop must not depend on the clock or on the process.
    """

    def after_step(self, moment: Moment) -> None:
        """Called for each step, in order, after its metrics have reached the host.

        Metrics are fetched only when a step is logged (`training.logging_steps`) or
        saved, since waiting for every step would slow the device down. So several steps
        may be reported at once.
        """

    def after_evaluation(self, moment: Moment) -> None:
        """Called after each evaluation of the held-out rows, before it is logged."""

    def on_save(self, moment: Moment) -> None:
        """Called before the checkpoint of `moment.step` is written."""

    def get_state(self) -> dict[str, Any]:
        """Return the callback's state for a checkpoint, as JSON values."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_state` returned; called before the first step."""


class Callbacks:
    """The callbacks of a run, and the logs and stops that they have asked for."""

    def __init__(
        self, callbacks: Mapping[str, Any] | None = None, directory: Path = Path()
    ) -> None:
        """Keep `callbacks`, given by their names in the configuration."""
        self._callbacks = dict(callbacks or {})
        self._directory = directory
        self._logged: dict[str, float] = {}
        self.reasons: list[str] = []  # reasons to stop

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def after_step(self, step: int, sums: Metrics) -> None:
        """Report a step to all callbacks; `sums` are its metrics, on the host."""
        if self._callbacks:
            self._ask("after_step", step, to_floats(sums))

    def after_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Report an evaluation; numbers that callbacks log are added to `metrics`."""
        before, self._logged = self._logged, {}
        self._ask("after_evaluation", step, metrics)
        metrics |= self.take_logged()
        self._logged = before

    def on_save(self, step: int) -> None:
        """Report that a checkpoint is about to be written."""
        self._ask("on_save", step, {})

    def take_logged(self) -> dict[str, float]:
        """Return the numbers for the next record, and forget them."""
        taken, self._logged = self._logged, {}
        return taken

    def get_state(self) -> dict[str, Any]:
        """The state for a checkpoint's record, as JSON; empty without callbacks."""
        if not self._callbacks:
            return {}
        states = {
            name: _checked_state(name, callback.get_state())
            for name, callback in self._callbacks.items()
            if hasattr(callback, "get_state")
        }
        logged = {name: str(value) for name, value in self._logged.items()}
        return {"states": states, "logged": logged, "reasons": self.reasons}

    def set_state(self, saved: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned; new callbacks start without a state."""
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
            try:
                method(moment)
            except ValueError as error:
                raise ValueError(f"{_KEY} = {name!r}, {point}: {error}") from error
            self.reasons += [f"{name}: {reason}" for reason in reasons]


def make_callbacks(settings: LoopSection, directory: Path) -> Callbacks:
    """Import the classes that the configuration names, and make an object of each.

    Args:
        directory: the folder of the checkpoints, which callbacks are told.

    Raises:
        ValueError: a class cannot be imported, does not take the arguments in
            `training.function_kwargs`, or has no method that a run calls.
    """
    made = {}
    for path in settings.callbacks:
        made[path] = bind_own(_KEY, path, settings.function_kwargs)()
        _check_methods(path, made[path])
    return Callbacks(made, directory)


def _checked_state(path: str, state: Any) -> Any:
    """The state of a callback, which a checkpoint's record keeps as JSON."""
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{_KEY} = {path!r}: what get_state returned has no JSON form ({error});"
            " return numbers, texts, lists and dicts"
        ) from error
    return state


def _check_methods(path: str, callback: Any) -> None:
    public = [name for name in dir(callback) if not name.startswith("_")]
    has = [name for name in (*_POINTS, *_STATE) if name in public]
    if len([name for name in _STATE if name in has]) == 1:
        raise ValueError(
            f"{_KEY} = {path!r}: it has only one of get_state and set_state; add the"
            " other, so that the callback's state is restored when a run resumes"
        )
    # A public method like these that no run calls is most likely misspelled.
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
