"""The tensors of PEFT's adapter files, sorted into leaves of our tree."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from jaxtrain.lora.targets import (
    ADAPTER_LEAVES,
    HEAD,
    LoraConfig,
    TreePath,
    full_names,
    is_tied,
    iterate_modules,
    matrix_shape,
)
from jaxtrain.models.quantization import CODES
from jaxtrain.tree import get as tree_get

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Ours are [in out], torch's [out in].
TRANSPOSED = ("lora_a", "lora_b", "kernel", "weight")

_LAYER_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")


def read_stacks(
    path: pathlib.Path, base_tree: Mapping[str, Any], *, drop_head: bool
) -> dict[TreePath, dict[int, np.ndarray]]:
    """Leaf path -> layer -> array; layer 0 alone outside the layers.

    Args:
        drop_head: pass over what a file says of a head that is the embedding.

    Raises:
        ValueError: a tensor has no place in the base, or is not of this base.
    """
    modules = {module.path: module.leaves for module in iterate_modules(base_tree)}
    modules.setdefault(HEAD, {"tied": None})
    stacks: dict[TreePath, dict[int, np.ndarray]] = {}
    tensors = safetensors.numpy.load_file(path / WEIGHTS_FILE)
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if ".modules_to_save." in name or ".original_module." in name:
            continue  # PEFT's own duplicates of a saved module's bias
        if drop_head and name.startswith("lm_head."):
            continue  # the embedding again
        if name in _BASE_COPIES:
            _check_base_copy(path, name, value, base_tree)
            continue
        match = re.fullmatch(
            r"(.+?)\.(lora_[AB]\.weight|lora_embedding_[AB]"
            r"|lora_magnitude_vector(?:\.weight)?|(?:base_layer\.)?bias|weight)",
            name,
        )
        module, leaf = match.groups() if match else (name, "")
        in_layer = _LAYER_NAME.fullmatch(module)
        layer = int(in_layer[1]) if in_layer else 0
        module_path: TreePath = (
            ("layers", *in_layer[2].split("."))
            if in_layer
            else tuple(module.removeprefix("model.").split("."))
        )
        leaves = modules.get(module_path)
        own_leaf = _own_leaf(leaf, leaves or {})
        if own_leaf is None:
            raise ValueError(
                f"adapter {path}: {key} has no place in this model: load the base that"
                " the adapter was trained on"
            )
        if own_leaf in TRANSPOSED:
            value = value.swapaxes(-1, -2)
        stacks.setdefault((*module_path, own_leaf), {})[layer] = value
    return stacks


# PEFT adds the base's own matrices to a file that adapts them.
_BASE_COPIES = ("lm_head.base_layer.weight", "model.embed_tokens.base_layer.weight")


def _check_base_copy(
    path: pathlib.Path, name: str, value: np.ndarray, base_tree: Mapping[str, Any]
) -> None:
    """Refuse an adapter whose embedding is not the base's, as after a resize."""
    module = name.removeprefix("model.").split(".")[0]
    tied = module == "lm_head" and is_tied(base_tree)
    leaves = base_tree["embed_tokens" if tied else module]
    leaf = leaves.get("embedding", leaves.get("kernel"))
    ours = leaf.shape if "embedding" in leaves else leaf.shape[::-1]
    is_other = tuple(ours) != value.shape
    if not is_other and isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
        own = np.asarray(leaf)
        own = own if "embedding" in leaves else own.T
        is_other = not np.array_equal(own, value.astype(own.dtype))
    if is_other:
        raise ValueError(
            f"adapter {path}: its {module} {value.shape} is not that of this base: load"
            " the base that the adapter was trained on, with its embeddings resized as"
            " they were then"
        )


def _own_leaf(torch_leaf: str, leaves: Mapping[str, Any]) -> str | None:
    """Our name of a module's tensor, or None where the module has no such."""
    if torch_leaf.startswith("lora_embedding_"):
        return (
            torch_leaf.lower().replace("_embedding", "")
            if "embedding" in leaves
            else None
        )
    if torch_leaf.startswith("lora_"):
        own = torch_leaf.removesuffix(".weight").removesuffix("_vector").lower()
        takes: tuple[str, ...] = ("kernel", CODES, "tied")
        if own == "lora_magnitude":
            takes += ("embedding",)
        return own if any(name in leaves for name in takes) else None
    if torch_leaf.endswith("bias"):
        return "bias" if "bias" in leaves else None
    kinds = ("kernel", "embedding", "scale", "weight")
    names = [name for name in kinds if name in leaves]
    return names[0] if torch_leaf == "weight" and names else None


def fit_to_base(
    path: pathlib.Path,
    stacks: Mapping[TreePath, Mapping[int, np.ndarray]],
    base_tree: Mapping[str, Any],
    lora: LoraConfig,
) -> dict[TreePath, np.ndarray]:
    """Stack each leaf's layers; its shape must be the one that the base calls for.

    Raises:
        ValueError: another shape, or some layers only.
    """
    fitted = {}
    for key, by_layer in stacks.items():
        if key[-1] in ADAPTER_LEAVES:
            *layers, width_in, width_out = matrix_shape(base_tree, key[:-1])
            names = full_names(key[:-1], *layers or [1])
            rank, _ = lora.rank_and_scaling(names)
            inner = {
                "lora_a": (width_in, rank),
                "lora_b": (rank, width_out),
                "lora_magnitude": (width_out,),
            }
            shape = (*layers, *inner[key[-1]])
        else:
            shape = tree_get(base_tree, key[:-1])[key[-1]].shape
        stacked = key[0] == "layers"
        count, layer_shape = (shape[0], shape[1:]) if stacked else (1, shape)
        if sorted(by_layer) != list(range(count)):
            raise ValueError(
                f"adapter {path}: {'.'.join(key)} is given for layers"
                f" {sorted(by_layer)} of {count} only, but layers are stacked and"
                " train alike: merge the adapter with PEFT and load the merged model"
            )
        for array in by_layer.values():
            if array.shape != layer_shape:
                raise ValueError(
                    f"adapter {path}: {'.'.join(key)} has shape {array.shape}, the base"
                    f" calls for {layer_shape}: load the base that the adapter was"
                    " trained on"
                )
        arrays = [by_layer[i].astype(np.float32) for i in range(count)]
        fitted[key] = np.stack(arrays) if stacked else arrays[0]
    return fitted
