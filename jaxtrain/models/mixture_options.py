"""What a run asks of a mixture of experts: where experts lie, and routers' losses."""

import math
from typing import Any

from jaxtrain.config import RunConfig
from jaxtrain.models import router_report
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.expert_parallel import AXIS, ExpertSpread
from jaxtrain.models.z_loss import Score
from jaxtrain.sharding import ShardingPlan
from jaxtrain.types import BALANCING_BIAS, Objective


def decoder_options(
    run: RunConfig, config: ModelConfig, plan: ShardingPlan
) -> dict[str, Any]:
    """The decoder's options that are about mixtures of experts.

    Raises:
        ValueError: the run asks for something that the model does not have.
    """
    router_loss_coefficient(run, config)
    return {
        "experts": spread_experts(run, config, plan),
        "balances_experts": balances_experts(run, config),
    }


def balances_experts(run: RunConfig, config: ModelConfig) -> bool:
    """Whether experts are balanced by biases (balance.py).

    Raises:
        ValueError: the run asks for it, and the model's routers have no such bias.
    """
    rate = run.loop.router_bias_update_rate
    if rate and not (config.num_experts and config.family.router == "sigmoid"):
        raise ValueError(
            f"training.router_bias_update_rate = {rate}: a {config.model_type} has no"
            f" {BALANCING_BIAS} that it could move, and its files have no place for"
            " one; unset it, and balance experts by training.router_aux_loss_coef"
        )
    return bool(rate)


def spread_experts(
    run: RunConfig, config: ModelConfig, plan: ShardingPlan
) -> ExpertSpread | None:
    """How this run spreads a mixture's experts; None where `mesh.expert` is 1.

    Raises:
        ValueError: the model has no experts, or they do not divide.
    """
    devices, count = plan.mesh.shape[AXIS], config.num_experts
    if devices == 1:
        return None
    if not count:
        raise ValueError(
            f"mesh.expert = {devices}: a {config.model_type} has no experts to share"
            " out; set 1, and split its weights by mesh.fsdp or mesh.tensor"
        )
    if count % devices:
        raise ValueError(
            f"mesh.expert = {devices}: the model's {count} experts do not divide over"
            f" so many devices; the nearest size is {math.gcd(count, devices)}"
        )
    return ExpertSpread(
        devices, run.model.expert_room, run.model.expert_exchange, plan.axes_of
    )


def with_router_report(
    objective: Objective,
    score: Score,
    run: RunConfig,
    config: ModelConfig,
    added: dict[str, float],
) -> tuple[Objective, Score]:
    """The objective and the score with what is reported of routers; without: as given.

    Args:
        added: weights of losses by the names of their metrics, to which the router
            z-loss is added where the run weighs it.
    """
    if not config.num_experts:
        return objective, score
    weight = run.loop.router_z_loss_coef
    if weight:
        added[router_report.Z_LOSS] = weight
    return router_report.with_report(objective, score, weight)


def router_loss_coefficient(run: RunConfig, config: ModelConfig) -> float:
    """What the router's loss is multiplied by; 0 where there is no router.

    As in TRL, a model's own coefficient acts, whether or not its config has
    `output_router_logits`, unless the run gives another.

    Raises:
        ValueError: the run gives one, and the model has no experts.
    """
    given = run.loop.router_aux_loss_coef
    own = {"aux": given, "z": run.loop.router_z_loss_coef}
    for name, weight in own.items():
        if not config.num_experts and weight:
            raise ValueError(
                f"training.router_{name}_loss_coef = {weight}: a {config.model_type}"
                " has no experts, so nothing to weigh; unset it, or train a mixture of"
                " experts"
            )
    return config.router_aux_loss_coef if given is None else given
