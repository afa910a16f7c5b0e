"""The tensors of PEFT's adapter files, sorted into leaves of our tree."""

import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from jaxtrain.lora import parameters, targets
from jaxtrain.lora.parameters import Parameter
from jaxtrain.lora.targets import LoraConfig, TreePath
from jaxtrain.models.hf_files import read_header, reading
from jaxtrain.models.hf_names import NUMPY_TYPES
from jaxtrain.models.quantization import CODES
from jaxtrain.models.stacks import LAYERS, layer_numbers, split_path
from jaxtrain.tree import get as tree_get

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Where a model inside a wrapper has its layers: its class in transformers 5, and 4's.
_IN_WRAPPER = re.compile(r"(model\.language_model|language_model\.model)\.")
_WRAPPED_HEAD = "language_model.lm_head."
# Ours are [in out], torch's [out in].
TRANSPOSED = ("lora_a", "lora_b", "kernel", "weight")

# PEFT adds the base's own matrices to a file that adapts them.
_BASE_COPIES = ("lm_head.base_layer.weight", "model.embed_tokens.base_layer.weight")
# So it does by save_embedding_layers, and by itself after a resize.
_ENDS = {"lm_head.weight": "lm_head", "model.embed_tokens.weight": "embed_tokens"}
_MATRICES = ("kernel", CODES, "tied")
# Tensors of a module: our name, and what it must hold one of to have such a tensor.
_LEAVES = {
    "lora_A.weight": ("lora_a", _MATRICES),
    "lora_B.weight": ("lora_b", _MATRICES),
    "lora_embedding_A": ("lora_a", ("embedding",)),
    "lora_embedding_B": ("lora_b", ("embedding",)),
    "lora_magnitude_vector": ("lora_magnitude", (*_MATRICES, "embedding")),
    "lora_magnitude_vector.weight": ("lora_magnitude", (*_MATRICES, "embedding")),
    "bias": ("bias", ("bias",)),
    "base_layer.bias": ("bias", ("bias",)),
}
_TORCH_LEAVES = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
    "bias": "bias",
}
# Beside the embedding, PEFT's adapter has other names and is no module of its own.
_EMBEDDING_LEAVES = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
_TENSOR = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, (*_LEAVES, 'weight')))})")


def name_in_wrapper(name: str) -> str:
    """Name a tensor as an adapter does whose base is inside a multimodal wrapper."""
    return name.replace(f"{PREFIX}model.", f"{PREFIX}model.language_model.", 1)


def modules_in_wrapper(modules: Collection[str]) -> str:
    """A `target_modules` regex that matches these modules in the language model only.

    Other towers of the wrapper, such as vision's, may have modules of the same names.
    """
    inner = "|".join(name for name in modules if name != "lm_head")
    head = "|lm_head" if "lm_head" in modules else ""
    return rf"model\.language_model\.(.*\.)?({inner}){head}"


def target_modules(
    flat: Mapping[TreePath, Any], mixture: Collection[TreePath]
) -> list[str]:
    """What PEFT shall adapt besides the `mixture`, as ends of names.

    A module's last name is unique where layers are alike. Where they differ, others may
    have it that have no adapter, so each is named in full.
    """
    names: set[str] = set()
    for path in _adapted(flat) - {*mixture}:
        if len(split_path(path)[0]) < 2:
            names.add(path[-1])
            continue
        full = targets.full_names(path, flat[*path, "lora_a"].shape[0])
        names |= {name.removeprefix("model.") for name in full}
    return sorted(names)


def _adapted(flat: Mapping[TreePath, Any]) -> set[TreePath]:
    return {key[:-1] for key in flat if key[-1] == "lora_a"}


def to_file(
    flat: Mapping[TreePath, np.ndarray], mixture: Mapping[TreePath, tuple[str, ...]]
) -> dict[str, np.ndarray]:
    """The tensors of adapters and of what trains beside them, by PEFT's names.

    Args:
        flat: what trains, by path.
        mixture: the parameters of routers and experts that have adapters, by where
            these stand.
    """
    tensors = _mixture_tensors(flat, mixture)
    adapted = _adapted(flat)
    for key, value in flat.items():
        if key[:-1] in mixture and key[-1] in targets.ADAPTER_LEAVES:
            continue
        leaf = _TORCH_LEAVES.get(key[-1], "weight")
        if key[:-1] == targets.EMBEDDING:
            leaf = _EMBEDDING_LEAVES.get(key[-1], leaf)
        if key[-1] == "bias" and key[:-1] in adapted:
            leaf = "base_layer.bias"
        names = targets.full_names(key[:-1], value.shape[0])
        layers = value if key[0] == LAYERS else [value]
        for name, array in zip(names, layers, strict=True):
            if key[-1] in TRANSPOSED:
                array = array.T
            tensors[f"{PREFIX}{name}.{leaf}"] = np.ascontiguousarray(array)
    return tensors


def tie_head(
    tensors: dict[str, np.ndarray], flat: Mapping[TreePath, Any], *, adapters: bool
) -> None:
    """Add to `tensors` those of a head that is the embedding, where this trains.

    `adapters`: whether its adapter is the embedding's, too.
    """
    table = f"{PREFIX}model.embed_tokens"
    if adapters and (*targets.EMBEDDING, "lora_a") in flat:
        for own, other in ("AB", "BA"):
            values = tensors[f"{table}.lora_embedding_{other}"]
            name = f"{PREFIX}lm_head.lora_{own}.weight"
            tensors[name] = np.ascontiguousarray(values.T)
    if (*targets.EMBEDDING, "embedding") in flat:
        tensors[f"{PREFIX}lm_head.weight"] = tensors[f"{table}.weight"].copy()


def _mixture_tensors(
    flat: Mapping[TreePath, np.ndarray], mixture: Mapping[TreePath, tuple[str, ...]]
) -> dict[str, np.ndarray]:
    """The tensors of adapters of routers and experts."""
    tensors = {}
    places = {name: path for path, names in mixture.items() for name in names}
    for stem, (name, layer) in parameters.stems_of(mixture.values()).items():
        for leaf, torch_leaf in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            stored = parameters.to_file(leaf, flat[*places[name], leaf][layer])
            tensors[f"{PREFIX}{stem}.{torch_leaf}.weight"] = np.ascontiguousarray(
                stored
            )
    return tensors


def read_stacks(
    path: pathlib.Path,
    base_tree: Mapping[str, Any],
    mixture: Collection[Parameter],
    *,
    saved: Collection[TreePath],
    drop_head: bool,
) -> dict[TreePath, dict[int, np.ndarray]]:
    """Leaf path -> layer -> array; layer 0 alone outside the layers.

    Args:
        mixture: the parameters of routers and experts that the adapter is of.
        saved: the modules that the adapter trained whole.
        drop_head: ignore the head's tensors, because the head is the embedding.

    Raises:
        ValueError: the file is damaged, or a tensor has no place in the base, belongs
            to another base, or holds no floating point numbers.
    """
    places = {
        name: (module, layer)
        for module in targets.iterate_modules(base_tree)
        for layer, name in enumerate(module.names)
    }
    by_name = {name: each for each in mixture for name in each.names}
    stems = parameters.stems_of(each.names for each in mixture)
    stacks: dict[TreePath, dict[int, np.ndarray]] = {}
    for key, tensor in read_header(path / WEIGHTS_FILE)[0].items():
        if tensor["dtype"] not in NUMPY_TYPES:
            raise ValueError(
                f"adapter {path}: {key} has type {tensor['dtype']}, not one of"
                f" {', '.join(NUMPY_TYPES)}: save the adapter in one of these with PEFT"
            )
    with reading(path / WEIGHTS_FILE):
        tensors = safetensors.numpy.load_file(path / WEIGHTS_FILE)
    for key, value in tensors.items():
        name = _IN_WRAPPER.sub("model.", key.removeprefix(PREFIX), count=1)
        name = name.replace(_WRAPPED_HEAD, "lm_head.")
        if ".modules_to_save." in name or ".original_module." in name:
            continue  # PEFT's own duplicates of a saved module's bias
        if drop_head and name.startswith("lm_head."):
            continue  # the embedding again
        if name in _BASE_COPIES or (name in _ENDS and (_ENDS[name],) not in saved):
            _check_base_copy(path, name, value, base_tree)
            continue
        match = _TENSOR.fullmatch(name)
        stem, leaf = match.groups() if match else (name, "")
        if stem in stems and leaf in ("lora_A.weight", "lora_B.weight"):
            full_name, layer = stems[stem]
            parameter, ours = by_name[full_name], _LEAVES[leaf][0]
            value = parameters.from_file(ours, value, parameter)
            stacks.setdefault((*parameter.path, ours), {})[layer] = value
            continue
        module, layer = places.get(stem) or places.get(f"model.{stem}") or (None, 0)
        own_leaf = _own_leaf(leaf, module.leaves) if module else None
        if module is None or own_leaf is None:
            raise ValueError(
                f"adapter {path}: {key} has no place in this model: load the base that"
                " the adapter was trained on"
            )
        if own_leaf in TRANSPOSED:
            value = value.T
        stacks.setdefault((*module.path, own_leaf), {})[layer] = value
    return stacks


def _check_base_copy(
    path: pathlib.Path, name: str, value: np.ndarray, base_tree: Mapping[str, Any]
) -> None:
    """Refuse an adapter whose embedding or head is not the base's."""
    module = name.removeprefix("model.").split(".")[0]
    tied = module == "lm_head" and targets.is_tied(base_tree)
    leaves = base_tree["embed_tokens" if tied else module]
    is_table = "embedding" in leaves
    leaf = leaves["embedding" if is_table else "kernel"]
    is_same = (leaf.shape if is_table else leaf.shape[::-1]) == value.shape
    if is_same and isinstance(leaf, jax.Array) and leaf.is_fully_addressable:
        own = np.asarray(leaf) if is_table else np.asarray(leaf).T
        is_same = np.array_equal(own, value.astype(own.dtype))
    if not is_same:
        raise ValueError(
            f"adapter {path}: its {module} {value.shape} is not that of this base: load"
            " the base that the adapter was trained on, with its embeddings resized as"
            f" they were then, or name {module} in its modules_to_save if it trained it"
        )


def _own_leaf(torch_leaf: str, leaves: Mapping[str, Any]) -> str | None:
    """Our name for a module's tensor, or None if the module has no such tensor."""
    if torch_leaf == "weight":
        kinds = ("kernel", "embedding", "scale", "weight")
        return next((name for name in kinds if name in leaves), None)
    own, beside = _LEAVES.get(torch_leaf, (None, ()))
    return own if any(name in leaves for name in beside) else None


def fit_to_base(
    path: pathlib.Path,
    stacks: Mapping[TreePath, Mapping[int, np.ndarray]],
    base_tree: Mapping[str, Any],
    lora: LoraConfig,
) -> dict[TreePath, np.ndarray]:
    """Stack each leaf's layers, and check the shape that the base requires.

    Raises:
        ValueError: a leaf has another shape, or is missing in some layers.
    """
    fitted, mixture = {}, parameters.find(base_tree)
    for key, by_layer in stacks.items():
        if key[-1] in targets.ADAPTER_LEAVES:
            *layers, width_in, width_out = targets.matrix_shape(base_tree, key[:-1])
            names = targets.full_names(key[:-1], (*layers, 1)[0])
            if key[:-1] in mixture:
                names = mixture[key[:-1]].names
            rank, _ = lora.rank_and_scaling(names)
            inner = {
                "lora_a": (width_in, rank),
                "lora_b": (rank, width_out),
                "lora_magnitude": (width_out,),
            }
            shape = (*layers, *inner[key[-1]])
        else:
            shape = tree_get(base_tree, key[:-1])[key[-1]].shape
        root, _ = split_path(key)
        stacked = bool(root)
        count, layer_shape = (shape[0], shape[1:]) if stacked else (1, shape)
        if sorted(by_layer) != list(range(count)):
            numbers = layer_numbers(root, count)
            raise ValueError(
                f"adapter {path}: {'.'.join(key)} is given for layers"
                f" {[numbers[i] for i in sorted(by_layer)]} of {count} only, but layers"
                " are stacked and"
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
