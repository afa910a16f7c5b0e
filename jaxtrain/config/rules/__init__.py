"""What keys mean together: precedence, values worked out from others, contradictions.

Each rule settles sections of a `Resolution`, or checks them, and adds every problem
that it finds; so one run of the command shows them all. `RULES` is their order.
"""

from collections.abc import Mapping
from typing import Any

from jaxtrain.config.rules import data, dpo, loop, lora, mesh, model, optimization
from jaxtrain.config.rules.resolution import ConfigError, Resolution

__all__ = ["ConfigError", "resolve_sections"]

RULES = (
    lora.resolve_lora,
    optimization.resolve_schedule,
    optimization.check_optimizer,
    optimization.resolve_precision,
    loop.resolve_loop,
    loop.resolve_generation,
    mesh.resolve_devices,
    mesh.resolve_mesh,
    data.resolve_lengths,
    data.check_lengths,
    model.resolve_model,
    dpo.resolve_options,
    data.resolve_data,
    data.check_curriculum,
    dpo.check_objective,
    dpo.check_dpo,
)


def resolve_sections(given: Mapping[str, Any], device_count: int | None) -> Resolution:
    """Every section, settled.

    Raises:
        ConfigError: every problem found.
    """
    run = Resolution(given, device_count)
    for rule in RULES:
        rule(run)
    if run.problems:
        raise ConfigError(run.problems)
    run.note_ineffective()
    return run
