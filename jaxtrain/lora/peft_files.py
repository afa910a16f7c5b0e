"""LoRA adapters in PEFT's files: adapter_config.json and adapter_model.safetensors.

PEFT holds one [out in] matrix a layer and module, under the torch model's names; here
layers are stacked and matrices are [in out].
"""

import dataclasses
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from jaxtrain.config.folders import bucket_cache
from jaxtrain.lora import parameters, peft_tensors, targets
from jaxtrain.lora.conversion import converted
from jaxtrain.lora.patterns import ends_one, why_none
from jaxtrain.lora.peft_tensors import PREFIX, WEIGHTS_FILE
from jaxtrain.lora.targets import ADAPTER_LEAVES, EMBEDDING, LoraConfig
from jaxtrain.models.hf_files import read_header, read_json
from jaxtrain.models.stacks import LAYERS, split_path
from jaxtrain.record.safe_text import shown
from jaxtrain.sharding import to_host
from jaxtrain.storage.address import is_remote
from jaxtrain.storage.mirror import mirror
from jaxtrain.tree import flatten, nest
from jaxtrain.types import Params

CONFIG_FILE = "adapter_config.json"
# What PEFT and a configuration call these settings; the others have the same names.
_SETTING_NAMES = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
_TORCH_LEAVES = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
    "bias": "bias",
}
# Beside the embedding, PEFT's adapter has other names and is no module of its own.
_EMBEDDING_LEAVES = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}


def save_adapter(
    path: str | pathlib.Path,
    trainable: Params,
    lora: LoraConfig,
    base_model_name: str | None,
    *,
    tied_embeddings: bool,
    initial: Params | None = None,
    in_wrapper: bool = False,
) -> None:
    """Write what trains in PEFT's format, for `peft.PeftModel.from_pretrained`.

    Where the base was changed at the start (`lora.changes_base`), what is written fits
    the original one: W - s A0 B0 + s A B = W + s [A A0] [B; -B0], of twice the rank.

    Every process must call this where arrays are spread over processes; the first
    writes.

    Args:
        path: directory, made if absent.
        base_model_name: path or hub name that PEFT shall find the base under.
        tied_embeddings: whether the head is the embedding; PEFT is then told so.
        initial: the first adapters, needed where `lora.changes_base`.
        in_wrapper: whether PEFT shall find the base inside a wrapper with towers.
    """
    if lora.changes_base:
        if initial is None:
            raise ValueError(
                f"lora.init_lora_weights = {shown(lora.init_lora_weights)} changed the"
                " base: pass the first adapters as `initial`"
            )
        trainable, lora = _as_plain(trainable, initial, lora)
    flat = {
        key: np.asarray(to_host(leaf), np.float32)
        for key, leaf in flatten(trainable).items()
    }
    mixture = parameters.of_adapters(flat, lora.target_parameters)
    adapted = {key[:-1] for key in flat if key[-1] == "lora_a"} - mixture.keys()
    tensors = peft_tensors.mixture_tensors(flat, mixture)
    for key, value in flat.items():
        if key[:-1] in mixture and key[-1] in ADAPTER_LEAVES:
            continue
        leaf = _TORCH_LEAVES.get(key[-1], "weight")
        if key[:-1] == EMBEDDING:
            leaf = _EMBEDDING_LEAVES.get(key[-1], leaf)
        if key[-1] == "bias" and key[:-1] in adapted:
            leaf = "base_layer.bias"
        names = targets.full_names(key[:-1], value.shape[0])
        layers = value if key[0] == LAYERS else [value]
        for name, array in zip(names, layers, strict=True):
            if key[-1] in peft_tensors.TRANSPOSED:
                array = array.T
            tensors[f"{PREFIX}{name}.{leaf}"] = np.ascontiguousarray(array)
    tied_adapters = tied_embeddings and lora.ensure_weight_tying
    if tied_adapters and (*EMBEDDING, "lora_a") in flat:
        for own, other in ("AB", "BA"):
            values = tensors[f"{PREFIX}model.embed_tokens.lora_embedding_{other}"]
            tensors[f"{PREFIX}lm_head.lora_{own}.weight"] = np.ascontiguousarray(
                values.T
            )
    ties = tied_embeddings and ("embed_tokens", "embedding") in flat
    if ties:
        table = tensors[f"{PREFIX}model.embed_tokens.weight"]
        tensors[f"{PREFIX}lm_head.weight"] = table.copy()
    settings = {
        _SETTING_NAMES.get(name, name): value
        for name, value in vars(lora).items()
        if name not in ("init_lora_weights", "ensure_weight_tying", "exclude_modules")
    }
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        **settings,
        "target_modules": _target_modules(adapted, flat),
        "target_parameters": parameters.entries_of(mixture) or None,
        "modules_to_save": list(lora.modules_to_save) or None,
        "inference_mode": True,
    } | ({"ensure_weight_tying": True} if ties or tied_adapters else {})
    if in_wrapper:
        tensors = {peft_tensors.name_in_wrapper(k): v for k, v in tensors.items()}
        names = config["target_modules"]
        if names:
            config["target_modules"] = peft_tensors.modules_in_wrapper(names)
    if jax.process_index() == 0:
        path = pathlib.Path(path)
        path.mkdir(parents=True, exist_ok=True)
        # Readers of safetensors files expect to be told that they are PyTorch's.
        safetensors.numpy.save_file(tensors, path / WEIGHTS_FILE, {"format": "pt"})
        text = json.dumps(config, indent=2)
        (path / CONFIG_FILE).write_text(text + "\n")


def _target_modules(
    adapted: Collection[targets.TreePath], flat: Mapping[targets.TreePath, Any]
) -> list[str]:
    """What PEFT shall adapt, as ends of names.

    A module's last name is unique where layers are alike. Where they differ, others may
    have it that have no adapter, so each is named in full.
    """
    names: set[str] = set()
    for path in adapted:
        if len(split_path(path)[0]) < 2:
            names.add(path[-1])
            continue
        count = flat[*path, "lora_a"].shape[0]
        full = targets.full_names(path, count)
        names |= {name.removeprefix("model.") for name in full}
    return sorted(names)


def _as_plain(
    trainable: Params, initial: Params, lora: LoraConfig
) -> tuple[Params, LoraConfig]:
    """The same adapters beside the base as it was before they changed it."""
    joined = flatten(trainable)
    for path, first in flatten(initial).items():
        if path[-1] in ("lora_a", "lora_b"):
            sign, axis = (1, -1) if path[-1] == "lora_a" else (-1, -2)
            parts = [to_host(joined[path]), sign * to_host(first)]
            joined[path] = np.concatenate(parts, axis)
    # What keeps the scaling where the rank doubles.
    factor = math.sqrt(2) if lora.use_rslora else 2
    plain = dataclasses.replace(
        lora,
        r=2 * lora.r,
        alpha=factor * lora.alpha,
        rank_pattern={key: 2 * rank for key, rank in lora.rank_pattern.items()},
        alpha_pattern={key: factor * a for key, a in lora.alpha_pattern.items()},
        init_lora_weights="default",
    )
    return nest(joined), plain


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


def load_adapter(
    path: str | pathlib.Path, base_tree: Mapping[str, Any]
) -> tuple[Params, LoraConfig]:
    """Read a PEFT LoRA adapter: the trainable tree (float32, on the host), its config.

    Args:
        path: directory of adapter_config.json and adapter_model.safetensors, which may
            be in a bucket.
        base_tree: the base's parameters, or anything with their structure and shapes.

    Raises:
        ValueError: no such file, an unsupported variant (by name), or weights that do
            not fit the base.
    """
    path = adapter_folder(path)
    lora = read_settings(path)
    config = _read_config(path)
    ties = targets.is_tied(base_tree) and bool(config.get("ensure_weight_tying"))
    mixture = parameters.select(lora, base_tree)
    stacks = peft_tensors.read_stacks(path, base_tree, mixture, drop_head=ties)
    having = {
        leaf: {key[:-1] for key in stacks if key[-1] == leaf} for leaf in ADAPTER_LEAVES
    }
    if not having["lora_a"] or having["lora_a"] != having["lora_b"]:
        raise ValueError(
            f"adapter {path} holds lora_A of {sorted(having['lora_a'])} and lora_B of"
            f" {sorted(having['lora_b'])}: it must hold both, of one module or more"
        )
    if having["lora_magnitude"] != (having["lora_a"] if lora.use_dora else set()):
        raise ValueError(
            f"adapter {path}: use_dora = {lora.use_dora}, but it holds magnitudes of"
            f" {sorted(having['lora_magnitude'])}: save it anew with PEFT"
        )
    targets.resolve_ranks(lora, base_tree)  # refuses what takes no adapter
    trainable = nest(peft_tensors.fit_to_base(path, stacks, base_tree, lora))
    _check_saved_modules(path, trainable, lora, base_tree, ties=ties)
    return trainable, lora


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
    config = _read_config(path)
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


def has_own_ends(path: str | pathlib.Path) -> bool:
    """Whether an adapter holds an embedding or a head whole, each apart from the other.

    Raises:
        ValueError: no such adapter.
    """
    path = adapter_folder(path)
    config = _read_config(path)
    saved = {name.rpartition(".")[2] for name in config.get("modules_to_save") or ()}
    if config.get("ensure_weight_tying") or not saved & {"embed_tokens", "lm_head"}:
        return False
    keys = read_header(path / WEIGHTS_FILE)[0]
    return any(key.endswith(("embed_tokens.weight", "lm_head.weight")) for key in keys)


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


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError(f"adapter {path}: there is no such directory; check the path")
    if (path / "adapter" / CONFIG_FILE).is_file() and not (
        path / CONFIG_FILE
    ).is_file():
        raise ValueError(
            f"adapter {path} is the work directory of a run: give {path / 'adapter'}"
        )
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


def _refuse_variants(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"adapter {path}: peft_type = {shown(config.get('peft_type'))} is not"
            " supported, only LORA: merge it with PEFT and load the merged model"
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


def _check_saved_modules(
    path: pathlib.Path,
    trainable: Params,
    lora: LoraConfig,
    base_tree: Mapping[str, Any],
    *,
    ties: bool,
) -> None:
    """Whole weights must be those that modules_to_save names, and tied as ours are."""
    trains_table = "embedding" in trainable.get("embed_tokens", {})
    if trains_table and targets.is_tied(base_tree) and not ties:
        raise ValueError(
            f"adapter {path}: it trains embed_tokens apart from the head, but here they"
            " are one array: save it with ensure_weight_tying=True, or untie the base"
            " (tie_word_embeddings=False)"
        )
    saved = targets.resolve_modules_to_save(lora, base_tree)
    for key in flatten(trainable):
        is_whole = key[-1] not in (*ADAPTER_LEAVES, "bias")
        if is_whole and not targets.is_within(key, saved):
            raise ValueError(
                f"adapter {path}: it holds {'.'.join(key)}, which its modules_to_save"
                f" = {list(lora.modules_to_save)} does not name: add it there"
            )
