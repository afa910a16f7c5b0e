"""Render chats with the tokenizer's template, and find what the assistant wrote.

If a template marks the assistant's text with `{% generation %}`, these marks are used.
Otherwise the module `turns` finds the assistant's turns in the rendered text.
`AssistantMarks`, and `train` or `weight` fields of single messages, select the turns
that are trained.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtrain.data.rows.formats import BadRow, refuse_surrogates
from jaxtrain.data.rows.jinja import checked
from jaxtrain.data.rows.marks import (
    ALL_TURNS,
    AssistantMarks,
    Span,
    choose_turns,
    drop_thoughts,
    take_training_fields,
)
from jaxtrain.data.rows.parts import fit_parts
from jaxtrain.data.rows.sandbox import plain_data, plain_messages, render_template
from jaxtrain.data.rows.turns import (
    STAND_IN,
    Messages,
    TurnShape,
    find_assistant_spans,
    find_spans_by_beginnings,
    find_turn_shape,
    writes_end,
)
from jaxtrain.record.safe_text import shown

logger = logging.getLogger(__name__)

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Arguments of apply_chat_template that are no template variables; rows can't set them.
_RESERVED = ("messages", "conversation", "add_generation_prompt")
_FOR_GENERATION = "continue_final_message"


@dataclasses.dataclass(frozen=True)
class _Template:
    """A template's text, and the variables it gets in addition to the messages."""

    text: str
    variables: Mapping[str, Any]

    @property
    def is_marked(self) -> bool:
        return bool(_GENERATION_TAG.search(self.text))

    @property
    def closing(self) -> str:
        """Text that the template may add after the last turn only."""
        eos = self.variables.get("eos_token")
        return eos if isinstance(eos, str) else ""

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        spans: list[Span] | None = None,
    ) -> str:
        """Render plain messages. Raises BadRow for any exception in the template."""
        known = {**self.variables, "add_generation_prompt": add_generation_prompt}
        try:
            text = render_template(self.text, messages, known, spans)
        except Exception as error:  # a template is a program
            kind, reason = type(error).__name__, str(error)
            told = reason if reason and len(reason) < 300 else f"{kind} {reason[:300]}"
            raise BadRow(
                f"the chat template refuses the conversation: {told.strip()}"
            ) from error
        refuse_surrogates(text, "the text that the chat template makes of it ")
        return text


def require_chat_template(tokenizer: PreTrainedTokenizerBase, tools: Any = None) -> str:
    """The tokenizer's template. Raises ValueError without one that can be used."""
    named, own = shown(tokenizer.name_or_path), tokenizer.chat_template
    if not own:
        raise ValueError(
            f"the rows are conversations, but tokenizer {named} has no chat template:"
            " name a file with one in data.chat_template, take an instruction-tuned"
            " tokenizer, or give plain text rows"
        )
    try:
        text = tokenizer.get_chat_template(None, tools)
    except ValueError as error:
        raise ValueError(
            f"tokenizer {named} has no chat template called default: set"
            f" data.chat_template to a name ({', '.join(sorted(own))}) or to a file"
        ) from error
    place = f"the chat template of tokenizer {named}"
    return checked(text, place, "set data.chat_template to a file with another")


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template_kwargs: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Render a conversation as text.

    Raises:
        BadRow: the template refuses it, or a message of a whole conversation asks not
            to be trained, which only `render_with_spans` supports.
    """
    template = _template(tokenizer, template_kwargs)
    plain, trained = _read_messages(template, messages)
    if False in trained and not add_generation_prompt:
        raise BadRow(
            f"messages[{trained.index(False)}] asks not to be trained (train or"
            " weight), which only assistant_only_loss reads: set it, or take the"
            " field out"
        )
    return template.render(plain, add_generation_prompt=add_generation_prompt)


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes first after an assistant's turn.

    None if there is no template, or no special token follows the turn's text.
    """
    turns = [("user", "?"), ("assistant", STAND_IN)]
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text = render_chat(tokenizer, messages, {})
    except (BadRow, ValueError):
        return None
    ending = text.rpartition(STAND_IN)[2]
    added = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special}
    special.update(tokenizer.all_special_ids)
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"]
    return next((number for number in ids if number in special), None)


def render_with_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template_kwargs: Mapping[str, Any],
    marks: AssistantMarks = ALL_TURNS,
) -> tuple[str, list[Span]]:
    """Render a conversation, and find the spans of characters that are trained.

    The spans are in order and do not overlap.

    Raises:
        BadRow: the template refuses the conversation, or the assistant's turns cannot
            be located in its text.
        ValueError: preserve_thinking is set, and the template marks its own turns.
    """
    template = _template(tokenizer, template_kwargs)
    plain, trained = _read_messages(template, messages)
    if template.is_marked:
        if marks.preserve_thinking:
            raise ValueError(
                "preserve_thinking=True: the chat template marks with {% generation %}"
                " what the assistant wrote, and its text is taken as it is; set it"
                " False"
            )
        spans: list[Span] = []
        text = template.render(plain, spans=spans)
    else:
        text, spans = _find_turns(template, plain)
        if marks.preserve_thinking:
            text, spans = _preserve_thinking(template, plain, text, spans)
    turns = [i for i, m in enumerate(plain) if m["role"] == "assistant"]
    spans = choose_turns(spans, [trained[i] for i in turns], marks)
    if not marks.thinking:
        spans = drop_thoughts(text, spans)
    return text, spans


def mask_assistant(
    offsets: Sequence[Span] | np.ndarray, spans: Sequence[Span]
) -> np.ndarray:
    """bool[tokens]: which tokens of a rendered conversation are trained.

    Raises:
        BadRow: no token is trained.
    """
    mask = mask_tokens(offsets, spans)
    if not mask.any():
        raise BadRow(
            "no token is the assistant's: the conversation has no assistant turn that "
            "is trained, or the chat template's {% generation %} marks nothing"
        )
    return mask


def mask_tokens(
    offsets: Sequence[Span] | np.ndarray, spans: Sequence[Span]
) -> np.ndarray:
    """bool[tokens]: which tokens overlap a span of characters.

    The spans must be in order and not overlap. A token also covers the characters
    between the end of the previous token and its own start, because byte-level
    tokenizers may leave a leading space out of a token's offsets.
    """
    if not len(offsets) or not len(spans):
        return np.zeros(len(offsets), bool)
    pairs = offsets
    if not isinstance(pairs, np.ndarray):
        flat = itertools.chain.from_iterable(pairs)
        pairs = np.fromiter(flat, int, 2 * len(offsets)).reshape(-1, 2)
    ends = np.maximum.accumulate(pairs[:, 1])
    begins = np.minimum(pairs[:, 0], np.concatenate([[0], ends[:-1]]))
    starts, stops = np.asarray(spans).T
    last = np.searchsorted(starts, ends, "left") - 1  # the last span that begins before
    return np.asarray((last >= 0) & (begins < stops[last]))


def _template(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]
) -> _Template:
    """The row's template or the tokenizer's, with the row's variables."""
    variables = {key: value for key, value in template_kwargs.items()}
    for key in (*_RESERVED, _FOR_GENERATION):
        if key in variables:
            raise BadRow(
                f"chat_template_kwargs holds {shown(key)}, which no row may set"
            )
    variables.setdefault("tools", None)
    variables.setdefault("documents", None)
    named = variables.pop("chat_template", None)
    if named is None:
        text = require_chat_template(tokenizer, variables["tools"])
    else:
        text = tokenizer.get_chat_template(named)
    if not isinstance(text, str):
        raise BadRow(f"chat_template is {type(text).__name__}, expected a string")
    for key in ("tools", "documents"):
        if not all(isinstance(item, Mapping) for item in variables[key] or ()):
            raise BadRow(f"{key} must be a list of JSON objects")
    with _no_deep_nesting():
        return _Template(
            text, {**tokenizer.special_tokens_map, **plain_data(variables)}
        )


def _read_messages(
    template: _Template, messages: Messages
) -> tuple[list[dict[str, Any]], list[bool | None]]:
    """The messages for the template, and whether each asks to be trained (or not)."""
    own, trained = take_training_fields(messages)
    bare = _Template(template.text, {**template.variables, "tools": None})
    with _no_deep_nesting():
        plain = plain_messages(own)
    fitting = fit_parts(plain, template.text, bare.render)
    return [dict(message) for message in fitting], trained


@contextlib.contextmanager
def _no_deep_nesting() -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise BadRow("its values nest too deeply for a chat template") from error


def _find_turns(template: _Template, messages: Messages) -> tuple[str, list[Span]]:
    """The text of plain messages, and the spans of the assistant's turns."""
    text = template.render(messages)
    shape = _turn_shape(template)
    if shape is not None:
        spans = find_assistant_spans(template.render, messages, text, shape)
        if spans is not None:
            return text, spans
    spans = find_spans_by_beginnings(
        template.render, messages, full=text, closing=template.closing
    )
    return text, spans


def _turn_shape(template: _Template) -> TurnShape | None:
    """How the template writes turns, found once for all rows with these variables."""
    shared = {k: v for k, v in template.variables.items() if k != "tools"}
    try:
        return _shape_of(template.text, json.dumps(shared, sort_keys=True))
    except (TypeError, ValueError, RecursionError):  # keys of several types
        return None


@functools.lru_cache(maxsize=256)
def _shape_of(text: str, variables: str) -> TurnShape | None:
    template = _Template(text, {**json.loads(variables), "tools": None})
    if not writes_end(template.render):
        logger.warning(
            "the chat template writes nothing behind an assistant's turn, so that no"
            " token is trained that ends it; set data.chat_template to one that marks"
            " turns and their ends with {% generation %}"
        )
    return find_turn_shape(template.render, template.closing)


def _preserve_thinking(
    template: _Template, messages: Messages, text: str, spans: Sequence[Span]
) -> tuple[str, list[Span]]:
    """Replace each assistant turn by what the template renders for it as the last."""
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        return text, list(spans)
    said = [text[start:stop] for start, stop in spans]
    ends = turns[-1] == len(messages) - 1  # then the last turn needs no change
    first = messages[: turns[0]]
    # Most templates write the last turn in the same way whatever came before it.
    alike = not ends or _last_turn(template, [*first, messages[-1]]) == said[-1]
    for number, turn in enumerate(turns[:-1] if ends else turns):
        before = first if alike else messages[:turn]
        last = _last_turn(template, [*before, messages[turn]])
        said[number] = last.removesuffix(template.closing)
    parts, placed, position, length = [], [], 0, 0
    for (start, stop), own in zip(spans, said, strict=True):
        parts += [text[position:start], own]
        length += start - position
        placed.append((length, length + len(own)))
        length, position = length + len(own), stop
    return "".join([*parts, text[position:]]), placed


def _last_turn(template: _Template, messages: Messages) -> str:
    """What the template writes for the last turn, which is the assistant's."""
    text, spans = _find_turns(template, messages)
    start, stop = spans[-1]
    return text[start:stop]
