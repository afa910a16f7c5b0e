"""The train and evaluation steps: pure functions of state and batch. No I/O.

One step serves every training type. The parameters in `state.trainable` are trained, an
`Objective` defines the loss, and a `ScoreFn` computes log-probs with the model.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxtrain.record.diagnostics import GroupOf, detect_spike, sum_squares_by_group
from jaxtrain.tree import overlay, select
from jaxtrain.types import (
    Batch,
    Metrics,
    Objective,
    Params,
    TokenLogProbs,
    TrainState,
    WeightedSum,
)

# (gradients, optimizer state, parameters, update or not: None is yes) -> both, updated
UpdateFn = Callable[[Params, Any, Params, Array | None], tuple[Params, Any]]
TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Any], Metrics]


class ScoreFn(Protocol):
    """The model as the step sees it: log-probs of a batch's targets under `params`."""

    def __call__(
        self, params: Params, batch: Batch, *, dropout_key: Array | None = None
    ) -> TokenLogProbs: ...


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a train step does in addition to computing the gradient of its objective.

    `max_grad_norm`: clip the gradient to this global norm; None or 0 does not clip.
    `with_reference`: pass `state.frozen` to the objective as the reference model;
    `score_reference` is how it scores, None: as the policy does.
    `with_dropout`: pass the policy a dropout key made from `state.rng` and the step.
    `skip_nonfinite`: do not update when the gradient is not finite.
    `spike_threshold`: a loss is a spike if it exceeds the mean of `state.loss_window`
    by this many standard deviations; `skip_spikes`: do not update at a spike.
    `group_of`: maps a parameter's path to a group, whose gradient norm is reported.
    `is_micro_batch_mean`: whether the loss or metric of this name is averaged within
    each micro-batch and then over those in which anything was counted, so that a short
    last one counts as much as the others.
    `fetch`: copies the parameters that the step reads from host to device memory.
    `prepare`: makes from the trained weights, once a step, what every micro-batch
    reads; it returns a function that puts this into a tree of them.
    `update`: replaces `make_whole_update`, for state that is kept in host memory.
    `unrolled`: the program compiles each layer of the policy by itself.
    """

    max_grad_norm: float | None = None
    with_reference: bool = False
    score_reference: ScoreFn | None = None
    with_dropout: bool = False
    skip_nonfinite: bool = False
    spike_threshold: float | None = None
    skip_spikes: bool = False
    group_of: GroupOf | None = None
    is_micro_batch_mean: Callable[[str], bool] = lambda name: False
    fetch: Callable[[TrainState], TrainState] = lambda state: state
    prepare: Callable[[Params], Callable[[Params], Params]] = lambda p: lambda t: t
    update: UpdateFn | None = None
    unrolled: bool = False


def make_train_step(
    objective: Objective,
    score: ScoreFn,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
    options: StepOptions = StepOptions(),
) -> TrainStep:
    """Build `train_step(state, batch) -> (state, metrics)`, to be jitted by the caller.

    The batch's leaves carry A accumulation micro-batches as their first axis. Totals
    and weights are summed over them in float32 and divided once, so that A
    micro-batches give the gradient of one large batch;
    `StepOptions.is_micro_batch_mean` names the exceptions. The schedule acts through
    `optimizer`; here it is only logged.

    The metrics are those of the objective and `loss`, `grad_norm` (before clipping),
    `learning_rate` (of this step) and `nonfinite` (1 if the gradient was not finite).
    With `group_of` there is a `grad_norm/<group>` for each group, and with
    `spike_threshold` there is `spike` (1 if the loss was one).
    """
    update = options.update or make_whole_update(optimizer)
    measure = _make_measure(objective, score, options)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        fetched = options.fetch(state)
        read = options.prepare(fetched.trainable)
        key = jax.random.fold_in(state.rng, state.step)
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale

        def scaled_total(
            trainable: Params, micro_batch: Any, index: Array
        ) -> tuple[Array, Metrics]:
            dropout = jax.random.fold_in(key, index) if options.with_dropout else None
            sums = measure(read(trainable), fetched.frozen, micro_batch, dropout)
            for name in filter(options.is_micro_batch_mean, sums):
                sums[name] = _as_one_vote(sums[name])
            return sums["loss"].total * scale, sums

        grads, metrics = _sum_gradients(scaled_total, fetched.trainable, batch)

        weight = metrics["loss"].weight
        # If a batch trains no token at all, the gradient must be zero and not NaN.
        denominator = jnp.where(weight == 0, 1, weight) * scale
        with jax.named_scope("clip"):
            group_of = options.group_of or (lambda path: "")
            squares = sum_squares_by_group(grads, group_of, unrolled=options.unrolled)
            norms = {k: jnp.sqrt(v) / denominator for k, v in squares.items()}
            grad_norm = jnp.sqrt(sum(squares.values())) / denominator
            grads = jax.tree.map(lambda g: g / denominator, grads)
            finite = jnp.isfinite(grad_norm)
            if options.max_grad_norm:
                grads = clip_to_norm(grads, grad_norm, options.max_grad_norm)
        good, is_spike, window = _guard(state, metrics["loss"], finite, options)
        with jax.named_scope("optimizer"):
            old = fetched if options.update is None else state
            trainable, opt_state = update(grads, old.opt_state, old.trainable, good)

        numbers = {
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "nonfinite": 1.0 - finite.astype(jnp.float32),
        }
        if options.spike_threshold is not None:
            numbers["spike"] = is_spike.astype(jnp.float32)
        if options.group_of is not None:
            numbers |= {f"grad_norm/{k}": norm for k, norm in norms.items()}
        loss_scale = state.loss_scale
        if loss_scale is not None:
            numbers["loss_scale"] = loss_scale.scale
            loss_scale = loss_scale.update(finite)
        metrics |= {k: WeightedSum(v, jnp.float32(1)) for k, v in numbers.items()}
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            trainable=trainable,
            opt_state=opt_state,
            loss_scale=loss_scale,
            loss_window=window,
        )
        return new_state, metrics

    return train_step


def _make_measure(
    objective: Objective, score: ScoreFn, options: StepOptions
) -> Callable[[Params, Params, Any, Array | None], Metrics]:
    """Build `measure(trainable, frozen, batch, dropout_key) -> {"loss": ..., metrics}`.

    The objective gets the policy, and the reference, through which no gradient flows.
    """

    def measure(
        trainable: Params, frozen: Params, batch: Any, key: Array | None
    ) -> Metrics:
        def policy(rows: Batch) -> TokenLogProbs:
            return score(overlay(frozen, trainable), rows, dropout_key=key)

        def reference(rows: Batch) -> TokenLogProbs:
            own = options.score_reference or score
            return jax.lax.stop_gradient(own(frozen, rows))

        second = reference if options.with_reference else None
        loss, metrics = objective(policy, second, batch)
        return {"loss": loss, **metrics}

    return measure


def _guard(
    state: TrainState, loss: WeightedSum, finite: Array, options: StepOptions
) -> tuple[Array | None, Array, Array | None]:
    """Return (whether to update, whether the loss is a spike, the new loss window).

    The first is None to update unconditionally. Loss scaling always skips steps that
    overflow, because it finds its scale by them.
    """
    is_spike, window = jnp.bool_(False), state.loss_window
    if options.spike_threshold is not None:
        assert window is not None  # `init_state` gives one with a threshold
        is_spike, window = detect_spike(window, loss.mean(), options.spike_threshold)
    good = finite if options.skip_nonfinite or state.loss_scale is not None else None
    if options.skip_spikes:
        good = ~is_spike if good is None else good & ~is_spike
    return good, is_spike, window


def clip_to_norm(grads: Params, norm: Float[Array, ""], max_norm: float) -> Params:
    """Scale by min(1, max_norm / (norm + 1e-6)), as PyTorch's `clip_grad_norm_`."""
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads)


def make_whole_update(optimizer: optax.GradientTransformation) -> UpdateFn:
    """Build an update of all parameters at once, in device memory."""

    def update(
        grads: Params, opt_state: Any, params: Params, good: Array | None
    ) -> tuple[Params, Any]:
        updates, new_opt_state = optimizer.update(grads, opt_state, params)
        new = (optax.apply_updates(params, updates), new_opt_state)
        if good is None:
            return new
        return jax.tree.map(
            lambda new, old: jnp.where(good, new, old), new, (params, opt_state)
        )

    return update


def _as_one_vote(sums: WeightedSum) -> WeightedSum:
    """The mean with weight 1, or 0 with weight 0 if nothing was counted."""
    return WeightedSum(sums.mean(), (sums.weight != 0).astype(jnp.float32))


def _sum_gradients(
    total: Callable[[Params, Any, Array], tuple[Array, Metrics]],
    trainable: Params,
    batch: Any,
) -> tuple[Params, Metrics]:
    """Add up the gradients (in float32) and metrics of all micro-batches, in a loop.

    `total` takes the parameters, a micro-batch and its number.
    """

    def micro_step(micro_batch: Any, index: Array) -> tuple[Params, Metrics]:
        grads, sums = jax.grad(total, has_aux=True)(trainable, micro_batch, index)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), sums

    count = jax.tree.leaves(batch)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], batch)
    if count == 1:
        return micro_step(first, jnp.int32(0))
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(micro_step, first, 0))

    def body(sums: Any, xs: tuple[Any, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, micro_step(*xs)), None

    sums, _ = jax.lax.scan(body, zeros, (batch, jnp.arange(count)))
    return sums


def make_eval_step(
    objective: Objective, score: ScoreFn, options: StepOptions = StepOptions()
) -> EvalStep:
    """Build `eval_step(state, batch) -> metrics`, for one micro-batch, without dropout.

    The sums of several batches add up to those of the whole set.
    """
    measure = _make_measure(objective, score, options)

    def eval_step(state: TrainState, batch: Any) -> Metrics:
        fetched = options.fetch(state)
        read = options.prepare(fetched.trainable)
        return measure(read(fetched.trainable), fetched.frozen, batch, None)

    return eval_step


def make_reference_sync(mixup: float) -> Callable[[TrainState], TrainState]:
    """Build `sync(state) -> state`: reference <- mixup * policy + (1 - mixup) * it.

    TR-DPO's soft update (arXiv:2404.09656). Under LoRA, `state.frozen` holds adapters
    of the reference besides the base, whose A and B are each updated by this rule.
    """

    def mix(old: Array, policy: Array) -> Array:
        blend = mixup * policy.astype(jnp.float32)
        return (blend + (1 - mixup) * old.astype(jnp.float32)).astype(old.dtype)

    def sync(state: TrainState) -> TrainState:
        moving = select(state.frozen, state.trainable)
        moved = jax.tree.map(mix, moving, state.trainable)
        return dataclasses.replace(state, frozen=overlay(state.frozen, moved))

    return sync
