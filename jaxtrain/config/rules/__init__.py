"""What keys mean together: precedence, values worked out from others, contradictions.

Each rule settles sections of a `Resolution`, or checks them, and adds every problem
that it finds; so one run of the command shows them all. `RULES` is their order.
"""

from collections.abc import Collection, Mapping
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
    loop.note_without_evaluation,
    loop.check_profile,
    loop.check_own_parts,
    loop.check_z_loss,
    loop.check_router_bias,
    mesh.resolve_devices,
    mesh.resolve_mesh,
    optimization.check_weights,
    data.resolve_lengths,
    data.check_lengths,
    data.check_tokens,
    model.resolve_model,
    dpo.resolve_options,
    data.resolve_data,
    data.check_curriculum,
    data.note_splits,
    data.note_hub_keys,
    dpo.check_objective,
    dpo.check_dpo,
)


def resolve_sections(
    given: Mapping[str, Any], device_count: int | None, flags: Collection[str] = ()
) -> Resolution:
    """Every section, settled.

    Args:
        flags: full keys that the command line set.

    Raises:
        ConfigError: every problem found.
    """
    run = Resolution(given, device_count, flags)
    for rule in RULES:
        rule(run)
    if not run.problems:  # else sections may be unsettled
        run.note_ineffective()
    if run.problems:
        raise ConfigError(run.problems)
    return run
