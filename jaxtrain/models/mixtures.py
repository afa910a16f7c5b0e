"""What config.json files say about mixtures of experts, read and written.

Which layers have experts, how many and of what width, how a router chooses among them,
and what runs beside them. No jax is imported.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from jaxtrain.models.families import Family
from jaxtrain.record.safe_text import shown

if TYPE_CHECKING:
    from jaxtrain.models.config import ModelConfig

# What configs call the number of experts.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_PREFIX, _STEP, _LISTED = (
    "first_k_dense_replace", "decoder_sparse_step", "mlp_only_layers",
)  # fmt: skip
_SHARED, _SHARED_WIDTH = "n_shared_experts", "shared_expert_intermediate_size"
# DeepSeek V2's, where groups count only under one method.
_METHOD, _OF_ALL, _IN_GROUPS = "topk_method", "greedy", "group_limited_greedy"
# Gemma 4's.
_ENABLED, _CHOSEN = "enable_moe_block", "top_k_experts"
_GROUPS, _KEPT, _FACTOR = "n_group", "topk_group", "routed_scaling_factor"


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a router chooses, beyond taking the best of all (`moe.choose_experts`).

    `groups`: experts are in so many groups of neighbours, of which a token may use
    `kept_groups` (DeepSeek V2, arXiv:2405.04434). `factor`: what the chosen experts'
    weights are multiplied by.
    """

    groups: int = 1
    kept_groups: int = 1
    factor: float = 1.0


ANY_EXPERTS = Routing()  # of no groups


def read_mixture(
    options: Mapping[str, Any], given: Mapping[str, Any], family: Family
) -> dict[str, Any]:
    """The fields of `ModelConfig` about experts; none for families without.

    Args:
        options: of a config.json, `given` with defaults for those that are absent.

    Raises:
        ValueError: the layers with a plain MLP are given in a way that has no meaning.
    """
    if family.expert_width_key is None:
        return {}
    if not given.get(_ENABLED, True):
        return {"num_experts": 0, "moe_intermediate_size": None}
    # One of several names may be set; the default stands under one of them.
    counts = (source.get(name) for source in (options, given) for name in _COUNTS)
    return {
        "num_experts": next(filter(None, counts), None),
        "num_experts_per_tok": given[_chosen_key(family)],
        "moe_intermediate_size": given.get("moe_intermediate_size"),
        # Mixtral always does, and has no key for it.
        "norm_topk_prob": bool(given.get("norm_topk_prob", True)),
        "router_aux_loss_coef": given.get("router_aux_loss_coef", 0.0),
        "output_router_logits": bool(given.get("output_router_logits", False)),
        "dense_layers": _dense_layers(given, family),
        "shared_expert_width": _shared_width(given, family),
        "routing": _routing(given, family),
    }


def has_experts(config: "ModelConfig") -> bool:
    """Whether a model of its family must have experts, or this one has some."""
    family = config.family
    may_be_without = _ENABLED in family.keys and config.num_experts == 0
    return family.expert_width_key is not None and not may_be_without


def written_mixture(config: "ModelConfig") -> dict[str, Any]:
    """The options of a config.json that say what `read_mixture` read."""
    family, dense = config.family, config.dense_layers
    if not config.num_experts:
        return {}
    values: dict[str, Any] = {
        _count_key(family): config.num_experts,
        _chosen_key(family): config.num_experts_per_tok,
        **{key: True for key in family.keys & {_ENABLED}},
    }
    if _LISTED in family.keys:
        values |= {_STEP: 1, _LISTED: list(dense)}
    if _PREFIX in family.keys:
        values[_PREFIX] = len(dense)
    if _SHARED_WIDTH in family.keys:
        values[_SHARED_WIDTH] = config.shared_expert_width
    if _GROUPS in family.keys:
        shared = config.shared_expert_width // (config.moe_intermediate_size or 1)
        values |= {
            _SHARED: shared,
            _GROUPS: config.routing.groups,
            _KEPT: config.routing.kept_groups,
            _FACTOR: config.routing.factor,
        }
    if _METHOD in family.defaults:
        limited = config.routing.groups > 1
        values[_METHOD] = _IN_GROUPS if limited else _OF_ALL
    return values


def mixture_problems(config: "ModelConfig", mixtures: list[str]) -> Iterator[str]:
    """A line for each reason why the model can't have such experts.

    Args:
        mixtures: the families that have experts.
    """
    chosen, family = config.num_experts_per_tok, config.family
    if family.expert_width_key is None and (config.num_experts or chosen):
        yield (
            f"model.num_experts = {config.num_experts}: a {config.model_type} has no"
            f" experts; use a model_type of {' or '.join(mixtures)}"
        )
    if chosen > config.num_experts:
        yield (
            f"model.num_experts_per_tok = {chosen} exceeds num_experts ="
            f" {config.num_experts}"
        )
    if config.model_type == "mixtral" and not config.norm_topk_prob:
        yield (
            "model.norm_topk_prob = False: a mixtral's weights always sum to 1; use"
            " model_type = 'qwen3_moe'"
        )
    yield from _wrong_routing(config)


def _wrong_routing(config: "ModelConfig") -> Iterator[str]:
    routing, experts = config.routing, config.num_experts
    if routing == ANY_EXPERTS:
        return
    for key, size, most in (
        (_GROUPS, routing.groups, experts),
        (_KEPT, routing.kept_groups, routing.groups),
    ):
        if type(size) is not int or not 0 < size <= most:
            yield (
                f"model.{key} = {shown(size, 60)}: must be an integer from 1 to {most}"
            )
            return
    each = experts // routing.groups
    least = 2 if config.family.router == "sigmoid" and routing.groups > 1 else 1
    if experts % routing.groups or each < least:
        yield (
            f"model.{_GROUPS} = {routing.groups} does not divide num_experts ="
            f" {experts} into groups of at least {least}"
        )
    elif routing.kept_groups * each < config.num_experts_per_tok:
        yield (
            f"model.{_KEPT} = {routing.kept_groups} groups of {each} experts have fewer"
            f" than num_experts_per_tok = {config.num_experts_per_tok}"
        )
    factor = routing.factor
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        yield f"model.{_FACTOR} = {shown(factor, 60)}: must be a finite number above 0"


def _count_key(family: Family) -> str:
    """What the family's config.json calls the number of experts."""
    named = (name for name in _COUNTS if family.defaults.get(name) is not None)
    return next(named, "num_experts")


def _chosen_key(family: Family) -> str:
    """What it calls the number of experts that a token is sent to."""
    return _CHOSEN if _CHOSEN in family.keys else "num_experts_per_tok"


def _shared_width(given: Mapping[str, Any], family: Family) -> int:
    """The width of the MLP beside the experts; 0 where the family has none."""
    if family.shared_expert is None:
        return 0
    key = _SHARED if _SHARED in family.keys else _SHARED_WIDTH
    size, each = given[key], given["moe_intermediate_size"]
    if type(size) is not int or size < 1:
        raise ValueError(f"{key} = {shown(size, 60)}: must be a positive integer")
    if key == _SHARED_WIDTH:
        return size
    return size * each if type(each) is int else 0


def _routing(given: Mapping[str, Any], family: Family) -> Routing:
    if _GROUPS not in family.keys:
        return ANY_EXPERTS
    method = given.get(_METHOD, _IN_GROUPS)
    if method not in (_IN_GROUPS, _OF_ALL) and _METHOD in family.defaults:
        raise ValueError(
            f"{_METHOD} = {shown(method, 60)}: use {_OF_ALL!r} or {_IN_GROUPS!r}"
        )
    if method == _OF_ALL:
        return Routing(factor=given[_FACTOR])
    return Routing(given[_GROUPS] or 1, given[_KEPT] or 1, given[_FACTOR])


def _dense_layers(given: Mapping[str, Any], family: Family) -> tuple[int, ...]:
    """The numbers of the layers with a plain MLP."""
    layers = given["num_hidden_layers"]
    if _PREFIX in family.keys:
        first = given[_PREFIX]
        if type(first) is not int or first < 0:
            raise ValueError(f"{_PREFIX} = {shown(first, 60)}: must be an integer >= 0")
        return tuple(range(min(first, layers)))
    if _LISTED not in family.keys:
        return ()
    step, listed = given[_STEP], given[_LISTED] or ()
    if type(step) is not int or step < 1:
        raise ValueError(f"{_STEP} = {shown(step, 60)}: must be a positive integer")
    if not all(type(layer) is int and 0 <= layer < layers for layer in listed):
        raise ValueError(
            f"{_LISTED} = {shown(listed, 200)}: must be numbers of layers, from 0 to"
            f" {layers - 1}"
        )
    return tuple(i for i in range(layers) if i in {*listed} or (i + 1) % step)
