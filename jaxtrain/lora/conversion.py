"""What PEFT makes of the names that a mixture's layers had in transformers 4.

There each expert was a module of three linear layers, and the router one. Where
target_modules names these (as all-linear and the usual list of seven names do), PEFT
0.21 adapts the parameters that they have become, with twice the rank and twice alpha
for gate_up_proj, because gate and up would each have had an adapter. It does so for the
families below only: all-linear of the others is their linear layers alone.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtrain.lora.targets import LoraConfig

_PROJECTIONS = {
    "gate": "gate.weight",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
# By family: the parameter that each name of a linear layer has become.
_BECAME: Mapping[str, Mapping[str, str]] = {
    "mixtral": {
        "gate": "gate.weight",
        "w1": "gate_up_proj",
        "w3": "gate_up_proj",
        "w2": "down_proj",
    },
    **dict.fromkeys(
        ("qwen3_moe", "qwen3_next", "glm4_moe", "deepseek_v2", "deepseek_v3"),
        _PROJECTIONS,
    ),
}


def converted(lora: "LoraConfig", model_type: str, layers: int) -> "LoraConfig":
    """The settings of new adapters with these names replaced, as PEFT does.

    An empty `target_parameters` keeps adapters away from routers and experts.

    Raises:
        ValueError: target_modules names a part of gate_up_proj without the other.
    """
    became = _BECAME.get(model_type)
    if became is None or lora.target_parameters == ():
        return lora
    chosen = [name for name in became if _names(lora, name, layers)]
    chosen = [name for name in chosen if not _is_saved(lora, name)]
    if not chosen:
        return lora
    fused = [name for name, new in became.items() if new == "gate_up_proj"]
    if len(given := [name for name in fused if name in chosen]) == 1:
        (missing,) = {*fused} - {*given}
        raise ValueError(
            f"lora.target_modules names {given[0]} without {missing}: they are one"
            " parameter of the experts, gate_up_proj, so name both or none"
        )
    parameters = [became[name] for name in chosen]
    doubled = r".*\.gate_up_proj"
    changes: dict[str, object] = {
        "target_parameters": tuple(
            dict.fromkeys([*(lora.target_parameters or ()), *parameters])
        )
    }
    if given:
        changes["rank_pattern"] = {**lora.rank_pattern, doubled: 2 * lora.r}
        changes["alpha_pattern"] = {**lora.alpha_pattern, doubled: 2 * lora.alpha}
    if isinstance(lora.target_modules, str):
        changes["exclude_modules"] = tuple(chosen)
    else:
        changes["target_modules"] = tuple(
            entry
            for entry in lora.target_modules
            if entry.rpartition(".")[2] not in chosen
        )
    return dataclasses.replace(lora, **changes)  # type: ignore[arg-type]


def _names(lora: "LoraConfig", name: str, layers: int) -> bool:
    """Whether target_modules means the linear layer that had this name."""
    targets = lora.target_modules
    if not isinstance(targets, str):
        return any(entry.rpartition(".")[2] == name for entry in targets)
    if targets.lower() == "all-linear":
        return True
    inner = name if name == "gate" else f"experts.{name}"
    full = (f"model.layers.{layer}.mlp.{inner}" for layer in range(layers))
    return any(re.fullmatch(targets, each) for each in full)


def _is_saved(lora: "LoraConfig", name: str) -> bool:
    """Whether it is a router that modules_to_save trains whole."""
    return name == "gate" and any("mlp.gate".endswith(e) for e in lora.modules_to_save)
