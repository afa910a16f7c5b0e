"""PEFT's adapter_config.json: what it may hold, and the settings that it means."""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from jaxtrain.config.folders import bucket_cache
from jaxtrain.lora import parameters
from jaxtrain.lora.conversion import converted
from jaxtrain.lora.patterns import ends_one, why_none
from jaxtrain.lora.peft_tensors import PREFIX, WEIGHTS_FILE
from jaxtrain.lora.targets import LoraConfig
from jaxtrain.models.hf_files import read_header, read_json
from jaxtrain.record.safe_text import shown
from jaxtrain.storage.address import is_remote
from jaxtrain.storage.mirror import mirror

CONFIG_FILE = "adapter_config.json"
# What PEFT and a configuration call these settings; the others have the same names.
_SETTING_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
# Keys of PEFT's config that we read, or that change nothing once weights are trained.
# Any other key that is set names a variant whose forward pass differs.
_READ_KEYS = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "bias",
    "use_rslora", "modules_to_save", "ensure_weight_tying", "init_lora_weights",
    "use_dora", "rank_pattern", "alpha_pattern", "target_parameters",
}  # fmt: skip
_INERT_KEYS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type",
}  # fmt: skip
# Initial values that leave the base as it is; others train beside a changed base.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def settings_from(section: Any, model_type: str, layers: int) -> LoraConfig:
    """The settings of `training.lora`, or of the adapter that its `init_from` names.

    Args:
        section: `training.lora`.
        model_type: the family, of which PEFT may convert names (conversion.py).
        layers: how many the model has.

    Raises:
        ValueError: that adapter cannot be read, or names cannot be converted.
    """
    if section.init_from:
        settings = read_settings(section.init_from)
        return dataclasses.replace(settings, dropout=section.lora_dropout)
    fields = dataclasses.fields(LoraConfig)
    names = [field.name for field in fields if field.name != "exclude_modules"]
    values = {n: getattr(section, _SETTING_NAMES.get(n, n)) for n in names}
    # A pattern that is not set is None there.
    patterns = ("rank_pattern", "alpha_pattern")
    values |= {name: values[name] or {} for name in patterns}
    return converted(LoraConfig(**values), model_type, layers)


def settings_in_file(lora: LoraConfig) -> dict[str, Any]:
    """Settings by PEFT's names, without those that act only as adapters are made."""
    return {
        _SETTING_NAMES.get(name, name): value
        for name, value in vars(lora).items()
        if name not in ("init_lora_weights", "ensure_weight_tying", "exclude_modules")
    }


def adapter_folder(path: str | pathlib.Path) -> pathlib.Path:
    """An adapter's folder; of one in a bucket, its copy on the local disk.

    Raises:
        OSError: the bucket does not give it.
    """
    return mirror(path, bucket_cache()) if is_remote(path) else pathlib.Path(path)


def read_settings(path: str | pathlib.Path) -> LoraConfig:
    """The settings of a PEFT LoRA adapter; its weights are named, not read.

    Raises:
        ValueError: no such file, or an unsupported variant, by name.
    """
    path = adapter_folder(path)
    config = read_config(path)
    _refuse_variants(path, config)
    keys = read_header(path / WEIGHTS_FILE)[0]
    ties = bool(config.get("ensure_weight_tying"))
    prefix = re.escape(PREFIX)
    tensor_name = rf"(?:{prefix})?(\S+)\.lora_(?:A\.|embedding_A)"
    names = re.findall(tensor_name, "\n".join(keys))
    entries = config.get("target_parameters") or ()
    of_mixture = parameters.names_in_file(entries, names)
    parameter_names = [name for found in of_mixture.values() for name in found]
    names = [name for name in names if not parameters.wraps(name, parameter_names)]
    known = names + parameter_names
    has_embedding = any(name.endswith("embed_tokens") for name in names)
    patterns: dict[str, Any] = {
        # PEFT itself writes patterns of a mixture's stacked experts, adapted or not.
        key: {p: v for p, v in (config.get(key) or {}).items() if ends_one(p, known)}
        for key in ("rank_pattern", "alpha_pattern")
    }
    saved = config.get("modules_to_save") or ()
    return LoraConfig(
        r=config.get("r", 8),  # PEFT's defaults, here and below
        alpha=config.get("lora_alpha", 8),
        dropout=config.get("lora_dropout", 0.0),
        # From the weights: PEFT passes over a name in its config that matches nothing.
        target_modules=_targets_of(names, config.get("target_modules")),
        target_parameters=tuple(sorted(of_mixture)) or None,
        bias=config.get("bias", "none"),
        use_rslora=bool(config.get("use_rslora", False)),
        use_dora=bool(config.get("use_dora", False)),
        **patterns,
        modules_to_save=tuple(
            # Not those that PEFT itself adds for tied weights ("model.embed_tokens").
            entry
            for entry in saved
            if not (entry.startswith("model.") and entry[len("model.") :] in saved)
        ),
        ensure_weight_tying=ties and has_embedding,
    )


def has_own_ends(path: str | pathlib.Path) -> bool:
    """Whether an adapter holds an embedding or a head whole, each apart from the other.

    Raises:
        ValueError: no such adapter.
    """
    path = adapter_folder(path)
    config = read_config(path)
    saved = {name.rpartition(".")[2] for name in config.get("modules_to_save") or ()}
    if config.get("ensure_weight_tying") or not saved & {"embed_tokens", "lm_head"}:
        return False
    keys = read_header(path / WEIGHTS_FILE)[0]
    return any(key.endswith(("embed_tokens.weight", "lm_head.weight")) for key in keys)


def _targets_of(names: list[str], chosen: Any) -> tuple[str, ...] | str:
    """What selects these modules and no others: the ends of their names.

    Where they are in some layers only, layers are of several kinds, and another kind
    may have modules of the same names: then a regular expression of whole names.
    """
    layers: dict[str, list[int]] = {}
    parts: list[str] = []  # of those outside of layers, first
    for name in names:
        if match := re.fullmatch(r"(?:.*\.)?layers\.(\d+)\.(.+)", name):
            layers.setdefault(match[2], []).append(int(match[1]))
        else:
            parts.append(re.escape(name.rpartition(".")[2]))
    numbers = {number for own in layers.values() for number in own}
    in_all = {*range(len(numbers))}
    is_plain = isinstance(chosen, list) and not any("." in name for name in chosen)
    if is_plain or all(set(own) == in_all for own in layers.values()):
        return tuple(sorted({name.rpartition(".")[2] for name in names}))
    for inner, own in sorted(layers.items()):
        of_layers = "|".join(map(str, sorted(own)))
        parts.append(rf"layers\.({of_layers})\.{re.escape(inner)}")
    return rf"(.*\.)?({'|'.join(parts)})"


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """The content of adapter_config.json, what we read of it checked.

    Raises:
        ValueError: a file is missing, or a value is of another type; a line for each.
    """
    if not path.is_dir():
        raise ValueError(f"adapter {path}: there is no such directory; check the path")
    inner = sorted(path.glob(f"*/{CONFIG_FILE}"))
    if inner and not (path / CONFIG_FILE).is_file():  # adapters that have a name
        found = " or ".join(str(each.parent) for each in inner)
        raise ValueError(f"adapter {path} has no {CONFIG_FILE}: give {found}")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise ValueError(
                f"adapter {path} has no {name}: save it with PEFT's save_pretrained"
                " (safe_serialization, its default)"
            )
    config = read_json(path / CONFIG_FILE)
    wrong = [
        f"{path / CONFIG_FILE}: {name} = {shown(config[name], 200)}: must be {wanted}"
        for name, (wanted, is_right) in _VALUES.items()
        if name in config and not is_right(config[name])
    ]
    if wrong:
        raise ValueError("\n".join(wrong))
    return config


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_names(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
    return value is None or isinstance(value, str) or is_list


def _is_pattern(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and all(_is_number(number) and number > 0 for number in value.values())
        and not any(map(why_none, value))
    )


_FLAG = ("true or false", _is_flag)
_NAMES = ("a text or a list of texts", _is_names)
_PATTERN = (
    "an object of numbers above 0 by regular expressions of module names",
    _is_pattern,
)
# What the keys that we read must hold, in words and as a test.
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("an integer, at least 1", lambda r: type(r) is int and r > 0),
    "lora_alpha": ("a number above 0", lambda x: _is_number(x) and x > 0),
    "lora_dropout": ("a number in [0, 1)", lambda x: _is_number(x) and 0 <= x < 1),
    "bias": ("a text", lambda bias: isinstance(bias, str)),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "ensure_weight_tying": _FLAG,
    "target_modules": _NAMES,
    "target_parameters": (
        "a list of texts",
        lambda names: (
            names is None or (not isinstance(names, str) and _is_names(names))
        ),
    ),
    "modules_to_save": _NAMES,
    "rank_pattern": _PATTERN,
    "alpha_pattern": _PATTERN,
    "init_lora_weights": (
        "true, false or a text",
        lambda x: _is_flag(x) or type(x) is str,
    ),
}


# Kinds that learn prompts, which no weights can hold; and tasks of other models.
_PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
_OTHER_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM")


def _refuse_variants(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    kind, task = config.get("peft_type"), config.get("task_type")
    if kind != "LORA":
        advice = "train an adapter of LORA anew"
        if kind not in _PROMPTS:
            advice = "merge it with PEFT and load the merged model"
        raise ValueError(
            f"adapter {path}: peft_type = {shown(kind)} is not supported, only LORA:"
            f" {advice}"
        )
    if task in _OTHER_TASKS:
        raise ValueError(
            f"adapter {path}: task_type = {shown(task)} is not supported, only models"
            " that continue texts (CAUSAL_LM): give another adapter"
        )
    variants = {
        key: value
        for key, value in config.items()
        if value and key not in _READ_KEYS | _INERT_KEYS
    }
    if config.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise ValueError(
            f"adapter {path}: init_lora_weights = {shown(config['init_lora_weights'])}"
            " is not supported, because it changed its base at first: save it by PEFT's"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...), which"
            " fits it to the original base"
        )
    if variants:
        raise ValueError(
            f"adapter {path}: {shown(variants, 400)} is not supported, because the"
            " adapter would act differently here: merge it with PEFT (merge_and_unload)"
            " and load the merged model"
        )
