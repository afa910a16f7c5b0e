"""Batches of streamed rows, made ahead by a thread; their state is exact.

The global batch is dealt out to shares, one a data-parallel device: each fills its own
columns from its own part of the rows. A process holds neighbouring shares, so batches
do not depend on the number of processes, nor on that of worker processes.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from jaxtrain.batch import AnyBatch
from jaxtrain.data.batches.dataset import ROW_MULTIPLE, DataStats, PreparedDataset
from jaxtrain.data.batches.gather import gather_rows
from jaxtrain.data.batches.layout import RowShape
from jaxtrain.data.batches.pipeline import (
    BatchShape,
    PackedRows,
    Reading,
    check_identity,
    describe_order,
)
from jaxtrain.data.prepare.kinds import Recipe
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import detect_row_format
from jaxtrain.data.rows.formats import RowFormat
from jaxtrain.data.rows.tokenize import check_tokenizer
from jaxtrain.data.stream.packing import StepPacking
from jaxtrain.data.stream.producer import Producer, run_window
from jaxtrain.data.stream.source import Share, Source, State, head
from jaxtrain.data.stream.windows import BlockReader, Lane, WindowReader, make_window

logger = logging.getLogger(__name__)

_DETECT_ROWS = 100  # among which the first good one tells the format
_KEPT_STATES = 32  # of the last steps: more than are ever read ahead
_SHOWN_BAD_ROWS = 5


class BadRowsError(ValueError):
    """Rows of a stream that cannot be used, by file, line and reason."""


@dataclasses.dataclass(frozen=True)
class StreamRows:
    """Raw rows that are read as a stream: sources and their weights."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True)
class StreamSizes:
    """How many raw rows are taken together.

    `window_rows` are tokenized and packed together. `shuffle_buffer_size` rows are
    shuffled together, over all shares; at least a window in each.
    """

    window_rows: int = 1000
    shuffle_buffer_size: int = 10_000


@dataclasses.dataclass(frozen=True)
class StreamDataset:
    """A stream that can be trained on: what its rows are, and how they are prepared."""

    rows: StreamRows
    recipes: tuple[Recipe, ...]  # one a source
    options: PrepareOptions
    sizes: StreamSizes

    @property
    def row_length(self) -> int:
        """Tokens of every row (T), for lengths are not known in advance."""
        longest = (self.options.max_length or 0) * (1 + self.options.share_prompts)
        return -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE

    @property
    def packed(self) -> bool:
        """Whether a window's rows may hold more than one document."""
        return self.options.packing is not None

    def without_shared_prompts(self) -> "StreamDataset":
        """The same pairs, chosen and rejected each in rows of their own."""
        options = dataclasses.replace(self.options, share_prompts=False)
        recipes = [dataclasses.replace(each, options=options) for each in self.recipes]
        return dataclasses.replace(self, options=options, recipes=tuple(recipes))

    @property
    def fingerprint(self) -> str:
        """Hash of the files' names and sizes, the tokenizer and the options."""
        # Checkpoints hold it: what enters, and in which form, must stay as it is.
        options = dataclasses.asdict(self.options)
        elsewhere = ["on_bad_row", "kind", "text_column", "difficulty_column"]
        elsewhere.append("vocab_size")
        # keys that earlier versions had not
        later = ("most_pairs", "column_map", "exchange_within")
        elsewhere += [name for name in later if not options[name]]
        items = sorted((k, v) for k, v in options.items() if k not in elsewhere)
        described = [
            [source.identity() for source in self.rows.sources],
            self.rows.weights,
            [[repr(recipe.row_format), items] for recipe in self.recipes],
            _describe_tokenizer(self.recipes[0].tokenizer),
        ]
        text = json.dumps(described, default=str)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def prepare_stream(
    rows: StreamRows,
    tokenizer: PreTrainedTokenizerBase,
    options: PrepareOptions,
    sizes: StreamSizes | None = None,
) -> StreamDataset:
    """Tell the rows' format by the first of them; read nothing else yet.

    A curriculum's `difficulty_column` does not act, and rows are padded to
    `max_length`.

    Raises:
        ValueError: the rows are of no known format, or not one for the objective.
    """
    sizes = sizes or StreamSizes()
    options = dataclasses.replace(
        options,
        difficulty_column=None,
        pad_to="max_length",
        pad_to_multiple=ROW_MULTIPLE,
        batch_size=sizes.window_rows,
    )
    if options.objective == "preference" and options.packing is not None:
        # Batches have one shape, so it is settled before the rows are known.
        most_pairs = max((options.max_length or 0) // 16, 2)
        options = dataclasses.replace(options, most_pairs=most_pairs)
    check_tokenizer(tokenizer)
    recipes = []
    for source in rows.sources:
        row_format = _detect(source, options)
        logger.info("detected %s in %s", row_format.describe(), source.name)
        recipes.append(Recipe(row_format, tokenizer, options))
    return StreamDataset(rows, tuple(recipes), options, sizes)


def _detect(source: Source, options: PrepareOptions) -> RowFormat:
    try:
        return detect_row_format(head(source, _DETECT_ROWS), options)
    except ValueError as error:
        raise ValueError(f"{source.name}: {error}") from error


class StreamIterator(Iterator[AnyBatch]):
    """Batches of steps [step, num_steps) of a stream, [A, B, T]."""

    def __init__(
        self,
        dataset: StreamDataset,
        shape: BatchShape,
        reading: Reading,
        *,
        num_steps: int,
        shares: int | None = None,
        rows: PackedRows | None = None,
    ) -> None:
        """Take up the rows of this process; read nothing yet.

        Args:
            rows: pack the examples of each micro-batch so. `shape` is then of all
                processes' examples, and each process reads all shares, for only who
                knows all lengths knows the shape of the rows.
            shares: how many shares the rows are dealt out to, a multiple of the
                processes that divides a micro-batch; one a process if None. Batches
                depend on it, and not on the number of processes.

        Raises:
            ValueError: `shares` does not fit.
        """
        count, examples = shape.process_count, shape.global_micro_batch_rows
        shares = count if shares is None else shares
        if shares % count or examples % shares:
            raise ValueError(
                f"shares={shares} must be a multiple of process_count={count} "
                f"and divide a micro-batch of {examples} rows"
            )
        self.num_steps = num_steps
        self.step = 0
        self._dataset = dataset
        self._reading, self._shares = reading, shares
        self._accumulation = shape.accumulation_steps
        held = shares // count
        first = shape.process_index * held
        self._held = range(first, first + held)
        self._rows_each = shape.micro_batch_rows // held
        self._identity = describe_order(shape, reading) | {
            "shuffle_buffer_size": dataset.sizes.shuffle_buffer_size,
            "stream_window_rows": dataset.sizes.window_rows,
            "row_length": dataset.row_length,
            "shares": shares,
            "fingerprint": dataset.fingerprint,
        }
        self._rows = rows
        self._row_shapes: list[list[int]] | None = None  # where batches are packed
        if rows is not None:
            self._identity["packing"] = "batch"
        self._empty: list[AnyBatch] = []
        self._lane_states: dict[str, State] = {}  # at _first_step
        self._first_step = 0
        self._states: dict[int, _Snapshot] = {}
        self._producer: Producer | None = None
        self._bad_rows = 0
        self._next_report = 1
        self._reported = 0

    def __next__(self) -> AnyBatch:
        if self.step >= self.num_steps:
            raise StopIteration
        batch, snapshot = self._open().get()
        self.step += 1
        self._states[self.step] = snapshot
        self._states.pop(self.step - _KEPT_STATES, None)
        if snapshot.counts.rows >= self._next_report:
            self._report(snapshot.counts)
            self._next_report = 2 * snapshot.counts.rows
        return batch

    def __len__(self) -> int:
        """Steps still to come."""
        return max(self.num_steps - self.step, 0)

    def empty_batches(self) -> list[AnyBatch]:
        """A batch without examples of each shape to come, to compile for.

        None where all have one shape. This reads the stream's first rows.
        """
        if self._rows is None:
            return []
        self._open()
        return self._empty

    def get_state(self, step: int | None = None) -> State:
        """The state behind a recent step, the last one given if None: JSON values.

        It has the shares of this process; `join_states` adds those of the others.
        """
        step = self.step if step is None else step
        if step in self._states:
            lanes = self._states[step].lanes
        elif step == self._first_step:
            lanes = self._lane_states
        else:
            raise ValueError(f"the state behind step {step} is not kept any more")
        state = {"next_step": step, "lanes": lanes, **self._identity}
        if self._rows is not None:
            state["row_shapes"] = self._row_shapes
        return state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved state.

        Raises:
            ValueError: it was saved with other data, another order, or lacks a share
                of this process.
        """
        check_identity(state, self._identity)
        lanes = state["lanes"]
        missing = [index for index in self._held if str(index) not in lanes]
        if missing and state["next_step"]:
            raise ValueError(
                f"cannot resume the data order: the state has no share {missing}; give "
                "the states of all processes to join_states"
            )
        self._close_producer()
        self._states.clear()
        self._row_shapes = state.get("row_shapes")
        self._lane_states = {str(i): lanes[str(i)] for i in self._held} if lanes else {}
        self.step = self._first_step = int(state["next_step"])

    def epochs_done(self, step: int) -> float:
        """Whole epochs done at a recent step by the share that has done the fewest."""
        return float(self._states[step].epoch) if step in self._states else 0.0

    def close(self) -> None:
        """Stop the thread and the worker processes; say what became of the rows."""
        if self.step in self._states:
            self._report(self._states[self.step].counts)
        self._close_producer()

    def _open(self) -> Producer:
        if self._producer is None:
            self._producer = Producer(
                self._lanes,
                functools.partial(
                    self._make_batches, self.num_steps - self.step, self._packing()
                ),
                self._reading,
                self._dataset.recipes,
            )
            if self._rows is not None:
                opening = self._producer.get()
                self._row_shapes = [list(shape) for shape in opening.shapes]
                self._empty = opening.empty
        return self._producer

    def _packing(self) -> StepPacking | None:
        if self._rows is None:
            return None
        shapes = self._row_shapes
        return StepPacking(
            self._rows,
            self._accumulation,
            self._dataset.row_length,
            self.num_steps,
            None if shapes is None else tuple(RowShape(*each) for each in shapes),
        )

    def _close_producer(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    # --- on the producer's thread -----------------------------------------------------

    def _lanes(self, pool: concurrent.futures.Executor, workers: int) -> list[Lane]:
        data = self._dataset
        window, buffer = data.sizes.window_rows, data.sizes.shuffle_buffer_size
        block = max(buffer // self._shares, window) if self._reading.shuffle else window
        readers = len(self._held) * len(data.recipes)
        lanes = []
        for index in self._held:
            parts = []
            for part, source in enumerate(data.rows.sources):
                seed = (self._reading.seed + part) % 2**32
                share = Share(
                    index, self._shares, seed if self._reading.shuffle else None
                )
                make = functools.partial(make_window, data.recipes[part])
                if workers:  # these have the recipes already
                    make = functools.partial(run_window, part)
                parts.append(
                    WindowReader(
                        BlockReader(source, share, block),
                        pool,
                        make,
                        window_rows=window,
                        ahead=max(1, -(-2 * workers // readers)),
                        on_bad_rows=self._take_bad_rows,
                    )
                )
            lane = Lane(parts, data.rows.weights, index, self._reading.seed)
            if self._lane_states:
                lane.set_state(self._lane_states[str(index)])
            lanes.append(lane)
        return lanes

    def _make_batches(
        self, remaining: int, packing: StepPacking | None, lanes: Sequence[Lane]
    ) -> Iterator[Any]:
        steps = map(self._take, itertools.repeat(lanes))
        if packing is not None:
            yield from packing.batches(steps, remaining)
            return
        for rows, snapshot in itertools.islice(steps, remaining):
            numbers = np.arange(len(rows)).reshape(self._accumulation, -1)
            yield rows.batch(numbers), snapshot

    def _take(self, lanes: Sequence[Lane]) -> "tuple[PreparedDataset, _Snapshot]":
        """The rows of the next step, and where the stream stands behind them."""
        rows = gather_rows(
            [
                lane.take()
                for _ in range(self._accumulation)
                for lane in lanes
                for _ in range(self._rows_each)
            ]
        )
        readers = [reader for lane in lanes for reader in lane.readers]
        counts = sum((reader.counts for reader in readers), DataStats())
        states = {
            str(index): lane.get_state()
            for index, lane in zip(self._held, lanes, strict=True)
        }
        return rows, _Snapshot(states, counts, min(lane.epoch for lane in lanes))

    def _take_bad_rows(self, problems: Sequence[tuple[str, str]]) -> None:
        if self._dataset.options.on_bad_row == "error":
            first = "; ".join(f"{p}: {why}" for p, why in problems[:_SHOWN_BAD_ROWS])
            more = "; ..." if len(problems) > _SHOWN_BAD_ROWS else ""
            raise BadRowsError(
                f"{len(problems)} rows cannot be used: {first}{more}. Fix these rows, "
                "or set data.on_bad_row = 'skip'"
            )
        for place, reason in problems:
            if self._bad_rows < _SHOWN_BAD_ROWS:
                logger.warning("skipped: %s: %s", place, reason)
            self._bad_rows += 1

    def _report(self, counts: DataStats) -> None:
        if counts.rows != self._reported:
            self._reported = counts.rows
            logger.info("stream so far: %s", counts.describe())


def join_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of the states that all processes saved at one step.

    Raises:
        ValueError: they are of different steps or data.
    """
    joined = dict(states[0])
    for state in states[1:]:
        if "lanes" in joined:
            joined["lanes"] = joined["lanes"] | state["lanes"]
        own = {key: value for key, value in state.items() if key != "lanes"}
        if own != {key: value for key, value in joined.items() if key != "lanes"}:
            raise ValueError(
                "the checkpoint holds different data positions of its processes: use "
                "the restored weights and begin the data anew in a fresh workdir"
            )
    return joined


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """Behind a batch: states by share, what became of the rows, epochs done."""

    lanes: dict[str, State]
    counts: DataStats
    epoch: int


def _describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else tokenizer.name_or_path
    return [str(vocabulary), str(tokenizer.chat_template)]
