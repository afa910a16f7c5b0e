"""What a configuration says that its run does not do: notes, and one line a kind."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from jaxtrain.record.safe_text import shown

Kind = Literal["overruled", "inactive", "foreign", "remark"]


@dataclass(frozen=True)
class Note:
    """A key that was set and does not act, or a remark.

    Attributes:
        kind: "overruled": another key counts; "inactive": a condition of its effect is
            not met, the training type included; "foreign": it is accepted for another
            program's sake and does nothing here; "remark": a sentence about a key.
        key: the full key.
        value: what it is set to.
        reason: the other key with its value, the condition that is not met, what acts
            in its place, or the remark.
    """

    kind: Kind
    key: str
    value: Any
    reason: str

    def __str__(self) -> str:
        link = {
            "overruled": " gives way to ",
            "inactive": " has no effect: ",
            "foreign": " has no effect in JAX: ",
            "remark": " ",
        }[self.kind]
        return f"{self.key} = {shown(self.value)}{link}{self.reason}"


def lines(notes: Iterable[Note]) -> list[str]:
    """One line for each kind of note, and one for each remark; none where all acts."""
    notes = list(notes)
    found = [
        _line("without effect", _by_reason(notes, "inactive")),
        _line("without effect in JAX", _by_reason(notes, "foreign")),
        _line("overruled", [str(each) for each in notes if each.kind == "overruled"]),
    ]
    remarks = [str(each) for each in notes if each.kind == "remark"]
    return [*filter(None, found), *remarks]


def _by_reason(notes: Iterable[Note], kind: Kind) -> list[str]:
    """Keys that share a reason stand together in front of it."""
    groups: dict[str, list[str]] = {}
    for note in notes:
        if note.kind == kind:
            setting = f"{note.key} = {shown(note.value)}"
            groups.setdefault(note.reason, []).append(setting)
    return [f"{', '.join(keys)} ({reason})" for reason, keys in groups.items()]


def _line(heading: str, parts: list[str]) -> str:
    return f"{heading}: {'; '.join(parts)}" if parts else ""
