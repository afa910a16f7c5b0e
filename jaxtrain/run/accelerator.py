"""An `accelerate.Accelerator` in place of some keys of a configuration."""

import logging
from typing import Any

from ml_collections import ConfigDict

logger = logging.getLogger(__name__)


def take_over(accelerator: Any, config: ConfigDict) -> None:
    """Set on `config` what an accelerator says of accumulation, precision and trackers.

    Devices and processes stay those of the jax mesh.
    """
    accumulation = accelerator.gradient_accumulation_steps
    precision = accelerator.mixed_precision
    if accumulation > 1:
        config.training.gradient_accumulation_steps = accumulation
    if precision in ("fp16", "bf16"):
        config.training.fp16 = precision == "fp16"
        config.training.bf16 = precision == "bf16"
    named = [getattr(n, "value", n) for n in accelerator.log_with or ()]
    trackers = [name for name in named if name in ("tensorboard", "wandb")]
    if trackers:
        before = config.training.report_to
        before = before.split(",") if isinstance(before, str) else before
        others = [n for n in before if n not in (*trackers, "none")]
        config.training.report_to = (*others, *trackers)
    logger.info(
        "accelerator: gradient_accumulation_steps = %s, mixed_precision = %s and"
        " log_with = %s are taken over; devices and processes are those of the jax"
        " mesh",
        accumulation,
        precision,
        trackers,
    )
