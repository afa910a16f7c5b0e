"""Feed: the batches of one run, from prepared rows to this process's devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxtrain.config import RunConfig
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.batches.pipeline import (
    BatchIterator,
    BatchShape,
    PackedRows,
    Reading,
    epochs_done,
    make_eval_iterator,
    make_train_iterator,
    score_trained,
    steps_per_epoch,
)
from jaxtrain.data.stream.batches import StreamDataset, StreamIterator
from jaxtrain.sharding import ShardingPlan, place_batch

Prepared = PreparedDataset | StreamDataset


@dataclasses.dataclass(frozen=True)
class Feed:
    """How many rows this process reads, which rows, and the devices they go to."""

    run: RunConfig
    plan: ShardingPlan
    long_rows: bool = False  # whether attention leaves out blocks between examples
    selects: bool = True  # whether the loss head may score what is trained alone

    @functools.cached_property  # asked at every step, of all devices of a pod
    def readers(self) -> int:
        """Number of shares: one for each group of processes that read the same rows."""
        return self.plan.readers[1]

    @property
    def packs_batches(self) -> bool:
        """Whether the examples of a micro-batch share rows."""
        return self.run.data.packing == "batch"

    @property
    def eval_rows(self) -> int:
        """Rows of an evaluation batch on this process."""
        return self._process_rows(self.run.loop.per_device_eval_batch_size)

    def _process_rows(self, per_device: int) -> int:
        return per_device * self.plan.batch_shards // self.readers

    @property
    def _shape(self) -> BatchShape:
        loop = self.run.loop
        return self._batch_shape(
            loop.per_device_train_batch_size, loop.gradient_accumulation_steps
        )

    def _batch_shape(self, per_device: int, accumulation_steps: int = 1) -> BatchShape:
        """Count this process's rows, or all examples where each batch is packed."""
        if self._packed_rows is not None:
            return BatchShape(per_device * self.plan.batch_shards, accumulation_steps)
        rows = self._process_rows(per_device)
        return BatchShape(rows, accumulation_steps, *self.plan.readers)

    @property
    def _packed_rows(self) -> PackedRows | None:
        if not self.packs_batches:
            return None
        plan = self.plan
        return PackedRows(plan.batch_shards, self.long_rows, plan.readers, self.selects)

    def train_batches(self, data: Prepared) -> BatchIterator | StreamIterator:
        """The batches of all steps of the run, [A B T] on each process."""
        loop = self.run.loop
        by_steps = loop.max_steps > 0
        workers = self.run.devices.dataloader_num_workers
        reading = Reading(loop.seed, self.run.data.shuffle, num_workers=workers)
        if isinstance(data, StreamDataset):
            shards = self.plan.batch_shards
            # By devices, where these divide, so that other processes can resume.
            shares = shards if shards % self.readers == 0 else self.readers
            return StreamIterator(
                data, self._shape, reading,
                num_steps=loop.max_steps, shares=shares, rows=self._packed_rows,
            )  # fmt: skip
        batches = make_train_iterator(
            data, self._shape, reading,
            num_epochs=None if by_steps else loop.num_train_epochs,
            num_steps=loop.max_steps if by_steps else None,
            curriculum=self.run.curriculum, rows=self._packed_rows,
        )  # fmt: skip
        if self.long_rows and self.selects:
            score_trained(batches, self.plan.batch_shards)
        return batches

    def eval_batches(self, data: PreparedDataset) -> BatchIterator:
        """All rows once, in order, [B T] on each process."""
        shape = self._batch_shape(self.run.loop.per_device_eval_batch_size)
        return make_eval_iterator(data, shape, self._packed_rows)

    def epochs(
        self, data: Prepared, batches: BatchIterator | StreamIterator
    ) -> tuple[int, Callable[[int], float]]:
        """Steps in an epoch (for a stream: all steps), and epochs done by a step."""
        if isinstance(batches, StreamIterator):
            return batches.num_steps, batches.epochs_done
        assert isinstance(data, PreparedDataset)  # as its batches are no stream's
        shape = self._shape
        sizes = len(data), shape.global_micro_batch_rows, shape.accumulation_steps
        return steps_per_epoch(*sizes), lambda step: epochs_done(step, *sizes)

    def place(self, batch: Any, leading_axes: int = 0) -> Any:
        """Make global arrays over all devices from this process's rows of a batch.

        `leading_axes`: how many axes come before the axis of the rows.
        """
        return place_batch(batch, self.plan.batch(leading_axes))
