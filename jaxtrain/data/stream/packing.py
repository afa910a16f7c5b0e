"""Packing the examples of a stream's micro-batches: shapes chosen from its first rows.

The examples of a step are those that it has in padded rows; `layout` says how they
share rows. As nobody knows how long later examples are, the shapes that suit the first
rows are completed by larger ones, up to one that holds any micro-batch. So every shape
is known before the first step, and a checkpoint keeps them with the stream's position.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from jaxtrain.batch import AnyBatch
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.batches.layout import (
    RowPacking,
    RowShape,
    choose_packing,
    cover,
    lengths_of,
    most_in_row,
)
from jaxtrain.data.batches.pipeline import PackedRows
from jaxtrain.data.stream.source import random_order

logger = logging.getLogger(__name__)

_LOOK_AHEAD = 1024  # rows whose lengths tell the shapes
_ORDERS = 8  # in which these rows are tried
_FITTED_SHAPES = 6  # at most: larger ones come on top
_Behind = TypeVar("_Behind")


class Opening(NamedTuple):
    """What is known of a stream's batches before the first of them.

    `shapes`: all that a batch can have. `empty`: a batch without examples of each of
    those shapes that are to come.
    """

    shapes: tuple[RowShape, ...]
    empty: list[AnyBatch]


@dataclasses.dataclass(frozen=True)
class StepPacking:
    """How the examples of each step share rows.

    Attributes:
        rows: where the rows go.
        accumulation_steps: micro-batches of a step.
        longest: tokens that an example has at the most.
        num_steps: of the whole run; more shapes pay in a longer one.
        shapes: of a stream that goes on; None: they are chosen.
    """

    rows: PackedRows
    accumulation_steps: int
    longest: int
    num_steps: int
    shapes: tuple[RowShape, ...] | None = None

    def batches(
        self, steps: Iterator[tuple[PreparedDataset, _Behind]], remaining: int
    ) -> Iterator[Opening | tuple[AnyBatch, _Behind]]:
        """An `Opening`, and then the packed batches of the `remaining` steps.

        Args:
            steps: the examples of each step, and what to give back with its batch.
        """
        first, behind = next(steps)
        steps = itertools.chain([(first, behind)], steps)
        few = max(1, _LOOK_AHEAD // len(first))
        count = few if self.shapes is None else min(remaining, few)
        ahead = list(itertools.islice(steps, count))
        packing = self._packing([data for data, _ in ahead])
        shapes = set(packing.shapes)
        if remaining <= len(ahead):
            shapes = {self._place(packing, data)[1] for data, _ in ahead[:remaining]}
        yield Opening(
            packing.shapes,
            [
                first.pack(
                    packing.no_examples(self.accumulation_steps, shape),
                    shape.length,
                    shape.scored,
                )
                for shape in sorted(shapes)
            ],
        )
        for data, behind in itertools.islice(itertools.chain(ahead, steps), remaining):
            slots, shape = self._place(packing, data)
            yield data.pack(packing.own(slots), shape.length, shape.scored), behind

    def _packing(self, ahead: list[PreparedDataset]) -> RowPacking:
        examples = len(ahead[0]) // self.accumulation_steps
        shards, share = self.rows.shards, self.rows.share
        if self.shapes is not None:
            most, varies_rows = most_in_row(examples, shards), not self.rows.are_long
            return RowPacking(shards, most, self.shapes, varies_rows, share)
        lengths = np.concatenate([data.side_lengths for data in ahead])
        count = len(lengths)
        orders = (random_order(count, index) for index in range(_ORDERS))
        fitted = choose_packing(
            lengths,
            np.concatenate([np.arange(count), *orders]).reshape(
                -1, self.accumulation_steps, examples
            ),
            self.num_steps,
            shards=shards,
            row_length=None if self.rows.are_long else self.longest,
            share=share,
            most_shapes=_FITTED_SHAPES,
            trained=self._trained(ahead),
        )
        packing = cover(fitted, self.longest, examples)
        told = ", ".join(f"{rows} x {length:,}" for rows, length, _ in packing.shapes)
        logger.info("a device's rows of the stream, by tokens: %s", told)
        return packing

    def _trained(self, ahead: list[PreparedDataset]) -> np.ndarray | None:
        """int64[rows, sides]: trained predictions, if the head scores these alone."""
        if not self.rows.are_long or not self.rows.selects:
            return None
        return np.concatenate([data.side_trained for data in ahead])

    def _place(
        self, packing: RowPacking, data: PreparedDataset
    ) -> tuple[np.ndarray, RowShape]:
        examples = np.arange(len(data)).reshape(self.accumulation_steps, -1)
        lengths = lengths_of(data.side_lengths, examples)
        trained = None
        if packing.selects:
            trained = lengths_of(data.side_trained, examples)
        return packing.place(examples, lengths, trained)
