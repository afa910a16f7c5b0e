"""The configurations that come with jaxtrain: presets to learn on, and recipes.

A preset (`dpo`) trains the embedded model in minutes. A recipe (`qwen3-4b-dpo-lora`)
trains a published model on one machine; the comments at its top say which.
"""

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from jaxtrain.config.sections import SCHEMA
from jaxtrain.objectives.options import objective_row
from jaxtrain.tree import get

_TITLE = re.compile(r"# (?P<model>.+): (?P<method>.+), on an? (?P<machine>.+)\.")
_MEMORY = re.compile(r"# Memory: (?P<memory>.+?), by `jaxtrain aot`")
# Keys that presets set for a model of a million parameters, and for few short rows.
_FOR_TINY_MODELS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "bf16",
)  # fmt: skip
_PROMPT_LIMIT = "training.dpo.max_prompt_length"
_FOR_SHORT_ROWS = (
    "training.max_steps", "data.max_length", "training.dpo.max_length", _PROMPT_LIMIT,
)  # fmt: skip
# What TRL's commands train that is no configuration here.
_ELSEWHERE = (
    "{} is not implemented; jaxtrain trains by next-token and preference losses"
)
_METHODS = {
    name: f"write `jaxtrain train dpo --training.objective={name}`"
    for name in ("kto", "orpo", "cpo", "simpo")
} | {
    name: _ELSEWHERE.format(name.upper())
    + ", and there are from_scratch, sft, lora, dpo"
    for name in ("grpo", "ppo", "rloo", "reward", "prm", "gkd", "online_dpo")
}
_TINY_BYTES = 100e6  # of weights in a directory; those of SmolLM2 135M are 270 MB


@dataclass(frozen=True)
class Recipe:
    """The comments at the top of a recipe, as four texts for people to read."""

    model: str
    method: str
    machine: str
    memory: str


def is_file_name(config: str) -> bool:
    """Whether `config` names a file, not a configuration that comes with jaxtrain.

    A dot alone does not make a file name: recipes have dots too (qwen3-0.6b-sft).
    """
    path = Path(config)
    return path.name != config or re.fullmatch(r"\.[A-Za-z]*", path.suffix) is not None


def config_stem(config: str) -> str:
    """The name of a configuration: `dpo` for dpo and for dpo.yaml."""
    return Path(config).stem if is_file_name(config) else config


def shipped_configs() -> dict[str, Path]:
    """All presets, then all recipes, by name, from the wheel or the checkout."""
    folder = _folder()
    presets = [path for path in folder.glob("*.py") if path.stem != "from_yaml"]
    recipes = folder.glob("recipes/*.yaml")
    return {
        path.name.removesuffix(path.suffix): path
        for path in (*sorted(presets), *sorted(recipes))
    }


def shipped_config(name: str) -> Path:
    """The path of a configuration that comes with jaxtrain.

    Raises:
        ValueError: there is none of this name; the message suggests similar names.
    """
    found = shipped_configs()
    if name not in found:
        if name in _METHODS:
            raise ValueError(f"config = {name!r}: {_METHODS[name]}")
        close = difflib.get_close_matches(name, found, n=3)
        hint = f"did you mean {' or '.join(close)}? There are" if close else "there are"
        presets = [each for each, path in found.items() if path.suffix == ".py"]
        raise ValueError(
            f"config = {name!r}: no configuration of that name comes with jaxtrain;"
            f" {hint} {', '.join(presets)} and what `jaxtrain recipes` lists, and a"
            " file's name ends in .yaml or .py"
        )
    return found[name]


def read_recipe(path: Path) -> Recipe:
    """Parse the comments at the top of a recipe.

    Raises:
        ValueError: they do not have the form that every recipe has.
    """
    lines = path.read_text("utf-8").splitlines()
    title = _TITLE.fullmatch(lines[0])
    memory = [found for line in lines if (found := _MEMORY.match(line))]
    if title is None or len(memory) != 1:
        raise ValueError(
            f"{path}: the first line of a recipe must be '# MODEL: METHOD, on a"
            " MACHINE.', and one other line '# Memory: ..., by `jaxtrain aot`'"
        )
    return Recipe(**title.groupdict(), **memory[0].groupdict())


def is_preset(config: str) -> bool:
    """Whether `config`, a name or a path, is a preset for the embedded model."""
    presets = [each for each in shipped_configs().values() if each.suffix == ".py"]
    if not is_file_name(config):
        return config in [each.stem for each in presets]
    path = Path(config)
    return path.is_file() and path.resolve() in [each.resolve() for each in presets]


def fit_preset_to_model(config: ConfigDict, flags: Collection[str]) -> str:
    """Reset keys that a preset sets for the tiny embedded model, for a larger model.

    Args:
        config: a preset after flags were applied; it is changed in place.
        flags: full keys that the command line set; these keep their values.

    Returns:
        A sentence for the log that tells what was reset, or "" if nothing was.
    """
    model = config.model.name_or_path
    if not model or _is_tiny(Path(model)):
        return ""
    training, done = config.training, []
    for key in _FOR_TINY_MODELS:
        usual = SCHEMA["training"][key].default
        if f"training.{key}" not in flags and training[key] != usual:
            done.append(f"training.{key} = {training[key]}")
            training[key] = usual
    kept = [
        f"{key} = {get(config, key)}"
        for key in _FOR_SHORT_ROWS
        if key not in flags and get(config, key) != get(SCHEMA, key).default
    ]
    if not done:
        return ""
    stays = (
        f"; {', '.join(kept)} were kept, so set them yourself if they do not fit"
        if kept
        else ""
    )
    return (
        "a preset is made for the small model that comes with jaxtrain: for"
        f" {model}, {', '.join(done)} were replaced by the defaults{stays};"
        " `jaxtrain recipes` lists configurations for real models"
    )


def give_way(config: ConfigDict, flags: Collection[str]) -> None:
    """Reset what a preset sets for its own model, loss and length, beside other flags.

    A model that is named has sizes of its own. A limit of prompts has no place with a
    length that is no greater, nor with a loss that reads none; and such a loss has
    other metrics. A constant rate has no warm-up. Nobody asked for these values, so
    nobody need be told to take them away.

    Args:
        config: a preset after flags were applied; it is changed in place.
        flags: full keys that the command line set; these keep their values.
    """
    if config.model.name_or_path:
        for key, leaf in SCHEMA["model"]["architecture"].items():
            if f"model.architecture.{key}" not in flags:
                config.model.architecture[key] = leaf.default
    training = config.training
    dpo, name = training.dpo, training.objective
    if training.lr_scheduler_type == "constant":
        for key in ("warmup_steps", "warmup_ratio"):
            if f"training.{key}" not in flags:
                training[key] = SCHEMA["training"][key].default
    row = objective_row(name, on_pairs=True)
    is_other = row is not None and row.row_kind != "preference"
    limit, length = dpo.max_prompt_length, dpo.max_length or config.data.max_length
    has_no_room = limit is not None and length is not None and length <= limit
    if (is_other or has_no_room) and _PROMPT_LIMIT not in flags:
        dpo.max_prompt_length = None
    if (is_other or ":" in name) and "training.metric_for_best_model" not in flags:
        default = SCHEMA["training"]["metric_for_best_model"].default
        training.metric_for_best_model = default


def _is_tiny(folder: Path) -> bool:
    """Whether the folder holds a model as small as the embedded one."""
    sizes = [each.stat().st_size for each in folder.glob("*.safetensors")]
    return bool(sizes) and sum(sizes) < _TINY_BYTES


def _folder() -> Path:
    package = Path(__file__).parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
