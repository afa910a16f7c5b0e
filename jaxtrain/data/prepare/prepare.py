"""Raw rows to a prepared data set: checked, tokenized, packed, held in flat arrays."""

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtrain.data.batches.dataset import DataStats, PreparedDataset, TokenStore
from jaxtrain.data.prepare.kinds import KINDS, Recipe, Row, Sides
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.rows.files import drop_filled
from jaxtrain.data.rows.formats import (
    BadRow,
    RowFormat,
    RowProblems,
    detect_for,
    read_row,
)
from jaxtrain.data.rows.places import name_rows
from jaxtrain.data.rows.tokenize import check_tokenizer

logger = logging.getLogger(__name__)

_DIFFICULTY = "difficulty"  # the name of a canonical row's number for a curriculum

Rows: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The documents of raw rows, and what became of the rows so far.

    `sides` has one sequence a document and side. `values` has one number a document
    for each name in `RowKind.row_values`, and its difficulty where a column has it.
    """

    sides: Sides
    values: Mapping[str, list[float]]
    stats: DataStats


def prepare(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: PrepareOptions,
    problems: RowProblems | None = None,
) -> PreparedDataset:
    """Check, tokenize, truncate and pack rows into a data set of one static length.

    Args:
        rows: raw rows in any known format (see `formats`).
        problems: collects the bad rows and does what it was made to do about them, in
            place of `options.on_bad_row`.

    Raises:
        ValueError: an option that does not fit the rows; bad rows (with their count,
            first numbers and reasons); nothing left to train on.
    """
    check_tokenizer(tokenizer)
    if not isinstance(rows, datasets.Dataset | Sequence):
        rows = list(rows)
    row_format = detect_row_format(rows, options)
    logger.info("detected %s", row_format.describe())
    if problems is None:
        problems = RowProblems(
            options.on_bad_row, name_rows=functools.partial(name_rows, rows)
        )
    recipe = Recipe(row_format, tokenizer, options)
    tokenized = tokenize(rows, recipe, problems)
    prepared = lay_out(tokenized, recipe)
    problems.report(len(rows))
    if prepared is None:
        raise _nothing_left(tokenized.stats, options)
    logger.debug("%s", prepared.stats.describe())
    return prepared


def _nothing_left(stats: DataStats, options: PrepareOptions) -> ValueError:
    """The error of rows of which none can be trained on, with what would help."""
    reasons, fixes = [], []
    if stats.bad_rows:
        reasons.append(f"{stats.bad_rows} are bad")
        fixes.append("mend the bad rows")
    if stats.dropped:
        reasons.append(
            f"{stats.dropped} have no trained token within "
            f"max_length={options.max_length}"
        )
        fixes.append("raise max_length, or set max_prompt_length")
    if not reasons:
        return ValueError("nothing to train on: there are no rows")
    return ValueError(
        f"nothing to train on: of {stats.rows} rows {' and '.join(reasons)}; "
        + ", or ".join(fixes)
    )


def detect_row_format(rows: Rows, options: PrepareOptions) -> RowFormat:
    """The format in which the options' objective reads these rows.

    Raises:
        ValueError: the rows are of no known format, or the objective needs another.
    """
    return detect_for(
        options.objective,
        rows,
        kind=options.kind,
        text_column=options.text_column,
        column_map=options.column_map,
    )


def tokenize(rows: Rows, recipe: Recipe, problems: RowProblems) -> Tokenized:
    """The documents of rows whose format is known.

    Bad rows are added to `problems`; the caller reports them.
    """
    kind, size = KINDS[recipe.options.objective], recipe.options.batch_size
    names = list(kind.row_values)
    if recipe.options.difficulty_column is not None:
        names.append((_DIFFICULTY, _DIFFICULTY))
    sides: Sides = collections.defaultdict(list)
    values: dict[str, list[float]] = {name: [] for name, _ in names}
    dropped = truncated = 0
    good = _read_rows(rows, recipe, problems)
    while batch := list(itertools.islice(good, size)):
        numbers, canonical = zip(*batch, strict=True)

        def on_bad(index: int, reason: str, numbers: Any = numbers) -> None:
            problems.add(numbers[index], reason)

        for document in kind.tokenize(canonical, recipe, on_bad):
            truncated += document.truncated
            if document.sides is None:
                dropped += 1
                continue
            for side, example in document.sides.items():
                sides[side].append(example)
            for name, key in names:
                values[name].append(float(document.row[key]))
    stats = DataStats(
        len(rows), problems.count, dropped, truncated, equal_pairs=problems.equal_count
    )
    return Tokenized(sides, values, stats)


def lay_out(tokenized: Tokenized, recipe: Recipe) -> PreparedDataset | None:
    """Documents packed into rows of one length; None where there is no document."""
    if not tokenized.sides:
        return None
    options = recipe.options
    kind = KINDS[options.objective]
    values = {name: np.asarray(x, np.float32) for name, x in tokenized.values.items()}
    values.pop(_DIFFICULTY, None)
    prepared = PreparedDataset(
        options.objective,
        kind.pack(tokenized.sides, options),
        row_length=0,  # told below
        pad_id=recipe.tokenizer.pad_token_id,
        stats=tokenized.stats,
        row_values=values,
        shares_prompts=options.share_prompts and options.objective == "preference",
        most_pairs=options.most_pairs,
    )
    lengths = prepared.row_lengths()
    longest = int(lengths.max())
    if options.pad_to == "max_length":
        longest = (options.max_length or 0) * (1 + prepared.shares_prompts)
    return dataclasses.replace(
        prepared,
        row_length=-(-longest // options.pad_to_multiple) * options.pad_to_multiple,
        stats=tokenized.stats + _count(prepared, lengths, options),
        difficulty=_difficulty_of_rows(tokenized, prepared, options),
    )


def _read_rows(
    rows: Rows, recipe: Recipe, problems: RowProblems
) -> Iterator[tuple[int, Row]]:
    """Numbers of rows and canonical rows; bad rows go to `problems`."""
    column = recipe.options.difficulty_column
    for number, row in enumerate(_raw_rows(rows, recipe.options.batch_size)):
        try:
            read = read_row(row, recipe.row_format)
            if column is not None:
                read |= {_DIFFICULTY: _read_number(row, column)}
        except BadRow as bad:
            problems.add(number, str(bad))
        else:
            problems.note_equal(number, read)
            yield number, read


def _raw_rows(rows: Rows, batch_size: int) -> Iterator[Mapping[str, Any]]:
    """Rows one by one. `datasets` decodes whole batches several times faster."""
    if not isinstance(rows, datasets.Dataset):
        yield from rows
        return
    for columns in rows.iter(batch_size):
        for values in zip(*columns.values(), strict=True):
            yield drop_filled(dict(zip(columns, values, strict=True)))


def _read_number(row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    if isinstance(value, str):  # a cell of a csv file
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{column} is {value!r}, expected a number")
    if not math.isfinite(value):
        raise BadRow(f"{column} is {value!r}, expected a finite number")
    return float(value)


def _difficulty_of_rows(
    tokenized: Tokenized, prepared: PreparedDataset, options: PrepareOptions
) -> np.ndarray | None:
    """float32[rows]: means over the tokens of a row's documents; None: not known."""
    if _DIFFICULTY not in tokenized.values:
        return None
    store = next(iter(prepared.stores.values()))
    values = np.asarray(tokenized.values[_DIFFICULTY])
    if options.packing == "bfd_split":  # the store has the pieces of documents
        (examples,) = tokenized.sides.values()
        lengths = np.asarray([len(example.ids) for example in examples], np.int64)
        values = np.repeat(values, -(-lengths // (options.max_length or 1)))
    weights = store.lengths[store.row_documents].astype(np.float64)
    firsts = store.row_offsets[:-1]
    sums = np.add.reduceat(values[store.row_documents] * weights, firsts)
    return np.asarray(sums / np.add.reduceat(weights, firsts), np.float32)


def _count(
    prepared: PreparedDataset, lengths: np.ndarray, options: PrepareOptions
) -> DataStats:
    """What the documents became: rows of these `lengths` in tokens."""
    sides = [prepared.stores[name] for name in KINDS[options.objective].counted]
    of_documents = functools.reduce(np.maximum, [side.lengths for side in sides])
    longest = options.max_length or int(lengths.max())
    return DataStats(
        packed_rows=len(lengths),
        tokens=(
            int(lengths.sum())
            if prepared.shares_prompts
            else sum(len(side.tokens) for side in sides)
        ),
        trained_tokens=sum(_predicted(side) for side in sides),
        slots=len(sides) * len(lengths) * longest,
        documents=len(of_documents),
        summed_lengths=int(of_documents.sum()),
        max_length=int(of_documents.max()),
    )


def _predicted(store: TokenStore) -> int:
    """Trained tokens that some position predicts: all but a document's first."""
    firsts = store.starts[store.lengths > 0]
    return int(store.trained.sum() - store.trained[firsts].sum())
