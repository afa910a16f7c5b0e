"""Prepared rows: tokens in flat arrays, read as static batches or from mapped files."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxtrain.batch import AnyBatch, Batch, LabeledBatch, PairBatch
from jaxtrain.data.batches import shared_prompt
from jaxtrain.data.batches.scoring import with_scored

ROW_MULTIPLE = 64  # tokens: rows are as long as a multiple of this
_BLOCK = 10_000  # documents
_DESCRIBED = (
    "objective", "row_length", "pad_id", "parts", "shares_prompts", "most_pairs",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataStats:
    """What became of the rows. Lengths and tokens count prompts too, not padding.

    `trained_tokens` are those the loss predicts. `dropped` rows have nothing left to
    train after truncation (a prompt that fills max_length). A preference row counts
    the tokens of both sides, and its length is the longer side's. `slots` are the
    tokens for which the packed rows have room. Checkpoints of streams hold the names.
    """

    rows: int = 0
    bad_rows: int = 0
    dropped: int = 0
    truncated: int = 0
    packed_rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    slots: int = 0
    documents: int = 0
    summed_lengths: int = 0
    max_length: int = 0
    equal_pairs: int = 0

    def __add__(self, other: "DataStats") -> "DataStats":
        sums = {name: x + getattr(other, name) for name, x in vars(self).items()}
        longest = max(self.max_length, other.max_length)
        return DataStats(**sums | {"max_length": longest})

    @property
    def mean_length(self) -> float:
        """Tokens of a document; 0 where there is none."""
        return self.summed_lengths / max(self.documents, 1)

    @property
    def packing_efficiency(self) -> float:
        """The filled share of the slots; 0 where there is none."""
        return self.tokens / max(self.slots, 1)

    def describe(self) -> str:
        """One line for the log."""
        equal = f", {self.equal_pairs} with chosen = rejected" * bool(self.equal_pairs)
        return (
            f"{self.rows} rows ({self.bad_rows} bad, {self.dropped} dropped, "
            f"{self.truncated} truncated{equal}) -> {self.packed_rows} rows of "
            f"{self.tokens} tokens, {self.trained_tokens} trained; length mean "
            f"{self.mean_length:.1f}, max {self.max_length}; "
            f"filled {self.packing_efficiency:.1%}"
        )


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """Documents as spans of one flat token array, and rows as lists of documents.

    `tokens` int32[N], `trained` bool[N]; document d is
    `tokens[starts[d] : starts[d] + lengths[d]]`; row r holds documents
    `row_documents[row_offsets[r] : row_offsets[r + 1]]`.
    """

    tokens: np.ndarray
    trained: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    row_documents: np.ndarray
    row_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row_lengths(self) -> np.ndarray:
        """int64[rows]: tokens in each row."""
        return self._sum_rows(self.lengths.astype(np.int64))

    def row_trained(self) -> np.ndarray:
        """int64[rows]: trained predictions in each row.

        A document's first token is predicted by none.
        """
        counts = np.zeros(len(self.starts), np.int64)
        for begin in range(0, len(counts), _BLOCK):  # a block's tokens at a time
            block = slice(begin, begin + _BLOCK)
            starts = self.starts[block].astype(np.int64)
            stops = starts + self.lengths[block]
            low, high = int(starts.min()), int(stops.max())
            total = np.concatenate([[0], np.cumsum(self.trained[low:high])])
            firsts = np.minimum(starts + 1, stops)
            counts[block] = total[stops - low] - total[firsts - low]
        return self._sum_rows(counts)

    def _sum_rows(self, of_documents: np.ndarray) -> np.ndarray:
        """int64[rows]: the sum of a number of each document, over a row's documents."""
        total = np.concatenate([[0], np.cumsum(of_documents[self.row_documents])])
        return total[self.row_offsets[1:]] - total[self.row_offsets[:-1]]

    def documents_of(self, rows: np.ndarray) -> np.ndarray:
        """int64: the documents of some rows, one after another."""
        spans = [
            self.row_documents[self.row_offsets[row] : self.row_offsets[row + 1]]
            for row in rows
        ]
        return np.concatenate([np.zeros(0, np.int64), *spans])

    def write_documents(self, documents: np.ndarray, out: Batch) -> None:
        """Write documents behind one another into `out`, an empty row of [T]."""
        at = 0
        for segment, document in enumerate(documents, start=1):
            start, length = int(self.starts[document]), int(self.lengths[document])
            stop = at + length
            out.tokens[at:stop] = self.tokens[start : start + length]
            # The last token of a document predicts nothing.
            out.targets[at : stop - 1] = self.tokens[start + 1 : start + length]
            out.loss_mask[at : stop - 1] = self.trained[start + 1 : start + length]
            out.segment_ids[at:stop] = segment
            out.positions[at:stop] = np.arange(length)
            at = stop


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """Token rows of one static length, in memory or memory-mapped.

    `stores` has one entry, "", for next-token rows, "chosen" and "rejected" for
    preference rows, "completions" and "mismatched" for labeled ones.
    `reference_logps` (float32[rows] a side) and `row_values` (float32[rows] a name)
    ride along in batches. `difficulty` (float32[rows]) orders a curriculum. `parts`
    are the (rows, weight) of the data sets of a mixture, in order. `shares_prompts`:
    a preference row holds each prompt once, then both completions (`shared_prompt`).
    `most_pairs`: batches have room for so many pairs a row; 0: as many as there are.
    """

    objective: str
    stores: Mapping[str, TokenStore]
    row_length: int
    pad_id: int
    stats: DataStats
    reference_logps: Mapping[str, np.ndarray] | None = None
    row_values: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    difficulty: np.ndarray | None = None
    parts: tuple[tuple[int, float], ...] = ()
    shares_prompts: bool = False
    most_pairs: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.stores.values())))

    @property
    def packed(self) -> bool:
        """Whether any row holds more than one document."""
        return any(
            bool((np.diff(s.row_offsets) > 1).any()) for s in self.stores.values()
        )

    def row_lengths(self) -> np.ndarray:
        """int64[rows]: tokens in each row; of a pair in two rows, the longer side's."""
        stores = self.stores
        if self.shares_prompts:  # the documents of a row are the same on both sides
            both = shared_prompt.pair_lengths(stores)
            stores = {"": dataclasses.replace(stores["chosen"], lengths=both)}
        return functools.reduce(np.maximum, [s.row_lengths() for s in stores.values()])

    @functools.cached_property
    def side_lengths(self) -> np.ndarray:
        """int64[rows, S]: tokens in each of the S rows that hold a row side by side.

        That is 1; 2 for chosen and rejected, or for a completion and its mismatch.
        """
        if self.shares_prompts:
            return self.row_lengths()[:, None]
        return np.stack([s.row_lengths() for s in self.stores.values()], axis=-1)

    @functools.cached_property
    def side_trained(self) -> np.ndarray:
        """int64[rows, S]: trained predictions in each of the rows of `side_lengths`."""
        each = np.stack([s.row_trained() for s in self.stores.values()], axis=-1)
        return each.sum(axis=-1, keepdims=True) if self.shares_prompts else each

    @functools.cached_property
    def packings(self) -> dict[Any, Any]:
        """How rows were packed, by what that was chosen for, to choose but once."""
        return {}

    def batch(self, rows: np.ndarray, *, row_length: int | None = None) -> AnyBatch:
        """Rows as arrays [*rows.shape, T]; -1 gives an empty row, which counts nowhere.

        `row_length` overrides T; it must hold the longest of these rows.
        """
        length = self.row_length if row_length is None else row_length
        ids = None
        if self.objective == "preference" and (self.most_pairs or self.packed):
            counts = np.diff(self.stores["chosen"].row_offsets)
            held = np.where(rows < 0, 0, counts[rows])[..., None]
            numbers = np.arange(1, (self.most_pairs or counts.max()) + 1)
            ids = np.where(numbers <= held, numbers, 0).astype(np.int32)
        return self._batch(rows[..., None], length, self._values(rows), ids)

    def pack(self, slots: np.ndarray, row_length: int, scored: int = 0) -> AnyBatch:
        """Several rows in each row of the batch, as `layout.RowPacking.place` says.

        Args:
            slots: int64[*dims, P], from left to right; -1 is none.
            scored: places that `Batch.scored` has; 0 leaves it out.
        """
        numbers = np.arange(1, slots.shape[-1] + 1)
        ids = np.where(slots < 0, 0, numbers).astype(np.int32)
        return self._batch(slots, row_length, self._values(slots), ids, scored)

    def _batch(
        self,
        slots: np.ndarray,
        length: int,
        values: dict[str, np.ndarray],
        ids: np.ndarray | None,
        scored: int = 0,
    ) -> AnyBatch:
        if self.shares_prompts:
            write = functools.partial(
                shared_prompt.write_documents, self.stores, self._prompt_lengths
            )
            shared = self._fill(self.stores["chosen"], write, slots, length)
            shared = _with_scored(shared, scored)
            return shared_prompt.share_prompts(shared, pair_ids=ids, **values)
        fields: dict[str, Any] = {
            name: _with_scored(
                self._fill(store, store.write_documents, slots, length), scored
            )
            for name, store in self.stores.items()
        }
        if self.objective == "next_token":
            return fields[""]
        fields |= values
        if self.objective == "preference":
            return PairBatch(**fields, pair_ids=ids)
        return LabeledBatch(**fields, example_ids=ids)

    def _values(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What a batch has of each row beside its tokens, by the batch's fields."""
        values = dict(self.row_values)
        for side, logps in (self.reference_logps or {}).items():
            values[f"ref_{side}_logps"] = logps
        return {
            name: np.where(rows < 0, np.float32(0), np.asarray(array, np.float32)[rows])
            for name, array in values.items()
        }

    def without_shared_prompts(self) -> "PreparedDataset":
        """The same pairs, chosen and rejected each in rows of their own."""
        apart = dataclasses.replace(self, shares_prompts=False)
        multiples = -(-int(apart.row_lengths().max()) // ROW_MULTIPLE)
        return dataclasses.replace(apart, row_length=multiples * ROW_MULTIPLE)

    @functools.cached_property
    def _prompt_lengths(self) -> np.ndarray:
        return shared_prompt.prompt_lengths(self.stores)

    def with_reference_logps(
        self, chosen: np.ndarray, rejected: np.ndarray
    ) -> "PreparedDataset":
        """The same pairs with summed reference log-probs (nats), one a row."""
        if self.objective != "preference":
            raise ValueError(
                "only preference rows have reference log-probs, and these are"
                f" {self.objective} rows: leave them out"
            )
        if self.packed:
            raise ValueError(
                "reference log-probs are one a row, and packed rows hold several "
                "pairs: set data.packing = false, or precompute_ref_log_probs = false"
            )
        both = {"chosen": chosen, "rejected": rejected}
        for name, logps in both.items():
            if np.shape(logps) != (len(self),):
                raise ValueError(
                    f"{name} log-probs have shape {np.shape(logps)}, expected one of "
                    f"each of the {len(self)} rows"
                )
        return dataclasses.replace(self, reference_logps=both)

    def with_difficulty(self, difficulty: np.ndarray) -> "PreparedDataset":
        """The same rows with how hard each is (any scale), for a curriculum."""
        if np.shape(difficulty) != (len(self),) or not np.isfinite(difficulty).all():
            raise ValueError(
                f"difficulty has shape {np.shape(difficulty)}: give one finite number "
                f"for each of the {len(self)} rows"
            )
        return dataclasses.replace(self, difficulty=np.asarray(difficulty, np.float32))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens, masks and rows: equal only for the same data."""
        digest = hashlib.blake2b(digest_size=8)
        for name, store in sorted(self.stores.items()):
            digest.update(name.encode())
            for array in vars(store).values():
                digest.update(np.ascontiguousarray(array).data)
        for name, values in sorted(self.row_values.items()):
            digest.update(name.encode() + np.asarray(values, np.float32).tobytes())
        return digest.hexdigest()

    def save(self, folder: str | pathlib.Path) -> None:
        """Write the arrays as .npy files, for `load` to map into memory."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            **{side: vars(store) for side, store in self.stores.items()},
            "reference_logps": self.reference_logps or {},
            "row_values": self.row_values,
            "difficulty": {} if self.difficulty is None else {"": self.difficulty},
        }
        for group, named in arrays.items():
            for name, array in named.items():
                np.save(folder / f"{group}.{name}.npy", array)
        described = {name: getattr(self, name) for name in _DESCRIBED}
        described["stats"] = dataclasses.asdict(self.stats)
        described["arrays"] = {group: list(named) for group, named in arrays.items()}
        (folder / "prepared.json").write_text(json.dumps(described))

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> "PreparedDataset":
        """Open what `save` wrote, memory-mapped."""
        folder = pathlib.Path(folder)
        described = json.loads((folder / "prepared.json").read_text())
        arrays = {
            group: {
                name: np.load(folder / f"{group}.{name}.npy", mmap_mode="r")
                for name in names
            }
            for group, names in described.pop("arrays").items()
        }
        more: dict[str, Any] = {
            "reference_logps": arrays.pop("reference_logps") or None,
            "row_values": arrays.pop("row_values"),
            "difficulty": arrays.pop("difficulty").get(""),
            "stores": {side: TokenStore(**named) for side, named in arrays.items()},
            "stats": DataStats(**described.pop("stats")),
            "parts": tuple((rows, weight) for rows, weight in described.pop("parts")),
        }
        return cls(**described, **more)

    def _fill(
        self,
        store: TokenStore,
        write_documents: Callable[[np.ndarray, Batch], None],
        slots: np.ndarray,
        length: int,
    ) -> Batch:
        shape = (*slots.shape[:-1], length)
        arrays = {
            "tokens": np.full(shape, self.pad_id, np.int32),
            "targets": np.full(shape, self.pad_id, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "loss_mask": np.zeros(shape, np.float32),
        }
        if self.shares_prompts:
            arrays["prompt_ids"] = np.zeros(shape, np.int32)
        for at in np.ndindex(shape[:-1]):
            rows = slots[at]
            documents = store.documents_of(rows[rows >= 0])
            write_documents(documents, Batch(**{n: x[at] for n, x in arrays.items()}))
        return Batch(**arrays)


def _with_scored(rows: Batch, count: int) -> Batch:
    """The rows with the places of their trained predictions, `count` to a row."""
    return with_scored(rows, count, rows.tokens.shape[-2]) if count else rows
