"""Texts to token ids, many in one call of the tokenizer.

Texts of one row that begin alike, as a prompt and the same prompt with its completion,
share the tokens of their beginning: it is cut off before a special token and tokenized
once. The cut changes no token, because a fast tokenizer first finds the special tokens
in the raw text and then tokenizes what stands between them, each piece by itself. It is
made only where that is certain (`_cuts_of`); elsewhere every text is tokenized whole.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import transformers
from transformers import PreTrainedTokenizerBase

from jaxtrain.record.safe_text import cut, shown

_WITH_OFFSETS = 128  # texts


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Texts to int32 ids.

    Attributes:
        add_special_tokens: whether the tokenizer adds its own (BOS), as it does around
            plain texts and must not around rendered conversations.
    """

    tokenizer: PreTrainedTokenizerBase
    add_special_tokens: bool

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32[tokens] of each text."""
        backend = _plain_backend(self.tokenizer)
        if backend is None:
            return _as_arrays(self._call(texts)["input_ids"])
        # What the tokenizer calls too; this leaves out what nobody reads: the places of
        # tokens in the text, and a dictionary a row.
        with self._own_errors():
            found = backend.encode_batch_fast(
                list(texts), add_special_tokens=self.add_special_tokens
            )
        return _as_arrays([encoding.ids for encoding in found])

    def encode_alike(self, rows: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
        """int32[tokens] of each text of each row; what they begin with, once a row."""
        cuts = () if self.add_special_tokens else _cuts_of(self.tokenizer)
        places = [_last_cut(texts, cuts) for texts in rows]
        heads = [texts[0][:at] for texts, at in zip(rows, places, strict=True) if at]
        tails = [
            text[at:] for texts, at in zip(rows, places, strict=True) for text in texts
        ]
        encoded = iter(self.encode([*heads, *tails]))
        shared = [next(encoded) if at else None for at in places]
        return [
            [
                next(encoded) if head is None else np.append(head, next(encoded))
                for _ in texts
            ]
            for texts, head in zip(rows, shared, strict=True)
        ]

    def encode_with_offsets(
        self, texts: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """int32[tokens] and int32[tokens, 2] of each text: ids, and their characters.

        Raises:
            NotImplementedError: the tokenizer is written in Python.
        """
        # A place in the text is a tuple of two at first, which is large: few at a time.
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for first in range(0, len(texts), _WITH_OFFSETS):
            encoded = self._call(
                texts[first : first + _WITH_OFFSETS], return_offsets_mapping=True
            )
            ids = _as_arrays(encoded["input_ids"])
            pairs = itertools.chain.from_iterable(
                itertools.chain.from_iterable(encoded["offset_mapping"])
            )
            count = sum(map(len, ids))
            offsets = np.fromiter(pairs, np.int32, 2 * count).reshape(count, 2)
            found += zip(ids, _split_like(offsets, ids), strict=True)
        return found

    def _call(self, texts: Sequence[str], **options: Any) -> Any:
        if not texts:
            return {"input_ids": []}
        with self._own_errors():
            return self.tokenizer(
                list(texts),
                add_special_tokens=self.add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # lengths are cut later: no warning about the limit
                **options,
            )

    @contextlib.contextmanager
    def _own_errors(self) -> Iterator[None]:
        """Turn what the tokenizers library raises, a bare Exception, into ValueError.

        A file may name an unknown token that its vocabulary lacks, which the library
        notices at the first text that needs it.
        """
        try:
            yield
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise ValueError(
                f"the tokenizer {shown(self.tokenizer.name_or_path)} cannot encode a"
                f" text ({cut(str(error))}); mend its tokenizer.json"
            ) from error


def _as_arrays(rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Views of one array: numpy converts many lists in one pass faster than each."""
    flat = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
    return _split_like(flat, rows)


def _split_like(flat: np.ndarray, rows: Sequence[Any]) -> list[np.ndarray]:
    ends = itertools.accumulate(map(len, rows), initial=0)
    return [flat[start:stop] for start, stop in itertools.pairwise(ends)]


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any | None:
    """The `tokenizers.Tokenizer` that alone makes the tokens of a whole text; or None.

    Some classes look at the text before it, and some have no such thing.
    """
    if not tokenizer.is_fast or getattr(tokenizer, "split_special_tokens", False):
        return None
    if any(_overrides(tokenizer, method) for method in ("__call__", "_encode_plus")):
        return None
    backend = tokenizer.backend_tokenizer
    cuts = backend.truncation or backend.padding or backend.encode_special_tokens
    return None if cuts else backend


def _cuts_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Special tokens in front of which a text may be cut without changing its tokens.

    They are found in the raw text, and no other added token can reach over the cut:
    none overlaps them, takes in the white space at the cut, or looks at its neighbours.
    """
    if _plain_backend(tokenizer) is None:
        return ()
    added = list(tokenizer.added_tokens_decoder.values())
    if any(token.single_word for token in added):
        return ()
    return tuple(
        token.content
        for token in added
        if token.special
        and not token.normalized
        and token.content.strip() == token.content
        and not any(_reaches_over(other, token.content) for other in added)
    )


def _overrides(tokenizer: PreTrainedTokenizerBase, method: str) -> bool:
    ours, plain = type(tokenizer), transformers.PreTrainedTokenizerFast
    return getattr(ours, method, None) is not getattr(plain, method, None)


def _reaches_over(other: Any, content: str) -> bool:
    """Whether a match of `other` may hold a character before `content` and one of it.

    Or white space before it.
    """
    text = other.content
    if other.lstrip and (text.startswith(content) or content.startswith(text)):
        return True
    endings = (text[first:] for first in range(1, len(text)))
    return any(end.startswith(content) or content.startswith(end) for end in endings)


def _last_cut(texts: Sequence[str], cuts: Sequence[str]) -> int:
    """Where the last such token starts that all texts have in common; 0: nowhere."""
    if not cuts:
        return 0
    shared = min(_common_prefix(texts[0], text) for text in texts)
    return max(0, *(texts[0].rfind(cut, 0, shared) for cut in cuts))


def _common_prefix(left: str, right: str) -> int:
    """How many characters two texts begin with alike, by halving."""
    low, high = 0, min(len(left), len(right))
    if left[:high] == right[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle
    return low
