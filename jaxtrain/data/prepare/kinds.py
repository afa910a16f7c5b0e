"""The three kinds of rows that objectives train on, one class each.

A kind says which formats it reads, how a row becomes token sequences, which sides the
data set has, and how these are packed.
"""

import abc
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtrain.data.batches import pack, shared_prompt
from jaxtrain.data.batches.dataset import TokenStore
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.sequences import Sequences, write_sequences
from jaxtrain.data.rows.formats import RowFormat
from jaxtrain.data.rows.template import turn_end_id
from jaxtrain.data.rows.tokenize import (
    Example,
    OnBad,
    Pair,
    tokenize_examples,
    tokenize_pairs,
    truncate_example,
    truncate_pair,
)
from jaxtrain.record.safe_text import shown

Row = Mapping[str, Any]  # canonical, as `read_row` gives it
Sides = Mapping[str, Sequences]
Folder = str | os.PathLike[str] | None  # for temporary files; None: the system's
_BLOCK_ROWS = 1000  # sequences that are made in memory together
_ANSWERS = "answers"  # completions by themselves, before rows are cut
_Tokens = TypeVar("_Tokens", Example, Pair)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that the tokens of raw rows depend on beside the rows."""

    row_format: RowFormat
    tokenizer: PreTrainedTokenizerBase
    options: PrepareOptions

    def __post_init__(self) -> None:
        limit, end = self.options.vocab_size, self.tokenizer.eos_token_id
        if limit is None or end < limit or self.row_format.kind == "tokenized":
            return
        if not self.row_format.conversational or turn_end_id(self.tokenizer) == end:
            raise ValueError(
                f"eos_token {self.tokenizer.eos_token!r} of tokenizer"
                f" {shown(self.tokenizer.name_or_path)} has id {end}, but the model has"
                f" vocab_size = {limit}: set model.grow_vocabulary or another eos_token"
            )


@dataclasses.dataclass(frozen=True)
class Document:
    """What truncation left of one row: a sequence a side, or None if nothing trains."""

    row: Row
    sides: Mapping[str, Example] | None
    truncated: bool


class RowKind(abc.ABC):
    """What the preparation of rows asks of their kind."""

    counted: ClassVar[tuple[str, ...]]  # sides whose tokens count in `DataStats`
    row_values: ClassVar[tuple[tuple[str, str], ...]] = ()  # (batch's field, row's key)

    @abc.abstractmethod
    def tokenize(
        self, rows: Sequence[Row], recipe: Recipe, on_bad: OnBad
    ) -> Iterator[Document]:
        """The documents of canonical rows; `on_bad` is told which rows have none."""

    def pack(
        self, sides: Sides, options: PrepareOptions, scratch: Folder = None
    ) -> dict[str, TokenStore]:
        """All documents as one store a side, packed into rows."""
        return {name: make_store(found, options) for name, found in sides.items()}


class NextToken(RowKind):
    """Texts, prompts with completions, and conversations; one unnamed side."""

    counted = ("",)

    def tokenize(
        self, rows: Sequence[Row], recipe: Recipe, on_bad: OnBad
    ) -> Iterator[Document]:
        """Documents that packing cuts into pieces are not truncated."""
        options = recipe.options
        whole = options.packing in ("bfd_split", "wrapped")
        examples = tokenize_examples(
            rows,
            recipe.row_format,
            recipe.tokenizer,
            completion_only_loss=options.completion_only_loss,
            assistant_only_loss=options.assistant_only_loss,
            assistant_marks=options.assistant_marks,
            on_bad=on_bad,
        )
        examples = _known_to_the_model(examples, recipe, on_bad)
        return _truncated("", rows, examples, None if whole else options.max_length)


class Labeled(RowKind):
    """Single completions with a verdict; a preference row gives two of them."""

    counted = ("completions",)  # those that mismatch are only measured on
    row_values = (("desirable", "label"),)

    def tokenize(
        self, rows: Sequence[Row], recipe: Recipe, on_bad: OnBad
    ) -> Iterator[Document]:
        """Train on completions alone."""
        each = 1
        if recipe.row_format.kind == "preference":
            each = 2
            rows = [
                row | {"completion": row[side], "label": label}  # type: ignore[operator]
                for row in rows
                for side, label in (("chosen", True), ("rejected", False))
            ]

        def on_bad_side(index: int, reason: str) -> None:
            on_bad(index // each, reason)

        examples = tokenize_examples(
            rows,
            dataclasses.replace(recipe.row_format, kind="prompt_completion"),
            recipe.tokenizer,
            completion_only_loss=True,
            on_bad=on_bad_side,
        )
        examples = _known_to_the_model(examples, recipe, on_bad_side)
        whole = (example for example in examples if example is not None)
        cut = _truncated("completions", rows, examples, recipe.options.max_length)
        for document, example in zip(cut, whole, strict=True):
            if document.sides is not None:
                ids = example.ids[np.argmax(example.trained) :]
                answer = Example(ids, np.ones(len(ids), bool))
                sides = {**document.sides, _ANSWERS: answer}
                document = dataclasses.replace(document, sides=sides)
            yield document

    def pack(
        self, sides: Sides, options: PrepareOptions, scratch: Folder = None
    ) -> dict[str, TokenStore]:
        """Add each prompt with another row's completion."""
        sides = dict(sides)
        found, answers = sides["completions"], sides.pop(_ANSWERS)
        within = options.exchange_within
        blocks = mismatch_completions(found, answers, options.max_length, within)
        mixed = write_sequences(blocks, scratch)
        return super().pack({**sides, "mismatched": mixed}, options)


class Preference(RowKind):
    """Pairs of completions, whose documents on both sides correspond."""

    counted = ("chosen", "rejected")

    def tokenize(
        self, rows: Sequence[Row], recipe: Recipe, on_bad: OnBad
    ) -> Iterator[Document]:
        """Train on both completions, behind the same prompt."""
        options = recipe.options
        pairs = tokenize_pairs(rows, recipe.row_format, recipe.tokenizer, on_bad=on_bad)
        pairs = _known_to_the_model(pairs, recipe, on_bad)
        for row, pair in zip(rows, pairs, strict=True):
            if pair is None:
                continue
            cut = truncate_pair(pair, options.max_length, options.max_prompt_length)
            if cut is None:
                yield Document(row, None, truncated=False)
                continue
            shorter = any(
                len(getattr(cut, part.name)) < len(getattr(pair, part.name))
                for part in dataclasses.fields(Pair)
            )
            sides = {side: _join(cut, side) for side in shared_prompt.SIDES}
            yield Document(row, sides, shorter)

    def pack(
        self, sides: Sides, options: PrepareOptions, scratch: Folder = None
    ) -> dict[str, TokenStore]:
        """Pairs are packed by their longer side, so both sides' rows hold the same.

        With shared prompts, a row is as long as both sides together.
        """
        alone = dataclasses.replace(options, packing=None)
        stores = super().pack(sides, alone)
        if options.packing is None:
            return stores
        assert options.max_length is not None
        if options.share_prompts:
            lengths = shared_prompt.pair_lengths(stores)
            capacity = 2 * options.max_length
        else:
            lengths = functools.reduce(np.maximum, [s.lengths for s in stores.values()])
            capacity = options.max_length
        offsets, documents = pack.pack_best_fit(lengths, capacity)
        if options.most_pairs:
            offsets = pack.limit_documents(offsets, options.most_pairs)
        return {
            side: dataclasses.replace(
                store, row_documents=documents, row_offsets=offsets
            )
            for side, store in stores.items()
        }


KINDS: dict[str, RowKind] = {
    "next_token": NextToken(),
    "preference": Preference(),
    "labeled": Labeled(),
}


def make_store(found: Sequences, options: PrepareOptions) -> TokenStore:
    """Sequences cut and packed as the options say; their tokens stay where they are."""
    tokens, trained, lengths = found.tokens, found.trained, found.lengths
    starts = found.starts
    packing, max_length = options.packing, options.max_length or 0
    if packing == "wrapped":
        starts, lengths = pack.wrap_stream(len(tokens), max_length)
    elif packing == "bfd_split":
        starts, lengths = pack.split_documents(starts, lengths, max_length)
    if packing in ("bfd", "bfd_split"):
        row_offsets, row_documents = pack.pack_best_fit(lengths, max_length)
    else:
        row_documents = np.arange(len(lengths))
        row_offsets = np.arange(len(lengths) + 1)
    return TokenStore(tokens, trained, starts, lengths, row_documents, row_offsets)


def mismatch_completions(
    found: Sequences, answers: Sequences, max_length: int | None, within: int
) -> Iterator[Sequences]:
    """Each prompt with the completion of another row, on which KTO estimates its KL.

    The completions change places, so that the answers are the same, good and bad ones,
    as those whose rewards the term is compared with.

    Args:
        found: prompts with their own completions.
        answers: the completions alone, of which a shorter prompt leaves more.
        within: rows go round among so many, each taking the completion of the one
            before it: what TRL does in each micro-batch. 0 or 1: among all rows, and
            past those of the same prompt, as of a preference there are two.

    Yields:
        The rows in blocks.
    """
    count, starts = len(found.lengths), found.starts
    begins, ends = answers.starts, np.cumsum(answers.lengths)
    prompts = np.fromiter((np.argmax(e.trained) for e in found), np.int64, count)

    def prompt(row: int) -> np.ndarray:
        return found.tokens[starts[row] : starts[row] + prompts[row]]

    def partners() -> np.ndarray:
        rows = np.arange(count)
        if within > 1:
            first = rows // within * within
            size = np.minimum(within, count - first)
            return first + (rows - first - 1) % size
        is_new = [not np.array_equal(prompt(i - 1), prompt(i)) for i in range(1, count)]
        turns = np.flatnonzero([True, *is_new, True])
        longest = int(np.diff(turns).max(initial=1))
        return (rows - (longest if longest < count else 1)) % max(count, 1)

    def mixed(row: int, other: int) -> Example:
        completion = answers.tokens[begins[other] : ends[other]]
        ids = np.concatenate([prompt(row), completion])[:max_length]
        return Example(ids, np.arange(len(ids)) >= prompts[row])

    pairs = enumerate(partners())
    while block := list(itertools.islice(pairs, _BLOCK_ROWS)):
        yield Sequences.of([mixed(*pair) for pair in block])


def _known_to_the_model(
    found: Sequence[_Tokens | None], recipe: Recipe, on_bad: OnBad
) -> list[_Tokens | None]:
    """The same; None for rows with a token id that the model has no embedding for."""
    limit, known = recipe.options.vocab_size, list(found)
    if limit is None:
        return known
    empty = np.zeros(0, np.int32)
    ids: list[np.ndarray] = [empty if x is None else _ids_of(x) for x in found]
    flat = np.concatenate([empty, *ids])
    beyond = np.flatnonzero(flat >= limit)
    numbers = np.repeat(np.arange(len(ids)), [len(row) for row in ids])[beyond]
    for index, first in zip(*np.unique(numbers, return_index=True), strict=True):
        token = int(flat[beyond[first]])
        known[index] = None
        on_bad(
            int(index),
            f"holds {recipe.tokenizer.convert_ids_to_tokens(token)!r}, token {token},"
            f" for which the model has no embedding (vocab_size = {limit}); take it"
            " out, or set model.grow_vocabulary",
        )
    return known


def _ids_of(tokens: Example | Pair) -> np.ndarray:
    if isinstance(tokens, Example):
        return tokens.ids
    return np.concatenate([tokens.prompt, tokens.chosen, tokens.rejected])


def _truncated(
    side: str,
    rows: Sequence[Row],
    examples: Sequence[Example | None],
    max_length: int | None,
) -> Iterator[Document]:
    """Documents of one side, of the rows that are not bad."""
    for row, example in zip(rows, examples, strict=True):
        if example is None:
            continue
        cut = truncate_example(example, max_length)
        if cut is None:
            yield Document(row, None, truncated=False)
        else:
            yield Document(row, {side: cut}, len(cut.ids) < len(example.ids))


def _join(pair: Pair, side: str) -> Example:
    """The prompt and one completion, of which the completion is trained."""
    ids = np.concatenate([pair.prompt, getattr(pair, side)])
    return Example(ids, np.arange(len(ids)) >= len(pair.prompt))
