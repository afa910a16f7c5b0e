"""Rules of the optimizer, its schedule, and the precision it computes in."""

from dataclasses import replace

from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import (
    SCHEMA,
    OptimizerSection,
    PrecisionSection,
    ScheduleSection,
)
from jaxtrain.schema import ReadBy

_KWARGS = "lr_scheduler_kwargs."


def resolve_schedule(
    schedule: ScheduleSection, optimizer: OptimizerSection, found: Resolution
) -> ScheduleSection:
    """Settle the warm-up, and check what shapes the schedule."""
    schedule = _resolve_warmup(schedule, found)
    _check_kwargs(schedule, found)
    for option in ("min_lr", "lr_end"):
        if schedule.options.get(option, -1.0) >= optimizer.learning_rate:
            found.add(
                _KWARGS + option,
                f"not below learning_rate = {optimizer.learning_rate}",
                "set a smaller one: the schedule decays to it",
                causes=("learning_rate", "training.training_type"),
            )
    return schedule


def _resolve_warmup(schedule: ScheduleSection, found: Resolution) -> ScheduleSection:
    steps, ratio = schedule.warmup_steps or 0, schedule.warmup_ratio or 0.0
    if steps and ratio:
        found.notes.append(
            f"{found.origin['warmup_ratio']} = {ratio} has no effect:"
            f" warmup_steps = {steps} takes precedence, as in transformers"
        )
        ratio = 0.0
    if schedule.lr_scheduler_type == "constant" and (steps or ratio):
        if "warmup_ratio" in found.unset:
            ratio = 0.0  # only the type's default asked for it
        else:
            found.add(
                "warmup_steps" if steps else "warmup_ratio",
                "lr_scheduler_type 'constant' has no warm-up",
                "set lr_scheduler_type = 'constant_with_warmup', or remove it",
            )
    return replace(schedule, warmup_steps=steps, warmup_ratio=ratio)


def _check_kwargs(schedule: ScheduleSection, found: Resolution) -> None:
    name, options = schedule.lr_scheduler_type, schedule.options
    keys = SCHEMA["training"]["lr_scheduler_kwargs"]
    allowed = [key for key in keys if name in keys[key].all(ReadBy)[0].names]
    for option in [name for name in options if name not in allowed]:
        found.add(
            _KWARGS + option,
            f"lr_scheduler_type {name!r} does not read it",
            f"remove it (it takes {', '.join(allowed) or 'none'})",
            causes=("lr_scheduler_type", "training.training_type"),
        )
    cycles = options.get("num_cycles", 1)
    if name == "cosine_with_restarts" and cycles != int(cycles):
        found.add(
            _KWARGS + "num_cycles",
            "restarts are counted in whole cycles",
            "set an integer >= 1",
        )
    ends = ("min_lr", "min_lr_rate")
    if name == "cosine_with_min_lr" and len(options.keys() & set(ends)) != 1:
        found.add(
            "lr_scheduler_type",
            "needs one of lr_scheduler_kwargs.min_lr and min_lr_rate",
            "set exactly one",
            causes=[_KWARGS + end for end in ends],
        )


def check_optimizer(optimizer: OptimizerSection, found: Resolution) -> None:
    """Refuse a key that the optimizer does not read."""
    name = optimizer.optimizer
    if optimizer.momentum is not None and name not in ("sgd", "muon"):
        found.add(
            "momentum",
            f"optimizer {name!r} does not read it",
            "remove it (adam_beta1 is adamw's and lion's), or use sgd or muon",
            causes=["optimizer"],
        )


def resolve_precision(
    precision: PrecisionSection, found: Resolution
) -> PrecisionSection:
    """Choose one precision to compute in."""
    if precision.fp16 and precision.bf16:
        found.add(
            "fp16",
            "bf16 is true too, and a run computes in one precision",
            f"set {found.origin['bf16']} = false, or fp16 = false",
        )
    if precision.bf16 is None:
        return replace(precision, bf16=not precision.fp16)
    return precision
