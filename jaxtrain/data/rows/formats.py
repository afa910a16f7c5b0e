"""What a data set's columns mean, and every row read into one canonical form.

Five kinds of rows: `text`; `prompt` + `completion`; `messages`; preference rows
`prompt` + `chosen` + `rejected`, whose prompt may be implicit; and labeled rows
`prompt` + `completion` + `label`, with a verdict each. All but the first come plain
(strings) or conversational (lists of messages). Alpaca and ShareGPT columns are read
as conversations.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

logger = logging.getLogger(__name__)

Kind = Literal["text", "prompt_completion", "messages", "preference", "labeled"]
Row = Mapping[str, Any]

ROLES = frozenset(
    {"system", "developer", "user", "assistant", "tool", "function", "ipython"}
)
# ShareGPT's names of the roles.
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
# The rows that objectives train on -> the kinds of format that these are read from.
TRAINS_ON: Mapping[str, tuple[Kind, ...]] = {
    "next_token": ("text", "prompt_completion", "messages"),
    "preference": ("preference",),
    "labeled": ("labeled", "preference"),
}
_DETECTED_ROWS = 100
_ACCEPTED = (
    "'text', 'prompt' + 'completion' (with 'label' for KTO), 'messages', 'chosen' + "
    "'rejected' (with or without 'prompt'), Alpaca's 'instruction' + 'output', or "
    "ShareGPT's 'conversations'"
)


class BadRow(Exception):
    """One row that cannot be trained on; the message is the reason."""


class UnreadableRow(dict[str, Any]):
    """Stands for a line that holds no row; reading it raises BadRow."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """What `detect_format` found: which columns are read, and how."""

    kind: Kind
    conversational: bool
    columns: tuple[str, ...]
    implicit_prompt: bool = False
    dialect: Literal["native", "alpaca", "sharegpt"] = "native"

    def describe(self) -> str:
        """One line for the log."""
        shape = "conversational" if self.conversational else "plain"
        prompt = ", prompt implicit in chosen/rejected" if self.implicit_prompt else ""
        dialect = "" if self.dialect == "native" else f" ({self.dialect} columns)"
        columns = ", ".join(self.columns)
        return f"{shape} {self.kind} rows{dialect} from columns {columns}{prompt}"


class RowProblems:
    """Collects bad rows; raises or logs them together once every row was read.

    `name_rows` tells where rows stand, by their numbers.
    """

    def __init__(
        self,
        on_bad_row: str,
        *,
        shown: int = 5,
        name_rows: Callable[[Sequence[int]], Sequence[str]] | None = None,
    ) -> None:
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row={on_bad_row!r}: use 'error' or 'skip'")
        self.on_bad_row = on_bad_row
        self.count = 0
        self._shown = shown
        self._name_rows = name_rows
        self.first: list[tuple[int, str]] = []

    def add(self, row: int, reason: str) -> None:
        self.count += 1
        if len(self.first) < self._shown:
            self.first.append((row, reason))

    def listed(self) -> list[str]:
        """The first bad rows, each with where it stands and the reason."""
        names = [f"row {row}" for row, _ in self.first]
        if self._name_rows is not None:
            names = [*self._name_rows([row for row, _ in self.first])]
        return [f"{n}: {why}" for n, (_, why) in zip(names, self.first, strict=True)]

    def report(self, total: int) -> None:
        """Raise ValueError (on_bad_row='error') or log a warning, if any row is bad."""
        if not self.count:
            return
        listed = "; ".join(self.listed())
        more = "; ..." if self.count > len(self.first) else ""
        summary = f"{self.count} of {total} rows cannot be used: {listed}{more}"
        if self.on_bad_row == "error":
            raise ValueError(f"{summary}. Fix these rows, or set on_bad_row='skip'")
        logger.warning("skipped: %s", summary)


def detect_format(
    rows: Iterable[Row], *, kind: str = "auto", text_column: str = "text"
) -> RowFormat:
    """Tell the format from the columns and values of the first row that has one.

    That is the first row but where it is bad: up to `_DETECTED_ROWS` are tried.

    Args:
        kind: read the rows as this kind, where their columns would allow several.
        text_column: the column of text rows.

    Raises:
        ValueError: no rows, or columns that form none of the known formats, or not
            the one asked for.
    """
    tried = list(itertools.islice(rows, _DETECTED_ROWS))
    if not tried:
        raise ValueError("the data set has no rows: give at least one")
    first = tried[0]
    names = list(getattr(rows, "column_names", None) or first)
    for row in tried:
        for row_format in _possible_formats(row, [*names, *row], text_column):
            if kind in ("auto", row_format.kind):
                return row_format
    filled = sorted(name for name in names if first.get(name) is not None)
    wanted = "a known format" if kind == "auto" else f"format={kind!r}"
    raise ValueError(
        f"columns {sorted(names)} (filled in the first row: {filled}) are not {wanted}:"
        f" give {_ACCEPTED}; rename its columns"
    )


def detect_for(
    objective: str,
    rows: Iterable[Row],
    *,
    kind: str = "auto",
    text_column: str = "text",
) -> RowFormat:
    """The format in which an objective's kind of rows is read from these.

    Args:
        objective: a name of `TRAINS_ON`.

    Raises:
        ValueError: the rows are of no known format, or the objective needs another.
    """
    first: Row = next(iter(rows), {})
    columns = getattr(rows, "column_names", None) or first
    if objective == "labeled" and kind == "auto" and "label" in columns:
        kind = "labeled"  # "auto" reads such rows as prompt and completion
    row_format = detect_format(rows, kind=kind, text_column=text_column)
    if row_format.kind not in TRAINS_ON[objective]:
        raise ValueError(
            f"the {objective} objective cannot train on {row_format.describe()}: "
            "preference (DPO) needs 'chosen' and 'rejected', labeled (KTO) needs "
            "'prompt', 'completion' and 'label', next_token (from_scratch, SFT) needs "
            "text, prompt/completion or messages"
        )
    return row_format


def _possible_formats(
    first: Row, names: Sequence[str], text_column: str
) -> Iterator[RowFormat]:
    """Every format that the filled columns form, the most specific first."""
    columns = {name for name in names if first.get(name) is not None}
    if {"chosen", "rejected"} <= columns:
        yield _preference_format(first, columns)
    read = ("prompt", "completion")
    if columns.issuperset(read):
        yield _format("prompt_completion", first["completion"], read)
    if columns.issuperset((*read, "label")):
        yield _format("labeled", first["completion"], (*read, "label"))
    for name in ("messages", "conversations"):
        if name in columns:
            yield RowFormat("messages", True, (name,), dialect=_dialect(first[name]))
    if {"instruction", "output"} <= columns:
        optional = tuple(c for c in ("input", "system", "history") if c in names)
        found = ("instruction", *optional, "output")
        yield RowFormat("prompt_completion", True, found, dialect="alpaca")
    if text_column in columns:
        yield RowFormat("text", False, (text_column,))


def read_row(row: Row, row_format: RowFormat) -> dict[str, Any]:
    """One row in canonical columns, checked. Conversations become lists of messages.

    Returns `text`, or `prompt` and `completion` (and the bool `label`), or `messages`,
    or `prompt`, `chosen` and `rejected`; for conversations also `template_kwargs` (the
    row's `tools` and `chat_template_kwargs`).

    Raises:
        BadRow: the row lacks a value, or one has the wrong form.
    """
    if isinstance(row, UnreadableRow):
        raise BadRow(row.reason)
    if row_format.kind == "text":
        (column,) = row_format.columns
        text = _plain(row.get(column), column)
        if not text:
            raise BadRow(f"{column} is empty")
        return {"text": text}
    if row_format.dialect == "alpaca":
        read = _read_alpaca(row)
    elif row_format.kind == "messages":
        column = row_format.columns[0]
        messages = _messages(row.get(column), column)
        read = {"messages": _attach_system(messages, row)}
    elif row_format.kind in ("prompt_completion", "labeled"):
        names = ("prompt", "completion")
        value: Callable[[Any, str], Any]
        value = _messages if row_format.conversational else _plain
        read = {name: value(row.get(name), name) for name in names}
        if row_format.kind == "labeled":
            read["label"] = _label(row.get("label"))
    else:
        read = _read_preference(row, row_format)
    if row_format.conversational:
        read["template_kwargs"] = _template_kwargs(row)
    return read


def extract_prompt(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Length of the prompt that chosen and rejected share, in characters or turns.

    TRL's rule: the longest common prefix; a space just before the first difference
    goes to the completions. Where one is a prefix of the other, its last character or
    turn stays in the completion. (TRL 1.16 reads chosen[-1] when nothing is shared;
    here the prompt is then empty.)

    Raises:
        BadRow: one side is empty.
    """
    shorter = min(len(chosen), len(rejected))
    if shorter == 0:
        raise BadRow("chosen or rejected is empty, so no prompt can be found in them")
    for index in range(shorter):
        if chosen[index] != rejected[index]:
            return index - 1 if index > 0 and chosen[index - 1] == " " else index
    return shorter - 1


def _format(kind: Kind, value: Any, columns: tuple[str, ...]) -> RowFormat:
    """The format of rows in whose columns such values stand."""
    return RowFormat(kind, _is_conversation(value), columns, dialect=_dialect(value))


def _preference_format(first: Row, columns: set[str]) -> RowFormat:
    chosen = first["chosen"]
    sides = _format("preference", chosen, ("chosen", "rejected"))
    prompt = next((c for c in ("prompt", "conversations") if c in columns), None)
    if prompt is None:
        return dataclasses.replace(sides, implicit_prompt=True)
    # A string beside full conversations repeats their first turn.
    repeated = sides.conversational and not _is_conversation(first[prompt])
    return dataclasses.replace(
        sides,
        columns=(prompt, *sides.columns),
        implicit_prompt=repeated and _starts_conversation(chosen),
    )


def _read_preference(row: Row, row_format: RowFormat) -> dict[str, Any]:
    value: Callable[[Any, str], Any]
    value = _messages if row_format.conversational else _plain
    chosen = value(row.get("chosen"), "chosen")
    rejected = value(row.get("rejected"), "rejected")
    if row_format.implicit_prompt:
        shared = extract_prompt(chosen, rejected)
        if row_format.conversational and shared == 0:
            raise BadRow("chosen and rejected share no first message to be the prompt")
        prompt: Any = chosen[:shared]
        chosen, rejected = chosen[shared:], rejected[shared:]
    else:
        column = row_format.columns[0]
        prompt = row.get(column)
        if row_format.conversational and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        prompt = value(prompt, column)
        if row_format.conversational:
            prompt = _attach_system(prompt, row)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _read_alpaca(row: Row) -> dict[str, Any]:
    """Instruction (and input) as the user's turn, output as the assistant's."""
    prompt: list[dict[str, Any]] = []
    for turn in row.get("history") or []:
        if not isinstance(turn, Sequence) or len(turn) != 2:
            raise BadRow(f"history holds {_shown(turn)}, expected pairs of strings")
        prompt.append({"role": "user", "content": _plain(turn[0], "history")})
        prompt.append({"role": "assistant", "content": _plain(turn[1], "history")})
    instruction = _plain(row.get("instruction"), "instruction")
    if extra := row.get("input"):
        instruction = f"{instruction}\n\n{_plain(extra, 'input')}"
    if not instruction:
        raise BadRow("instruction is empty")
    prompt.append({"role": "user", "content": instruction})
    output = _plain(row.get("output"), "output")
    completion = [{"role": "assistant", "content": output}]
    return {"prompt": _attach_system(prompt, row), "completion": completion}


def _attach_system(messages: list[dict[str, Any]], row: Row) -> list[dict[str, Any]]:
    """Put a `system` column in front, as Alpaca and ShareGPT files carry it."""
    system = row.get("system")
    if not isinstance(system, str) or not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _template_kwargs(row: Row) -> dict[str, Any]:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise BadRow(f"tools is not JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise BadRow(f"tools is {_shown(tools)}, expected a list of JSON schemas")
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise BadRow(f"chat_template_kwargs is {_shown(kwargs)}, expected a mapping")
    return {"tools": tools, **kwargs}


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if isinstance(value, Mapping):  # ShareGPT preference files hold one message
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRow(f"{column} is {_shown(value)}, expected a non-empty message list")
    return [_message(item, f"{column}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise BadRow(f"{where} is {_shown(item)}, expected {{'role', 'content'}}")
    # Arrow fills a key that only some messages have with None; templates want it gone.
    message = {key: value for key, value in item.items() if value is not None}
    if "from" in message and "value" in message:
        message["role"] = message.pop("from")
        message["content"] = message.pop("value")
    role = message.get("role")
    if role not in ROLES:
        message["role"] = ROLE_ALIASES.get(role, "") if isinstance(role, str) else ""
        if not message["role"]:
            known = ", ".join(sorted(ROLES))
            raise BadRow(f"{where} has role {role!r}, expected one of {known}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise BadRow(f"{where} has neither content nor tool_calls")
    if isinstance(content, list):
        kinds = {
            part.get("type") if isinstance(part, Mapping) else part for part in content
        }
        if kinds != {"text"}:
            raise BadRow(f"{where} has content parts {kinds}, only text is supported")
    elif content is not None and not isinstance(content, str):
        raise BadRow(f"{where} has content {_shown(content)}, expected a string")
    return message


def _label(value: Any) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise BadRow(f"label is {_shown(value)}, expected true or false")


def _plain(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{column} is {_shown(value)}, expected a string")
    return value


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list | Mapping)


def _starts_conversation(value: Any) -> bool:
    """Whether a message list opens with a turn that is not the assistant's."""
    turn = _first_turn(value)
    role = turn.get("role") or turn.get("from")
    return bool(turn) and ROLE_ALIASES.get(str(role), role) != "assistant"


def _dialect(value: Any) -> Literal["native", "sharegpt"]:
    return "native" if _first_turn(value).get("from") is None else "sharegpt"


def _first_turn(value: Any) -> Mapping[str, Any]:
    """The first message, or the only one; empty where there is none."""
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, Mapping) else {}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
