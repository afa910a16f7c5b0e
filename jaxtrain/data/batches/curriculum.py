"""Curricula: short or easy rows first, all rows in the end, in a few static lengths.

A limit rises in a straight line from `start_length` to `end_length` over `steps`
optimizer steps. It counts in `num_buckets` levels, evenly spaced on a logarithmic
scale, so it moves by jumps: every level is one static shape, hence one compilation.

`length_based` draws rows of at most that many tokens. `difficulty_based` draws the
easiest share of rows, limit / end_length, as competence does in arXiv:1903.09848.

The first pass takes every row once, where easy rows suffice for the early steps;
otherwise it repeats some of them. When the limit is at its end, the rows that were not
yet trained follow, and after them ordinary epochs. All is a pure function of data,
seed and step, worked out before training.
"""

import dataclasses
import functools
import hashlib
import itertools
import logging

import numpy as np

from jaxtrain.config import CurriculumSection
from jaxtrain.data.batches import pack
from jaxtrain.data.batches.dataset import PreparedDataset

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps [first_step, next stage's) with the rows that they may draw.

    `rows` int64: row numbers. `row_length`: tokens T of the batches.
    """

    first_step: int
    rows: np.ndarray
    row_length: int


@dataclasses.dataclass(frozen=True)
class FirstPass:
    """The steps before ordinary epochs, row by row.

    `rows` int64[steps, rows a step], -1 for an empty row; `row_lengths` int64[steps].
    """

    rows: np.ndarray
    row_lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the whole pass: equal only for the same rows in the same order."""
        digest = hashlib.blake2b(self.rows.tobytes(), digest_size=8)
        digest.update(self.row_lengths.tobytes())
        return digest.hexdigest()


def levels(start: int, end: int, count: int) -> np.ndarray:
    """float64[count]: from start to end in equal ratios; only end if equal."""
    if start == end or count == 1:
        return np.asarray([float(end)])
    return start * (end / start) ** (np.arange(count) / (count - 1))


def first_steps(heights: np.ndarray, steps: int) -> np.ndarray:
    """int64: the step at which the rising limit reaches each level, 0 to `steps`."""
    if len(heights) == 1:
        return np.zeros(1, np.int64)
    share = (heights - heights[0]) / (heights[-1] - heights[0])
    # Rounding must not keep a level from the step that reaches it exactly.
    return np.ceil(share * steps - 1e-6).astype(np.int64)


def round_length(level: float) -> int:
    """Up to a multiple of 64 tokens, as kernels like it; below 64, of 8."""
    multiple = 64 if level > 64 else 8
    return -(-int(np.ceil(level - 1e-6)) // multiple) * multiple


def plan_first_pass(
    dataset: PreparedDataset,
    section: CurriculumSection,
    *,
    rows_per_step: int,
    num_steps: int,
    seed: int,
    shuffle: bool,
) -> tuple[PreparedDataset, FirstPass]:
    """The rows of every step before ordinary epochs, and the data set they are of.

    That is `dataset`, behind whose rows stand more where documents are packed: see
    `pack_by_length`.

    Raises:
        ValueError: difficulty_based, and the rows have no difficulty; length_based,
            and the rows are packed pairs.
    """
    rows = np.arange(len(dataset))
    if dataset.packed and section.strategy == "length_based":
        dataset, rows = pack_by_length(dataset, section)
    stages = make_stages(dataset, rows, section)
    first_pass = make_first_pass(stages, rows_per_step, seed=seed, shuffle=shuffle)
    for stage in stages:
        logger.info(
            "curriculum: from step %d, %d of %d rows, batches of %d tokens a row",
            stage.first_step, len(stage.rows), len(rows), stage.row_length,
        )  # fmt: skip
    if len(stages) == 1:
        logger.warning(
            "the curriculum does nothing: all %d rows are within its first limit; "
            "lower training.curriculum.start_length",
            len(rows),
        )
    if num_steps < len(first_pass):
        seen = np.unique(first_pass.rows[:num_steps])
        logger.warning(
            "training ends after %d steps, before the curriculum's first pass of %d "
            "(its limit is at the end by step %d): %d of %d rows are never trained; "
            "lower training.curriculum.steps, or train longer",
            num_steps, len(first_pass), stages[-1].first_step,
            len(rows) - np.count_nonzero(seen >= 0), len(rows),
        )  # fmt: skip
    return dataset, first_pass


def make_stages(
    dataset: PreparedDataset, rows: np.ndarray, section: CurriculumSection
) -> list[Stage]:
    """The stages of a curriculum over `rows`; the last holds all, at the full length.

    A stage that adds no row to the one before is left out, so there are at most
    `num_buckets`.

    Raises:
        ValueError: difficulty_based, and the rows have no difficulty.
    """
    heights = levels(section.start_length, section.end_length, section.num_buckets)
    starts = first_steps(heights, section.steps)
    if section.strategy == "length_based":
        measure = dataset.row_lengths()[rows]
        lengths = [min(round_length(h), dataset.row_length) for h in heights]
        limits = list(lengths)
    else:
        if dataset.difficulty is None:
            raise ValueError(
                "training.curriculum.strategy = 'difficulty_based': the rows have no "
                "difficulty; name their column in training.curriculum.column, or give "
                "raw rows, which the model then measures"
            )
        measure = _ranks(dataset.difficulty[rows])
        shares = heights / heights[-1]
        limits = np.ceil(shares * len(rows) - 1e-6).astype(int).tolist()
        lengths = [dataset.row_length] * len(limits)
    limits[-1], lengths[-1] = int(measure.max()), dataset.row_length

    stages: list[Stage] = []
    for first_step, limit, length in zip(starts.tolist(), limits, lengths, strict=True):
        eligible = rows[measure <= limit]
        if not len(eligible):
            continue
        if stages and len(eligible) == len(stages[-1].rows):
            if length > stages[-1].row_length and len(eligible) == len(rows):
                # All rows are in already: no need of a longer batch.
                stages[-1] = dataclasses.replace(stages[-1], row_length=length)
            continue
        # The first stage starts at once, even where no row is as short as its limit.
        stages.append(Stage(first_step if stages else 0, eligible, length))
    return stages


def make_first_pass(
    stages: list[Stage], rows_per_step: int, *, seed: int, shuffle: bool
) -> FirstPass:
    """Draw the rows of every stage, those least drawn so far first, then the rest."""
    random = np.random.Philox(seed)  # raw bits: the same under every numpy

    def order(rows: np.ndarray) -> np.ndarray:
        if not shuffle:
            return rows
        return rows[np.argsort(random.random_raw(len(rows)), kind="stable")]

    drawn = np.zeros(int(stages[-1].rows.max()) + 1, np.int64)
    taken: list[np.ndarray] = []
    lengths: list[int] = []
    for stage, after in itertools.pairwise(stages):
        steps = after.first_step - stage.first_step
        missing = steps * rows_per_step
        lengths += [stage.row_length] * steps
        while missing:
            times = drawn[stage.rows]
            some = order(stage.rows[times == times.min()])[:missing]
            drawn[some] += 1
            taken.append(some)
            missing -= len(some)
    rest = order(stages[-1].rows[drawn[stages[-1].rows] == 0])
    steps = -(-len(rest) // rows_per_step)
    lengths += [stages[-1].row_length] * steps
    rows = np.full(len(lengths) * rows_per_step, -1, np.int64)
    flat = np.concatenate([np.zeros(0, np.int64), *taken, rest])
    rows[: len(flat)] = flat
    return FirstPass(
        rows.reshape(len(lengths), rows_per_step), np.asarray(lengths, np.int64)
    )


def pack_by_length(
    dataset: PreparedDataset, section: CurriculumSection
) -> tuple[PreparedDataset, np.ndarray]:
    """Packed rows once more, so that a row holds documents of one length bucket only.

    Ordinary packing fills every row to the end, so no row would be short. Here the
    documents up to a bucket's length, and beyond the bucket before, share rows of that
    length. The new rows stand behind the old ones and refer to the same tokens.

    Returns:
        the data set with both kinds of rows, and the numbers of the new ones.

    Raises:
        ValueError: the rows are pairs.
    """
    if len(dataset.stores) > 1:
        raise ValueError(
            "training.curriculum.strategy = 'length_based' does not go with packed "
            "pairs: set data.packing = false"
        )
    ((name, store),) = dataset.stores.items()
    heights = levels(section.start_length, section.end_length, section.num_buckets)
    most = dataset.row_length
    caps = sorted({most, *(min(round_length(h), most) for h in heights[:-1])})
    offsets, documents = [store.row_offsets], [store.row_documents]
    below = 0
    for cap in caps:
        inside = np.flatnonzero((store.lengths > below) & (store.lengths <= cap))
        below = cap
        row_offsets, picked = pack.pack_best_fit(store.lengths[inside], cap)
        offsets.append(row_offsets[1:] + offsets[-1][-1])
        documents.append(inside[picked])
    both = dataclasses.replace(
        store,
        row_documents=np.concatenate(documents),
        row_offsets=np.concatenate(offsets),
    )
    extended = dataclasses.replace(dataset, stores={name: both})
    return extended, np.arange(len(store), len(both))


def _ranks(values: np.ndarray) -> np.ndarray:
    """int64: 1 for the least value; the earlier row first on a tie."""
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(1, len(values) + 1)
    return ranks
