"""Rows to token ids and masks, by the rules of TRL 1.16 (SFTTrainer and DPOTrainer).

Plain rows: the EOS string is appended to a text, a completion, a chosen and a rejected
unless it already ends so; the tokenizer adds its own special tokens (BOS) once, in
front. Conversations: the chat template alone decides; nothing is appended, and its
terminators are trained. A completion starts where the tokens of the prompt alone and of
prompt + completion part, so tokens that merge across the border belong to the
completion.
"""

import dataclasses
import functools
import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from jaxtrain.data.rows.formats import BadRow, RowFormat
from jaxtrain.data.rows.jinja import read_template
from jaxtrain.data.rows.template import (
    encode_with_assistant_mask,
    render_chat,
    require_chat_template,
)
from jaxtrain.data.rows.tokenized import read_tokens

logger = logging.getLogger(__name__)

# One of them holds the vocabulary.
_TOKENIZER_FILES = (
    "tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken", "*.bpe",
)  # fmt: skip

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
    if local and not (trust_remote_code or _holds_tokenizer(folder)):
        # Of a config.json alone, transformers makes a tokenizer without any token.
        raise ValueError(
            f"cannot load tokenizer {path_or_name!r}: the folder holds no tokenizer"
            " (such as tokenizer.json); set model.tokenizer_name_or_path to one that"
            " does"
        )
    try:
        loader = _named_class(folder) or transformers.AutoTokenizer
        tokenizer = loader.from_pretrained(
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
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot load tokenizer {path_or_name!r}: {place}. {reason}"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template)
    check_tokenizer(tokenizer)
    return tokenizer


# Tokenizer classes, and the model types for which AutoTokenizer takes the class that
# the folder names; None is a folder without a model. It corrects what folders of some
# other types say.
_GENERIC = "PreTrainedTokenizerFast"
_TAKEN_AT_ITS_WORD: Mapping[str, set[str | None]] = {
    _GENERIC: {None, "llama", "qwen3", "gemma2", "gemma3_text"},
    "Qwen2Tokenizer": {"qwen2", "qwen3", "qwen3_moe"},
    "GemmaTokenizer": {"gemma2", "gemma3_text"},
}


def _named_class(folder: pathlib.Path) -> Any | None:
    """The tokenizer class that a folder names, if AutoTokenizer is sure to choose it.

    Importing AutoTokenizer imports PyTorch where that is installed: a second that a run
    has no other use for. None leaves the choice to it.
    """
    if not (folder / "tokenizer.json").is_file():
        return None
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        name, has_code = settings["tokenizer_class"], "auto_map" in settings
        model, model_type = folder / "config.json", None
        if model.is_file():
            model_type = json.loads(model.read_text("utf-8"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    name = _GENERIC if name in (_GENERIC, "TokenizersBackend") else name
    if name != _GENERIC:
        name = str(name).removesuffix("Fast")
    if has_code or model_type not in _TAKEN_AT_ITS_WORD.get(name, ()):
        return None
    return getattr(transformers, name, None)


def _holds_tokenizer(folder: pathlib.Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


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


def highest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id that a text can become; ids may have gaps below it."""
    return max(tokenizer.get_vocab().values())


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
    _check_loss_options(row_format, completion_only_loss, assistant_only_loss)
    if row_format.kind == "tokenized":
        read = functools.partial(
            read_tokens,
            completion_only=completion_only_loss is not False,
            highest_id=highest_id(tokenizer),
        )
        return each_row(rows, lambda row: Example(*read(row)), on_bad)
    encoder = _Encoder(tokenizer, row_format.conversational, on_bad)
    has_prompt = row_format.kind == "prompt_completion"
    columns = ("prompt", "completion") if has_prompt else (row_format.kind,)
    if assistant_only_loss:
        examples = encoder.mark_assistant(rows, columns)
    else:
        examples = [
            ids if ids is None else Example(ids, np.ones(len(ids), bool))
            for ids in encoder.encode(rows, columns)
        ]
    if not has_prompt or completion_only_loss is False:
        return examples
    heads = encoder.encode(_where(rows, examples), ("prompt",), prompts=True)
    for example, head in zip(examples, heads, strict=True):
        if example is not None and head is not None:
            example.trained[: common_prefix_length(head, example.ids)] = False
    return _where(examples, heads)  # a prompt that no template renders is bad too


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
    encoder = _Encoder(tokenizer, row_format.conversational, on_bad)
    chosen = encoder.encode(rows, ("prompt", "chosen"))
    good = _where(rows, chosen)
    rejected = encoder.encode(good, ("prompt", "rejected"))
    good = _where(good, rejected)
    heads = encoder.encode(good, ("prompt",), prompts=True)
    pairs: list[Pair | None] = []
    for head, *sides in zip(heads, chosen, rejected, strict=True):
        if head is None:
            pairs.append(None)
            continue
        shared = min(common_prefix_length(head, side) for side in sides)
        pairs.append(Pair(head[:shared], *(side[shared:] for side in sides)))
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


def common_prefix_length(
    left: Sequence[int] | np.ndarray, right: Sequence[int] | np.ndarray
) -> int:
    """How many leading tokens two sequences share."""
    shorter = min(len(left), len(right))
    differ = np.not_equal(left[:shorter], right[:shorter])
    return int(np.argmax(differ)) if np.any(differ) else shorter


def _check_loss_options(
    row_format: RowFormat, completion_only: bool | None, assistant_only: bool
) -> None:
    has = row_format.columns if row_format.kind == "tokenized" else ()
    assistant_only &= "assistant_masks" not in has
    completion_only = completion_only and "completion_mask" not in has
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


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """Texts or conversations to tokens; `on_bad` is told what cannot be rendered."""

    tokenizer: PreTrainedTokenizerBase
    conversational: bool
    on_bad: OnBad

    def __post_init__(self) -> None:
        if self.conversational:
            require_chat_template(self.tokenizer)

    def encode(
        self,
        rows: Sequence[Row | None],
        columns: Sequence[str],
        *,
        prompts: bool = False,
    ) -> list[Any]:
        """int32 ids of rows' columns behind one another; None: of none or a bad one.

        `prompts`: a completion is still to come.
        """

        def text(row: Row) -> str:
            *before, last = (row[column] for column in columns)
            if not self.conversational:
                eos = self.tokenizer.eos_token
                return "".join(before) + (last if prompts else _with_eos(last, eos))
            return render_chat(
                self.tokenizer,
                [*itertools.chain(*before, last)],
                row["template_kwargs"],
                add_generation_prompt=prompts,
            )

        texts = self._each(rows, text)
        given = [text for text in texts if text is not None]
        if not given:
            return texts
        encoded = self.tokenizer(
            given,
            add_special_tokens=not self.conversational,
            return_attention_mask=False,
            verbose=False,  # lengths are cut later: no warning about the model's most
        )
        ids = iter(encoded["input_ids"])
        return [t if t is None else np.asarray(next(ids), np.int32) for t in texts]

    def mark_assistant(
        self, rows: Sequence[Row], columns: Sequence[str]
    ) -> list[Example | None]:
        """Conversations of which the assistant's tokens are trained."""

        def example(row: Row) -> Example:
            messages = [*itertools.chain(*(row[column] for column in columns))]
            ids, mask = encode_with_assistant_mask(
                self.tokenizer, messages, row["template_kwargs"]
            )
            return Example(np.asarray(ids, np.int32), mask)

        return self._each(rows, example)

    def _each(
        self, rows: Sequence[Row | None], function: Callable[[Row], Any]
    ) -> list[Any]:
        return each_row(rows, function, self.on_bad)


def each_row(
    rows: Sequence[Row | None], function: Callable[[Row], Any], on_bad: OnBad
) -> list[Any]:
    """`function` of each row; None where there is none or it raises BadRow."""
    found: list[Any] = [None] * len(rows)
    for index, row in enumerate(rows):
        try:
            found[index] = row if row is None else function(row)
        except BadRow as bad:
            on_bad(index, str(bad))
    return found


def _where(values: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The values beside which something stands; None for the rest."""
    return [v if o is not None else None for v, o in zip(values, others, strict=True)]


def _with_eos(text: str, eos: str) -> str:
    return text if text.endswith(eos) else text + eos
