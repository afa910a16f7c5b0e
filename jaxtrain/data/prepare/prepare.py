"""Raw rows to a prepared data set: checked, tokenized, packed, held in flat arrays."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtrain.data.batches import pack, shared_prompt
from jaxtrain.data.batches.dataset import DataStats, PreparedDataset, TokenStore
from jaxtrain.data.rows.formats import (
    BadRow,
    RowFormat,
    RowProblems,
    detect_format,
    read_row,
)
from jaxtrain.data.rows.places import HeldRows, name_rows
from jaxtrain.data.rows.tokenize import (
    Example,
    check_tokenizer,
    tokenize_examples,
    tokenize_pairs,
    truncate_example,
    truncate_pair,
)

logger = logging.getLogger(__name__)

OBJECTIVES = ("next_token", "preference", "labeled")

Numbered = tuple[list[int], list[dict[str, Any]]]  # row numbers, canonical rows


def prepare(
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    objective: str,
    max_length: int | None,
    max_prompt_length: int | None = None,
    packing: str | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    on_bad_row: str = "error",
    kind: str = "auto",
    text_column: str = "text",
    pad_to: str = "longest",
    pad_to_multiple: int = 64,
    batch_size: int = 1000,
    difficulty_column: str | None = None,
    problems: RowProblems | None = None,
    share_prompts: bool = False,
) -> PreparedDataset:
    """Check, tokenize, truncate and pack rows into a data set of one static length.

    Args:
        rows: raw rows in any known format (see `formats`).
        objective: "next_token", "preference" or "labeled"; the last takes preference
            rows too, each as two completions.
        max_length: longest sequence in tokens; None keeps all (not with packing).
        max_prompt_length: preference rows keep only the end of a longer prompt.
        packing: None (a document a row), "bfd" (best fit, long documents cut),
            "bfd_split" (long documents split), or "wrapped" (TRL's cut stream).
        completion_only_loss, assistant_only_loss: see `tokenize_examples`.
        on_bad_row: "error" refuses the data set, "skip" leaves bad rows out.
        kind, text_column: see `detect_format`.
        pad_to: "longest" row or "max_length"; T is that, rounded up.
        pad_to_multiple: T is a multiple of this.
        batch_size: rows tokenized at once.
        difficulty_column: a column of numbers to order a curriculum by.
        problems: collects the bad rows, in place of `on_bad_row`.
        share_prompts: a preference row holds its prompt once, then both completions;
            packed ones, up to 2 * max_length tokens of such pairs.

    Raises:
        ValueError: an option that does not fit the rows; bad rows (with their count,
            first numbers and reasons); nothing left to train on.
    """
    check_options(objective, max_length, max_prompt_length, packing, pad_to)
    check_tokenizer(tokenizer)
    if not isinstance(rows, datasets.Dataset | HeldRows):
        rows = list(rows)
    row_format = detect_row_format(rows, objective, kind, text_column)
    logger.info("detected %s", row_format.describe())
    if problems is None:
        problems = RowProblems(on_bad_row, name_rows=functools.partial(name_rows, rows))
    counts = {"dropped": 0, "truncated": 0}
    prepared = prepare_as(
        row_format, rows, tokenizer, problems, counts,
        objective=objective, max_length=max_length,
        max_prompt_length=max_prompt_length, packing=packing,
        completion_only_loss=completion_only_loss,
        assistant_only_loss=assistant_only_loss, pad_to=pad_to,
        pad_to_multiple=pad_to_multiple, batch_size=batch_size,
        difficulty_column=difficulty_column, share_prompts=share_prompts,
    )  # fmt: skip
    problems.report(len(rows))
    if prepared is None:
        raise ValueError(
            f"nothing to train on: of {len(rows)} rows {problems.count} are bad and "
            f"{counts['dropped']} have no trained token within "
            f"max_length={max_length}; raise max_length, or set max_prompt_length"
        )
    logger.info("%s", prepared.stats.describe())
    return prepared


def prepare_as(
    row_format: RowFormat,
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    problems: RowProblems,
    counts: dict[str, int],
    *,
    objective: str,
    max_length: int | None,
    max_prompt_length: int | None = None,
    packing: str | None = None,
    completion_only_loss: bool | None = None,
    assistant_only_loss: bool = False,
    pad_to: str = "longest",
    pad_to_multiple: int = 64,
    batch_size: int = 1000,
    difficulty_column: str | None = None,
    share_prompts: bool = False,
    most_pairs: int = 0,
) -> PreparedDataset | None:
    """`prepare` of rows whose format is known; None where nothing is left to train on.

    The options are `prepare`'s, and were checked by `check_options`.
    Bad rows go to `problems`, which nobody reports here; `counts` gets how many rows
    were dropped and truncated.

    Args:
        most_pairs: so many preference pairs share a packed row at most; 0: any number.
    """
    difficulties = _Difficulties(difficulty_column)
    batches = _canonical_batches(rows, row_format, problems, batch_size, difficulties)
    row_values: dict[str, np.ndarray] = {}
    sources: list[int] = []  # the row that each document is of
    if objective == "preference":
        columns = _tokenize_all_pairs(
            batches, row_format, tokenizer, problems, counts, sources,
            max_length=max_length, max_prompt_length=max_prompt_length,
        )  # fmt: skip
        documents = {side: _join(columns[side]) for side in ("chosen", "rejected")}
    elif objective == "labeled":
        labels: list[bool] = []
        examples = _tokenize_all_examples(
            _unpaired(batches, row_format),
            dataclasses.replace(row_format, kind="prompt_completion"),
            tokenizer, problems, counts, sources, max_length=max_length,
            completion_only_loss=True, assistant_only_loss=False, labels=labels,
        )  # fmt: skip
        documents = {
            "completions": _join(examples),
            "mismatched": _join(mismatch_completions(examples, max_length)),
        }
        row_values["desirable"] = np.asarray(labels, np.float32)
    else:
        examples = _tokenize_all_examples(
            batches, row_format, tokenizer, problems, counts, sources,
            max_length=None if packing in ("bfd_split", "wrapped") else max_length,
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
        )  # fmt: skip
        documents = {"": _join(examples)}
    if not len(next(iter(documents.values()))[2]):
        return None
    stores = {
        side: _store(*parts, packing, max_length) for side, parts in documents.items()
    }
    if objective == "preference" and packing is not None:
        stores = _pack_together(stores, max_length, share_prompts, most_pairs)
    if packing == "bfd_split":
        sources = _split_sources(sources, documents[""][2], max_length)
    prepared = _finish(
        stores, objective, tokenizer, len(rows), problems.count, counts,
        max_length if pad_to == "max_length" else None, pad_to_multiple, max_length,
        share_prompts and objective == "preference",
    )  # fmt: skip
    prepared = dataclasses.replace(
        prepared, row_values=row_values, most_pairs=most_pairs
    )
    if difficulty_column is not None:
        store = next(iter(stores.values()))
        prepared = prepared.with_difficulty(difficulties.of_rows(store, sources))
    return prepared


def detect_row_format(
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    objective: str,
    kind: str = "auto",
    text_column: str = "text",
) -> RowFormat:
    """The format in which an objective reads these rows.

    Raises:
        ValueError: the rows are of no known format, or the objective needs another.
    """
    first: Mapping[str, Any] = next(iter(rows), {})
    columns = getattr(rows, "column_names", None) or first
    if objective == "labeled" and kind == "auto" and "label" in columns:
        kind = "labeled"  # "auto" reads such rows as prompt and completion
    row_format = detect_format(rows, kind=kind, text_column=text_column)
    takes: dict[str, tuple[str, ...]] = {
        "next_token": ("text", "prompt_completion", "messages"),
        "preference": ("preference",),
        "labeled": ("labeled", "preference"),
    }
    if row_format.kind not in takes[objective]:
        raise ValueError(
            f"the {objective} objective cannot train on {row_format.describe()}: "
            "preference (DPO) needs 'chosen' and 'rejected', labeled (KTO) needs "
            "'prompt', 'completion' and 'label', next_token (from_scratch, SFT) needs "
            "text, prompt/completion or messages"
        )
    return row_format


def mismatch_completions(
    examples: Sequence[Example], max_length: int | None
) -> list[Example]:
    """Each prompt with the completion of the next row that has another prompt.

    KTO estimates its KL term on them. The last rows go on at the first. Where all
    prompts are equal, the next row's completion is taken.
    """
    starts = [int(np.argmax(example.trained)) for example in examples]
    prompts = [e.ids[:n].tobytes() for e, n in zip(examples, starts, strict=True)]
    count = len(examples)
    partner = [(i + 1) % count for i in range(count)]
    different = [i for i in range(count) if prompts[i - 1] != prompts[i]]
    if different:
        # The first row behind each run of equal prompts.
        following = different[0]
        for i in range(count - 1, -1, -1):
            partner[i] = following
            if prompts[i - 1] != prompts[i]:
                following = i
    mixed = []
    for i, j in enumerate(partner):
        completion = examples[j].ids[starts[j] :]
        ids = np.concatenate([examples[i].ids[: starts[i]], completion])[:max_length]
        trained = np.arange(len(ids)) >= starts[i]
        mixed.append(Example(ids, trained))
    return mixed


class _Difficulties:
    """The numbers of one column, by row."""

    def __init__(self, column: str | None) -> None:
        self.column = column
        self._values: dict[int, float] = {}

    def read(self, number: int, row: Mapping[str, Any]) -> None:
        """Take note of a row's number; BadRow if it has none."""
        if self.column is None:
            return
        value = row.get(self.column)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRow(f"{self.column} is {value!r}, expected a number")
        if not math.isfinite(value):
            raise BadRow(f"{self.column} is {value!r}, expected a finite number")
        self._values[number] = float(value)

    def of_rows(self, store: TokenStore, sources: Sequence[int]) -> np.ndarray:
        """float32[rows]: means over the tokens of a row's documents."""
        values = np.asarray([self._values[number] for number in sources])
        weights = store.lengths[store.row_documents].astype(np.float64)
        sums = np.add.reduceat(
            values[store.row_documents] * weights, store.row_offsets[:-1]
        )
        totals = np.add.reduceat(weights, store.row_offsets[:-1])
        return np.asarray(sums / totals, np.float32)


def _split_sources(
    sources: list[int], lengths: np.ndarray, capacity: int | None
) -> list[int]:
    """The rows that the pieces of split documents are of."""
    assert capacity is not None
    return list(np.repeat(sources, -(-lengths // capacity)).tolist())


def _unpaired(batches: Iterable[Numbered], row_format: RowFormat) -> Iterator[Numbered]:
    """Rows of single completions with a `label`; a preference row gives two."""
    for numbers, batch in batches:
        if row_format.kind == "labeled":
            yield numbers, batch
            continue
        sides = (("chosen", True), ("rejected", False))
        rows = [
            row | {"completion": row[side], "label": label}
            for row in batch
            for side, label in sides
        ]
        yield [number for number in numbers for _ in sides], rows


def check_options(
    objective: str,
    max_length: int | None,
    max_prompt_length: int | None,
    packing: str | None,
    pad_to: str,
) -> None:
    """Raise ValueError where options of `prepare` do not fit one another."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r}: use one of {OBJECTIVES}")
    if packing is not None and packing not in pack.STRATEGIES:
        raise ValueError(f"packing={packing!r}: use one of {pack.STRATEGIES} or None")
    if objective == "labeled" and packing is not None:
        raise ValueError(f"packing={packing!r}: labeled rows are not packed, use None")
    if objective == "preference" and packing not in (None, "bfd"):
        raise ValueError(
            f"packing={packing!r}: a preference pair is never cut in pieces, use 'bfd'"
        )
    if pad_to not in ("longest", "max_length"):
        raise ValueError(f"pad_to={pad_to!r}: use 'longest' or 'max_length'")
    if max_length is None and (packing is not None or pad_to == "max_length"):
        raise ValueError(
            f"max_length=None with packing={packing!r}, pad_to={pad_to!r}: give the "
            "length of a row in tokens"
        )
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length={max_length}: a target needs at least 2 tokens")
    if max_prompt_length is None:
        return
    if objective != "preference":
        raise ValueError(
            f"max_prompt_length={max_prompt_length} acts on preference rows only: "
            "set max_length for SFT, or leave max_prompt_length unset"
        )
    if max_prompt_length < 1 or max_prompt_length >= (max_length or 1 << 62):
        raise ValueError(
            f"max_prompt_length={max_prompt_length} must lie between 1 and "
            f"max_length={max_length} - 1, to leave room for the completion"
        )


def _canonical_batches(
    rows: datasets.Dataset | Sequence[Mapping[str, Any]],
    row_format: RowFormat,
    problems: RowProblems,
    batch_size: int,
    difficulties: "_Difficulties",
) -> Iterator[Numbered]:
    """Batches of (row numbers, canonical rows); bad rows go to `problems`."""
    numbers: list[int] = []
    batch: list[dict[str, Any]] = []
    for number, row in enumerate(_raw_rows(rows, batch_size)):
        try:
            read = read_row(row, row_format)
            difficulties.read(number, row)
        except BadRow as bad:
            problems.add(number, str(bad))
            continue
        batch.append(read)
        numbers.append(number)
        if len(batch) == batch_size:
            yield numbers, batch
            numbers, batch = [], []
    if batch:
        yield numbers, batch


def _raw_rows(
    rows: datasets.Dataset | Sequence[Mapping[str, Any]], batch_size: int
) -> Iterator[Mapping[str, Any]]:
    """Rows one by one. `datasets` decodes whole batches several times faster."""
    if not isinstance(rows, datasets.Dataset):
        yield from rows
        return
    for columns in rows.iter(batch_size):
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _tokenize_all_examples(
    batches: Iterable[Numbered],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    problems: RowProblems,
    counts: dict[str, int],
    sources: list[int],
    *,
    max_length: int | None,
    completion_only_loss: bool | None,
    assistant_only_loss: bool,
    labels: list[bool] | None = None,
) -> list[Example]:
    """What is left after truncation; of each, `sources` gets the row's number."""
    kept = []
    for numbers, batch in batches:
        examples = tokenize_examples(
            batch,
            row_format,
            tokenizer,
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
            on_bad=_reporter(problems, numbers),
        )
        for number, row, example in zip(numbers, batch, examples, strict=True):
            if example is None:
                continue
            short = truncate_example(example, max_length)
            counts["dropped"] += short is None
            counts["truncated"] += short is not None and len(short.ids) < len(
                example.ids
            )
            if short is not None:
                kept.append(short)
                sources.append(number)
                if labels is not None:
                    labels.append(row["label"])
    return kept


def _tokenize_all_pairs(
    batches: Iterable[Numbered],
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    problems: RowProblems,
    counts: dict[str, int],
    sources: list[int],
    *,
    max_length: int | None,
    max_prompt_length: int | None,
) -> dict[str, list[Example]]:
    kept: dict[str, list[Example]] = {"chosen": [], "rejected": []}
    for numbers, batch in batches:
        pairs = tokenize_pairs(
            batch, row_format, tokenizer, on_bad=_reporter(problems, numbers)
        )
        for number, pair in zip(numbers, pairs, strict=True):
            if pair is None:
                continue
            short = truncate_pair(pair, max_length, max_prompt_length)
            if short is None:
                counts["dropped"] += 1
                continue
            names = ("prompt", "chosen", "rejected")
            counts["truncated"] += any(
                len(getattr(short, name)) < len(getattr(pair, name)) for name in names
            )
            for side in ("chosen", "rejected"):
                completion = getattr(short, side)
                trained = np.ones(len(short.prompt) + len(completion), bool)
                trained[: len(short.prompt)] = False
                ids = np.concatenate([short.prompt, completion])
                kept[side].append(Example(ids, trained))
            sources.append(number)
    return kept


def _reporter(problems: RowProblems, numbers: list[int]) -> Callable[[int, str], None]:
    return lambda index, reason: problems.add(numbers[index], reason)


def _join(examples: list[Example]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat tokens, flat trained flags, and the length of each document."""
    lengths = np.fromiter((len(e.ids) for e in examples), np.int64, len(examples))
    tokens = np.concatenate([np.zeros(0, np.int32), *(e.ids for e in examples)])
    trained = np.concatenate([np.zeros(0, bool), *(e.trained for e in examples)])
    return tokens, trained, lengths


def _store(
    tokens: np.ndarray,
    trained: np.ndarray,
    lengths: np.ndarray,
    packing: str | None,
    max_length: int | None,
) -> TokenStore:
    starts = np.cumsum(lengths) - lengths
    if packing == "wrapped":
        assert max_length is not None
        starts, lengths = pack.wrap_stream(len(tokens), max_length)
    elif packing == "bfd_split":
        assert max_length is not None
        starts, lengths = pack.split_documents(starts, lengths, max_length)
    if packing in ("bfd", "bfd_split"):
        assert max_length is not None
        row_offsets, row_documents = pack.pack_best_fit(lengths, max_length)
    else:
        row_documents = np.arange(len(lengths))
        row_offsets = np.arange(len(lengths) + 1)
    return TokenStore(tokens, trained, starts, lengths, row_documents, row_offsets)


def _pack_together(
    stores: dict[str, TokenStore],
    max_length: int | None,
    share_prompts: bool,
    most_pairs: int = 0,
) -> dict[str, TokenStore]:
    """Pairs packed by their longer side, so that both sides' rows hold the same.

    With shared prompts a row is as long as those two together.
    """
    assert max_length is not None
    if share_prompts:
        lengths, max_length = shared_prompt.pair_lengths(stores), 2 * max_length
    else:
        lengths = functools.reduce(np.maximum, [s.lengths for s in stores.values()])
    offsets, documents = pack.pack_best_fit(lengths, max_length)
    if most_pairs:
        offsets = pack.limit_documents(offsets, most_pairs)
    return {
        side: dataclasses.replace(store, row_documents=documents, row_offsets=offsets)
        for side, store in stores.items()
    }


def _finish(
    stores: dict[str, TokenStore],
    objective: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    bad_rows: int,
    counts: dict[str, int],
    fixed_length: int | None,
    pad_to_multiple: int,
    max_length: int | None,
    share_prompts: bool,
) -> PreparedDataset:
    if share_prompts:
        row_lengths = shared_prompt.row_lengths(stores)
        fixed_length = fixed_length and 2 * fixed_length
    else:
        row_lengths = functools.reduce(
            np.maximum, [store.row_lengths() for store in stores.values()]
        )
    # KTO's mismatched completions are only measured on, so they count nowhere.
    sides = [store for name, store in stores.items() if name != "mismatched"]
    document_lengths = functools.reduce(np.maximum, [s.lengths for s in sides])
    longest = int(row_lengths.max()) if fixed_length is None else fixed_length
    row_length = -(-longest // pad_to_multiple) * pad_to_multiple
    tokens = sum(len(s.tokens) for s in sides)
    if share_prompts:
        tokens = int(row_lengths.sum())
    slots = len(sides) * len(row_lengths) * (max_length or int(row_lengths.max()))
    stats = DataStats(
        rows=rows,
        bad_rows=bad_rows,
        dropped=counts["dropped"],
        truncated=counts["truncated"],
        packed_rows=len(row_lengths),
        tokens=tokens,
        trained_tokens=sum(_predicted(store) for store in sides),
        max_length=int(document_lengths.max()),
        mean_length=float(document_lengths.mean()),
        packing_efficiency=tokens / slots,
    )
    pad_id = tokenizer.pad_token_id
    return PreparedDataset(
        objective, stores, row_length, pad_id, stats, shares_prompts=share_prompts
    )


def _predicted(store: TokenStore) -> int:
    """Trained tokens that some position predicts: all but a document's first."""
    firsts = store.starts[store.lengths > 0]
    return int(store.trained.sum() - store.trained[firsts].sum())
