"""Turn rows into token ids and masks by the rules of TRL 1.16 (SFTTrainer, DPOTrainer).

Plain rows: the EOS string is appended to each text, completion, chosen and rejected
value that does not end with it already. The tokenizer adds its own special tokens (BOS)
once, at the front. Conversations: the chat template decides everything; nothing is
appended, and the end-of-turn tokens that it writes are trained. A completion starts at
the first token where prompt + completion differs from the prompt alone, so a token that
spans the border belongs to the completion.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import logging
import pathlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from jaxtrain.config.folders import bucket_cache
from jaxtrain.data.rows.encode import TextEncoder
from jaxtrain.data.rows.formats import BadRow, RowFormat, refuse_surrogates
from jaxtrain.data.rows.jinja import read_template
from jaxtrain.data.rows.marks import ALL_TURNS, AssistantMarks
from jaxtrain.data.rows.template import (
    mask_assistant,
    render_chat,
    render_with_spans,
)
from jaxtrain.data.rows.tokenized import read_tokens
from jaxtrain.record.safe_text import shown
from jaxtrain.storage.address import is_remote
from jaxtrain.storage.mirror import mirror_model

logger = logging.getLogger(__name__)

# One of these files holds the vocabulary.
_TOKENIZER_FILES = (
    "tokenizer.json", "*.model", "vocab.*", "tekken.json", "*.tiktoken", "*.bpe",
)  # fmt: skip

Row = Mapping[str, Any]
OnBad = Callable[[int, str], None]  # index in the batch, reason


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence: its token ids, and a bool mask of those that are trained."""

    ids: np.ndarray
    trained: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    """Token ids of a preference pair: the shared prompt and the two completions."""

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
    """Load a tokenizer from a folder, a bucket or the hub, ready to train with.

    A tokenizer without a pad token pads with EOS. That is harmless, because every mask
    is made from lengths and never from ids.

    Args:
        chat_template: a Jinja template, the path of one, or the name of one of the
            tokenizer's, which replaces the tokenizer's own.

    Raises:
        ValueError: it cannot be loaded, or it has no EOS token.
    """
    folder = pathlib.Path(path_or_name).expanduser()
    if is_remote(path_or_name):
        folder = mirror_model(path_or_name, bucket_cache())
    local = folder.is_dir()
    if not local and (path_or_name.startswith((".", "/", "~")) or folder.exists()):
        raise ValueError(f"tokenizer {shown(path_or_name)} is not a folder")
    if local and not (trust_remote_code or _holds_tokenizer(folder)):
        # From a config.json alone transformers makes a tokenizer without any tokens.
        raise ValueError(
            f"cannot load tokenizer {shown(path_or_name)}: the folder holds no"
            " tokenizer (such as tokenizer.json); set model.tokenizer_name_or_path to"
            " one that does"
        )
    if local:
        _check_files(folder)
    try:
        loader = _named_class(folder) or transformers.AutoTokenizer
        tokenizer = loader.from_pretrained(
            str(folder) if local else path_or_name,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )
    except Exception as error:  # transformers and tokenizers have no base of theirs
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ValueError(
                f"cannot load tokenizer {shown(path_or_name)}: it brings code of its"
                " own, which does not run unless you say so: read that code, then set"
                " model.trust_remote_code = true; or set model.tokenizer_name_or_path"
                " to a tokenizer without any"
            ) from error
        place = (
            "the folder holds no tokenizer that transformers reads (tokenizer.json "
            "and tokenizer_config.json)"
            if local
            else "it is no local folder, and the Hugging Face hub did not give it; "
            "without network, give a local folder"
        )
        reason = (str(error).strip() or "no message").splitlines()[0]
        if not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        if local and _lacks_sentencepiece(folder):
            place = "its file is one that the package sentencepiece reads"
            reason = "It is not installed: pip install sentencepiece"
        raise ValueError(
            f"cannot load tokenizer {shown(path_or_name)}: {place}. {reason:.400}"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = read_template(chat_template, tokenizer.chat_template)
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
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    name = _GENERIC if name in (_GENERIC, "TokenizersBackend") else name
    if name != _GENERIC:
        name = str(name).removesuffix("Fast")
    if has_code or model_type not in _TAKEN_AT_ITS_WORD.get(name, ()):
        return None
    return _import_class(name)


def _import_class(name: str) -> Any | None:
    """A tokenizer class of transformers, without the reader of GGUF files.

    Up to 5.17 transformers imports that reader beside its tokenizers, and PyTorch with
    it. Here it is imported when something of it is called.
    """
    reader = "transformers.modeling_gguf_pytorch_utils"
    if reader in sys.modules or "torch" in sys.modules:
        return getattr(transformers, name, None)

    def stand_in(called: str) -> Callable[..., Any]:
        if called.startswith("_"):
            raise AttributeError(called)
        return lambda *args, **options: getattr(
            importlib.import_module(reader), called
        )(*args, **options)

    module = types.ModuleType(reader)
    vars(module)["__getattr__"] = stand_in
    sys.modules[reader] = module
    try:
        return getattr(transformers, name, None)
    finally:
        del sys.modules[reader]


def _check_files(folder: pathlib.Path) -> None:
    """Raise ValueError if the folder holds a pipe or a device, which would block."""
    for file in folder.iterdir():
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise ValueError(
                f"cannot load tokenizer {shown(str(folder))}: {file.name} is a pipe or"
                " a device, not a file"
            )


def _holds_tokenizer(folder: pathlib.Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES)


def _lacks_sentencepiece(folder: pathlib.Path) -> bool:
    """Whether the folder's is of protobuf (tiktoken's is text) and that is missing."""
    other = folder / "tokenizer.json"
    if other.exists() or transformers.is_sentencepiece_available():
        return False
    files = filter(pathlib.Path.is_file, folder.glob("*.model"))
    return any(file.read_bytes()[:1] == b"\n" for file in files)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError without an EOS token; set a missing pad token to EOS."""
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {shown(tokenizer.name_or_path)} has no EOS token, so a model"
            " could not learn to stop: set 'eos_token' in its tokenizer_config.json"
        )
    if (highest := highest_id(tokenizer)) >= 2**31:
        raise ValueError(
            f"tokenizer {shown(tokenizer.name_or_path)} has a token id {highest},"
            " beyond 32 bits: no model has so many; mend its tokenizer.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info(
            "the tokenizer has no pad token: padding with EOS %r (masks come from "
            "lengths)",
            tokenizer.eos_token,
        )


def highest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest token id in the vocabulary; ids below it may be unused."""
    return max(tokenizer.get_vocab().values())


def tokenize_examples(
    rows: Sequence[Row],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    assistant_marks: AssistantMarks = ALL_TURNS,
    on_bad: OnBad,
) -> list[Example | None]:
    """Tokenize canonical rows for next-token training; None where a row is bad.

    `completion_only_loss`: train on completions only; None means yes for
    prompt/completion rows. `assistant_only_loss`: train on assistant turns only, and of
    these on the ones that `assistant_marks` selects. If both are set, a token must
    satisfy both to be trained.
    """
    _check_loss_options(row_format, completion_only_loss, assistant_only_loss)
    if row_format.kind == "tokenized":
        read = functools.partial(
            read_tokens,
            completion_only=completion_only_loss is not False,
            highest_id=highest_id(tokenizer),
        )
        return each_row(rows, lambda row: Example(*read(row)), on_bad)
    if assistant_marks.preserve_thinking and row_format.kind != "messages":
        raise ValueError(
            "preserve_thinking=True needs messages, but the rows are "
            f"{row_format.describe()}: set it to False"
        )
    encoder = _Encoder(tokenizer, row_format.conversational, on_bad)
    has_prompt = row_format.kind == "prompt_completion"
    columns = ("prompt", "completion") if has_prompt else (row_format.kind,)
    masks_prompt = has_prompt and completion_only_loss is not False
    if assistant_only_loss:
        return encoder.mark_assistant(
            rows, columns, assistant_marks, masks_prompt=masks_prompt
        )
    if masks_prompt:
        return [
            _completion(*found) if found is not None else None
            for found in encoder.encode_behind_prompts(rows, ("completion",))
        ]
    return [
        Example(ids, np.ones(len(ids), bool)) if ids is not None else None
        for ids in encoder.encode(rows, columns)
    ]


def tokenize_pairs(
    rows: Sequence[Row],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    on_bad: OnBad,
) -> list[Pair | None]:
    """Tokenize canonical preference rows; None where a row is bad.

    The shared prompt is the part of the prompt's tokens that both sides begin with; any
    later prompt tokens are left out.
    """
    encoder = _Encoder(tokenizer, row_format.conversational, on_bad)
    pairs: list[Pair | None] = []
    for found in encoder.encode_behind_prompts(rows, ("chosen", "rejected")):
        if found is None:
            pairs.append(None)
            continue
        head, *sides = found
        shared = min(common_prefix_length(head, side) for side in sides)
        pairs.append(Pair(head[:shared], *(side[shared:] for side in sides)))
    return pairs


def truncate_example(example: Example, max_length: int | None) -> Example | None:
    """Keep the first max_length tokens; None if none of them is trained."""
    ids, trained = example.ids[:max_length], example.trained[:max_length]
    return Example(ids, trained) if trained.any() else None


def truncate_pair(
    pair: Pair, max_length: int | None, max_prompt_length: int | None
) -> Pair | None:
    """Cut prompt + completion to max_length tokens, for each side of a pair.

    First the prompt is cut to its last `max_prompt_length` tokens, as older versions of
    TRL did; a BOS token at its front is lost. Then each completion is cut at its end,
    which may remove its EOS. The result is None if the prompt alone takes max_length
    tokens or more.
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
    """The number of leading tokens that two sequences have in common."""
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


def _completion(head: np.ndarray, ids: np.ndarray) -> Example:
    """Make the example of `ids`; `head` holds the tokens of its prompt alone."""
    return Example(ids, np.arange(len(ids)) >= common_prefix_length(head, ids))


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """Encodes rows, with one call of the tokenizer for the texts of all of them.

    Rows that cannot be rendered are passed to `on_bad`, and their result is None.
    """

    tokenizer: PreTrainedTokenizerBase
    conversational: bool
    on_bad: OnBad

    @property
    def _texts(self) -> TextEncoder:
        return TextEncoder(self.tokenizer, add_special_tokens=not self.conversational)

    def encode(
        self, rows: Sequence[Row], columns: Sequence[str]
    ) -> list[np.ndarray | None]:
        """Token ids (int32) of each row's columns, one column after another."""

        def render(row: Row) -> str:
            return self._render(row, [row[column] for column in columns])

        return self._each(rows, render, self._texts.encode)

    def encode_behind_prompts(
        self, rows: Sequence[Row], columns: Sequence[str]
    ) -> list[list[np.ndarray] | None]:
        """Token ids (int32) of each row's prompt, and of the prompt with each column.

        The prompt alone is rendered so that a completion can follow it.
        """

        def render(row: Row) -> list[str]:
            prompt = row["prompt"]
            whole = [self._render(row, [prompt, row[column]]) for column in columns]
            return [self._render(row, [prompt], is_prompt=True), *whole]

        return self._each(rows, render, self._texts.encode_alike)

    def mark_assistant(
        self,
        rows: Sequence[Row],
        columns: Sequence[str],
        marks: AssistantMarks,
        *,
        masks_prompt: bool,
    ) -> list[Example | None]:
        """Encode conversations so that only the assistant's tokens are trained.

        `masks_prompt`: leave out the assistant's turns in the prompt, too.
        """
        texts = self._texts

        def render(row: Row) -> tuple[str, list[tuple[int, int]], str | None]:
            messages = [*itertools.chain(*(row[column] for column in columns))]
            rendered = render_with_spans(
                self.tokenizer, messages, row["template_kwargs"], marks
            )
            prompt = row["prompt"] if masks_prompt else None
            head = prompt and self._render(row, [prompt], is_prompt=True)
            return *rendered, head

        def tokenize(rendered: Sequence[Any]) -> list[Any]:
            encoded = texts.encode_with_offsets([text for text, _, _ in rendered])
            heads = iter(texts.encode([head for *_, head in rendered if head]))
            return [
                (*tokens, spans, next(heads) if head else None)
                for tokens, (_, spans, head) in zip(encoded, rendered, strict=True)
            ]

        def example(found: Any) -> Example:
            ids, offsets, spans, head = found
            trained = mask_assistant(offsets, spans)
            if head is not None:
                trained[: common_prefix_length(head, ids)] = False
            return Example(ids, trained)

        return self._each(self._each(rows, render, tokenize), example)

    def _render(
        self, row: Row, parts: Sequence[Any], *, is_prompt: bool = False
    ) -> str:
        """The text of these values; that of a prompt is open for its completion."""
        *before, last = parts
        if self.conversational:
            return render_chat(
                self.tokenizer,
                [*itertools.chain(*before, last)],
                row["template_kwargs"],
                add_generation_prompt=is_prompt,
            )
        eos = str(self.tokenizer.eos_token)
        text = "".join(before) + (last if is_prompt else _with_eos(last, eos))
        refuse_surrogates(text)
        return text

    def _each(
        self,
        rows: Sequence[Any],
        function: Callable[[Any], Any],
        together: Callable[[list[Any]], Sequence[Any]] = lambda found: found,
    ) -> list[Any]:
        """Apply `function` to each row and `together` to the list of all results.

        Returns one result per row, None for bad rows.
        """
        results: list[Any] = each_row(rows, function, self.on_bad)
        good = [index for index, result in enumerate(results) if result is not None]
        found = together([results[index] for index in good])
        for index, result in zip(good, found, strict=True):
            results[index] = result
        return results


def each_row(
    rows: Sequence[Any], function: Callable[[Any], Any], on_bad: OnBad
) -> list[Any]:
    """Apply `function` to each row; None for rows that are None or raise BadRow."""
    found: list[Any] = [None] * len(rows)
    for index, row in enumerate(rows):
        try:
            found[index] = row if row is None else function(row)
        except BadRow as bad:
            on_bad(index, str(bad))
    return found


def _with_eos(text: str, eos: str) -> str:
    return text if text.endswith(eos) else text + eos
