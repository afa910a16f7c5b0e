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

from jaxtrain.batch import Batch, LabeledBatch, PairBatch

LogicalAxes = tuple[str | None, ...]  # a name, or None, for each axis of an array
Params = dict[str, Any]  # a nested plain dict of arrays, named as in Hugging Face
BALANCING_BIAS = "e_score_correction_bias"  # a router's: no loss has a gradient by it

for _batch in (Batch, PairBatch, LabeledBatch):
    jax.tree_util.register_dataclass(
        _batch, [field.name for field in dataclasses.fields(_batch)], meta_fields=[]
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedSum:
    """A sum and its weight; added over micro-batches and devices, divided once.

    Averages of averages depend on how rows fall into batches. Sums do not, so mesh
    shape and padding never change a number. Accumulation does so only if the step is
    told to give all micro-batches the same weight, as TRL does for pairs.
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
    """What an objective sees of each prediction; the vocabulary axis is not kept.

    `logps`: log-probability of the target (nats). `entropy`: of the predicted
    distribution (nats). `correct`: 1 where the target is the first argmax.
    `mean_logit`: logits averaged over the vocabulary. `collision`: log sum_v p_v^2
    (nats), computed only for objectives that ask for it (WPO). All float32.
    `router_loss`: how unevenly the router used the experts, over all tokens of the
    batch (models/moe.py). Objectives never see it: `with_router_loss` adds it to their
    loss. `log_total`: log of the softmax's denominator, for the z-loss alone. `router`:
    what else is reported of it (models/router_report.py); objectives do not see it.
    """

    logps: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    correct: Float[Array, "B T"]
    mean_logit: Float[Array, "B T"]
    collision: Float[Array, "B T"] | None = None
    router_loss: Float[Array, ""] | None = None
    log_total: Float[Array, "B T"] | None = None
    router: Any = None


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
