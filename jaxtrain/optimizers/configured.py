"""The optimizer and the learning-rate schedule that a configuration asks for."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxtrain.config import OptimizerSection, ScheduleSection
from jaxtrain.optimizers import optim, schedules


def make_optimizer(
    optimizer: OptimizerSection, schedule: ScheduleSection, total_steps: int
) -> tuple[Callable[[Any], jax.Array], optax.GradientTransformation]:
    """Make the schedule of a run of `total_steps` steps, and the optimizer on it."""
    learning_rate = schedules.make_schedule(
        schedule.lr_scheduler_type,
        learning_rate=optimizer.learning_rate,
        total_steps=total_steps,
        warmup_steps=schedules.count_warmup_steps(
            total_steps,
            warmup_steps=schedule.warmup_steps,
            warmup_ratio=schedule.warmup_ratio,
        ),
        **schedule.options,
    )
    return learning_rate, optim.make_optimizer(
        optimizer.optimizer,
        learning_rate,
        weight_decay=optimizer.weight_decay,
        beta1=optimizer.adam_beta1,
        beta2=optimizer.adam_beta2,
        epsilon=optimizer.adam_epsilon,
        momentum=optimizer.momentum,
    )
