"""Where the examples of a micro-batch lie in its rows: packed, in few fixed shapes.

A micro-batch of G examples becomes rows of one length on each of the devices that split
its rows. Every example keeps the step and the micro-batch that it would have in a row
of its own, so losses and gradients are those of padded rows, and padding is only what
is left between the longest row and the others.

Each shape is compiled, so there are at most `MOST_SHAPES`, chosen from the lengths of
the examples for the least padding. Which one a step has depends on its examples alone.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

MOST_SHAPES = 7
# Each costs a compilation, and is worth it if it saves the time of so many steps in an
# epoch.
_STEPS_A_SHAPE = 40
# Rows of kernels that leave out blocks are as long as this on average, at most.
_LONG_ROW = 16_384
_MULTIPLE = 128  # of tokens in a row
_RARE_MULTIPLE = 512  # the same for steps that no shape was made for


class RowShape(NamedTuple):
    """Rows of a micro-batch on each device, and tokens in a row.

    `scored`: the most trained predictions of a row, where the loss head scores no
    others; 0: it scores them all.
    """

    rows: int
    length: int
    scored: int = 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclasses.dataclass(frozen=True)
class RowPacking:
    """How the examples of each micro-batch are put into rows.

    Attributes:
        shards: devices, or groups of them, that split the rows of a batch.
        most: examples that a row can hold.
        shapes: what the rows may look like, by tokens.
        varies_rows: these differ in the number of rows, or else in their length.
        share: which part of the rows this process reads, and of how many.
    """

    shards: int
    most: int
    shapes: tuple[RowShape, ...]
    varies_rows: bool
    share: tuple[int, int] = (0, 1)

    def place(
        self,
        examples: np.ndarray,
        lengths: np.ndarray,
        trained: np.ndarray | None = None,
    ) -> tuple[np.ndarray, RowShape]:
        """Which example lies where in the rows of a step.

        Args:
            examples: int64[A, G], the numbers of the step's examples; -1 is none.
            lengths: int64[A, G, S], their tokens in each of the S rows that hold them
                side by side (chosen and rejected); 0 for none.
            trained: int64[A, G, S], how many of their predictions are trained; None:
                any may be.

        Returns:
            int64[A, R, P], the examples of the R rows of all processes from left to
            right, -1 behind them; and the shape of these rows.
        """
        trained = lengths if trained is None else trained
        fitting: list[tuple[RowShape, np.ndarray]] = []
        for rows in sorted({shape.rows for shape in self.shapes}):
            bins, load = self._assign(lengths, rows)
            fitting += [
                (shape, bins)
                for shape in self.shapes
                if shape.rows == rows and shape.length >= load
            ]
        if not fitting:
            fitting.append(self._dealt_out(lengths) or self._rare(lengths))
        with_room = [
            (shape, bins)
            for shape, bins in fitting
            if not shape.scored or self._load(trained, bins, shape.rows) <= shape.scored
        ]
        shape, bins = min(with_room or fitting, key=lambda found: found[0].tokens)
        if not with_room:  # a shape for this step alone
            shape = shape._replace(scored=0)
        return self._slots(examples, bins, shape), shape

    @property
    def selects(self) -> bool:
        """Whether some shape goes by how much of its rows is trained."""
        return any(shape.scored for shape in self.shapes)

    def own(self, slots: np.ndarray) -> np.ndarray:
        """This process's rows of what `place` gave."""
        index, count = self.share
        rows = slots.shape[1] // count
        return slots[:, index * rows : (index + 1) * rows]

    def no_examples(self, accumulation_steps: int, shape: RowShape) -> np.ndarray:
        """This process's slots of a step in which every slot is empty (-1)."""
        rows = shape.rows * self.shards // self.share[1]
        return np.full((accumulation_steps, rows, self.most), -1)

    def _dealt_out(self, lengths: np.ndarray) -> tuple[RowShape, np.ndarray] | None:
        """The largest shape, with the examples dealt out evenly over its rows.

        None if a row would overflow.
        """
        shape = self.shapes[-1]
        rows = self.shards * shape.rows
        bins = np.broadcast_to(np.arange(lengths.shape[1]) % rows, lengths.shape[:2])
        fits = loads(lengths, bins, rows).max() <= shape.length
        return (shape, bins) if fits else None

    def _rare(self, lengths: np.ndarray) -> tuple[RowShape, np.ndarray]:
        """A new shape, for a step whose examples fit in none of `shapes`."""
        rows, length, _ = max(self.shapes)
        bins, load = self._assign(lengths, rows)
        while self.varies_rows and load > length:
            rows += 1
            bins, load = self._assign(lengths, rows)
        if not self.varies_rows:
            length = -(-load // _RARE_MULTIPLE) * _RARE_MULTIPLE
        return RowShape(rows, length), bins

    def _assign(self, lengths: np.ndarray, rows: int) -> tuple[np.ndarray, int]:
        bins = assign(lengths.sum(-1), self.shards * rows, self.most)
        return bins, self._load(lengths, bins, rows)

    def _load(self, counts: np.ndarray, bins: np.ndarray, rows: int) -> int:
        """What the fullest row holds, of `rows` on each device."""
        return int(loads(counts, bins, self.shards * rows).max())

    def _slots(
        self, examples: np.ndarray, bins: np.ndarray, shape: RowShape
    ) -> np.ndarray:
        micro_batches, count = examples.shape
        slots = np.full((micro_batches, self.shards * shape.rows, self.most), -1)
        held = np.zeros(slots.shape[:2], np.int64)
        for index in range(micro_batches):
            for column in range(count):
                if examples[index, column] >= 0:
                    row = bins[index, column]
                    slots[index, row, held[index, row]] = examples[index, column]
                    held[index, row] += 1
        return slots


def assign(lengths: np.ndarray, bins: int, most: int) -> np.ndarray:
    """Spread the examples of each micro-batch evenly: the longest first, to the
    emptiest of the rows that hold fewer than `most`.

    Args:
        lengths: int64[S, G] tokens; 0 is no example.

    Returns:
        int64[S, G], the row of each.
    """
    micro_batches = np.arange(len(lengths))
    order = np.argsort(-lengths, axis=1, kind="stable")
    filled = np.zeros((len(lengths), bins), np.int64)
    held = np.zeros_like(filled)
    found = np.zeros_like(lengths)
    for column in order.T:
        free = np.where(held < most, filled, np.iinfo(np.int64).max)
        row = free.argmin(axis=1)
        length = lengths[micro_batches, column]
        filled[micro_batches, row] += length
        held[micro_batches, row] += length > 0
        found[micro_batches, column] = row
    return found


def loads(lengths: np.ndarray, bins: np.ndarray, count: int) -> np.ndarray:
    """int64[S]: tokens in the fullest row of each micro-batch.

    Args:
        lengths: int64[S, G, sides].
        bins: int64[S, G], the row of each example, of `count` rows.
    """
    micro_batches, _, sides = lengths.shape
    filled = np.zeros((micro_batches, count, sides), np.int64)
    np.add.at(filled, (np.arange(micro_batches)[:, None], bins), lengths)
    return filled.max(axis=(1, 2))


def choose_packing(
    lengths: np.ndarray,
    sample: np.ndarray,
    steps_per_epoch: int,
    *,
    shards: int,
    row_length: int | None,
    share: tuple[int, int] = (0, 1),
    most_shapes: int = MOST_SHAPES,
    trained: np.ndarray | None = None,
) -> RowPacking:
    """Choose the shapes of rows that leave the least padding.

    They depend on the data, the order and the batch, not on how many steps are trained.

    Args:
        lengths: int64[examples, sides], see `RowPacking.place`.
        sample: int64[steps, A, G], the examples of some steps such as will come.
        steps_per_epoch: steps after which a shape has to have paid.
        row_length: rows are so long, and their number varies. None: a device's rows
            are few and long, which suits attention that leaves out blocks.
        trained: int64[examples, sides], the trained predictions of each, if the loss
            head is to score no others; in long rows alone, where their share varies
            little.
    """
    count, _, examples = sample.shape
    drawn = lengths_of(lengths, sample.reshape(-1, examples))
    each, most = -(-examples // shards), most_in_row(examples, shards)
    if row_length is None:
        mean = drawn.sum(axis=1).max(axis=-1).mean() / shards
        rows = min(each, max(1, round(mean / _LONG_ROW)))
        bins = assign(drawn.sum(-1), shards * rows, most)
        needed = loads(drawn, bins, shards * rows)
        # Other steps than these may need more than any of them, but none needs more
        # than examples of the greatest length.
        limit = -(-each // rows) * int(lengths.max(initial=0))
        room = np.minimum(needed + needed // 8, limit)
        needed = np.where(needed == needed.max(), np.maximum(needed, room), needed)
        needed = -(-needed // _MULTIPLE) * _MULTIPLE
    else:
        needed = _rows_needed(drawn, row_length, shards=shards, most=most)
    needed = needed.reshape(count, -1).max(axis=1)
    scored = None
    if row_length is None and trained is not None:
        drawn = lengths_of(trained, sample.reshape(-1, examples))
        scored = loads(drawn, bins, shards * rows).reshape(count, -1).max(axis=1)
    sizes = _choose_sizes(needed, steps_per_epoch, most_shapes)
    shapes = tuple(
        RowShape(rows, size) if row_length is None else RowShape(size, row_length)
        for size in sizes
    )
    if scored is not None:
        places = np.searchsorted(sizes, needed)
        shapes = tuple(
            shape._replace(
                scored=room_for_scored(
                    int(scored[places == index].max(initial=0)), shape.length
                )
            )
            for index, shape in enumerate(shapes)
        )
    return RowPacking(shards, most, shapes, row_length is not None, share)


def cover(packing: RowPacking, longest: int, examples: int) -> RowPacking:
    """Add shapes for micro-batches that need more than the sample did.

    The largest holds `examples` of up to `longest` tokens each, whatever they are. One
    or two in between, as `MOST_SHAPES` leave room, spare most of the difference. So
    there is one more than these at the most.
    """
    fitted, each = packing.shapes[-1], -(-examples // packing.shards)
    if packing.varies_rows:
        whole = RowShape(each, fitted.length)
        start, end, unit = fitted.rows, whole.rows, 1
    else:
        tokens = -(-each // fitted.rows) * longest
        whole = RowShape(fitted.rows, -(-tokens // _MULTIPLE) * _MULTIPLE)
        start, end, unit = fitted.length, whole.length, _RARE_MULTIPLE
    # In equal ratios, so that each spares the same share.
    count = min(2, MOST_SHAPES - len(packing.shapes))
    between = (start * (end / start) ** (n / (count + 1)) for n in range(1, count + 1))
    sizes = {-(-math.ceil(size) // unit) * unit for size in between}
    shapes = {
        fitted._replace(scored=0, **{"rows" if packing.varies_rows else "length": size})
        for size in sizes
        if size > start
    }
    kept = (s for s in {*packing.shapes, *shapes} if s.tokens < whole.tokens)
    return dataclasses.replace(packing, shapes=(*sorted(kept), whole))


def room_for_scored(most: int, tokens: int) -> int:
    """Places for the trained predictions of `tokens`, if that spares a tenth or more.

    There is a little room for steps that train more than `most`, the most of the
    sample. 0: it spares too little, and the head scores all.
    """
    most = -(-(most + most // 16) // _MULTIPLE) * _MULTIPLE
    return most if spares_enough(most, tokens) else 0


def spares_enough(places: int, tokens: int) -> bool:
    """Whether scoring so many places of `tokens` is worth selecting them."""
    return places <= 0.9 * tokens


def most_in_row(examples: int, shards: int) -> int:
    """For how many of a micro-batch's examples a row has room."""
    return min(examples, 2 * -(-examples // shards))


def lengths_of(lengths: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """int64[*examples.shape, sides]: tokens of some examples; 0 for -1."""
    return np.where((examples >= 0)[..., None], lengths[examples], 0)


def _rows_needed(
    sample: np.ndarray, row_length: int, *, shards: int, most: int
) -> np.ndarray:
    """int64[S]: rows on each device that hold a micro-batch."""
    needed = np.zeros(len(sample), np.int64)
    rows = 0
    while not needed.all():
        rows += 1
        open_ = np.flatnonzero(needed == 0)
        bins = assign(sample[open_].sum(-1), shards * rows, most)
        fits = loads(sample[open_], bins, shards * rows) <= row_length
        needed[open_[fits]] = rows
    return needed


def _choose_sizes(needed: np.ndarray, steps_per_epoch: int, most: int) -> list[int]:
    """So many sizes that one more would not be worth its compilation."""
    sizes = _least_padding(needed, 1)
    for count in range(2, most + 1):
        more = _least_padding(needed, count)
        filled, fuller = (
            np.asarray(each)[np.searchsorted(each, needed)].mean()
            for each in (sizes, more)
        )
        if (filled / fuller - 1) * steps_per_epoch < _STEPS_A_SHAPE:
            break
        sizes = more
    return sizes


def _least_padding(needed: np.ndarray, limit: int) -> list[int]:
    """At most `limit` sizes that hold all `needed` ones with the least in excess."""
    sizes, counts = np.unique(needed, return_counts=True)
    steps = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: of the first j sizes by k shapes, the last of which is size j - 1.
    cost = np.where(np.arange(len(sizes) + 1) == 0, 0.0, np.inf)
    choices = []
    for _ in range(min(limit, len(sizes))):
        # Size j - 1 holds the steps from size i on.
        of_last = sizes * (steps[None, 1:] - steps[:-1, None])
        of_last = np.where(np.triu(np.ones_like(of_last)), of_last, np.inf)
        total = cost[:-1, None] + of_last
        choices.append(total.argmin(axis=0))
        cost = np.concatenate([[0.0], total.min(axis=0)])
    found, last = [], len(sizes)
    for choice in reversed(choices):
        if last == 0:
            break
        found.append(int(sizes[last - 1]))
        last = int(choice[last - 1])
    return found[::-1]
