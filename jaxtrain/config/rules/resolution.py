"""What was set for a run, and the problems and notes that the rules collect."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxtrain import schema
from jaxtrain.config.sections import SCHEMA, TrainingType
from jaxtrain.tree import get

_AS_SET = object()


class ConfigError(ValueError):
    """All problems of a configuration, one `key = value: problem; fix` a line."""

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = (
            problems.splitlines() if isinstance(problems, str) else list(problems)
        )
        super().__init__("\n".join(self.problems))


class Resolution:
    """The checked values of one configuration, and what the rules say about them.

    Rules name a general training key without `training.`, as in
    "deepspeed.zero_stage". `general` maps each to its value, `origin` to the full key
    that gave it; `unset` holds those that nobody set.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.values, refused = schema.merge(SCHEMA, given)
        self.problems = list(refused.values())
        self.refused = set(refused)
        self.notes: list[str] = []
        self.training_type: TrainingType = self.values["training"]["training_type"]
        self.general: dict[str, Any] = {}
        self.origin: dict[str, str] = {}
        self.unset: set[str] = set()

    def add(
        self,
        key: str,
        problem: str,
        fix: str,
        *,
        value: Any = _AS_SET,
        causes: Iterable[str] = (),
    ) -> None:
        """Add a problem, unless it follows from one that was found already.

        Args:
            key: the key to complain about; the message names its full key.
            problem: what is wrong with it.
            fix: what to set instead.
            value: the value to show, where it is not the one that was set.
            causes: other keys whose values the complaint rests on. A key that was
                refused for its type or bounds holds its default, which nobody chose:
                a complaint about it, or because of it, would be false.
        """
        if any(self.is_refused(name) for name in (key, *causes)):
            return
        if value is _AS_SET:
            is_general = key in self.general
            value = self.general[key] if is_general else get(self.values, key)
        self.problems.append(
            f"{self.origin.get(key, key)} = {value!r}: {problem}; {fix}"
        )

    def is_refused(self, key: str) -> bool:
        """Whether the key, or a section around it, had a value that can't be used."""
        parts = self.origin.get(key, key).split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return not self.refused.isdisjoint(paths)
