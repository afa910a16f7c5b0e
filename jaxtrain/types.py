"""Types that modules exchange: batches, sums, token log-probs and the train state.

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
    """A sum and its weight, added up over micro-batches and devices and divided once.

    Averages of averages depend on how rows fall into batches, and sums do not. So mesh
    shape and padding never change a result. Accumulation changes it only if the step is
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
    """Results for each prediction, without the vocabulary axis; all are float32.

    `logps`: log-probability of the target (nats). `entropy`: entropy of the predicted
    distribution (nats). `correct`: 1 where the target is the first argmax, else 0.
    `mean_logit`: logits averaged over the vocabulary. `collision`: log sum_v p_v^2
    (nats), computed only for objectives that ask for it (WPO). Objectives never see the
    others, which are for wrappers around them: `router_loss` tells how unevenly the
    router used the experts over all tokens of the batch (models/moe.py), `log_total` is
    the log of the softmax's denominator, `router` is of models/router_report.py.
    `total` is sum(loss_mask * logps); where it is given, it alone has the gradient.
    """

    logps: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    correct: Float[Array, "B T"]
    mean_logit: Float[Array, "B T"]
    collision: Float[Array, "B T"] | None = None
    router_loss: Float[Array, ""] | None = None
    log_total: Float[Array, "B T"] | None = None
    router: Any = None
    total: Float[Array, ""] | None = None


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
