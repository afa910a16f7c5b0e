"""The data that crosses module borders: batches, sums, token log-probs, train state.

Dimension letters, the same in every module: A accumulation micro-batches, B batch
rows, T query time, S key time, D model width, F MLP width, N query heads, K key-value
heads, H head width, V vocabulary, L layers, R LoRA rank.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

Params = dict[str, Any]  # a nested plain dict of arrays, named as in Hugging Face


@jax.tree_util.register_dataclass
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


@jax.tree_util.register_dataclass
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


def share_prompts(rows: Batch, **fields: Any) -> PairBatch:
    """The pairs of rows that hold a prompt once and then both completions.

    Pair p of a row has its prompt in segment 3 p - 2, the chosen completion in 3 p - 1
    and the rejected one in 3 p. Takes numpy arrays as well. `fields`: of the result.
    """

    def less(other: int) -> Batch:
        kept = (rows.segment_ids % 3 != other) | (rows.segment_ids == 0)
        return dataclasses.replace(
            rows,
            segment_ids=rows.segment_ids * kept,
            loss_mask=rows.loss_mask * kept,
        )

    return PairBatch(chosen=less(0), rejected=less(2), shared=rows, **fields)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """A sum and its weight; added over micro-batches and devices, divided once.

    Averages of averages depend on how rows fall into batches. Sums do not, so mesh
    shape and padding never change a number, nor does accumulation, but where the step
    is told to weigh micro-batches alike, as TRL does for pairs.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: "WeightedSum") -> "WeightedSum":
        return WeightedSum(self.total + other.total, self.weight + other.weight)

    def mean(self) -> Float[Array, ""]:
        """total / weight, and 0 where nothing was counted."""
        return self.total / jnp.where(self.weight == 0, 1, self.weight)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogProbs:
    """What an objective may know of each prediction: never the vocabulary axis.

    `logps`: log-probability of the target (nats). `entropy`: of the predicted
    distribution (nats). `correct`: 1 where the target is the first argmax.
    `mean_logit`: logits averaged over the vocabulary. `collision`: log sum_v p_v^2
    (nats), computed only for objectives that ask for it (WPO). All float32.
    `router_loss`: how unevenly a mixture of experts used them, over all tokens of the
    batch (models/moe.py); objectives never see it, `with_router_loss` adds it to them.
    """

    logps: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    correct: Float[Array, "B T"]
    mean_logit: Float[Array, "B T"]
    collision: Float[Array, "B T"] | None = None
    router_loss: Float[Array, ""] | None = None


LogProbsFn = Callable[[Batch], TokenLogProbs]
Metrics = dict[str, WeightedSum]
Objective = Callable[[LogProbsFn, LogProbsFn | None, Any], tuple[WeightedSum, Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything one step reads and writes, as a plain tree.

    The policy is `overlay(frozen, trainable)`. Full training: `trainable` is the whole
    model and `frozen` is empty, or the DPO reference. LoRA: `frozen` is the base and
    `trainable` the adapters, so the reference is `frozen` again, without a copy.
    `loss_window` holds the last losses where spikes are looked for.
    """

    step: Int32[Array, ""]
    trainable: Params
    frozen: Params
    opt_state: Any
    rng: Array
    loss_scale: Any = None
    loss_window: Float[Array, "W"] | None = None
