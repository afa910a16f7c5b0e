"""Prepared rows to batches: a pure function of (seed, step), read ahead by Grain.

The rows of optimizer step s depend on the data, the seed and s alone, not on workers,
processes or what was read before. So the iterator's state is a step number; resume is
exact, and a process takes its columns of one global batch whatever the process count.
"""

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags

from jaxtrain.batch import AnyBatch, Batch
from jaxtrain.config import CurriculumSection
from jaxtrain.data.batches.curriculum import FirstPass, plan_first_pass
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.batches.layout import (
    RowPacking,
    RowShape,
    choose_packing,
    lengths_of,
)
from jaxtrain.data.batches.mixture import rows_per_epoch
from jaxtrain.data.batches.scoring import Scoring, choose_scoring


def steps_per_epoch(
    num_rows: int, global_micro_batch_rows: int, accumulation_steps: int
) -> int:
    """Optimizer steps in an epoch, as the Hugging Face Trainer counts them.

    ceil(ceil(rows / global micro-batch) / accumulation): nothing is dropped.
    """
    micro_batches = -(-num_rows // global_micro_batch_rows)
    return -(-micro_batches // accumulation_steps)


def epochs_done(
    step: int, num_rows: int, global_micro_batch_rows: int, accumulation_steps: int
) -> float:
    """Epochs after `step` steps, as the Hugging Face Trainer counts: in micro-batches.

    An epoch's last step may have fewer of them than the others.
    """
    micro_batches = -(-num_rows // global_micro_batch_rows)
    epochs, rest = divmod(step, -(-micro_batches // accumulation_steps))
    return epochs + rest * accumulation_steps / micro_batches


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The rows of a process in an optimizer step: A micro-batches of B rows.

    Process `process_index` takes the columns of one global batch that are its own.

    Attributes:
        micro_batch_rows: rows of this process in a micro-batch (B).
        accumulation_steps: micro-batches of an optimizer step (A).

    Raises:
        ValueError: a number is out of range.
    """

    micro_batch_rows: int
    accumulation_steps: int = 1
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.micro_batch_rows < 1 or self.accumulation_steps < 1:
            raise ValueError(
                f"micro_batch_rows={self.micro_batch_rows} and accumulation_steps="
                f"{self.accumulation_steps} must be at least 1"
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index={self.process_index} must lie in 0..process_count - 1 "
                f"(process_count={self.process_count})"
            )

    @property
    def global_micro_batch_rows(self) -> int:
        """Rows of all processes in a micro-batch."""
        return self.micro_batch_rows * self.process_count


@dataclasses.dataclass(frozen=True)
class Reading:
    """In which order rows are drawn, and how far ahead.

    Attributes:
        seed: of the shuffle, 0 to 2**32 - 1; each epoch has its own order.
        shuffle: False keeps the rows' order.
        num_workers: processes that prepare or assemble batches; 0 uses threads.
        prefetch: steps read ahead (by each worker).

    Raises:
        ValueError: a number is out of range.
    """

    seed: int = 0
    shuffle: bool = True
    num_workers: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        if self.num_workers < 0 or self.prefetch < 1:
            raise ValueError(
                f"num_workers={self.num_workers} must be at least 0 and "
                f"prefetch={self.prefetch} at least 1"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie in 0..2**32 - 1")


# Rows of a sample of an order: two epochs, but no fewer and no more than this.
_FEWEST, _MOST = 1 << 11, 1 << 18
_FEW_STEPS = 64


@dataclasses.dataclass(frozen=True)
class RowOrder:
    """Which rows make up an optimizer step, on one process.

    Epoch e visits every row once, in an order drawn from (seed, e). Its micro-batches
    are consecutive runs of B * process_count rows; process p takes columns
    [p * B, (p + 1) * B). Where the epoch ends within a step, -1 fills the rest. In a
    mixture, an epoch has `mixture.rows_per_epoch` rows of each part, and continues
    each part where the last epoch stopped.
    """

    num_rows: int
    shape: BatchShape
    seed: int = 0
    shuffle: bool = True
    first_pass: FirstPass | None = None  # a curriculum's, before ordinary epochs
    parts: tuple[tuple[int, float], ...] = ()  # (rows, weight) of a mixture

    @property
    def steps_per_epoch(self) -> int:
        shape = self.shape
        return steps_per_epoch(
            self.num_rows, shape.global_micro_batch_rows, shape.accumulation_steps
        )

    def rows(self, step: int) -> np.ndarray:
        """int64[A, B]: row numbers of this process at a step, -1 for an empty row."""
        if self.first_pass is not None:
            if step < len(self.first_pass):
                return self._own_columns(self.first_pass.rows[step])
            step -= len(self.first_pass)
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        per_step = self.shape.accumulation_steps * self.shape.global_micro_batch_rows
        first = step_of_epoch * per_step
        places = self._own_columns(np.arange(first, first + per_step))
        inside = places < self.num_rows
        drawn = places[inside] + epoch * self.num_rows
        rows = np.full(places.shape, -1, np.int64)
        rows[inside] = self._draw(self.num_rows, self.seed, drawn)
        return self._of_parts(rows, epoch) if self.parts else rows

    def of_all_processes(self) -> "RowOrder":
        """The same with the rows of all processes in each micro-batch."""
        shape = self.shape
        every = BatchShape(shape.global_micro_batch_rows, shape.accumulation_steps)
        return dataclasses.replace(self, shape=every)

    def sample(self) -> np.ndarray:
        """int64[steps, A, B]: rows of steps such as these, for their lengths."""
        shape = (self.shape.accumulation_steps, self.shape.micro_batch_rows)
        per_step = shape[0] * shape[1]
        count = -(-min(max(2 * self.num_rows, _FEWEST), _MOST) // per_step)
        random = np.random.default_rng(self.seed)
        epochs = range(-(-count * per_step // self.num_rows))
        rows = np.concatenate([self._any_epoch(random) for _ in epochs])
        rows = rows[: count * per_step].reshape(-1, *shape)
        if self.first_pass is not None:
            early = np.asarray(self.first_pass.rows)[: len(rows)]
            rows = np.concatenate([early.reshape(-1, *shape), rows])
        return rows

    def _any_epoch(self, random: np.random.Generator) -> np.ndarray:
        """The rows of an epoch in an order drawn quickly, not the one trained in."""
        if not self.parts:
            ordered = np.arange(self.num_rows)
            return random.permutation(ordered) if self.shuffle else ordered
        quotas, sizes = rows_per_epoch(self.parts), [rows for rows, _ in self.parts]
        firsts = np.cumsum([0, *sizes])[:-1]
        drawn = [
            first + random.integers(size, size=quota)
            for first, size, quota in zip(firsts, sizes, quotas, strict=True)
        ]
        return random.permutation(np.concatenate(drawn))

    def row_length(self, step: int) -> int | None:
        """Tokens of a row, if a curriculum sets them at this step; else None."""
        if self.first_pass is None or step >= len(self.first_pass):
            return None
        return int(self.first_pass.row_lengths[step])

    def _own_columns(self, rows: np.ndarray) -> np.ndarray:
        """int64[A, B]: this process's part of a step's rows, which come as one line."""
        shape = self.shape
        rows = rows.reshape(shape.accumulation_steps, shape.global_micro_batch_rows)
        column = shape.process_index * shape.micro_batch_rows
        return rows[:, column : column + shape.micro_batch_rows]

    def _draw(self, num_rows: int, seed: int, places: np.ndarray) -> np.ndarray:
        """The row numbers at some places in the sequence of all epochs."""
        import grain  # not above: it imports jax, which a look at data does not need

        order = grain.MapDataset.range(num_rows)
        if self.shuffle:
            order = order.shuffle(seed=seed)  # `repeat` reseeds every epoch
        order = order.repeat()
        return np.asarray([order[int(place)] for place in places], np.int64)

    def _of_parts(self, slots: np.ndarray, epoch: int) -> np.ndarray:
        """The rows that an epoch's slots stand for; each part has a quota of slots."""
        quotas = rows_per_epoch(self.parts)
        sizes = [rows for rows, _ in self.parts]
        first_slots, first_rows = (np.cumsum([0, *n]) for n in (quotas, sizes))
        rows = slots.copy()
        for part, (quota, size) in enumerate(zip(quotas, sizes, strict=True)):
            seed = (self.seed + 1 + part) % 2**32
            inside = (slots >= first_slots[part]) & (slots < first_slots[part + 1])
            drawn = slots[inside] - first_slots[part] + epoch * quota
            rows[inside] = self._draw(size, seed, drawn) + first_rows[part]
        return rows


@dataclasses.dataclass(frozen=True)
class BatchReader:
    """`reader(step)` assembles the batch of a step.

    Worker processes are given the folder that holds the data, and map it into memory.
    """

    data: PreparedDataset | str
    order: RowOrder
    flat: bool = False  # [B, T] in place of [1, B, T]
    packing: RowPacking | None = None
    scoring: Scoring | None = None  # without packing

    def __call__(self, step: int) -> AnyBatch:
        data = self._data
        if self.packing is None:
            rows, length = self.order.rows(step), self.order.row_length(step)
            batch = data.batch(rows[0] if self.flat else rows, row_length=length)
            return batch if self.scoring is None else self._score(batch, step)
        slots, shape = self._place(step)
        slots = self.packing.own(slots)
        slots = slots[0] if self.flat else slots
        return data.pack(slots, shape.length, shape.scored)

    def examples(self, step: int) -> np.ndarray:
        """Numbers of the examples in a step's batch, over all processes; -1 for none.

        int64[B], or [B, P] where up to P examples are packed into a row. Only for
        batches without gradient accumulation.
        """
        if self.packing is not None:
            return self._place(step)[0][0]
        return self.order.of_all_processes().rows(step)[0]

    def empty_batches(self, first: int, last: int) -> list[AnyBatch]:
        """An empty batch for each shape that steps first, ..., last - 1 use.

        If there are many such steps, one for each shape that packing can give.
        """
        if self.packing is None:
            return []
        shapes = set(self.packing.shapes)
        if last - first <= _FEW_STEPS:
            shapes = {self._place(step)[1] for step in range(first, last)}
        accumulation = self.order.shape.accumulation_steps
        return [
            self._data.pack(
                self.packing.no_examples(accumulation, shape),
                shape.length,
                shape.scored,
            )
            for shape in sorted(shapes)
        ]

    def _score(self, batch: AnyBatch, step: int) -> AnyBatch:
        """With the places of what is trained, if those of all processes suffice."""
        assert isinstance(batch, Batch) and self.scoring is not None
        rows = self.order.of_all_processes().rows(step)
        if not self.scoring.fits(lengths_of(self._data.side_trained, rows)[..., 0]):
            return batch
        return self.scoring.select(batch, self.order.shape.process_count)

    def _place(self, step: int) -> tuple[np.ndarray, RowShape]:
        assert self.packing is not None
        rows, data = self.order.rows(step), self._data
        trained = None
        if self.packing.selects:
            trained = lengths_of(data.side_trained, rows)
        return self.packing.place(rows, lengths_of(data.side_lengths, rows), trained)

    @property
    def _data(self) -> PreparedDataset:
        return _load(self.data) if isinstance(self.data, str) else self.data


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """How the examples of each micro-batch share rows, see `layout`.

    Attributes:
        shards: devices, or groups of them, that split the rows of a batch.
        are_long: True for few rows, as long as their examples need; False for rows as
            long as the longest example, as many as are needed.
        share: which part of the rows this process reads, and of how many.
        selects: whether the loss head scores trained predictions alone, where that
            spares it enough.
    """

    shards: int
    are_long: bool
    share: tuple[int, int] = (0, 1)
    selects: bool = True


_load = functools.lru_cache(maxsize=1)(PreparedDataset.load)  # a worker process's own


def check_identity(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Raise ValueError where a saved state is of other data, seed or batch shape."""
    keys = (saved.keys() | present.keys()) - {
        "next_step",
        "lanes",
        "row_shapes",
    }  # the position
    differing = [
        f"{key} was {saved.get(key)!r} and is {present.get(key)!r}"
        for key in sorted(keys)
        if saved.get(key) != present.get(key)
    ]
    if differing:
        raise ValueError(
            f"cannot resume the data order: {', '.join(differing)}. Restore these"
            " values (the fingerprint is of the rows: data.train, how it is prepared,"
            " the tokenizer), or use a new workdir"
        )


class BatchIterator(Iterator[AnyBatch]):
    """Batches of steps [step, num_steps), read ahead; its state is the next step.

    `get_state()` is JSON-serialisable, and independent of the number of workers and
    processes. `set_state` refuses the state of other data or another order.
    """

    def __init__(
        self,
        reader: BatchReader,
        num_steps: int,
        reading: Reading,
        identity: dict[str, Any] | None = None,
    ) -> None:
        self.num_steps = num_steps
        self.step = 0
        self.reader = reader
        self._reading = reading
        self._identity = identity or {}
        self._source: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __next__(self) -> AnyBatch:
        if self.step >= self.num_steps:
            raise StopIteration
        if self._source is None:
            self._source = self._open()
        batch = next(self._source)
        self.step += 1
        return batch

    def __len__(self) -> int:
        """Steps still to come."""
        return max(self.num_steps - self.step, 0)

    def empty_batches(self) -> list[AnyBatch]:
        """An empty batch for each shape still to come, to compile the step for it."""
        return self.reader.empty_batches(self.step, self.num_steps)

    @property
    def most_examples(self) -> int | None:
        """The most examples that a packed row can hold; None without packing."""
        return None if self.reader.packing is None else self.reader.packing.most

    def in_order(self, values: np.ndarray) -> np.ndarray:
        """Values of the examples in all processes' last batch, sorted by their number.

        Args:
            values: [B, *dims], one for each row, or packed [B, P, *dims].
        """
        numbers = self.reader.examples(self.step - 1)
        present = numbers >= 0
        return values[present][np.argsort(numbers[present])]

    def get_state(self, step: int | None = None) -> dict[str, Any]:
        """The state after `step`; if that is None, after the last batch returned."""
        step = self.step if step is None else step
        return {"next_step": step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a saved state.

        Raises:
            ValueError: the state was saved with other data, seed or batch shape.
        """
        check_identity(state, self._identity)
        self._close_source()
        self.step = int(state["next_step"])

    def close(self) -> None:
        """Stop read-ahead threads and workers, and remove their shared files."""
        self._close_source()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _open(self) -> Iterator[AnyBatch]:
        import grain

        reader, ahead = self.reader, self._reading.prefetch
        workers = self._reading.num_workers
        if workers:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="jaxtrain-data-")
                assert isinstance(reader.data, PreparedDataset)
                reader.data.save(self._folder.name)
            reader = dataclasses.replace(reader, data=self._folder.name)
        options = grain.ReadOptions(min(ahead, 4), prefetch_buffer_size=ahead)
        steps = grain.MapDataset.range(self.step, self.num_steps)
        batches = steps.map(reader).to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():
                # Grain reads its flags here; as a library we were started without.
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=workers, per_worker_buffer_size=ahead
                )
            )
        return iter(batches)

    def _close_source(self) -> None:
        if self._source is not None:
            with contextlib.suppress(AttributeError):
                self._source.close()
            self._source = None


def make_train_iterator(
    dataset: PreparedDataset,
    shape: BatchShape,
    reading: Reading,
    *,
    num_epochs: float | None = None,
    num_steps: int | None = None,
    curriculum: CurriculumSection | None = None,
    rows: PackedRows | None = None,
) -> BatchIterator:
    """Iterate over training steps: batches of [A, B, T].

    Args:
        num_epochs, num_steps: give exactly one. A fraction of an epoch is rounded up
            to whole steps; steps go on into further epochs.
        curriculum: short or easy rows first; batches then differ in T. It changes
            neither the number of steps nor of rows in them.
        rows: how to pack the examples of each micro-batch; `shape` then counts the
            examples of all processes.

    Raises:
        ValueError: not exactly one of `num_epochs` and `num_steps`, or the curriculum
            asks for a difficulty that the rows do not have.
    """
    if (num_epochs is None) == (num_steps is None):
        raise ValueError(
            f"num_epochs={num_epochs}, num_steps={num_steps}: give exactly one"
        )
    seed, shuffle = reading.seed, reading.shuffle
    order = RowOrder(len(dataset), shape, seed, shuffle, parts=dataset.parts)
    if num_steps is None:
        assert num_epochs is not None
        num_steps = math.ceil(num_epochs * order.steps_per_epoch)
    identity = describe_order(shape, reading) | {
        "num_rows": len(dataset),
        "row_length": dataset.row_length,
        "fingerprint": dataset.fingerprint,
    }
    if dataset.parts:
        identity["parts"] = [list(part) for part in dataset.parts]
    if curriculum is not None and curriculum.enabled:
        planned, first_pass = plan_first_pass(
            _as_padded(dataset) if rows is not None else dataset,
            curriculum,
            rows_per_step=shape.accumulation_steps * shape.global_micro_batch_rows,
            num_steps=num_steps,
            seed=seed,
            shuffle=shuffle,
        )
        same = {
            name: getattr(dataset, name) for name in ("shares_prompts", "row_length")
        }
        dataset = dataclasses.replace(planned, **same)
        order = dataclasses.replace(order, first_pass=first_pass)
        identity["curriculum"] = first_pass.fingerprint
    packing = None
    if rows is not None:
        identity["packing"] = "batch"
        packing = _choose_packing(dataset, order, rows)
    reader = BatchReader(dataset, order, packing=packing)
    return BatchIterator(reader, num_steps, reading, identity)


def score_trained(batches: BatchIterator, shards: int) -> None:
    """Let the loss head score trained predictions alone, where that spares it enough.

    Of next-token rows that no packing of steps has laid out.

    Args:
        shards: devices, or groups of them, that split the rows of a micro-batch.
    """
    reader = batches.reader
    data = reader.data
    assert isinstance(data, PreparedDataset)
    if reader.packing is None and data.objective == "next_token":
        scoring = choose_scoring(
            data.side_trained[:, 0],
            reader.order.of_all_processes().sample(),
            data.row_length,
            shards,
        )
        batches.reader = dataclasses.replace(reader, scoring=scoring)


def _as_padded(dataset: PreparedDataset) -> PreparedDataset:
    """The rows as if padded, because a curriculum follows the padded lengths."""
    return dataset.without_shared_prompts() if dataset.shares_prompts else dataset


def _choose_packing(
    dataset: PreparedDataset, order: RowOrder, rows: PackedRows
) -> RowPacking:
    return choose_packing(
        dataset.side_lengths,
        order.sample(),
        order.steps_per_epoch,
        shards=rows.shards,
        row_length=None if rows.are_long else dataset.row_length,
        share=rows.share,
        trained=dataset.side_trained if rows.are_long and rows.selects else None,
    )


def describe_order(shape: BatchShape, reading: Reading) -> dict[str, Any]:
    """The part of a saved position that describes what the rows of a step depend on."""
    return {
        "seed": reading.seed,
        "shuffle": reading.shuffle,
        "global_micro_batch_rows": shape.global_micro_batch_rows,
        "accumulation_steps": shape.accumulation_steps,
    }


def make_eval_iterator(
    dataset: PreparedDataset, shape: BatchShape, rows: PackedRows | None = None
) -> BatchIterator:
    """Iterate once over all rows in order: batches of [B, T], without accumulation.

    Every process gets the same number of batches; empty rows fill the last one. `rows`
    says how to pack a batch's examples; `shape` then counts those of all processes.
    """
    order = RowOrder(len(dataset), shape, shuffle=False)
    packing = None
    if rows is not None:  # every evaluation asks for the same
        packing = dataset.packings.get((shape, rows))
        if packing is None:
            packing = _choose_packing(dataset, order, rows)
            dataset.packings[shape, rows] = packing
    reader = BatchReader(dataset, order, flat=True, packing=packing)
    return BatchIterator(reader, order.steps_per_epoch, Reading())
