"""Rules of the optimizer, its schedule, and the precision it computes in."""

import re
from dataclasses import replace
from typing import Any

from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import SCHEMA
from jaxtrain.schema import ReadBy

_KWARGS = "lr_scheduler_kwargs."


def resolve_schedule(run: Resolution) -> None:
    """Settle the warm-up, and check what shapes the schedule."""
    _resolve_warmup(run)
    _check_kwargs(run)
    rate = run.optimizer.learning_rate
    for option in ("min_lr", "lr_end"):
        if run.schedule.options.get(option, -1.0) >= rate:
            run.problem(
                _KWARGS + option,
                f"not below learning_rate = {rate}; set a smaller one: the schedule"
                " decays to it",
                causes=("learning_rate", "training.training_type"),
            )


def _resolve_warmup(run: Resolution) -> None:
    steps, ratio = run.schedule.warmup_steps or 0, run.schedule.warmup_ratio or 0.0
    if steps and ratio:
        if "warmup_ratio" not in run.unset:
            winner = run.origin["warmup_steps"]
            run.note_gives_way(run.origin["warmup_ratio"], winner, steps)
        ratio = 0.0
    if run.schedule.lr_scheduler_type == "constant" and (steps or ratio):
        if "warmup_ratio" in run.unset:
            ratio = 0.0  # only the type's default asked for it
        else:
            run.problem(
                "warmup_steps" if steps else "warmup_ratio",
                "lr_scheduler_type 'constant' has no warm-up; set lr_scheduler_type ="
                " 'constant_with_warmup', or remove it",
            )
    run.schedule = replace(run.schedule, warmup_steps=steps, warmup_ratio=ratio)


def _check_kwargs(run: Resolution) -> None:
    name, options = run.schedule.lr_scheduler_type, run.schedule.options
    keys = SCHEMA["training"]["lr_scheduler_kwargs"]
    allowed = [key for key in keys if name in keys[key].all(ReadBy)[0].names]
    for option in [name for name in options if name not in allowed]:
        run.problem(
            _KWARGS + option,
            f"lr_scheduler_type {name!r} does not read it; remove it (it takes"
            f" {', '.join(allowed) or 'none'})",
            causes=("lr_scheduler_type", "training.training_type"),
        )
    cycles = options.get("num_cycles", 1)
    if name == "cosine_with_restarts" and cycles != int(cycles):
        text = "restarts are counted in whole cycles; set an integer >= 1"
        run.problem(_KWARGS + "num_cycles", text)
    ends = options.keys() & {"min_lr", "min_lr_rate"}
    if name == "cosine_with_min_lr" and len(ends) != 1:
        run.problem(
            "lr_scheduler_type",
            "needs one of lr_scheduler_kwargs.min_lr and min_lr_rate; set exactly one",
            causes=(_KWARGS + "min_lr", _KWARGS + "min_lr_rate"),
        )


def check_optimizer(run: Resolution) -> None:
    """Refuse a key that the optimizer does not read."""
    name = run.optimizer.optimizer
    if run.optimizer.momentum is not None and name not in ("sgd", "muon"):
        run.problem(
            "momentum",
            f"optimizer {name!r} does not read it; remove it (adam_beta1 is adamw's and"
            " lion's), or use sgd or muon",
            causes=["optimizer"],
        )


def check_weights(run: Resolution) -> None:
    """Refuse what cannot be frozen, multiplied or averaged as it is asked for."""
    settings, zero = run.optimizer, run.devices.deepspeed
    offloads = zero.offload_optimizer or zero.offload_param
    if settings.lr_multipliers and offloads:
        run.problem(
            "lr_multipliers",
            "offloaded state is updated a layer at a time, by one program for all"
            " layers; unset it, or deepspeed.offload_* and cpu_offload",
            causes=("deepspeed.offload_optimizer", "deepspeed.offload_param"),
        )
    if problem := _find_problem(settings.lr_multipliers):
        run.problem("lr_multipliers", problem)
    if settings.ema_decay is None:
        return
    if run.lora.enabled:
        run.problem(
            "ema_decay",
            "the averages of A and of B are not the average of their product, which is"
            " what an adapter adds; unset it, or train all parameters",
            causes=("training.lora.enabled", "training.training_type"),
        )
    if offloads:
        run.problem(
            "ema_decay",
            "evaluations would bring the average from host memory each time; unset it,"
            " or deepspeed.offload_* and cpu_offload",
            causes=("deepspeed.offload_optimizer", "deepspeed.offload_param"),
        )


def resolve_precision(run: Resolution) -> None:
    """Choose one precision to compute in."""
    fp16, bf16 = run.precision.fp16, run.precision.bf16
    if fp16 and bf16:
        run.problem(
            "fp16",
            "bf16 is true too, and a run computes in one precision; set"
            f" {run.origin['bf16']} = false, or fp16 = false",
        )
    if bf16 is None:
        run.precision = replace(run.precision, bf16=not fp16)
    if run.precision.fp8:
        _check_fp8(run)


def _check_fp8(run: Resolution) -> None:
    """Refuse settings that do not work with products in eight bits."""
    if not run.precision.bf16:
        run.problem(
            "fp8",
            "it needs bf16, because everything but the projections is computed in"
            f" bfloat16; set {run.origin['bf16']} = true and fp16 = false, or unset"
            " fp8",
            causes=("bf16", "fp16"),
        )
    if run.devices.deepspeed.offload_param:
        run.problem(
            "fp8",
            "it is not implemented for weights in host memory; unset it, or"
            " deepspeed.offload_param and cpu_offload",
            causes=("deepspeed.offload_param", "cpu_offload"),
        )
    if run.is_dpo and run.dpo.sync_ref_model:
        run.problem(
            "fp8",
            "the reference is kept in eight bits, in which small updates are lost;"
            " unset it, or training.dpo.sync_ref_model",
            causes=("training.dpo.sync_ref_model",),
        )


def _find_problem(patterns: Any) -> str:
    """What is wrong with the patterns as they are written; "" if nothing is."""
    for entry in patterns:
        is_pair = len(entry) == 2 and isinstance(entry[0], str)
        if not is_pair or isinstance(entry[1], str):
            return f"{list(entry)} is no pair; write each as ['embed.*', 0.1]"
        try:
            re.compile(entry[0])
        except re.error as error:
            return f"{entry[0]!r} is not a regular expression: {error}"
        if entry[1] < 0:
            return f"{entry[1]} is negative; set 0 to freeze, or more"
    if patterns and not any(rate > 0 for _, rate in patterns):
        return "every multiplier is 0, so nothing would train; set one above 0"
    return ""
