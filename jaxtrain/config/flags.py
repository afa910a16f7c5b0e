"""Flags that set keys: `--training.learning_rate=5e-4`, over whatever a file says.

`--config.training.learning_rate=5e-4` is the same flag. A flag wins over a file always,
over the active training type's block too: what the file sets there is unset. Where two
flags contradict each other, or a flag would not act, `resolve` is told and refuses it.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxtrain import schema
from jaxtrain.config import peer_keys
from jaxtrain.config.files import parse_value
from jaxtrain.config.renamed import current_key
from jaxtrain.config.rules import ConfigError
from jaxtrain.config.run import RunConfig, resolve
from jaxtrain.config.sections import GENERAL_KEYS, SCHEMA
from jaxtrain.record.safe_text import shown
from jaxtrain.tree import get, nest

# A general key -> the keys that would overrule or contradict it, so that a file's give
# way too. Those of `_ONE_OF` do so only where the flag switches its key on.
_OVERRULED_BY = {
    "num_train_epochs": ("max_steps",),
    "warmup_ratio": ("warmup_steps",),
    "warmup_steps": ("warmup_ratio",),
    "pin_memory": ("dataloader_pin_memory",),
    "dataloader_pin_memory": ("pin_memory",),
    "cpu_offload": ("deepspeed.offload_optimizer", "deepspeed.offload_param"),
}
_ONE_OF = {"fp16": ("bf16",), "bf16": ("fp16",)}
_ONE_BASE = ("quantization", "load_in_4bit", "load_in_8bit")
_SECTIONS = tuple(SCHEMA)
_MOST_CHARACTERS = 240  # of a flag's value that a message repeats


@dataclasses.dataclass(frozen=True)
class Flag:
    """One key as the command line gives it: its full name and its text.

    A text of None stands for a flag without a value, which sets true.
    """

    key: str
    text: str | None


def split_flags(arguments: Sequence[str]) -> tuple[list[Flag], list[str]]:
    """Tell the flags that set keys from all other arguments, whose order stays.

    A flag sets a key if its name has a dot, as in `--data.train=a.jsonl`,
    `--data.train a.jsonl`, `--training.bf16` and `--notraining.bf16`.
    """
    flags: list[Flag] = []
    others: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, text = argument.partition("=")
        key = current_key(name.lstrip("-").removeprefix("config."))
        negated = current_key(key.removeprefix("no"))
        if not name.startswith("--") or "." not in key:
            others.append(argument)
        elif equals:
            flags.append(Flag(key, text))
        elif _names_a_switch(negated) and key.startswith("no"):
            flags.append(Flag(negated, "false"))
        elif _names_a_switch(key) and (not rest or not _is_switch_value(rest[0])):
            flags.append(Flag(key, None))
        elif rest and not rest[0].startswith("--"):
            flags.append(Flag(key, rest.pop(0)))
        else:
            flags.append(Flag(key, None))
    return flags, others


def override(config: ConfigDict, flags: Iterable[Flag]) -> frozenset[str]:
    """Set on `config` what the flags say, and unset what would overrule them.

    Returns:
        The full keys that were set, for `resolve`.

    Raises:
        ConfigError: one line for each flag that names no key, has a value that its key
            can't hold, or contradicts another flag.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for flag in flags:
        try:
            parsed = _parse(flag)
        except ValueError as error:
            problems.extend(str(error).splitlines())
            continue
        for key, value in parsed.items():
            if key in values and values[key] != value:
                problems.append(
                    f"--{key} is given twice, as {shown(values[key])} and"
                    f" {shown(value)}: give it once"
                )
            values[key] = value
    given = nest({tuple(key.split(".")): value for key, value in values.items()})
    problems += schema.overlay(config, SCHEMA, given, peer_keys.suggest)
    for key, value in values.items():
        if value is None:
            _unset(config, key)
    if problems:
        raise ConfigError(problems)
    _give_way(config, values)
    return frozenset(values)


def resolve_flags(
    config: ConfigDict, flags: Iterable[Flag]
) -> tuple[ConfigDict, RunConfig]:
    """The configuration with its flags set, and what it resolves to.

    Raises:
        ConfigError: all problems of the flags, or all of the configuration.
    """
    keys = override(config, flags)
    return config, resolve(config, flags=keys)


def _parse(flag: Flag) -> dict[str, Any]:
    """The value of each key that a flag sets; several for a whole section."""
    entry = _find(flag.key)
    if isinstance(entry, dict):
        value = parse_value(flag.text or "")
        if not isinstance(value, Mapping):
            raise ValueError(
                f"--{flag.key}={flag.text or ''}: a section, not a value; give one of"
                f" its keys, such as --{flag.key}.{next(iter(entry))}"
            )
        return dict(_leaves(flag.key, entry, value))
    if flag.text is None:
        if not _names_a_switch(flag.key):
            wanted = schema.describe(entry.hint)
            raise ValueError(
                f"--{flag.key}: no value; write --{flag.key}=... ({wanted})"
            )
        return {flag.key: True}
    if not flag.text.strip():
        raise ValueError(
            f"--{flag.key}=: no value, as of a shell variable that is not set; give"
            " one, or leave the flag out"
        )
    if entry.default is None and flag.text in ("None", "null"):
        return {flag.key: None}
    try:
        return {flag.key: schema.parse(flag.text, entry.hint, parse_value)}
    except ValueError as error:
        text = flag.text if len(flag.text) < _MOST_CHARACTERS else "..."
        raise ValueError(f"--{flag.key}={text}: {error}") from None


def _leaves(
    key: str, section: schema.Schema, value: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """The keys that a mapping given for a section sets."""
    for name, below in value.items():
        entry, path = section.get(name), f"{key}.{name}"
        if isinstance(entry, dict) and isinstance(below, Mapping):
            yield from _leaves(path, entry, below)
        else:
            yield path, below


def _find(key: str) -> Any:
    """The schema's entry of a full key.

    Raises:
        ValueError: there is none; names the nearest.
    """
    entry: Any = SCHEMA
    parts = key.split(".")
    for number, part in enumerate(parts):
        if not isinstance(entry, dict) or part not in entry:
            prefix = "".join(f"{name}." for name in parts[:number])
            here = entry if isinstance(entry, dict) else SCHEMA
            fix = peer_keys.suggest(part, prefix, here)
            if not number and not difflib.get_close_matches(
                part, _SECTIONS, cutoff=0.6
            ):
                fix = f"keys start with {', '.join(_SECTIONS)}"
            raise ValueError(f"--{key}: unknown key; {fix}")
        entry = entry[part]
    return entry


def keys_by_last_part() -> dict[str, str]:
    """Every full key, by its last part."""
    return schema.by_last_part(SCHEMA)


def _names_a_switch(key: str) -> bool:
    try:
        entry = _find(key)
    except ValueError:
        return False
    return isinstance(entry, schema.Leaf) and schema.storage_type(entry.hint) is bool


def _is_switch_value(text: str) -> bool:
    return text.lower() in ("true", "false")


def _unset(config: ConfigDict, key: str) -> None:
    *sections, name = key.split(".")
    with config.unlocked():
        get(config, tuple(sections))[name] = None


def _give_way(config: ConfigDict, flags: Mapping[str, Any]) -> None:
    """Unset what a file says in places that would overrule a flag.

    Raises:
        ConfigError: two flags give a general key two values.
    """
    block = f"training.{config.training.training_type}"
    for name in GENERAL_KEYS:
        places = [f"training.{name}", f"{block}.{name}"]
        named = [place for place in places if place in flags]
        if not named:
            continue
        if len(named) == 2 and flags[named[0]] != flags[named[1]]:
            raise ConfigError(
                f"--{named[0]} and --{named[1]} set the same key, to"
                f" {shown(flags[named[0]])} and {shown(flags[named[1]])}: give one of"
                " the two"
            )
        rivals = _OVERRULED_BY.get(name, ())
        if flags[named[0]]:
            rivals += _ONE_OF.get(name, ())
        for rival in (name, *rivals):
            for place in (f"training.{rival}", f"{block}.{rival}"):
                if place not in flags:
                    _reset(config, place)
    base_keys = [f"training.lora.{name}" for name in _ONE_BASE]
    if any(flags.get(key) for key in base_keys) or base_keys[0] in flags:
        for key in base_keys:
            if key not in flags:
                _reset(config, key)
    if "data.max_length" in flags and "training.dpo.max_length" not in flags:
        _reset(config, "training.dpo.max_length")


def _reset(config: ConfigDict, key: str) -> None:
    """Set a key back to its default."""
    *sections, name = key.split(".")
    get(config, tuple(sections))[name] = get(SCHEMA, key).default
