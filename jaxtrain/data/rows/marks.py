"""Which of the assistant's text is trained: by the options and by single messages."""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxtrain.data.rows.formats import BadRow
from jaxtrain.record.safe_text import shown

Span = tuple[int, int]  # of characters: the first, and the one after the last

# A block of thoughts with the white space behind it, and how a turn begins whose block
# the generation prompt has opened. A block without an end was cut off.
_THOUGHT = re.compile(
    r"<think>.*?(?:</think>\s*|\Z)|\[THINK\].*?(?:\[/THINK\]\s*|\Z)", re.DOTALL
)
_OPENED = re.compile(r"(?:<think>|\[THINK\])\s*\Z")
_REST_OF_THOUGHT = re.compile(r".*?(?:</think>\s*|\[/THINK\]\s*|\Z)", re.DOTALL)
# A message's own fields for the trainer, which templates do not know.
_TRAIN, _WEIGHT = "train", "weight"


@dataclasses.dataclass(frozen=True)
class AssistantMarks:
    """Which of the assistant's text is trained.

    A message's own `train` (a bool) or `weight` (0 or 1), where it has one, overrules
    `turns`.

    Attributes:
        turns: train on all of the assistant's turns, or on the last alone.
        thinking: train on the blocks of thoughts (`<think>`, `[THINK]`) too.
        preserve_thinking: render every turn as the template renders it in last place,
            so that earlier turns keep their thoughts.
    """

    turns: Literal["all", "last"] = "all"
    thinking: bool = True
    preserve_thinking: bool = False


ALL_TURNS = AssistantMarks()


def take_training_fields(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], list[bool | None]]:
    """Messages without the fields for the trainer, and what each of them says.

    Raises:
        BadRow: a field has another value than it may have.
    """
    own, trained = [dict(message) for message in messages], []
    for index, message in enumerate(own):
        said: set[bool] = set()
        if _TRAIN in message:
            value = message.pop(_TRAIN)
            if not isinstance(value, bool):
                raise BadRow(
                    f"messages[{index}] has train {shown(value)}: use true or false"
                )
            said.add(value)
        if _WEIGHT in message:
            value = message.pop(_WEIGHT)
            if isinstance(value, bool) or value not in (0, 1):
                raise BadRow(f"messages[{index}] has weight {shown(value)}: use 0 or 1")
            said.add(bool(value))
        if len(said) == 2:
            raise BadRow(f"messages[{index}]: train and weight contradict each other")
        if True in said and message["role"] != "assistant":
            raise BadRow(
                f"messages[{index}] is to be trained, but it is the"
                f" {message['role']}'s: only assistant turns are"
            )
        trained.append(said.pop() if said else None)
    return own, trained


def choose_turns(
    spans: Sequence[Span], trained: Sequence[bool | None], marks: AssistantMarks
) -> list[Span]:
    """The spans of the turns that are trained; one span a turn."""
    if marks.turns == "all" and False not in trained:
        return list(spans)
    if len(spans) != len(trained):
        raise BadRow(
            f"the chat template's {{% generation %}} marks {len(spans)} texts of"
            f" {len(trained)} assistant turns, so single turns cannot be chosen: unset"
            " train_on_turns and the messages' train and weight"
        )
    last = len(spans) - 1
    chosen = [
        said if said is not None else marks.turns == "all" or turn == last
        for turn, said in enumerate(trained)
    ]
    return list(itertools.compress(spans, chosen))


def drop_thoughts(text: str, spans: Sequence[Span]) -> list[Span]:
    """The spans without the blocks of thoughts in them."""
    kept = []
    for start, stop in spans:
        if _OPENED.search(text, max(0, start - 64), start):
            rest = _REST_OF_THOUGHT.match(text, start, stop)
            start = rest.end() if rest else stop
        for thought in _THOUGHT.finditer(text, start, stop):
            kept.append((start, thought.start()))
            start = thought.end()
        kept.append((start, stop))
    return [(start, stop) for start, stop in kept if start < stop]
