"""Keys that have another name than in the last release: the old ones still work.

A key that is renamed gets a line in `RENAMED`, and loses it one release later. Until
then its old name, in a file, a flag, a program or the record of a checkpoint, sets the
new key, and a warning says so.

Records of runs from before a key was added lack it; `as_recorded` says what they did.
"""

import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from jaxtrain.config.rules import ConfigError
from jaxtrain.config.sections import SCHEMA, TrainingType
from jaxtrain.schema import Leaf

logger = logging.getLogger(__name__)

# Full keys: the name in the last release, and the name now.
RENAMED: dict[str, str] = {}


def current_key(key: str) -> str:
    """The name that a full key has now; warns if it has another than `key`."""
    for old, new in _names():
        if key == old:
            _warn(old, new)
            return new
    return key


def with_current_names(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration whose old names are replaced by the new ones, with a warning.

    Raises:
        ConfigError: an old and a new name say different things.
    """
    if not RENAMED:
        return given
    found = copy.deepcopy(dict(given))
    problems = []
    for old, new in _names():
        section, name = _section(found, old), old.rpartition(".")[2]
        if section is None or name not in section:
            continue
        value = section.pop(name)
        target, now = _section(found, new, make=True), new.rpartition(".")[2]
        if target is None:
            continue
        if target.get(now, value) not in (value, _default(new)):
            problems.append(f"{old} and {new} are one key: remove {old}, its old name")
        target[now] = value
        _warn(old, new)
    if problems:
        raise ConfigError(problems)
    return found


def is_recorded(content: Any) -> bool:
    """Whether a config.json is the configuration of a run, and not a model's."""
    training = content.get("training") if isinstance(content, Mapping) else None
    return isinstance(training, Mapping) and "training_type" in training


def as_recorded(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A run's saved configuration, with keys that are newer than it as they acted then.

    Runs that train adapters had none on routers and experts, whose experts were never
    quantized.
    """
    training = saved.get("training")
    if not isinstance(training, Mapping):
        return saved
    lora = training.get("lora")
    if not isinstance(lora, Mapping) or not {"r", "target_modules"} <= lora.keys():
        return saved
    before: dict[str, Any] = {}
    if lora["target_modules"] == "all-linear":
        before["target_parameters"] = []
    if lora.get("quantization"):
        before["quantize_experts"] = False
    return {**saved, "training": {**training, "lora": {**before, **lora}}}


def _names() -> Iterator[tuple[str, str]]:
    """The table, and the same for the keys' twins in the blocks of training types."""
    for old, new in RENAMED.items():
        yield old, new
        section, _, name = old.partition(".")
        twin, _, now = new.partition(".")
        if section == twin == "training":
            for block in get_args(TrainingType):
                yield f"training.{block}.{name}", f"training.{block}.{now}"


def _section(
    tree: dict[str, Any], key: str, *, make: bool = False
) -> dict[str, Any] | None:
    """The section that a full key is in; None where there is none."""
    at: Any = tree
    for name in key.split(".")[:-1]:
        below = at.setdefault(name, {}) if make else at.get(name)
        if not isinstance(below, dict):
            return None
        at = below
    return at


def _default(key: str) -> Any:
    entry: Any = SCHEMA
    for name in key.split("."):
        entry = entry.get(name) if isinstance(entry, dict) else None
    return entry.default if isinstance(entry, Leaf) else None


@functools.cache  # once a run is enough
def _warn(old: str, new: str) -> None:
    logger.warning(
        "%s is called %s now: change it, because the next release knows the new name"
        " only",
        *(old, new),
    )
