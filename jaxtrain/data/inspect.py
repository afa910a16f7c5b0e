"""Look at data before training: what was detected, what is wrong, what is trained.

    jaxtrain inspect sft
    jaxtrain inspect train.jsonl --tokenizer=Qwen/Qwen2.5-0.5B
    jaxtrain inspect train.csv --data.column_map="{prompt: Question, completion: A}"

It prints the format, the rows that cannot be used with their lines and reasons, the
lengths, and some rows as the model sees them, the trained tokens between ⟦ and ⟧ (in
green on a terminal). It exits with 1 if any row is bad.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtrain.cli.command import ConfigParser
from jaxtrain.cli.ending import run_command
from jaxtrain.config import RunConfig, default_config
from jaxtrain.config.flags import Flag, resolve_flags, split_flags
from jaxtrain.config.shipped import shipped_configs
from jaxtrain.data.batches.dataset import TokenStore
from jaxtrain.data.batches.mixture import Mixture
from jaxtrain.data.loading import (
    load_run_tokenizer,
    load_training_rows,
    options_for,
    take_kind_of,
)
from jaxtrain.data.prepare.prepare import Rows, detect_row_format, prepare
from jaxtrain.data.rows.formats import RowProblems, UnreadableRow
from jaxtrain.data.rows.own_format import format_rows
from jaxtrain.data.rows.places import name_rows
from jaxtrain.data.rows.tokenize import PreTrainedTokenizerBase
from jaxtrain.data.stream.batches import StreamRows
from jaxtrain.data.stream.source import head
from jaxtrain.record.safe_text import escape_controls

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_BAR = 40  # characters of the longest bar
_STREAM_ROWS = 10_000  # shown of a stream, which may have no end


def report(
    run: RunConfig,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    shown: int = 3,
    color: bool = False,
    vocab_size: int | None = None,
) -> tuple[list[str], int]:
    """The report on raw rows in lines, and how many rows are bad.

    Args:
        shown: rows rendered, and bad rows listed in full (at least 10 of these).
        vocab_size: the model's, if it is known: rows with other tokens are bad.

    Raises:
        ValueError: the rows are of no known format, or none of them can be used.
    """
    options = options_for(run, tokenizer, vocab_size)
    options = dataclasses.replace(options, on_bad_row="skip")
    if run.data.format_row:
        rows = format_rows(rows, run.data.format_row, run.loop.function_kwargs)
    row_format = detect_row_format(rows, options)
    problems = _Problems(rows, max(shown, 10))
    lines = [f"format: {row_format.describe()}"]
    try:
        prepared = prepare(rows, tokenizer, options, problems)
    except ValueError as error:
        if not problems.count:
            raise
        return [*lines, *problems.describe(), "", str(error)], problems.count
    lines += problems.describe()
    # Whole documents, a row each: their true lengths, and what is rendered.
    uncut = dataclasses.replace(
        options, max_length=None, max_prompt_length=None, packing=None
    )
    whole = prepare(rows, tokenizer, uncut, _Problems(rows, 0))
    duplicates = count_duplicates(rows)
    lines += [f"duplicates: {duplicates} rows are copies of an earlier one", ""]
    lines += [f"as trained: {prepared.stats.describe()}"]
    trained, tokens = prepared.stats.trained_tokens, prepared.stats.tokens
    lines.append(f"masked: {1 - trained / tokens:.1%} of the tokens are not trained")
    lines += ["", *_lengths(whole.row_lengths(), run.data.max_length)]
    for number in range(min(shown, len(whole))):
        lines += ["", f"--- row {number}"]
        for name, store in whole.stores.items():
            text = render(store, number, tokenizer, color=color)
            lines += [f"{name}: {text}" if name else text]
    return lines, problems.count


class _Problems(RowProblems):
    """Bad rows that are listed in the report, and not logged."""

    def __init__(self, rows: Rows, shown: int) -> None:
        name = functools.partial(name_rows, rows)
        super().__init__("skip", shown=shown, name_rows=name)
        self._total = len(rows)

    def report(self, total: int) -> None:
        """Say nothing; `describe` does."""

    def describe(self) -> Iterator[str]:
        """The lines of the report."""
        yield f"validation: {self.count} of {self._total} rows cannot be used"
        yield from (f"  {escape_controls(line)}" for line in self.listed())
        if self.count > len(self.first):
            yield f"  and {self.count - len(self.first)} more"
        if self.equal_count:
            places = ", ".join(self.names(self.equal))
            more = ", ..." if self.equal_count > len(self.equal) else ""
            yield f"equal: {self.equal_count} pairs have a chosen that equals rejected"
            yield f"  {places}{more}"


def render(
    store: TokenStore, row: int, tokenizer: PreTrainedTokenizerBase, *, color: bool
) -> str:
    """A row's text as its tokens decode, those that the loss predicts marked."""
    first, last = store.row_offsets[row], store.row_offsets[row + 1]
    marks = (_GREEN, _PLAIN) if color else ("⟦", "⟧")
    text = ""
    for document in store.row_documents[first:last]:
        start, length = int(store.starts[document]), int(store.lengths[document])
        ids = np.asarray(store.tokens[start : start + length])
        trained = np.array(store.trained[start : start + length])
        trained[0] = False  # nothing predicts a document's first token
        borders = np.flatnonzero(np.diff(trained)) + 1
        for run in np.split(np.arange(length), borders):
            piece = escape_controls(str(tokenizer.decode(ids[run].tolist())))
            text += f"{marks[0]}{piece}{marks[1]}" if trained[run[0]] else piece
    return text


def count_duplicates(rows: Rows) -> int:
    """Rows whose every column equals that of an earlier row; bad lines are none."""
    seen, count = set(), 0
    for row in rows:
        if isinstance(row, UnreadableRow):
            continue
        text = json.dumps(row, sort_keys=True, default=repr)
        digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=16).digest()
        count += digest in seen
        seen.add(digest)
    return count


def _lengths(lengths: np.ndarray, max_length: int) -> Iterator[str]:
    """Quantiles, and a histogram in about ten bins."""
    quantiles = np.quantile(lengths, [0, 0.5, 0.9, 0.99, 1]).astype(int)
    names = ("least", "median", "90%", "99%", "most")
    listed = ", ".join(f"{n} {q}" for n, q in zip(names, quantiles, strict=True))
    longer = int((lengths > max_length).sum())
    yield f"length in tokens: {listed}"
    yield f"longer than max_length = {max_length}: {longer} of {len(lengths)} rows"
    width = max(-(-int(lengths.max()) // 10), 1)
    counts = np.bincount((lengths - 1) // width)
    for index, count in enumerate(counts):
        bar = "#" * int(np.ceil(_BAR * count / np.max(counts)))
        yield f"  {index * width + 1:>7}-{(index + 1) * width:<7} {count:>8} {bar}"


def _run_of_file(path: str, flags: Sequence[Flag]) -> RunConfig:
    """The configuration that trains on a file, of the kind that its rows are."""
    config = default_config()
    config.data.train = path
    config, run = resolve_flags(config, flags)
    take_kind_of(next(iter(_parts(run, load_training_rows(run)).values())), config)
    return resolve_flags(config, flags)[1]


def main(arguments: Sequence[str]) -> int:
    """Print the report; 1 where a row is bad.

    Raises:
        ValueError, OSError: nothing can be said.
    """
    # For `datasets`, which is only imported for rows that it has to read.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    options, run = _read_options(arguments)
    rows = load_training_rows(run)
    named = run.model.name_or_path
    tokenizer = load_run_tokenizer(run, named, instead=options.tokenizer)
    bad = 0
    for name, part in _parts(run, rows).items():
        if isinstance(rows, Mixture | StreamRows):
            print(f"===== {name}")
        lines, count = report(
            *(run, part, tokenizer),
            shown=options.rows,
            color=options.color,
            vocab_size=None if options.tokenizer else _vocab_size(run),
        )
        print("\n".join(lines))
        bad += count
    return 1 if bad else 0


def _vocab_size(run: RunConfig) -> int | None:
    """The tokens that the model named has; None if it tells of none here, or grows."""
    file = pathlib.Path(run.model.name_or_path or "", "config.json")
    if run.model.grow_vocabulary or not file.is_file():
        return None
    with contextlib.suppress(OSError, ValueError, AttributeError):  # training tells
        config = json.loads(file.read_text("utf-8"))
        size = config.get("text_config", config).get("vocab_size")
        return size if isinstance(size, int) else None
    return None


def _read_options(arguments: Sequence[str]) -> tuple[argparse.Namespace, RunConfig]:
    """The flags, and the configuration named, or that of a file of data."""
    parser = ConfigParser(
        "inspect",
        "Look at data before training: jaxtrain inspect sft, or a file of data:\n"
        "jaxtrain inspect train.jsonl --tokenizer=Qwen/Qwen2.5-0.5B",
    )
    parser.or_data = " or data file"
    add = parser.add_argument
    add("--tokenizer", help="folder or hub name (default: the model's)")
    add("--rows", type=int, default=3, help="rows to print")
    add("--max_length", type=int, help="in tokens")
    add(
        "--color",
        action=argparse.BooleanOptionalAction,
        default=sys.stdout.isatty(),
        help="mark trained tokens by color",
    )
    if (length := parser.split(arguments)[0].max_length) is not None:
        arguments = [*arguments, f"--data.max_length={length}"]
    path = _data_path(parser, arguments)
    options, flags = parser.split(arguments)
    for key, given in {
        "data.train": path,
        "model.tokenizer_name_or_path": options.tokenizer,
    }.items():
        if given and any(flag.key == key for flag in flags):
            parser.error(f"{given} is named beside --{key}: leave one of the two out")
    if options.rows < 0:
        parser.error(f"--rows={options.rows}: give 0 or more")
    if path is not None:
        return options, _run_of_file(path, flags)
    return options, parser.read(arguments)[2]


def _data_path(parser: ConfigParser, arguments: Sequence[str]) -> str | None:
    """The argument that is a path of data and not a configuration, if there is one."""
    options, _ = parser.parse_known_args(split_flags(arguments)[1])
    named = options.config
    is_config = named is None or named in shipped_configs()
    is_config |= str(named).partition(":")[0].endswith((".py", ".yaml", ".yml"))
    return None if is_config else str(named)


def _parts(run: RunConfig, rows: Any) -> Mapping[str, Rows]:
    if isinstance(rows, Mixture):
        return {part.name: part.rows for part in rows.parts}
    if isinstance(rows, StreamRows):
        part = f"(of a stream, the first {_STREAM_ROWS} rows)"
        return {f"{s.name} {part}": head(s, _STREAM_ROWS) for s in rows.sources}
    return {str(run.data.train): rows}


if __name__ == "__main__":
    sys.exit(run_command(main))
