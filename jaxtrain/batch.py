"""The batches that data makes and that the step takes, without importing jax.

On the host their leaves are numpy arrays; in a step and on the devices, jax arrays.
`jaxtrain.types` registers these classes as pytrees and explains the dimension letters.
"""

import dataclasses
from typing import Any, TypeAlias

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
    `scored`: the places that `loss_mask` counts, C in each of G lines of B / G rows,
    the line's length behind the last; the loss head scores no others. None: all.
    """

    tokens: Int32[Array, "*A B T"]
    targets: Int32[Array, "*A B T"]
    segment_ids: Int32[Array, "*A B T"]
    positions: Int32[Array, "*A B T"]
    loss_mask: Float[Array, "*A B T"]
    prompt_ids: Int32[Array, "*A B T"] | None = None
    scored: Int32[Array, "*A G C"] | None = None


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
    ref_chosen_logps: Float[Array, "*A_B_P"] | None = None
    ref_rejected_logps: Float[Array, "*A_B_P"] | None = None
    pair_ids: Int32[Array, "*A B P"] | None = None
    shared: Batch | None = None


@dataclasses.dataclass(frozen=True)
class LabeledBatch:
    """Single completions with a verdict each, for KTO.

    `desirable`: 1 or 0 a row. `mismatched`: each prompt with another row's completion,
    from which KTO estimates its KL term. `ref_*_logps`: precomputed summed reference
    log-probs (nats), where given. A row with an all-zero loss mask is padding.
    `example_ids`: packed rows hold up to P completions, completion p of row b in the
    segment `example_ids[b, p]`; 0 is none, and what belongs to a completion is then
    [*A B P]. None: a row is a completion.
    """

    completions: Batch
    desirable: Float[Array, "*A_B_P"]
    mismatched: Batch | None = None
    ref_logps: Float[Array, "*A_B_P"] | None = None
    ref_mismatched_logps: Float[Array, "*A_B_P"] | None = None
    example_ids: Int32[Array, "*A B P"] | None = None


AnyBatch: TypeAlias = Batch | PairBatch | LabeledBatch


def rows_of(batch: AnyBatch) -> list[Batch]:
    """The rows that hold the tokens, each token once."""
    if isinstance(batch, PairBatch) and batch.shared is not None:
        return [batch.shared]
    parts = [batch] if isinstance(batch, Batch) else vars(batch).values()
    return [part for part in parts if isinstance(part, Batch)]
