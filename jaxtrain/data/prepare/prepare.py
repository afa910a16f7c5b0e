"""Raw rows to a prepared data set: checked, tokenized, packed, held in flat arrays."""

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtrain.data.batches.dataset import DataStats, PreparedDataset, TokenStore
from jaxtrain.data.prepare.chunks import DIFFICULTY, value_names
from jaxtrain.data.prepare.kinds import KINDS, Folder, Recipe, Sides
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.sequences import SequenceWriter
from jaxtrain.data.prepare.workers import ALONE, Resources, make_chunks
from jaxtrain.data.rows.formats import RowFormat, RowProblems, detect_for
from jaxtrain.data.rows.hf_datasets import Dataset, is_data_set
from jaxtrain.data.rows.places import name_rows
from jaxtrain.data.rows.tokenize import check_tokenizer

logger = logging.getLogger(__name__)

Rows: TypeAlias = Dataset | Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The documents of raw rows, and what became of the rows so far.

    `sides` has one sequence a document and side. `values` has one number a document
    for each name in `RowKind.row_values`, and its difficulty where a column has it.
    """

    sides: Sides
    values: Mapping[str, np.ndarray]
    stats: DataStats


def prepare(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: PrepareOptions,
    problems: RowProblems | None = None,
    resources: Resources = ALONE,
) -> PreparedDataset:
    """Check, tokenize, truncate and pack rows into a data set of one static length.

    Tokens of many rows are in unnamed files mapped into memory, which end with it.

    Args:
        rows: raw rows in any known format (see `formats`).
        problems: collects the bad rows and does what it was made to do about them, in
            place of `options.on_bad_row`.
        resources: how many processes take part, which changes nothing in the result.

    Raises:
        ValueError: an option that does not fit the rows; bad rows (with their count,
            first numbers and reasons); nothing left to train on.
    """
    check_tokenizer(tokenizer)
    if not (is_data_set(rows) or isinstance(rows, Sequence)):
        rows = list(rows)
    row_format = detect_row_format(rows, options)
    logger.info("detected %s", row_format.describe())
    if problems is None:
        problems = RowProblems(
            options.on_bad_row, name_rows=functools.partial(name_rows, rows)
        )
    recipe = Recipe(row_format, tokenizer, options)
    tokenized = tokenize(rows, recipe, problems, resources)
    prepared = lay_out(tokenized, recipe, resources.scratch)
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
        of_pairs = options.objective == "preference"
        other = "set max_prompt_length" if of_pairs else "shorten the prompts"
        fixes.append(f"raise max_length, or {other}")
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


def tokenize(
    rows: Rows, recipe: Recipe, problems: RowProblems, resources: Resources = ALONE
) -> Tokenized:
    """The documents of rows whose format is known.

    Bad rows are added to `problems`, in order; the caller reports them.
    """
    sides: dict[str, SequenceWriter] = {}
    values: dict[str, list[np.ndarray]] = {name: [] for name, _ in value_names(recipe)}
    dropped = truncated = 0
    for chunk in make_chunks(rows, recipe, resources):
        for side, block in chunk.sides.items():
            if side not in sides:
                sides[side] = SequenceWriter(resources.scratch)
            sides[side].append(block)
        for name, found in chunk.values.items():
            values[name].append(found)
        for number, reason in chunk.problems:
            problems.add(number, reason)
        for number in chunk.equal:
            problems.add_equal(number)
        dropped += chunk.dropped
        truncated += chunk.truncated
    return Tokenized(
        {side: writer.finish() for side, writer in sides.items()},
        {name: np.concatenate(found) for name, found in values.items() if found},
        DataStats(
            len(rows),
            problems.count,
            dropped,
            truncated,
            equal_pairs=problems.equal_count,
        ),
    )


def lay_out(
    tokenized: Tokenized, recipe: Recipe, scratch: Folder = None
) -> PreparedDataset | None:
    """Documents packed into rows of one length; None where there is no document.

    `scratch` is a folder for temporary files.
    """
    if not tokenized.sides:
        return None
    options = recipe.options
    kind = KINDS[options.objective]
    values = {name: np.asarray(x, np.float32) for name, x in tokenized.values.items()}
    values.pop(DIFFICULTY, None)
    prepared = PreparedDataset(
        options.objective,
        kind.pack(tokenized.sides, options, scratch),
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


def _difficulty_of_rows(
    tokenized: Tokenized, prepared: PreparedDataset, options: PrepareOptions
) -> np.ndarray | None:
    """float32[rows]: means over the tokens of a row's documents; None: not known."""
    if DIFFICULTY not in tokenized.values:
        return None
    store = next(iter(prepared.stores.values()))
    values = tokenized.values[DIFFICULTY]
    if options.packing == "bfd_split":  # the store has the pieces of documents
        (found,) = tokenized.sides.values()
        values = np.repeat(values, -(-found.lengths // (options.max_length or 1)))
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
