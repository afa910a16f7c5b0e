"""Rows that come as they are, and of which the loss head scores what is trained alone.

Where the examples of each step are packed, layout.py sees to the same for each shape
of rows. Here rows have one length, whether documents fill them or padding does. So the
rows of a device are taken as one line of tokens, whose trained predictions vary less
from step to step than those of one row.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.batch import Batch
from jaxtrain.data.batches.layout import lengths_of, room_for_scored, spares_enough


class Scoring(NamedTuple):
    """How many predictions the head scores of the rows of each device.

    `shards`: devices, or groups of them, that split the rows of a micro-batch.
    """

    shards: int
    places: int

    def fits(self, trained: np.ndarray) -> bool:
        """Whether no device's rows have more to score.

        Args:
            trained: int64[*, R], trained predictions of the rows of all processes.
        """
        return bool(_of_devices(trained, self.shards).max() <= self.places)

    def select(self, rows: Batch, processes: int) -> Batch:
        """The rows [A B T] of one of so many processes, with their `scored` places.

        As they are where the curriculum has made them so short that little is spared.
        """
        devices = self.shards // processes
        count, length = rows.loss_mask.shape[-2:]
        tokens = count // devices * length
        if not spares_enough(self.places, tokens):
            return rows
        return with_scored(rows, self.places, devices)


def choose_scoring(
    trained: np.ndarray, sample: np.ndarray, row_length: int, shards: int
) -> Scoring | None:
    """The fewest places that hold what is trained; None if that spares too little.

    Args:
        trained: int64[rows], the trained predictions of each row.
        sample: int64[steps, A, R], the rows of all processes in some steps such as
            will come.
        row_length: tokens in a row.
        shards: as in `Scoring`.
    """
    of_rows = lengths_of(trained[:, None], sample)[..., 0]
    most = int(_of_devices(of_rows, shards).max())
    places = room_for_scored(most, sample.shape[-1] // shards * row_length)
    return Scoring(shards, places) if places else None


def with_scored(rows: Batch, count: int, groups: int) -> Batch:
    """The rows with the places of their trained predictions, `count` to a group.

    Args:
        rows: [*dims, B, T].
        groups: into how many runs of B / groups rows they are divided.
    """
    *dims, _, _ = rows.loss_mask.shape
    mask = rows.loss_mask.reshape(*dims, groups, -1)
    scored = np.full((*dims, groups, count), mask.shape[-1], np.int32)
    for at in np.ndindex(*dims, groups):
        places = np.flatnonzero(mask[at])
        scored[at][: len(places)] = places
    return dataclasses.replace(rows, scored=scored)


def _of_devices(trained: Any, shards: int) -> np.ndarray:
    """int64[*, shards]: the sums over each device's rows, of int64[*, R]."""
    return np.asarray(trained.reshape(*trained.shape[:-1], shards, -1).sum(axis=-1))
