"""Chat rendering by the tokenizer's own template, and which tokens the assistant wrote.

A template that marks the assistant's text with `{% generation %}` is believed.
Otherwise the spans are found by rendering the conversation's beginnings: the text of a
turn starts where the generation prompt ends and stops where the next turn begins.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtrain.data.rows.formats import BadRow
from jaxtrain.data.rows.parts import fit_parts

Messages = Sequence[Mapping[str, Any]]
Render = Callable[..., str]

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Stands in for an assistant's text; no template alters plain letters.
_STAND_IN = "jaxtrainstandin"


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if conversations cannot be rendered."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the rows are conversations, but tokenizer {tokenizer.name_or_path!r} has "
            "no chat template: give one with load_tokenizer(..., chat_template=path), "
            "take an instruction-tuned tokenizer, or give plain text rows"
        )


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template_kwargs: Mapping[str, Any],
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as text. Raises BadRow where the template refuses it."""
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    return str(_apply_template(tokenizer, messages, template_kwargs, options))


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes first after an assistant's turn.

    None if there is no template, or no special token follows the turn's text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [("user", "?"), ("assistant", _STAND_IN)]
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text = render_chat(tokenizer, messages, {})
    except (BadRow, ValueError):
        return None
    ending = text.rpartition(_STAND_IN)[2]
    added = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special}
    special.update(tokenizer.all_special_ids)
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"]
    return next((number for number in ids if number in special), None)


def encode_with_assistant_mask(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template_kwargs: Mapping[str, Any],
) -> tuple[list[int], np.ndarray]:
    """Token ids of a conversation, and a bool mask of those the assistant wrote.

    Raises:
        BadRow: no token is the assistant's, or the spans cannot be told.
    """
    template = template_kwargs.get("chat_template") or tokenizer.get_chat_template(
        None, template_kwargs.get("tools")
    )
    if _GENERATION_TAG.search(template):
        options = dict.fromkeys(
            ("tokenize", "return_dict", "return_assistant_tokens_mask"), True
        )
        encoded = _apply_template(tokenizer, messages, template_kwargs, options)
        ids, mask = encoded["input_ids"], np.asarray(encoded["assistant_masks"], bool)
    else:
        ids, mask = _encode_unmarked(tokenizer, messages, template_kwargs)
    if not mask.any():
        raise BadRow(
            "no token is the assistant's: the conversation has no assistant turn, or "
            "the chat template's {% generation %} marks nothing"
        )
    return ids, mask


def find_assistant_spans(
    render: Render, messages: Messages, *, closing: str = ""
) -> list[tuple[int, int]]:
    """Character spans of the assistant's turns, terminators included.

    `render(messages, add_generation_prompt=False)` gives text. A turn starts after the
    generation prompt; where the whole conversation lacks a part of that prompt, where
    the two part. `closing` is a text that the template may add after the last turn
    only, as Phi-3's adds EOS.

    Raises:
        BadRow: the template is not prefix-stable, so the spans cannot be told.
    """
    full = render(messages)
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


def mask_tokens(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> np.ndarray:
    """bool[tokens]: which tokens overlap a span of characters.

    A token also owns the characters since the previous one's end: byte-level
    tokenizers may leave a leading space out of a token's offsets.
    """
    mask = np.zeros(len(offsets), bool)
    if not len(offsets):
        return mask
    pairs = np.asarray(offsets)
    ends = np.maximum.accumulate(pairs[:, 1])
    begins = np.minimum(pairs[:, 0], np.concatenate([[0], ends[:-1]]))
    for start, stop in spans:
        mask |= (ends > start) & (begins < stop)
    return mask


def _apply_template(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template_kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Any:
    try:
        own = _own_messages(tokenizer, messages, template_kwargs)
        return tokenizer.apply_chat_template(own, **options, **template_kwargs)
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise BadRow(f"the chat template refuses the conversation: {error}") from error


def _own_messages(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template_kwargs: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Copies of the messages, with contents in the form that the template wants."""
    own = template_kwargs.get("chat_template")
    template = own or tokenizer.get_chat_template(None, template_kwargs.get("tools"))

    def render(probe: list[Mapping[str, Any]]) -> str:
        turns = [dict(message) for message in probe]
        return str(
            tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
        )

    return [dict(message) for message in fit_parts(messages, template, render)]


def _encode_unmarked(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    template_kwargs: Mapping[str, Any],
) -> tuple[list[int], np.ndarray]:
    render = functools.partial(render_chat, tokenizer, template_kwargs=template_kwargs)
    eos = tokenizer.eos_token
    spans = find_assistant_spans(
        render, messages, closing=eos if isinstance(eos, str) else ""
    )
    encoded = tokenizer(
        render(messages),
        add_special_tokens=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return encoded["input_ids"], mask_tokens(encoded["offset_mapping"], spans)


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
    shortened = [*messages[:turn], {"role": "assistant", "content": _STAND_IN}]
    extended = [*shortened, *messages[turn + 1 : following]]
    _, found, terminator = render(shortened).rpartition(_STAND_IN)
    rest = render(extended).rpartition(_STAND_IN)[2]
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
