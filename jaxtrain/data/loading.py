"""The rows and the tokenizer of a run's configuration, and rows prepared as it says."""

import dataclasses
import functools
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

from ml_collections import ConfigDict

from jaxtrain import assets
from jaxtrain.config import RunConfig, eval_sets
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.batches.mixture import (
    Mixture,
    Part,
    join,
    parse_mixture,
    rows_per_epoch,
)
from jaxtrain.data.prepare.cache import prepare_cached
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import Rows, prepare
from jaxtrain.data.prepare.workers import Resources, usable_cores
from jaxtrain.data.rows.columns import make_column_map
from jaxtrain.data.rows.folders import looks_local
from jaxtrain.data.rows.formats import detect_format
from jaxtrain.data.rows.hf_datasets import IterableDataset, is_stream
from jaxtrain.data.rows.marks import AssistantMarks
from jaxtrain.data.rows.own_format import format_rows
from jaxtrain.data.rows.source import load_rows
from jaxtrain.data.rows.tokenize import (
    PreTrainedTokenizerBase,
    highest_id,
    load_tokenizer,
)
from jaxtrain.data.stream.batches import (
    StreamDataset,
    StreamRows,
    StreamSizes,
    prepare_stream,
)
from jaxtrain.data.stream.source import HubSource, head, open_stream
from jaxtrain.record.safe_text import shown

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
AnyRows: TypeAlias = Rows | Mixture | StreamRows | IterableDataset


def load_training_rows(
    run: RunConfig, path: str | os.PathLike[str] | None = None
) -> AnyRows:
    """Load raw rows from `path`, else from `data.train`, else the embedded ones.

    `data.max_train_rows` applies to each data set of a mixture separately.
    """
    data = run.data
    parts = parse_mixture(os.fspath(path) if path else data.train)
    if data.streaming:
        if parts is None:
            name = os.fspath(path or str(data.train)) or str(_embedded(run, False))
            parts = ((name, 1.0),)
        sources = (
            open_stream(name, split=data.train_split, max_rows=data.max_train_rows)
            for name, _ in parts
        )
        return StreamRows(tuple(sources), tuple(weight for _, weight in parts))
    load = functools.partial(_load, run, split=data.train_split, evaluation=False)
    if parts is None:
        return load(path or str(data.train))
    return Mixture(tuple(Part(name, load(name), weight) for name, weight in parts))


def load_evaluation_rows(
    run: RunConfig, path: str | os.PathLike[str] | None = None
) -> Rows | dict[str, Rows] | None:
    """Load raw evaluation rows from `path` or `data.eval`.

    Several sets give a dict of rows by name. The result is None if there are training
    data but no evaluation data. The rows are held in memory and never streamed: of a
    stream from the hub, the first `data.max_eval_rows` are read.
    """
    source = path or run.data.eval
    if isinstance(source, dict):
        split = run.data.eval_split or "eval"
        return {
            name: _load(run, each, split=split, evaluation=True)
            for name, each in source.items()
        }
    if not source and run.data.train:
        if run.data.eval_split is None:
            return None
        if not isinstance(run.data.train, str) or parse_mixture(run.data.train):
            raise ValueError(
                f"data.eval_split = {run.data.eval_split!r}: data.train is a mixture, "
                "so it is not clear which data set is meant; set data.eval"
            )
        source = run.data.train
    return _load(run, source, split=run.data.eval_split or "eval", evaluation=True)


def prepare_rows(
    run: RunConfig,
    rows: AnyRows,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None = None,
) -> PreparedDataset | StreamDataset:
    """Check and tokenize raw rows for this run's objective, and log a summary.

    For a stream this determines only the format; its rows are checked as they arrive.

    Args:
        vocab_size: size of the model's vocabulary; rows with higher token ids are bad.

    Raises:
        ValueError: bad rows, each by number and reason (`data.on_bad_row: error`).
    """
    if is_stream(rows):
        if not run.data.streaming:
            raise ValueError(
                "data.streaming = False: an IterableDataset is a stream; set it"
                " true, and training.max_steps"
            )
        source = HubSource("train_dataset", rows, run.data.max_train_rows)
        rows = StreamRows((source,))
    elif not isinstance(rows, StreamRows | Mixture):
        rows = _hold(rows)
    options = options_for(run, tokenizer, vocab_size)
    if isinstance(rows, Mixture):
        return _prepare_mixture(run, rows, tokenizer, options)
    if not isinstance(rows, StreamRows):
        return _prepare_held(run, rows, tokenizer, options)
    if run.data.packing is False:
        logger.info(
            "data.packing = False: rows of a stream are padded to data.max_length = %d "
            "tokens, because the longest is not known",
            run.data.max_length,
        )
    sizes = StreamSizes(run.data.stream_window_rows, run.data.shuffle_buffer_size)
    return prepare_stream(rows, tokenizer, options, sizes)


def options_for(
    run: RunConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None
) -> PrepareOptions:
    """The run's, with the vocabulary of its model where a row may go beyond it."""
    options = prepare_options(run)
    if vocab_size is not None and highest_id(tokenizer) >= vocab_size:
        options = dataclasses.replace(options, vocab_size=vocab_size)
    return options


def _hold(rows: Any) -> Rows:
    """Rows that can be read again.

    Raises:
        ValueError: they are a text, or a mapping such as a DatasetDict or a DataFrame.
    """
    if isinstance(rows, str | bytes | os.PathLike):
        raise ValueError(
            f"the rows are the text {shown(rows)}: name a file in data.train"
        )
    if isinstance(rows, Mapping):
        raise ValueError(f"the rows are a mapping: give one of {shown([*rows])}")
    if hasattr(rows, "iloc"):
        raise ValueError('the rows are a DataFrame: give frame.to_dict("records")')
    return list(rows) if isinstance(rows, Iterator) else rows


def load_run_tokenizer(
    run: RunConfig, model: str | None = None, *, instead: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the run names, else its model's, else the embedded one.

    Args:
        model: the model's folder or hub name, if it has one.
        instead: a folder or hub name that is used in preference to all of these.

    Raises:
        ValueError: it cannot be loaded.
    """
    named = instead or run.model.tokenizer_name_or_path or model
    return load_tokenizer(
        named or str(assets.asset_path(assets.TOKENIZER)),
        revision=None if instead else run.model.revision,
        trust_remote_code=run.model.trust_remote_code,
        chat_template=run.data.chat_template,
    )


def take_kind_of(rows: Rows, config: ConfigDict) -> None:
    """Set the training type and objective in `config` that fit this kind of rows.

    Raises:
        ValueError: the kind of the rows is not recognized.
    """
    row_format = detect_format(
        rows,
        text_column=config.data.text_column,
        column_map=make_column_map(config.data.column_map),
    )
    columns = {name for row in itertools.islice(rows, 100) for name in row}
    columns.update(name for name, _ in row_format.column_map)
    if row_format.kind == "preference":
        config.training.training_type = "dpo"
    elif row_format.kind == "prompt_completion" and "label" in columns:
        config.training.training_type = "dpo"
        config.training.objective = "kto"


def prepare_evaluation_rows(
    sets: _T | Mapping[str, _T] | None,
    prepare_set: Callable[[_T], PreparedDataset | StreamDataset],
) -> dict[str, PreparedDataset]:
    """Prepare the evaluation sets, one after another, and return them by name.

    Args:
        sets: the rows of one set, which gets the name "", or several sets by name, or
            None for no set.
        prepare_set: the function that prepares the rows of one set.

    Raises:
        ValueError: a set is a stream or cannot be prepared, or a name cannot be part
            of a metric's name.
    """
    named = eval_sets.by_name(sets)
    if "" not in named and named and (problem := eval_sets.find_problem(named)):
        raise ValueError(f"the evaluation sets {', '.join(map(str, named))}: {problem}")
    prepared = {}
    for name, rows in named.items():
        try:
            ready = prepare_set(rows)
        except ValueError as error:
            if not name:
                raise
            raise ValueError(f"evaluation set {name!r}: {error}") from error
        if isinstance(ready, StreamDataset):
            raise ValueError(
                "the evaluation rows are a stream, which has no end: give a list of"
                f" rows, or their path in {eval_sets.key_of(name)}"
            )
        prepared[name] = ready
    return prepared


def _prepare_held(
    run: RunConfig,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    options: PrepareOptions,
) -> PreparedDataset:
    if run.data.format_row:
        rows = format_rows(rows, run.data.format_row, run.loop.function_kwargs)
    resources = Resources(run.data.dataset_num_proc or usable_cores())
    if run.data.cache:
        folder = run.data.cache_dir
        return prepare_cached(rows, tokenizer, options, folder, resources)
    return prepare(rows, tokenizer, options, resources=resources)


def prepare_options(run: RunConfig) -> PrepareOptions:
    """Collect the options of this configuration that concern preparing rows."""
    packing = "bfd_split" if run.training_type == "from_scratch" else "bfd"
    by_column = run.curriculum.enabled and run.curriculum.column
    # Rows that are shuffled meet others in a micro-batch.
    meets = run.objective_row.row_kind == "labeled" and not run.data.shuffle
    return PrepareOptions(
        objective=run.objective_row.row_kind,
        max_length=run.data.max_length,
        max_prompt_length=run.dpo.max_prompt_length if run.dpo else None,
        packing=packing if run.data.packing is True else None,
        completion_only_loss=run.data.completion_only_loss,
        assistant_only_loss=run.data.assistant_only_loss,
        assistant_marks=AssistantMarks(
            run.data.train_on_turns,
            run.data.train_on_thinking,
            run.data.preserve_thinking,
        ),
        on_bad_row=run.data.on_bad_row,
        kind=run.data.format,
        text_column=run.data.text_column,
        column_map=make_column_map(run.data.column_map),
        difficulty_column=run.curriculum.column if by_column else None,
        share_prompts=run.data.share_prompts,
        exchange_within=run.loop.per_device_train_batch_size if meets else 0,
    )


def _prepare_mixture(
    run: RunConfig,
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    options: PrepareOptions,
) -> PreparedDataset:
    prepared = []
    for part in mixture.parts:
        try:
            prepared.append(_prepare_held(run, part.rows, tokenizer, options))
        except ValueError as error:
            raise ValueError(f"{part.name}: {error}") from error
    joined = join(prepared, [part.weight for part in mixture.parts])
    quotas = rows_per_epoch(joined.parts)
    for part, data, quota in zip(mixture.parts, prepared, quotas, strict=True):
        logger.info(
            "mixture: %s gives %d of %d rows of an epoch (%.1f%%), %.2f times its %d",
            part.name, quota, len(joined), 100 * quota / len(joined),
            quota / len(data), len(data),
        )  # fmt: skip
    return joined


def _load(
    run: RunConfig, path: str | os.PathLike[str], *, split: str, evaluation: bool
) -> Rows:
    max_rows = run.data.max_eval_rows if evaluation else run.data.max_train_rows
    name = os.fspath(path or _embedded(run, evaluation))
    # An address of a bucket looks local too.
    local = pathlib.Path(name).expanduser().exists() or looks_local(name)
    if run.data.streaming and not local:
        return head(open_stream(name, split=split, max_rows=max_rows), max_rows)
    rows = load_rows(name, split=split, max_rows=max_rows)
    if not len(rows):
        raise ValueError(f"{name} holds no row")
    return rows


def _embedded(run: RunConfig, evaluation: bool) -> os.PathLike[str]:
    if run.data.text_column != "text":
        raise ValueError(
            f"data.text_column = {run.data.text_column!r} has no effect: data.train is"
            " unset, and the data that come with jaxtrain have no such column; set"
            " data.train too, or remove it"
        )
    kind = "next_token" if run.training_type == "from_scratch" else "sft"
    if run.objective_row.row_kind != "next_token":
        kind = "preference"  # for KTO, each as two completions
    return assets.asset_path(assets.DATA[kind][evaluation])
