"""What a data set's columns mean, and every row read into one canonical form.

Six kinds of rows: `text`; `prompt` + `completion`; `messages`; preference rows
`prompt` + `chosen` + `rejected`, whose prompt may be implicit; labeled rows
`prompt` + `completion` + `label`, with a verdict each; and `input_ids`, token ids that
somebody else made (`tokenized`). All but the first and the last come plain (strings) or
conversational (lists of messages). Alpaca and ShareGPT columns are read as
conversations.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from jaxtrain.data.rows.columns import (
    ColumnMap,
    check_columns,
    check_unread,
    propose_map,
    rename,
)
from jaxtrain.record import safe_text

logger = logging.getLogger(__name__)

Kind = Literal[
    "text", "prompt_completion", "messages", "preference", "labeled", "tokenized"
]
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
    "next_token": ("tokenized", "prompt_completion", "messages", "text"),
    "preference": ("preference",),
    "labeled": ("labeled", "preference"),
}
# The columns of token ids, the masks that may stand beside them, and that of padding.
IDS = "input_ids"
MASKS = ("completion_mask", "assistant_masks")
PADDING = "attention_mask"

_DETECTED_ROWS = 100
# Columns that make a format where a row has a value in each.
_REQUIRED = (
    ("chosen", "rejected"), ("prompt", "completion"), ("instruction", "output"),
    ("messages",), ("conversations",), ("text",), (IDS,),
)  # fmt: skip
# What a value of a form that nobody thought of may raise.
_UNFORESEEN = (
    ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError,
)  # fmt: skip
# What a JSON file may call the list of its rows.
_WRAPPERS = ("data", "rows", "examples", "instances", "records", "items", "train")
_ACCEPTED = (
    "'text', 'prompt' + 'completion' (with 'label' for KTO), 'messages', 'chosen' + "
    "'rejected' (with or without 'prompt'), Alpaca's 'instruction' + 'output', "
    "ShareGPT's 'conversations', or 'input_ids'"
)


class BadRow(Exception):
    """One row that cannot be trained on; the message is the reason."""


class UnreadableRow(dict[str, Any]):
    """Stands for a line that holds no row; reading it raises BadRow."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__()
        self.reason = reason
        self.place = place


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """What `detect_format` found: which columns are read, and how."""

    kind: Kind
    conversational: bool
    columns: tuple[str, ...]
    implicit_prompt: bool = False
    dialect: Literal["native", "alpaca", "sharegpt"] = "native"
    # Not in repr, which checkpoints of streams hold beside options that have it.
    column_map: ColumnMap = dataclasses.field(default=(), repr=False)

    def describe(self) -> str:
        """One line for the log."""
        shape = "conversational" if self.conversational else "plain"
        prompt = ", prompt implicit in chosen/rejected" if self.implicit_prompt else ""
        dialect = "" if self.dialect == "native" else f" ({self.dialect} columns)"
        theirs = dict(self.column_map)
        columns = ", ".join(
            f"{shown(theirs[name])} as {name}" if name in theirs else name
            for name in self.columns
        )
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
        self.equal: list[int] = []  # the first rows whose chosen equals rejected
        self.equal_count = 0
        self._name_rows = name_rows
        self.first: list[tuple[int, str]] = []

    def add(self, row: int, reason: str) -> None:
        self.count += 1
        if len(self.first) < self._shown:
            self.first.append((row, reason))

    def add_equal(self, row: int) -> None:
        """Count a pair that prefers nothing."""
        self.equal_count += 1
        if len(self.equal) < self._shown:
            self.equal.append(row)

    def names(self, rows: Sequence[int]) -> Sequence[str]:
        """Where rows stand."""
        if self._name_rows is not None:
            return self._name_rows(rows)
        return [f"row {row}" for row in rows]

    def listed(self) -> list[str]:
        """The first bad rows, each with where it stands and the reason."""
        names = self.names([row for row, _ in self.first])
        return [f"{n}: {why}" for n, (_, why) in zip(names, self.first, strict=True)]

    def report(self, total: int) -> None:
        """Raise ValueError (on_bad_row='error') or log a warning, if any row is bad.

        Also log the pairs whose two sides are equal.
        """
        if self.equal_count:
            more = ", ..." if self.equal_count > len(self.equal) else ""
            logger.warning(
                "chosen equals rejected in %d of %d pairs (%s%s): they are trained, but"
                " express no preference",
                self.equal_count, total, ", ".join(self.names(self.equal)), more,
            )  # fmt: skip
        if not self.count:
            return
        listed = "; ".join(self.listed())
        more = "; ..." if self.count > len(self.first) else ""
        summary = f"{self.count} of {total} rows cannot be used: {listed}{more}"
        if self.on_bad_row == "error":
            raise ValueError(
                f"{summary}. Fix these rows, or set data.on_bad_row = 'skip'"
            )
        logger.warning("skipped: %s", summary)


def detect_format(
    rows: Iterable[Row],
    *,
    kind: str = "auto",
    text_column: str = "text",
    column_map: ColumnMap = (),
) -> RowFormat:
    """Tell the format from the columns and values of the first rows.

    It is the one that most of the first `_DETECTED_ROWS` have, and of several the one
    seen first: a bad row in front does not decide for the rest.

    Args:
        kind: read the rows as this kind, where their columns would allow several.
        text_column: the column of text rows.
        column_map: names of columns that are read, and the file's.

    Raises:
        ValueError: no rows, none that can be read, a map that does not fit, columns
            that form none of the known formats, or not the one asked for.
    """
    tried = list(itertools.islice(rows, _DETECTED_ROWS))
    if not tried:
        raise ValueError("the data set has no rows: give at least one")
    readable = [row for row in tried if _is_readable(row)]
    if not readable:
        raise _unreadable(tried)
    names = list(getattr(rows, "column_names", None) or readable[0])
    if column_map:
        check_columns(column_map, [*names, *itertools.chain(*readable)], text_column)
        names = list(rename(dict.fromkeys(names), column_map))
    mapped = {name for name, _ in column_map}
    found: collections.Counter[RowFormat] = collections.Counter()
    for row in readable:
        row = rename(row, column_map)
        formats = list(_possible_formats(row, [*names, *row], text_column))
        # Columns that somebody named were named to be read.
        formats.sort(key=lambda each: -len(mapped.intersection(each.columns)))
        wanted = (each for each in formats if kind in ("auto", each.kind))
        found.update(itertools.islice(wanted, 1))
    if not found:
        raise _unknown_format(readable[0], names, kind, column_map)
    ((row_format, _),) = found.most_common(1)
    if not row_format.conversational and any(row.get("system") for row in readable):
        _tell_unread_system(tuple(names))
    for row in readable:
        check_unread(
            rename(row, column_map),
            row_format.columns,
            finds_prompt=row_format.implicit_prompt and not row_format.conversational,
        )
    return dataclasses.replace(row_format, column_map=column_map)


@functools.cache
def _tell_unread_system(columns: tuple[str, ...]) -> None:
    """Once for rows of these columns: several parts of a run look at the same ones."""
    del columns
    logger.warning(
        "column 'system' is not read, because these rows are no conversations: make"
        " their prompts lists of messages, or write the text into them"
    )


def _is_readable(row: Any) -> bool:
    return isinstance(row, Mapping) and not isinstance(row, UnreadableRow)


def _unreadable(rows: Sequence[Row]) -> ValueError:
    """The error of rows of which the first ones are none."""
    listed = "; ".join(
        f"{row.place}: {row.reason}"
        if isinstance(row, UnreadableRow)
        else f"{shown(row)} is no mapping of columns"
        for row in rows[:3]
    )
    return ValueError(f"none of the first {len(rows)} rows can be read: {listed}")


def _listed(names: Sequence[str], most: int = 20) -> list[str]:
    """Names of columns for a message: the first ones, long ones cut."""
    short = [name if len(name) <= 60 else f"{name[:57]}..." for name in sorted(names)]
    return short if len(short) <= most else [*short[:most], "..."]


def _unknown_format(
    first: Row, names: Sequence[str], kind: str, column_map: ColumnMap
) -> ValueError:
    """The error of columns that are no format."""
    row = rename(first, column_map)
    filled = sorted(name for name in names if row.get(name) is not None)
    wanted = "a known format" if kind == "auto" else f"format={shown(kind)}"
    advice = f"rename its columns, or map them, such as {propose_map(_listed(names))}"
    if len(names) == 1 and (marks := {*";\t|"} & {*names[0]}):
        advice = f"separate the columns by commas instead of {min(marks)!r}"
    elif other := next((f.kind for f in _possible_formats(row, names, "text")), None):
        advice = f"they are {other} rows: set data.format = 'auto'"
    elif there := next(filter(set(names).issuperset, _REQUIRED), None):
        listed = " and ".join(map(repr, there))
        advice = f"no row among the first {_DETECTED_ROWS} has a value in {listed}"
    elif wrapper := next((n for n in _WRAPPERS if _is_rows(row.get(n))), None):
        advice = f"if its rows are the list in {wrapper!r}, write that list alone"
    elif column_map:
        advice = (
            f"data.column_map = {shown(dict(column_map))} does not make one of them"
        )
    return ValueError(
        f"columns {_listed(names)} (filled in the first row: {_listed(filled)}) are not"
        f" {wanted}: give {_ACCEPTED}; {advice}"
    )


def _is_rows(value: Any) -> bool:
    """Whether a value is a list of mappings, as the rows of a file are."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def detect_for(
    objective: str,
    rows: Iterable[Row],
    *,
    kind: str = "auto",
    text_column: str = "text",
    column_map: ColumnMap = (),
) -> RowFormat:
    """The format in which an objective's kind of rows is read from these.

    Args:
        objective: a name of `TRAINS_ON`.

    Raises:
        ValueError: the rows are of no known format, or the objective needs another.
    """
    good = (row for row in rows if _is_readable(row))
    first: Row = next(itertools.islice(good, 1), {})
    names = getattr(rows, "column_names", None) or first
    columns = rename(dict.fromkeys(names), column_map)
    if objective == "labeled" and kind == "auto" and "label" in columns:
        kind = "labeled"  # "auto" reads such rows as prompt and completion
    detect = functools.partial(
        detect_format, rows, text_column=text_column, column_map=column_map
    )
    row_format = detect(kind=kind)
    if row_format.kind not in TRAINS_ON[objective] and kind == "auto":
        row_format = _other_format(detect, TRAINS_ON[objective]) or row_format
    if row_format.kind not in TRAINS_ON[objective]:
        labeled = row_format.kind == "prompt_completion" and "label" in columns
        advice = "to train on them and 'label', set training.objective = 'kto'; "
        raise ValueError(
            f"the {objective} objective cannot train on {row_format.describe()}: "
            f"{advice if labeled else ''}preference (DPO) needs 'chosen' and"
            " 'rejected', labeled (KTO) needs 'prompt', 'completion' and 'label',"
            " next_token (from_scratch, SFT) needs text, prompt/completion, messages or"
            " input_ids"
        )
    return row_format


def _other_format(
    detect: Callable[..., RowFormat], kinds: Sequence[Kind]
) -> RowFormat | None:
    """A less specific format of rows with columns for several, if it is of these kinds.

    Preference sets such as UltraFeedback have `messages` beside, to fine-tune on first.
    """
    for kind in kinds:
        with contextlib.suppress(ValueError):
            return detect(kind=kind)
    return None


def _possible_formats(
    first: Row, names: Sequence[str], text_column: str
) -> Iterator[RowFormat]:
    """Every format that the filled columns form, the most specific first."""
    columns = {name for name in names if first.get(name) is not None}
    if {"chosen", "rejected"} <= columns:
        yield _preference_format(first, columns)
    if IDS in columns:
        beside = ("labels",) if "labels" in columns else MASKS
        present = tuple(name for name in (*beside, PADDING) if name in columns)
        yield RowFormat("tokenized", False, (IDS, *present))
    read = ("prompt", "completion")
    if columns.issuperset(read):
        yield _format("prompt_completion", first["completion"], read)
    if columns.issuperset((*read, "label")):
        yield _format("labeled", first["completion"], (*read, "label"))
    for name in ("messages", "conversations"):
        if name in columns:
            dialect = _dialect(_from_json(first[name]))
            yield RowFormat("messages", True, (name,), dialect=dialect)
    if {"instruction", "output"} <= columns:
        optional = tuple(c for c in ("input", "system", "history") if c in names)
        found = ("instruction", *optional, "output")
        yield RowFormat("prompt_completion", True, found, dialect="alpaca")
    if text_column in columns:
        yield RowFormat("text", False, (text_column,))


def read_row(row: Row, row_format: RowFormat) -> dict[str, Any]:
    """One row in canonical columns, checked. Conversations become lists of messages.

    Returns `text`, or the columns of token ids, or `prompt` and `completion` (and the
    bool `label`), or `messages`, or `prompt`, `chosen` and `rejected`; for
    conversations also `template_kwargs` (the row's `tools` and `chat_template_kwargs`).

    Raises:
        BadRow: the row lacks a value, or one has the wrong form.
    """
    if isinstance(row, UnreadableRow):
        raise BadRow(row.reason)
    try:
        return _read_row(rename(row, row_format.column_map), row_format)
    except _UNFORESEEN as error:
        raise BadRow(
            f"cannot be read ({type(error).__name__}: {error}): {shown(row)}"
        ) from error


def _read_row(row: Row, row_format: RowFormat) -> dict[str, Any]:
    """The same where only what is foreseen raises BadRow."""
    if row_format.kind == "tokenized":
        return {name: row.get(name) for name in (IDS, "labels", *MASKS, PADDING)}
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
        messages = _messages(_from_json(row.get(column)), column)
        read = {"messages": _attach_system(messages, row)}
    elif row_format.kind in ("prompt_completion", "labeled"):
        names = ("prompt", "completion")
        value: Callable[[Any, str], Any]
        value = _messages if row_format.conversational else _plain
        read = {name: value(row.get(name), name) for name in names}
        if row_format.conversational:
            read["prompt"] = _attach_system(read["prompt"], row)
        if row_format.kind == "labeled":
            read["label"] = _label(row.get("label"))
    else:
        read = _read_preference(row, row_format)
    if row_format.conversational:
        read["template_kwargs"] = _template_kwargs(row)
    return read


def is_equal(read: Mapping[str, Any]) -> bool:
    """Whether a canonical row is a pair that prefers nothing."""
    return "rejected" in read and bool(read["chosen"] == read["rejected"])


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
    history = row.get("history") or []
    if not isinstance(history, list | tuple):
        raise BadRow(f"history is {shown(history)}, expected pairs of strings")
    for turn in history:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise BadRow(f"history holds {shown(turn)}, expected pairs of strings")
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
        except (ValueError, RecursionError) as error:
            raise BadRow(f"tools is not JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise BadRow(f"tools is {shown(tools)}, expected a list of JSON schemas")
    kwargs = row.get("chat_template_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise BadRow(f"chat_template_kwargs is {shown(kwargs)}, expected a mapping")
    return {"tools": tools, **kwargs}


def _from_json(value: Any) -> Any:
    """The list that a text holds as JSON, as in a CSV file; else the value itself."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if isinstance(value, Mapping):  # ShareGPT preference files hold one message
        value = [value]
    if not isinstance(value, list) or not value:
        hint = ""
        if isinstance(value, str) and value.lstrip().startswith("["):
            hint = (
                " or its JSON, not Python's text of it: write jsonl or parquet, not csv"
            )
        raise BadRow(
            f"{column} is {shown(value)}, expected a non-empty message list{hint}"
        )
    return [_message(item, f"{column}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise BadRow(f"{where} is {shown(item)}, expected {{'role', 'content'}}")
    # Arrow fills a key that only some messages have with None; templates want it gone.
    message = {key: value for key, value in item.items() if value is not None}
    if "from" in message and "value" in message:
        message["role"] = message.pop("from")
        message["content"] = message.pop("value")
    role = message.get("role")
    if role == "function_call":
        message["tool_calls"] = _tool_calls(message.pop("content", None), where)
    if not isinstance(role, str) or role not in ROLES:
        message["role"] = ROLE_ALIASES.get(role, "") if isinstance(role, str) else ""
        if not message["role"]:
            known = ", ".join(sorted(ROLES))
            raise BadRow(f"{where} has role {shown(role)}, expected one of {known}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise BadRow(f"{where} has neither content nor tool_calls")
    if isinstance(content, list):
        _check_parts(content, where)
    elif content is not None and not isinstance(content, str):
        raise BadRow(f"{where} has content {shown(content)}, expected a string")
    return message


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a ShareGPT turn "function_call": JSON of one, or of several."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(value) if isinstance(value, str) else value
    calls = value if isinstance(value, list) else [value]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise BadRow(
                f"{where} is a function_call of {shown(value)}, expected JSON of"
                " {'name', 'arguments'}"
            )
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": call.get("arguments", {})},
        }
        for call in calls
    ]


def _check_parts(parts: Sequence[Any], where: str) -> None:
    """Refuse content parts that are no text; `parts.py` has what becomes of text."""
    if not parts:
        raise BadRow(f"{where} has an empty list as its content")
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else part
        if kind != "text":
            raise BadRow(
                f"{where} has a content part {shown(kind)}, only text is supported"
            )
        if not isinstance(part.get("text"), str):
            raise BadRow(
                f"{where}.content[{number}] has text {shown(part.get('text'))}, "
                "expected a string"
            )


def _label(value: Any) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise BadRow(f"label is {shown(value)}, expected true or false")


def _plain(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{column} is {shown(value)}, expected a string")
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


def refuse_surrogates(text: str, whose: str = "") -> None:
    """Raise BadRow for a text that UTF-8 lacks: no tokenizer takes one."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        escape = json.dumps(text[error.start])
        raise BadRow(
            f"{whose}holds {escape}, half of a surrogate pair, which is no character"
        ) from None


def shown(value: Any) -> str:
    """A value as messages about a row show it, cut to 60 characters."""
    return safe_text.shown(value, 60)
