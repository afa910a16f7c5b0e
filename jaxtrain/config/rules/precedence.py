"""Where a general training key's value comes from, and which keys have no effect."""

from collections.abc import Mapping
from typing import Any

from jaxtrain import schema
from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import (
    GENERAL_KEYS,
    LORA_LEARNING_RATES,
    SCHEMA,
    TYPE_DEFAULTS,
)
from jaxtrain.tree import dotted, get, nest


def take_precedence(found: Resolution, has_adapters: bool) -> dict[str, Any]:
    """Fill `found.general`, and return it nested.

    The block of the active training type goes before `training`, and `training` before
    the type's default.
    """
    training, training_type = found.values["training"], found.training_type
    shared, block, usual = (
        {key: get(tree, key) for key in GENERAL_KEYS}
        for tree in (
            training,
            training[training_type],
            schema.defaults(SCHEMA["training"]),
        )
    )
    type_defaults = dict(TYPE_DEFAULTS[training_type])
    if has_adapters:
        type_defaults["learning_rate"] = LORA_LEARNING_RATES[training_type]
    _take_warmup_from_one_place(shared, block, found)
    for key in GENERAL_KEYS:
        in_block = f"training.{training_type}.{key}"
        is_refused = found.is_refused(in_block)
        found.general[key] = shared[key] if block[key] is None else block[key]
        found.origin[key] = f"training.{key}"
        if block[key] is not None or is_refused:
            found.origin[key] = in_block
        if block[key] is not None and shared[key] not in (block[key], usual[key]):
            _note_gives_way(key, shared[key], block[key], found)
        if found.general[key] is None:
            found.general[key] = type_defaults.get(key)
            found.unset.add(key)
    return nest({tuple(key.split(".")): value for key, value in found.general.items()})


def _take_warmup_from_one_place(
    shared: dict[str, Any], block: dict[str, Any], found: Resolution
) -> None:
    """A block that sets one of the two warm-up keys decides both.

    Otherwise a general warmup_steps would overrule a block's warmup_ratio.
    """
    pair = ("warmup_steps", "warmup_ratio")
    deciding = shared
    for one, other in (pair, pair[::-1]):
        if block[one] is not None:
            deciding = block
            if shared[other] and block[other] is None:
                _note_gives_way(other, shared[other], block[one], found, to=one)
                shared[other] = None
    if any(deciding[key] is not None for key in pair):
        for key in pair:
            deciding[key] = deciding[key] or 0


def _note_gives_way(
    key: str, value: Any, winning: Any, found: Resolution, to: str = ""
) -> None:
    winner = f"training.{found.training_type}.{to or key}"
    found.notes.append(
        f"training.{key} = {value!r} gives way to {winner} = {winning!r}"
    )


def note_ineffective(found: Resolution, resolved: Mapping[str, Any]) -> None:
    """Name the keys that were set and that this run does not read.

    `resolved` maps full keys to the values that the run has.
    """
    for key, leaf in dotted(SCHEMA).items():
        value = get(found.values, key)
        if value == leaf.default:
            continue
        reasons = (
            condition.reason(resolved[condition.key])
            for condition in leaf.all(schema.OnlyIf)
            if condition.key != key
        )
        if reason := next(filter(None, reasons), ""):
            found.notes.append(f"{key} = {value!r} has no effect: {reason}")
