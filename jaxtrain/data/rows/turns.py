"""Where the assistant's turns stand in a rendered conversation.

For templates that do not mark them. What a turn is, the beginnings of the conversation
say: its text starts where the generation prompt ends and stops where the next turn
begins. Rendering every beginning takes time quadratic in the turns. So a template is
asked once, on a short conversation, for what it writes around a turn; a conversation
is then rendered as it is and with stand-ins for the assistant's texts, and where both
agree with that, the spans are known. Otherwise the beginnings decide.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtrain.data.rows.formats import BadRow
from jaxtrain.data.rows.marks import Span

Messages = Sequence[Mapping[str, Any]]
Render = Callable[..., str]  # (messages, add_generation_prompt=False)

# Stands in for an assistant's text; no template alters plain letters.
STAND_IN = "jaxtrainstandin"


@dataclasses.dataclass(frozen=True)
class TurnShape:
    """What a template writes around an assistant's turn.

    Attributes:
        prompt: the generation prompt.
        before: what stands in its place before the text of a turn within a
            conversation.
        before_last: the same of the last turn, which may differ.
        after: what ends a turn within a conversation, of that turn.
        after_last: what ends the conversation's last turn, a closing text included.
    """

    prompt: str
    before: str
    before_last: str
    after: str
    after_last: str

    @property
    def shared(self) -> int:
        """How many characters the first three begin with in common."""
        both = _common_prefix(self.before, self.before_last)
        return _common_prefix(self.prompt, self.before[:both])


def find_turn_shape(render: Render, closing: str) -> TurnShape | None:
    """A template's shape of turns; None if three turns do not all have the same."""
    user = {"role": "user", "content": "Is it?"}
    turns = [{"role": "assistant", "content": _stand_in(i)} for i in range(3)]
    messages = [message for turn in turns for message in (user, turn)]
    try:
        full = render(messages)
        spans = find_spans_by_beginnings(render, messages, closing=closing)
        shapes = []
        for turn, (start, stop) in enumerate(spans):
            history = _prefix_length(render(messages[: 2 * turn + 1]), full, closing)
            prompt = render(messages[: 2 * turn + 1], add_generation_prompt=True)
            said = full.find(_stand_in(turn))
            if history is None or not history <= start <= said < stop:
                return None
            if full[:history] != prompt[:history]:
                return None
            after = full[said + len(_stand_in(turn)) : stop]
            shapes.append((prompt[history:], full[history:said], after))
    except BadRow:
        return None
    first, second, last = shapes
    if first != second or first[0] != last[0]:
        return None
    return TurnShape(first[0], first[1], last[1], first[2], last[2])


def writes_end(render: Render) -> bool:
    """Whether a template writes something behind the last turn, an assistant's."""
    user = {"role": "user", "content": "Is it?"}
    try:
        text = render([user, {"role": "assistant", "content": STAND_IN}])
    except BadRow:
        return True  # not known
    return not text.endswith(STAND_IN)


def find_assistant_spans(
    render: Render, messages: Messages, full: str, shape: TurnShape
) -> list[Span] | None:
    """Spans of the assistant's turns in time linear in them; None if they are unsure.

    Args:
        full: the conversation's text.
        shape: of the same template.
    """
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if len(turns) < 2 or turns[0] == 0:
        return None  # the beginnings of a single turn are fewer renders
    bare, said, before = list(messages), [], [shape.before] * len(turns)
    if turns[-1] == len(messages) - 1:
        before[-1] = shape.before_last
    for number, i in enumerate(turns):
        bare[i] = {"role": "assistant", "content": _stand_in(number)}
        said.append(messages[i].get("content"))
    try:
        pieces = _split(render(bare), len(turns))
        last_prompt = render(messages[: turns[-1]], add_generation_prompt=True)
    except BadRow:
        return None
    if pieces is None or not _have_shape(pieces, before, shape.after):
        return None
    # What a template writes before a text may depend on it: that part is found with it.
    shared = shape.shared
    extras = [text[shared:] for text in before]
    for number, extra in enumerate(extras):
        pieces[number] = pieces[number].removesuffix(extra)
    places = _align(full, pieces, extras, said)
    if places is None:
        return None
    history = places[-1][0] - shared
    if last_prompt != full[:history] + shape.prompt:
        return None
    spans = []
    for (start, stop), behind in zip(places, pieces[1:], strict=True):
        history = start - shared
        head = full[history : history + len(shape.prompt)]
        start = history + _common_prefix(shape.prompt, head)
        closes = behind.startswith(shape.after_last)  # nothing is written behind it
        end = shape.after_last if closes else shape.after
        spans.append((start, stop + len(end)))
    if turns[-1] == len(messages) - 1:
        spans[-1] = (spans[-1][0], len(full))
    return spans


def find_spans_by_beginnings(
    render: Render, messages: Messages, *, full: str | None = None, closing: str = ""
) -> list[Span]:
    """Character spans of the assistant's turns, terminators included.

    A turn starts after the generation prompt; where the whole conversation lacks a part
    of that prompt, where the two part. `full` is the conversation's text, if it is
    known; `closing` a text that the template may add after the last turn only, as
    Phi-3's adds EOS.

    Raises:
        BadRow: the template is not prefix-stable, so the spans cannot be told.
    """
    full = render(messages) if full is None else full
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if turn == 0:
            raise BadRow("the conversation opens with the assistant's turn")
        prompt = render(messages[:turn], add_generation_prompt=True)
        start = _common_prefix(prompt, full)
        if start < len(prompt):
            history = _prefix_length(render(messages[:turn]), full, closing)
            if history is None or start < history:
                raise _not_stable(turn)
        spans.append((start, _turn_end(render, messages, turn, full, closing)))
    return spans


def _stand_in(number: int) -> str:
    """A text for each turn, none of which begins another."""
    return f"{STAND_IN}{number:05d}"


def _split(text: str, count: int) -> list[str] | None:
    """What stands around the stand-ins, if each is there once and in their order."""
    pieces = []
    for number in range(count):
        piece, found, text = text.partition(_stand_in(number))
        if not found:
            return None
        pieces.append(piece)
    pieces.append(text)
    return None if any(STAND_IN in piece for piece in pieces) else pieces


def _have_shape(pieces: Sequence[str], before: Sequence[str], after: str) -> bool:
    """Whether every turn has around it what the template writes around turns."""
    ends = [*before, ""]
    starts = ["", *([after] * (len(before) - 1)), ""]
    return all(
        piece.startswith(start)
        and piece.endswith(end)
        and len(piece) >= len(start) + len(end)
        for piece, start, end in zip(pieces, starts, ends, strict=True)
    )


def _align(
    full: str, pieces: Sequence[str], extras: Sequence[str], said: Sequence[Any]
) -> list[Span] | None:
    """Where the texts between the pieces stand; None if that is not certain.

    It is where the assistant's texts behind the extras, or these texts trimmed, fill
    the gaps exactly, and where the pieces can stand behind one another in one way only.
    """
    if all(isinstance(text, str) for text in said):
        for written in (str, str.strip):
            texts = [a + written(b) for a, b in zip(extras, said, strict=True)]
            if _join(pieces, [*texts, ""]) == full:
                return _gaps(pieces, texts)
    leftmost, rightmost = _first_fit(full, pieces), _last_fit(full, pieces)
    return leftmost if leftmost == rightmost else None


def _gaps(pieces: Sequence[str], texts: Sequence[str]) -> list[Span]:
    places, position = [], 0
    for piece, text in zip(pieces, texts, strict=False):
        start = position + len(piece)
        position = start + len(text)
        places.append((start, position))
    return places


def _join(pieces: Sequence[str], texts: Sequence[str]) -> str:
    return "".join(itertools.chain(*zip(pieces, texts, strict=True)))


def _first_fit(full: str, pieces: Sequence[str]) -> list[Span] | None:
    """The gaps if every piece but the first and last stands as early as it can."""
    if not full.startswith(pieces[0]) or not full.endswith(pieces[-1]):
        return None
    end = len(full) - len(pieces[-1])
    starts, stops = [len(pieces[0])], []
    for piece in pieces[1:-1]:
        place = full.find(piece, starts[-1], end) if piece else -1
        if place < 0:
            return None
        stops.append(place)
        starts.append(place + len(piece))
    stops.append(end)
    return list(zip(starts, stops, strict=True)) if starts[-1] <= end else None


def _last_fit(full: str, pieces: Sequence[str]) -> list[Span] | None:
    """The same, if they stand as late as they can."""
    mirrored = _first_fit(full[::-1], [piece[::-1] for piece in pieces[::-1]])
    if mirrored is None:
        return None
    return [(len(full) - stop, len(full) - start) for start, stop in mirrored[::-1]]


def _turn_end(
    render: Render, messages: Messages, turn: int, full: str, closing: str
) -> int:
    """Where the assistant's turn ends in the full text."""
    if turn == len(messages) - 1:
        return len(full)
    closed = _prefix_length(render(messages[: turn + 1]), full, closing)
    if closed is not None:
        return closed
    # Some templates render a last turn unlike an earlier one (Qwen3 adds an empty
    # thought to it). Then go on to the next assistant turn, and take off the turns
    # between: what they add is seen by rendering them after a stand-in turn.
    later = range(turn + 1, len(messages))
    following = next(
        (i for i in later if messages[i]["role"] == "assistant"), len(messages)
    )
    until = render(messages[:following])
    shortened = [*messages[:turn], {"role": "assistant", "content": STAND_IN}]
    extended = [*shortened, *messages[turn + 1 : following]]
    _, found, terminator = render(shortened).rpartition(STAND_IN)
    rest = render(extended).rpartition(STAND_IN)[2]
    between = rest.removeprefix(terminator)
    if not (
        found
        and full.startswith(until)
        and rest.startswith(terminator)
        and until.endswith(between)
    ):
        raise _not_stable(turn + 1)
    return len(until) - len(between)


def _common_prefix(left: str, right: str) -> int:
    pairs = zip(left, right, strict=False)
    shorter = min(len(left), len(right))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)


def _prefix_length(head: str, full: str, closing: str) -> int | None:
    """Length of `head`, or of it less the closing text, if `full` starts so."""
    for text in (head, head.removesuffix(closing)):
        if full.startswith(text):
            return len(text)
    return None


def _not_stable(count: int) -> BadRow:
    return BadRow(
        f"the chat template is not prefix-stable: its first {count} messages alone "
        "render differently from the same messages in the whole conversation, so the "
        "assistant's tokens cannot be told; use a template that marks them with "
        "{% generation %}, or set assistant_only_loss=False"
    )
