"""Learning-rate schedules by transformers' names, with transformers' values.

Each is a pure function of the step, traced into the train step and logged by it.
"""

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

logger = logging.getLogger(__name__)

Schedule = Callable[[Any], Array]  # optimizer steps done so far -> learning rate
Factor = Callable[[Array], Any]  # the same -> a multiple of the peak


def count_warmup_steps(
    total_steps: int, *, warmup_steps: int = 0, warmup_ratio: float = 0.0
) -> int:
    """`warmup_steps` where positive, else `ceil(warmup_ratio * total_steps)`."""
    return warmup_steps if warmup_steps > 0 else math.ceil(warmup_ratio * total_steps)


def make_schedule(
    name: str,
    *,
    learning_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    **options: Any,
) -> Schedule:
    """Build `schedule(step) -> learning rate`, equal to transformers' of that name.

    `step` counts finished optimizer steps, so step 0 of a warm-up trains at rate 0.

    Args:
        name: a key of `SCHEDULES`.
        learning_rate: the peak.
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps of the rise from 0; "constant" has none.
        options: cosine: num_cycles. cosine_with_restarts: num_cycles (an integer).
            cosine_with_min_lr: min_lr or min_lr_rate, num_cycles. polynomial: lr_end,
            power. inverse_sqrt: timescale. wsd: num_decay_steps (a tenth of the run),
            num_stable_steps, warmup_type, decay_type, min_lr_ratio, num_cycles.

    Raises:
        ValueError: unknown name or option, or a value the schedule cannot take.
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"lr_scheduler_type = {name!r} is unknown: choose from {sorted(SCHEDULES)}"
        )
    if total_steps < 1 or warmup_steps < 0:
        raise ValueError(
            f"total_steps = {total_steps} must be at least 1 and"
            f" warmup_steps = {warmup_steps} at least 0"
        )
    make = SCHEDULES[name]
    allowed = set(inspect.signature(make).parameters) - {"run"}
    if unknown := set(options) - allowed:
        raise ValueError(
            f"lr_scheduler_kwargs {sorted(unknown)} are unknown to {name!r}, which"
            f" takes {sorted(allowed) or 'none'}"
        )
    factor = make(_Run(learning_rate, total_steps, warmup_steps), **options)

    def schedule(step: Any) -> Float[Array, ""]:
        return learning_rate * jnp.asarray(factor(jnp.asarray(step)), jnp.float32)

    return schedule


class _Run(NamedTuple):
    """What every schedule is drawn over."""

    learning_rate: float
    total_steps: int
    warmup_steps: int

    @property
    def decay_steps(self) -> int:
        return max(1, self.total_steps - self.warmup_steps)

    def progress(self, step: Array) -> Array:
        """0 at the end of the warm-up, 1 at the end of the run."""
        return (step - self.warmup_steps) / self.decay_steps

    def after_warmup(self, decay: Callable[[Array], Any]) -> Callable[[Array], Array]:
        """A linear rise from 0 to 1, then `decay`."""

        def factor(step: Array) -> Array:
            rise = step / max(1, self.warmup_steps)
            return jnp.where(step < self.warmup_steps, rise, decay(step))

        return factor


def _constant(run: _Run) -> Factor:
    if run.warmup_steps:
        logger.warning(
            "lr_scheduler_type 'constant' has no warm-up, as in transformers:"
            " warmup_steps = %d does nothing; 'constant_with_warmup' has one",
            run.warmup_steps,
        )
    return lambda step: 1.0


def _linear(run: _Run) -> Factor:
    return run.after_warmup(
        lambda step: jnp.maximum(0.0, (run.total_steps - step) / run.decay_steps)
    )


def _cosine(run: _Run, num_cycles: float = 0.5) -> Factor:
    return run.after_warmup(
        lambda step: _half_cosine(2 * num_cycles * run.progress(step))
    )


def _cosine_with_restarts(run: _Run, num_cycles: int = 1) -> Factor:
    if num_cycles != int(num_cycles) or num_cycles < 1:
        raise ValueError(
            f"num_cycles = {num_cycles} must be a positive integer for"
            " cosine_with_restarts"
        )

    def decay(step: Array) -> Array:
        done = step - run.warmup_steps
        # In integers: a rounded quotient could miss the step on which a cycle begins.
        within_cycle = (int(num_cycles) * done) % run.decay_steps / run.decay_steps
        return jnp.where(done >= run.decay_steps, 0.0, _half_cosine(within_cycle))

    return run.after_warmup(decay)


def _cosine_with_min_lr(
    run: _Run,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    num_cycles: float = 0.5,
) -> Factor:
    if min_lr is not None:
        if min_lr_rate is not None:
            raise ValueError(
                f"min_lr = {min_lr} and min_lr_rate = {min_lr_rate}: set only one"
            )
        if not 0 < run.learning_rate >= min_lr:
            raise ValueError(
                f"min_lr = {min_lr} must not exceed learning_rate ="
                f" {run.learning_rate}, which must be positive: lower min_lr"
            )
        min_lr_rate = min_lr / run.learning_rate
    if min_lr_rate is None:
        raise ValueError("cosine_with_min_lr needs min_lr or min_lr_rate: set one")
    floor = min_lr_rate

    def decay(step: Array) -> Array:
        return floor + (1 - floor) * _half_cosine(2 * num_cycles * run.progress(step))

    return run.after_warmup(decay)


def _polynomial(run: _Run, lr_end: float = 1e-7, power: float = 1.0) -> Factor:
    if lr_end >= run.learning_rate:
        raise ValueError(
            f"lr_end = {lr_end} must be below learning_rate = {run.learning_rate}"
        )
    end = lr_end / run.learning_rate

    def decay(step: Array) -> Array:
        return end + (1 - end) * _clip(1 - run.progress(step)) ** power

    return run.after_warmup(decay)


def _inverse_sqrt(run: _Run, timescale: int | None = None) -> Factor:
    scale = timescale or run.warmup_steps or 10_000

    return run.after_warmup(
        lambda step: jax.lax.rsqrt((step - run.warmup_steps + scale) / scale)
    )


def _warmup_stable_decay(
    run: _Run,
    num_decay_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Factor:
    """Warm-up, plateau, decay (arXiv:2404.06395)."""
    if num_decay_steps is None:
        num_decay_steps = math.ceil(0.1 * run.total_steps)
    if num_stable_steps is None:
        num_stable_steps = run.total_steps - run.warmup_steps - num_decay_steps
        if num_stable_steps < 0:
            raise ValueError(
                f"warmup_steps = {run.warmup_steps} and num_decay_steps ="
                f" {num_decay_steps} together exceed the run's {run.total_steps} steps:"
                " lower one of them"
            )
    # Each falls from 1 to 0 on [0, 1]; a rise is the same curve run backwards.
    curves: Mapping[str, Callable[[Array], Array]] = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: _half_cosine(2 * num_cycles * x),
        "1-sqrt": lambda x: 1 - jnp.sqrt(x),
    }
    rises = {**curves, "cosine": _half_cosine}
    for key, kind in (("warmup_type", warmup_type), ("decay_type", decay_type)):
        if kind not in curves:
            raise ValueError(f"{key} = {kind!r} is unknown: choose from {list(curves)}")
    stable_end = run.warmup_steps + num_stable_steps
    decay_steps = num_decay_steps

    def factor(step: Array) -> Array:
        rise = rises[warmup_type](_clip(1 - step / max(1, run.warmup_steps)))
        fall = curves[decay_type](_clip((step - stable_end) / max(1, decay_steps)))
        fall = jnp.where(step < stable_end + decay_steps, fall, 0.0)
        level = jnp.where(step < stable_end, 1.0, fall)
        level = jnp.where(step < run.warmup_steps, rise, level)
        return min_lr_ratio + (1 - min_lr_ratio) * level

    return factor


def _half_cosine(x: Any) -> Array:
    """1 at x = 0, 0 at x = 1, and up again."""
    return 0.5 * (1.0 + jnp.cos(jnp.pi * x))


def _clip(x: Any) -> Array:
    return jnp.clip(x, 0.0, 1.0)


SCHEDULES: Mapping[str, Callable[..., Factor]] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "constant": _constant,
    "constant_with_warmup": lambda run: run.after_warmup(lambda step: 1.0),
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _warmup_stable_decay,
    "warmup_stable_decay": _warmup_stable_decay,
}
