"""LoRA adapters in PEFT's files: adapter_config.json and adapter_model.safetensors.

`peft_config.py` knows the first of these, `peft_tensors.py` the second. PEFT holds one
[out in] matrix a layer and module, under the torch model's names; here layers are
stacked and matrices are [in out].
"""

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from jaxtrain.lora import parameters, peft_tensors, targets
from jaxtrain.lora.peft_config import (
    CONFIG_FILE,
    adapter_folder,
    read_config,
    read_settings,
    settings_in_file,
)
from jaxtrain.lora.peft_tensors import WEIGHTS_FILE
from jaxtrain.lora.targets import ADAPTER_LEAVES, EMBEDDING, LoraConfig, TreePath
from jaxtrain.record.safe_text import shown
from jaxtrain.sharding import to_host
from jaxtrain.tree import flatten, nest
from jaxtrain.types import Params


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
    tensors = peft_tensors.to_file(flat, mixture)
    trains_table = (*EMBEDDING, "embedding") in flat
    ties = tied_embeddings and (lora.ensure_weight_tying or trains_table)
    if ties:
        peft_tensors.tie_head(tensors, flat, adapters=lora.ensure_weight_tying)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        **settings_in_file(lora),
        "target_modules": peft_tensors.target_modules(flat, mixture),
        "target_parameters": parameters.entries_of(mixture) or None,
        "modules_to_save": list(lora.modules_to_save) or None,
        "inference_mode": True,
    } | ({"ensure_weight_tying": True} if ties else {})
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
            not fit the base or are no numbers.
    """
    path = adapter_folder(path)
    lora = read_settings(path)
    config = read_config(path)
    ties = targets.is_tied(base_tree) and bool(config.get("ensure_weight_tying"))
    with _of_adapter(path):
        mixture = parameters.select(lora, base_tree)
        saved = targets.resolve_modules_to_save(lora, base_tree)
    stacks = peft_tensors.read_stacks(
        path, base_tree, mixture, saved=saved, drop_head=ties
    )
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
    with _of_adapter(path):
        targets.resolve_ranks(lora, base_tree)  # refuses what takes no adapter
    trainable = nest(peft_tensors.fit_to_base(path, stacks, base_tree, lora))
    flat = flatten(trainable).items()
    if bad := [".".join(name) for name, x in flat if not np.isfinite(x).all()]:
        raise ValueError(f"adapter {path}: NaN or infinity is in {bad[:3]}")
    unties = targets.is_tied(base_tree) and not ties
    _check_saved_modules(path, trainable, saved, unties=unties)
    return trainable, lora


@contextlib.contextmanager
def _of_adapter(path: pathlib.Path) -> Iterator[None]:
    """What is wrong with an adapter's settings, which are no longer to be chosen."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"adapter {path}: {error}. If it was trained so, merge it with PEFT"
        ) from error


def _check_saved_modules(
    path: pathlib.Path, trainable: Params, saved: set[TreePath], *, unties: bool
) -> None:
    """Whole weights must be those that modules_to_save names, and tied as ours are."""
    trains_table = "embedding" in trainable.get("embed_tokens", {})
    if trains_table and unties:
        raise ValueError(
            f"adapter {path}: it trains embed_tokens apart from the head, but here they"
            " are one array: save it with ensure_weight_tying=True, or untie the base"
            " (tie_word_embeddings=False)"
        )
    for key in flatten(trainable):
        is_whole = key[-1] not in (*ADAPTER_LEAVES, "bias")
        if is_whole and not targets.is_within(key, saved):
            raise ValueError(
                f"adapter {path}: it holds {'.'.join(key)}, which its modules_to_save"
                " does not name: add it there"
            )
