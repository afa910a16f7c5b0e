"""The batches that data makes and that the step takes, without importing jax.

On the host their leaves are numpy arrays; in a step and on the devices, jax arrays.
`jaxtrain.types` registers these classes as pytrees and explains the dimension letters.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from jaxtyping import Float, Int32

Array: TypeAlias = Any  # of numpy or of jax: naming jax's would import it here


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens for next-token prediction. Targets are shifted once, in data.

    `targets[b, t]` is the token that position t predicts. `segment_ids` number the
    documents packed into a row from 1; 0 marks padding. `positions` restart at 0 in
    each document. `loss_mask` weighs each prediction; 0 leaves it out of the loss.
    `prompt_ids` name a second segment that a token reads beside its own: the prompt
    that the two completions of a pair share (0: none). None: no row shares any.
    """

    tokens: Int32[Array, "*A B T"]
    targets: Int32[Array, "*A B T"]
    segment_ids: Int32[Array, "*A B T"]
    positions: Int32[Array, "*A B T"]
    loss_mask: Float[Array, "*A B T"]
    prompt_ids: Int32[Array, "*A B T"] | None = None

    def sides(self) -> dict[str, "Batch"]:
        """The rows that hold the tokens, each token once, by name."""
        return {"": self}


@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Preference pairs: row b of `chosen` and row b of `rejected` share a prompt.

    A pair whose two loss masks are all 0 is padding and counts nowhere.
    `ref_*_logps` are precomputed summed reference log-probs (nats), where given.
    `pair_ids`: packed rows hold up to P pairs, pair p of row b in the segments
    `pair_ids[b, p]` of both sides; 0 is no pair. None: a row is a pair.
    `shared`: rows that hold both sides and each prompt once, as `share_prompts` lays
    them out; `chosen` and `rejected` are then these rows less the other completion, so
    scoring `shared` alone scores both.
    """

    chosen: Batch
    rejected: Batch
    ref_chosen_logps: Float[Array, "*A B"] | None = None
    ref_rejected_logps: Float[Array, "*A B"] | None = None
    pair_ids: Int32[Array, "*A B P"] | None = None
    shared: Batch | None = None

    def sides(self) -> dict[str, Batch]:
        """The rows that hold the tokens, each token once, by name."""
        if self.shared is not None:
            return {"shared": self.shared}
        return {"chosen": self.chosen, "rejected": self.rejected}


@dataclasses.dataclass(frozen=True)
class LabeledBatch:
    """Single completions with a verdict each, for KTO.

    `desirable`: 1 or 0 a row. `mismatched`: each prompt with another row's completion,
    from which KTO estimates its KL term. `ref_*_logps`: precomputed summed reference
    log-probs (nats), where given. A row with an all-zero loss mask is padding.
    """

    completions: Batch
    desirable: Float[Array, "*A B"]
    mismatched: Batch | None = None
    ref_logps: Float[Array, "*A B"] | None = None
    ref_mismatched_logps: Float[Array, "*A B"] | None = None

    def sides(self) -> dict[str, Batch]:
        """The rows that hold the tokens, each token once, by name."""
        both = {"completions": self.completions, "mismatched": self.mismatched}
        return {name: side for name, side in both.items() if side is not None}


AnyBatch: TypeAlias = Batch | PairBatch | LabeledBatch
_SomeBatch = TypeVar("_SomeBatch", Batch, PairBatch, LabeledBatch)


def empty_rows(
    shape: tuple[int, ...], *, pad_id: int = 0, shares_prompts: bool = False
) -> Batch:
    """Rows of padding to write documents into, as numpy arrays of this shape."""
    return Batch(
        tokens=np.full(shape, pad_id, np.int32),
        targets=np.full(shape, pad_id, np.int32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        loss_mask=np.zeros(shape, np.float32),
        prompt_ids=np.zeros(shape, np.int32) if shares_prompts else None,
    )


def unpacked_rows(
    documents: Sequence[tuple[Sequence[int], int]], shape: tuple[int, int]
) -> Batch:
    """Rows of one document each, padded to `shape`.

    Each document is its token ids and the first position whose prediction counts.
    """
    batch = empty_rows(shape)
    for b, (ids, first_counted) in enumerate(documents):
        length = max(len(ids) - 1, 0)
        batch.tokens[b, :length] = ids[:-1]
        batch.targets[b, :length] = ids[1:]
        batch.segment_ids[b, :length] = 1
        batch.positions[b, :length] = np.arange(length)
        batch.loss_mask[b, first_counted:length] = 1
    return batch


def share_prompts(rows: Batch, **fields: Any) -> PairBatch:
    """The pairs of rows that hold a prompt once and then both completions.

    Pair p of a row has its prompt in segment 3 p - 2, the chosen completion in 3 p - 1
    and the rejected one in 3 p. `fields`: of the result.
    """

    def less(other: int) -> Batch:
        kept = (rows.segment_ids % 3 != other) | (rows.segment_ids == 0)
        return dataclasses.replace(
            rows,
            segment_ids=rows.segment_ids * kept,
            loss_mask=rows.loss_mask * kept,
        )

    return PairBatch(chosen=less(0), rejected=less(2), shared=rows, **fields)


def map_arrays(function: Callable[..., Any], *batches: _SomeBatch) -> _SomeBatch:
    """Call `function` with each array of these batches, which are of one type.

    This is `jax.tree.map` for where jax is not imported.
    """

    def of(*leaves: Any) -> Any:
        if leaves[0] is None:
            return None
        if isinstance(leaves[0], Batch):
            return map_arrays(function, *leaves)
        return function(*leaves)

    names = [field.name for field in dataclasses.fields(batches[0])]
    return type(batches[0])(**{n: of(*(getattr(b, n) for b in batches)) for n in names})


def named_arrays(batch: AnyBatch) -> dict[str, Any]:
    """The arrays of a batch by name: `tokens`, `chosen/tokens`, `pair_ids`.

    Of pairs that share prompts `chosen` and `rejected` are left out, for `shared` has
    all that they have.
    """
    sides = batch.sides()
    found = {
        f"{side}/{name}" if side else name: array
        for side, rows in sides.items()
        for name, array in vars(rows).items()
    }
    if not isinstance(batch, Batch):
        rest = vars(batch).items()
        found |= {name: x for name, x in rest if not isinstance(x, Batch)}
    return {name: array for name, array in found.items() if array is not None}
