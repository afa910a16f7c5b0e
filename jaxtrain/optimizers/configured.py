"""The optimizer and the learning-rate schedule that a configuration asks for."""

from typing import Any

import jax
import optax

from jaxtrain.config import RunConfig
from jaxtrain.config.own_parts import bind_own
from jaxtrain.config.sections import WITH_MOMENTS
from jaxtrain.optimizers import optim, schedules
from jaxtrain.optimizers.balance import with_balancing
from jaxtrain.optimizers.ema import with_ema
from jaxtrain.optimizers.moments import with_compact_moments
from jaxtrain.optimizers.multipliers import with_multipliers
from jaxtrain.optimizers.schedules import Schedule


def make_optimizer(
    run: RunConfig, total_steps: int
) -> tuple[Schedule, optax.GradientTransformation]:
    """Make the schedule of a run of `total_steps` steps, and the optimizer on it.

    Raises:
        ValueError: a schedule or an optimizer of the user's own cannot be had, or is
            not what it should be.
    """
    settings = run.optimizer
    schedule = _make_schedule(run, total_steps)
    if ":" in settings.optimizer:
        optimizer = _make_own_optimizer(run, schedule)
    else:
        optimizer = optim.make_optimizer(
            settings.optimizer,
            schedule,
            weight_decay=settings.weight_decay,
            beta1=settings.adam_beta1,
            beta2=settings.adam_beta2,
            epsilon=settings.adam_epsilon,
            momentum=settings.momentum,
        )
        if WITH_MOMENTS.holds(settings.optimizer):
            optimizer = with_compact_moments(optimizer, settings.moment_dtype)
    if settings.lr_multipliers:
        optimizer = with_multipliers(optimizer, settings.lr_multipliers)
    if run.loop.router_bias_update_rate:
        optimizer = with_balancing(optimizer, run.loop.router_bias_update_rate)
    if settings.ema_decay is not None:
        optimizer = with_ema(optimizer, settings.ema_decay)
    return schedule, optimizer


def _make_schedule(run: RunConfig, total_steps: int) -> Schedule:
    settings, rate = run.schedule, run.optimizer.learning_rate
    name = settings.lr_scheduler_type
    warmup_steps = schedules.count_warmup_steps(
        total_steps,
        warmup_steps=settings.warmup_steps,
        warmup_ratio=settings.warmup_ratio,
    )
    if ":" not in name:
        return schedules.make_schedule(
            name,
            learning_rate=rate,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            **settings.options,
        )
    key, names = "training.lr_scheduler_type", "learning_rate total_steps warmup_steps"
    make = bind_own(key, name, run.loop.function_kwargs, *names.split())
    own = make(rate, total_steps, warmup_steps)
    if not callable(own):
        raise ValueError(
            f"{key} = {name!r}: it returned {type(own).__name__}; return a function of"
            " the step that gives the learning rate"
        )

    def schedule(step: Any) -> jax.Array:
        return jax.numpy.asarray(own(jax.numpy.asarray(step)), jax.numpy.float32)

    try:
        shape = jax.eval_shape(schedule, 0).shape
    except (TypeError, jax.errors.JAXTypeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{key} = {name!r}: the function that it returned must give a number for a"
            f" step that jax traces, so choose with jax.numpy.where and not with if:"
            f" {first}"
        ) from error
    if shape != ():
        raise ValueError(f"{key} = {name!r}: it gave an array of {shape}, not a number")
    return schedule


def _make_own_optimizer(
    run: RunConfig, schedule: Schedule
) -> optax.GradientTransformation:
    key, name = "training.optimizer", run.optimizer.optimizer
    names = ("schedule", "weight_decay")
    own = bind_own(key, name, run.loop.function_kwargs, *names)(
        schedule, run.optimizer.weight_decay
    )
    if not isinstance(own, optax.GradientTransformation):
        raise ValueError(
            f"{key} = {name!r}: it returned {type(own).__name__}; return an optax"
            " transformation, whose updates are added to the weights"
        )
    return optim.in_float32(own)
