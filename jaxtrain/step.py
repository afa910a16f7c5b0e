"""The train and evaluation steps: pure functions of state and batch. No I/O.

One step serves every training type. What is trained is whatever `state.trainable`
holds; what the loss is, an `Objective` says; how a model scores tokens, a `ScoreFn`.
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

# (gradients, optimizer state, parameters, whether to: None is yes) -> both, updated
UpdateFn = Callable[[Params, Any, Params, Array | None], tuple[Params, Any]]
TrainStep = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Any], Metrics]


class ScoreFn(Protocol):
    """The model, seen by the step: log-probs of a batch's targets under `params`."""

    def __call__(
        self, params: Params, batch: Batch, *, dropout_key: Array | None = None
    ) -> TokenLogProbs: ...


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a train step does beyond the gradient of its objective.

    `max_grad_norm`: clip the global norm to this; None or 0 leaves it.
    `with_reference`: give the objective `state.frozen` as a second model.
    `with_dropout`: give the policy a key, a function of `state.rng` and the step.
    `skip_nonfinite`: leave parameters and optimizer as they were when a gradient is not
    finite. `spike_threshold`: standard deviations of `state.loss_window` above its mean
    from which a loss is a spike; `skip_spikes` leaves the state as it was there too.
    `group_of`: a parameter's group by its path: report each group's gradient norm.
    `is_micro_batch_mean`: true of a name ("loss" or a metric's) that is averaged within
    each micro-batch first and over micro-batches then, so that a short last one counts
    as much as the others. Empty ones count nowhere.
    `fetch`: bring what the step reads of the state from host to device memory.
    `prepare`: of weights that train, make what every micro-batch reads, once a step;
    what it returns puts that into their tree.
    `update`: in place of `make_whole_update`, of state as it is stored.
    """

    max_grad_norm: float | None = None
    with_reference: bool = False
    with_dropout: bool = False
    skip_nonfinite: bool = False
    spike_threshold: float | None = None
    skip_spikes: bool = False
    group_of: GroupOf | None = None
    is_micro_batch_mean: Callable[[str], bool] = lambda name: False
    fetch: Callable[[TrainState], TrainState] = lambda state: state
    prepare: Callable[[Params], Callable[[Params], Params]] | None = None
    update: UpdateFn | None = None


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

    Metrics: those of the objective, `loss`, `grad_norm` (before clipping),
    `learning_rate` (of this step), `nonfinite` (1 where the gradient was not finite),
    with `group_of` `grad_norm/<group>`, with a threshold `spike` (1 where it was one).
    """
    update = options.update or make_whole_update(optimizer)
    measure = _make_measure(objective, score, options)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        fetched = options.fetch(state)
        read = (options.prepare or (lambda _: lambda tree: tree))(fetched.trainable)
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
        # A step whose batch trains no token at all leaves a zero gradient, not NaN.
        denominator = jnp.where(weight == 0, 1, weight) * scale
        with jax.named_scope("clip"):
            grads = jax.tree.map(lambda g: g / denominator, grads)
            squares = sum_squares_by_group(grads, options.group_of or (lambda path: ""))
            grad_norm = jnp.sqrt(sum(squares.values()))
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
            for group, square in squares.items():
                numbers[f"grad_norm/{group}"] = jnp.sqrt(square)
        if (loss_scale := state.loss_scale) is not None:
            numbers["loss_scale"] = loss_scale.scale
            loss_scale = loss_scale.update(finite)
        one = jnp.float32(1)
        metrics |= {name: WeightedSum(value, one) for name, value in numbers.items()}
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
    """Build `measure(trainable, frozen, batch, dropout_key)`: all sums, `loss` first.

    The objective gets the policy, and the reference, which is never differentiated.
    """

    def measure(
        trainable: Params, frozen: Params, batch: Any, key: Array | None
    ) -> Metrics:
        def policy(rows: Batch) -> TokenLogProbs:
            return score(overlay(frozen, trainable), rows, dropout_key=key)

        def reference(rows: Batch) -> TokenLogProbs:
            return jax.lax.stop_gradient(score(frozen, rows))

        second = reference if options.with_reference else None
        loss, metrics = objective(policy, second, batch)
        return {"loss": loss, **metrics}

    return measure


def _guard(
    state: TrainState, loss: WeightedSum, finite: Array, options: StepOptions
) -> tuple[Array | None, Array, Array | None]:
    """Whether to apply the update; whether the loss is a spike; the window with it.

    The first is None where the update is applied whatever the gradient is. Loss scaling
    finds its scale by steps that overflow, so it always skips them.
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
    """Gradients of global norm `norm`, scaled as PyTorch's `clip_grad_norm_` does.

    That is by min(1, max_norm / (norm + 1e-6)).
    """
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * factor, grads)


def make_whole_update(optimizer: optax.GradientTransformation) -> UpdateFn:
    """Build the update of everything at once, on the device."""

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
    """The mean, with weight 1; nothing with weight 0 where nothing was counted."""
    return WeightedSum(sums.mean(), (sums.weight != 0).astype(jnp.float32))


def _sum_gradients(
    total: Callable[[Params, Any, Array], tuple[Array, Metrics]],
    trainable: Params,
    batch: Any,
) -> tuple[Params, Metrics]:
    """Add up gradients (float32) and metrics of each micro-batch, one after the other.

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
    """Build `eval_step(state, batch) -> metrics`, one micro-batch, no dropout.

    The sums of several batches add up to those of the whole set.
    """
    measure = _make_measure(objective, score, options)

    def eval_step(state: TrainState, batch: Any) -> Metrics:
        fetched = options.fetch(state)
        return measure(fetched.trainable, fetched.frozen, batch, None)

    return eval_step


def make_reference_sync(mixup: float) -> Callable[[TrainState], TrainState]:
    """Build `sync(state) -> state`: reference <- mixup * policy + (1 - mixup) * it.

    TR-DPO's soft update (arXiv:2404.09656). Under LoRA the reference's own adapters
    move, which `state.frozen` then holds beside the base: A and B each, as they are.
    """

    def mix(old: Array, policy: Array) -> Array:
        blend = mixup * policy.astype(jnp.float32)
        return (blend + (1 - mixup) * old.astype(jnp.float32)).astype(old.dtype)

    def sync(state: TrainState) -> TrainState:
        moving = select(state.frozen, state.trainable)
        moved = jax.tree.map(mix, moving, state.trainable)
        return dataclasses.replace(state, frozen=overlay(state.frozen, moved))

    return sync
