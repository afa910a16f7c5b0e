"""Rows to token ids and masks, by the rules of TRL 1.16 (SFTTrainer and DPOTrainer).

Plain rows: the EOS string is appended to a text, a completion, a chosen and a rejected
unless it already ends so; the tokenizer adds its own special tokens (BOS) once, in
front. Conversations: the chat template alone decides; nothing is appended, and its
terminators are trained. A completion starts where the tokens of the prompt alone and of
prompt + completion part, so tokens that merge across the border belong to the
completion.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from jaxtrain.data.rows.formats import BadRow, RowFormat
from jaxtrain.data.rows.template import (
    encode_with_assistant_mask,
    render_chat,
    require_chat_template,
)

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
OnBad = Callable[[int, str], None]  # index in the batch, reason


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence: its token ids, and which of them are trained (bool)."""

    ids: np.ndarray
    trained: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    """Preference tokens. Prompt and completion are apart, the prompt is shared."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def load_tokenizer(
    path_or_name: str,
    *,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder or the hub, ready to train with.

    Args:
        chat_template: a Jinja template, or the path of one, in place of its own.

    A tokenizer without a pad token pads with EOS, which is harmless: every mask comes
    from lengths, never from ids.

    Raises:
        ValueError: it cannot be loaded, or it has no EOS token.
    """
    folder = pathlib.Path(path_or_name).expanduser()
    local = folder.is_dir()
    if not local and (path_or_name.startswith((".", "/", "~")) or folder.exists()):
        raise ValueError(f"tokenizer {path_or_name!r} is not a folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if local else path_or_name,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
    except (OSError, ValueError) as error:
        place = (
            "the folder holds no tokenizer that transformers reads (tokenizer.json "
            "and tokenizer_config.json)"
            if local
            else "it is no local folder, and the Hugging Face hub did not give it; "
            "without network, give a local folder"
        )
        raise ValueError(
            f"cannot load tokenizer {path_or_name!r}: {place}. {error}"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    check_tokenizer(tokenizer)
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError without an EOS token; set a missing pad token to EOS."""
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no EOS token, so a model could "
            "not learn to stop: set 'eos_token' in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info(
            "the tokenizer has no pad token: padding with EOS %r (masks come from "
            "lengths)",
            tokenizer.eos_token,
        )


def tokenize_examples(
    rows: Sequence[Row],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    on_bad: OnBad,
) -> list[Example | None]:
    """Tokenize canonical rows for next-token training; None where a row is bad.

    `completion_only_loss`: train on completions alone; None means yes for
    prompt/completion rows. `assistant_only_loss`: train on assistant turns alone. Both
    given, a token must be in both.
    """
    has_prompt = row_format.kind == "prompt_completion"
    _check_loss_options(row_format, completion_only_loss, assistant_only_loss)
    mask_prompt = has_prompt and completion_only_loss is not False

    if not row_format.conversational:
        texts = [_full_text(row, tokenizer.eos_token) for row in rows]
        full = _encode(tokenizer, texts)
        masks: list[np.ndarray | None] = [np.ones(len(ids), bool) for ids in full]
    else:
        require_chat_template(tokenizer)
        talks = [
            row.get("messages") or row["prompt"] + row["completion"] for row in rows
        ]
        full, masks = _encode_talks(tokenizer, talks, rows, assistant_only_loss, on_bad)
    if mask_prompt:
        heads = _encode_prompts(tokenizer, rows, row_format, masks, on_bad)
        for ids, mask, head in zip(full, masks, heads, strict=True):
            if mask is not None and head is not None:
                mask[: common_prefix_length(head, ids)] = False
            # A prompt that no template renders makes the row bad.
    else:
        heads = [()] * len(rows)
    return [
        None if mask is None or head is None else Example(_int32(ids), mask)
        for ids, mask, head in zip(full, masks, heads, strict=True)
    ]


def tokenize_pairs(
    rows: Sequence[Row],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    on_bad: OnBad,
) -> list[Pair | None]:
    """Tokenize canonical preference rows; None where a row is bad.

    The shared prompt is the shorter of what the prompt's tokens have in common with
    either side; later prompt tokens are left out.
    """
    ok: list[np.ndarray | None] = [np.empty(0)] * len(rows)
    sides: list[list[Sequence[int]]] = []
    for side in ("chosen", "rejected"):
        if row_format.conversational:
            require_chat_template(tokenizer)
            talks = [row["prompt"] + row[side] for row in rows]
            ids, masks = _encode_talks(tokenizer, talks, rows, False, on_bad, ok)
            ok = masks
        else:
            eos = tokenizer.eos_token
            texts = [row["prompt"] + _with_eos(row[side], eos) for row in rows]
            ids = _encode(tokenizer, texts)
        sides.append(ids)
    heads = _encode_prompts(tokenizer, rows, row_format, ok, on_bad)
    pairs: list[Pair | None] = []
    for head, chosen, rejected in zip(heads, *sides, strict=True):
        if head is None:
            pairs.append(None)
            continue
        shared = min(
            common_prefix_length(head, chosen), common_prefix_length(head, rejected)
        )
        pairs.append(
            Pair(
                _int32(head[:shared]),
                _int32(chosen[shared:]),
                _int32(rejected[shared:]),
            )
        )
    return pairs


def truncate_example(example: Example, max_length: int | None) -> Example | None:
    """The first max_length tokens; None if none of them is trained."""
    ids, trained = example.ids[:max_length], example.trained[:max_length]
    return Example(ids, trained) if trained.any() else None


def truncate_pair(
    pair: Pair, max_length: int | None, max_prompt_length: int | None
) -> Pair | None:
    """Cut a pair to max_length tokens a side; None if the prompt alone fills it.

    max_prompt_length keeps the end of the prompt, as TRL did while it had the option
    (a BOS token at the front is cut too). Then prompt + completion keep their start,
    which may cut a completion's EOS.
    """
    prompt = pair.prompt
    if max_prompt_length is not None:
        prompt = prompt[-max_prompt_length:]
    if max_length is None:
        return dataclasses.replace(pair, prompt=prompt)
    room = max_length - len(prompt)
    if room <= 0:
        return None
    return Pair(prompt, pair.chosen[:room], pair.rejected[:room])


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:
        return shorter
    return next(i for i in range(shorter) if left[i] != right[i])


def _check_loss_options(
    row_format: RowFormat, completion_only: bool | None, assistant_only: bool
) -> None:
    if assistant_only and not row_format.conversational:
        raise ValueError(
            "assistant_only_loss=True needs conversations, but the rows are "
            f"{row_format.describe()}: set it to False"
        )
    if completion_only and row_format.kind != "prompt_completion":
        raise ValueError(
            "completion_only_loss=True needs prompt/completion rows, but the rows are "
            f"{row_format.describe()}: set assistant_only_loss for conversations"
        )


def _encode_talks(
    tokenizer: PreTrainedTokenizerBase,
    talks: Sequence[list[dict[str, Any]]],
    rows: Sequence[Row],
    assistant_only: bool,
    on_bad: OnBad,
    ok: Sequence[np.ndarray | None] | None = None,
) -> tuple[list[Sequence[int]], list[np.ndarray | None]]:
    """Ids and masks of conversations; a mask of None marks a bad row.

    Rows whose `ok` is None are bad already and are passed over.
    """
    count = len(talks)
    alive = [ok is None or ok[i] is not None for i in range(count)]
    ids: list[Sequence[int]] = [()] * count
    masks: list[np.ndarray | None] = [None] * count
    texts: dict[int, str] = {}
    for i, (talk, row) in enumerate(zip(talks, rows, strict=True)):
        if not alive[i]:
            continue
        kwargs = row["template_kwargs"]
        try:
            if assistant_only:
                ids[i], masks[i] = encode_with_assistant_mask(tokenizer, talk, kwargs)
            else:
                texts[i] = render_chat(tokenizer, talk, kwargs)
        except BadRow as bad:
            on_bad(i, str(bad))
    encoded = _encode(tokenizer, list(texts.values()), add_special_tokens=False)
    for i, row_ids in zip(texts, encoded, strict=True):
        ids[i], masks[i] = row_ids, np.ones(len(row_ids), bool)
    return ids, masks


def _encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    row_format: RowFormat,
    ok: Sequence[np.ndarray | None],
    on_bad: OnBad,
) -> list[Sequence[int] | None]:
    """Ids of the prompts alone, with the generation prompt; None for a bad row."""
    if not row_format.conversational:
        return list(_encode(tokenizer, [row["prompt"] for row in rows]))
    texts: dict[int, str] = {}
    for i, row in enumerate(rows):
        if ok[i] is None:
            continue
        try:
            texts[i] = render_chat(
                tokenizer,
                row["prompt"],
                row["template_kwargs"],
                add_generation_prompt=True,
            )
        except BadRow as bad:
            on_bad(i, str(bad))
    heads: list[Sequence[int] | None] = [None] * len(rows)
    encoded = _encode(tokenizer, list(texts.values()), add_special_tokens=False)
    for i, ids in zip(texts, encoded, strict=True):
        heads[i] = ids
    return heads


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    add_special_tokens: bool = True,
) -> list[Sequence[int]]:
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_attention_mask=False,
        verbose=False,  # lengths are cut later: no warning about the model's maximum
    )
    return encoded["input_ids"]


def _full_text(row: Row, eos: str) -> str:
    if "text" in row:
        return _with_eos(row["text"], eos)
    return row["prompt"] + _with_eos(row["completion"], eos)


def _with_eos(text: str, eos: str) -> str:
    return text if text.endswith(eos) else text + eos


def _int32(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)


def _read_template(template: str) -> str:
    if template.endswith((".jinja", ".j2", ".jinja2")):
        path = pathlib.Path(template).expanduser()
        if not path.is_file():
            raise ValueError(f"chat_template {template!r} does not exist")
        return path.read_text(encoding="utf-8")
    return template
