"""Hugging Face directories: where a model is, its config, its weights.

`save_pretrained` (hf_save.py) writes what `load_params` reads.
"""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors import SafetensorError, safe_open

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.hf_experts import split_fused
from jaxtrain.models.hf_names import (
    TOKENIZER_FILES,
    WEIGHTS,
    WEIGHTS_INDEX,
    Leaf,
    Path,
    leaves_of,
)
from jaxtrain.models.hf_save import save_pretrained
from jaxtrain.models.quantization import CODES, SCALES, quantize_on_device
from jaxtrain.models.transformer import Decoder
from jaxtrain.tree import flatten, nest
from jaxtrain.types import Params

__all__ = [
    "load_config",
    "load_params",
    "resolve_model_path",
    "save_pretrained",
    "stored_dtype",
]

_NUMPY_TYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
}
# Buffers that old checkpoints hold beside the weights; the config implies them.
_IMPLIED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def resolve_model_path(name: str, revision: str | None = None) -> pathlib.Path:
    """The directory of a model: `name` itself, or what the hub has under that name.

    Raises:
        ValueError: it is neither a directory nor to be had from the hub.
    """
    directory = pathlib.Path(name).expanduser()
    if directory.is_dir():
        return directory
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"model path {name!r} is no directory; check the spelling")
    import huggingface_hub  # needed only for names of the hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", *TOKENIZER_FILES],
            )
        )
    except Exception as error:  # the hub's client has no common base of its errors
        raise ValueError(
            f"model {name!r} is no local directory, and the hub did not give it"
            f" ({type(error).__name__}: {error}). Offline, run `hf download {name}` on"
            " a machine with network and give the directory it prints; for a gated"
            " model log in with `hf auth login` first"
        ) from error


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The ModelConfig of a directory's config.json.

    Raises:
        ValueError: there is none, or it asks for what the decoder has not.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: {path} is no Hugging Face model")
    try:
        options = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}): download it again") from error
    try:
        return ModelConfig.from_hf(options)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def stored_dtype(directory: str | os.PathLike[str]) -> str:
    """The type that config.json says the weights are kept in.

    It is float32 where config.json names none, or one that nothing is computed in.
    """
    text = (pathlib.Path(directory) / "config.json").read_text("utf-8")
    settings = json.loads(text)
    named = settings.get("dtype") or settings.get("torch_dtype")
    return named if named in ("float32", "bfloat16", "float16") else "float32"


def load_params(
    path: str | os.PathLike[str],
    model: Decoder,
    shardings: Params | None = None,
    dtype: str | None = None,
) -> Params:
    """The weights in a directory, each device reading only its own slices.

    `shardings`: for every leaf where it goes (leaves for adapters are passed over);
    None is the first local device. `dtype`: the type to convert to; None or "keep"
    leaves each as stored. Where `model.quantization` is set, kernels are quantized as
    they come, one at a time.

    Raises:
        ValueError: there are no safetensors, or they are not the tensors of the
            model's config; it names all that are missing, unexpected or misshapen.
    """
    first = SingleDeviceSharding(jax.local_devices()[0])
    on_first = collections.defaultdict[Path, Sharding](lambda: first)
    targets = on_first if shardings is None else flatten(shardings)
    keep = dtype is None or dtype == "keep"
    with _open_checkpoint(pathlib.Path(path)) as stored_tensors:
        tensors = split_fused(model.config.model_type, stored_tensors)
        leaves = leaves_of(model.config)
        _check_tensors(path, model.config, leaves, tensors)
        loaded: dict[Path, jax.Array] = {}
        few_bits = model.quantization and model.linear_kernels()
        for leaf in leaves:
            stored = tensors[leaf.tensor_name(leaf.places[0])].get_dtype()
            is_kernel = leaf.path[-1] == "kernel"
            if few_bits and is_kernel and ".".join(leaf.path[1:-1]) in few_bits:
                loaded |= _load_in_few_bits(leaf, tensors, targets, model, stored)
                continue
            kind = _NUMPY_TYPES[stored] if keep else jnp.dtype(dtype)
            loaded[leaf.path] = _load_leaf(leaf, tensors, targets[leaf.path], kind)
    return nest(loaded)


@contextlib.contextmanager
def _open_checkpoint(directory: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Every tensor of a directory by name, as a slice that is read when indexed."""
    with contextlib.ExitStack() as stack:
        tensors = {}
        for file in _weight_files(directory):
            try:
                opened = stack.enter_context(safe_open(str(file), framework="numpy"))
            except SafetensorError as error:
                raise ValueError(
                    f"{file} is no whole safetensors file ({error}): copy or download"
                    " it again"
                ) from error
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                tensors[name] = opened.get_slice(name)
        yield tensors


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    index = directory / WEIGHTS_INDEX
    if not index.is_file():
        pickles = sorted(file.name for file in directory.glob("*.bin"))
        if pickles:
            raise ValueError(
                f"{directory} has its weights only as pickles ({', '.join(pickles)}),"
                " which can run code when read. Convert them to safetensors:"
                " transformers' AutoModelForCausalLM.from_pretrained(...)"
                ".save_pretrained(...) on a machine that may run them"
            )
        raise ValueError(
            f"{directory} has neither {WEIGHTS} nor {WEIGHTS_INDEX}: copy or download"
            " the weights too, or name another model"
        )
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in names:
        # The index is input: it may not name files elsewhere.
        if pathlib.PurePath(name).name != name or "\\" in name or name == "..":
            raise ValueError(
                f"{index} names the file {name!r}; shards must lie beside the index"
            )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{index} names files that {directory} lacks: {', '.join(missing)};"
            " download them again"
        )
    return [directory / name for name in names]


def _check_tensors(
    path: Any, config: ModelConfig, leaves: list[Leaf], tensors: Mapping[str, Any]
) -> None:
    expected = {
        leaf.tensor_name(place): leaf.tensor_shape
        for leaf in leaves
        for place in leaf.places
    }
    allowed = {"lm_head.weight"} if config.tie_word_embeddings else set()
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [
        f"unexpected {name}"
        for name in tensors
        if name not in expected and name not in allowed and not _IMPLIED.fullmatch(name)
    ]
    for name in expected.keys() & tensors.keys():
        shape, kind = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if shape != expected[name]:
            problems.append(f"{name} has shape {shape}, expected {expected[name]}")
        if kind not in _NUMPY_TYPES:
            problems.append(f"{name} has type {kind}, expected a float type")
    if problems:
        raise ValueError(
            f"the weights in {path} are not those of its config"
            f" ({config.model_type}): {'; '.join(sorted(problems))}"
        )


def _load_leaf(
    leaf: Leaf, tensors: Mapping[str, Any], sharding: Sharding, dtype: np.dtype
) -> jax.Array:
    """One leaf, assembled from each layer's and expert's tensor, slice by slice."""
    parts: dict[Any, np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        bounds = tuple(
            range(size)[part] for part, size in zip(index, leaf.shape, strict=True)
        )
        if bounds not in parts:  # replicas share what was read once
            parts[bounds] = _read_slice(leaf, tensors, bounds, dtype)
        return parts[bounds]

    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _load_in_few_bits(
    leaf: Leaf,
    tensors: Mapping[str, Any],
    targets: Mapping[Path, Sharding],
    model: Decoder,
    stored: str,
) -> dict[Path, jax.Array]:
    """The codes and scales of one kernel, from the values as stored.

    No other kernel is on the device as a whole at the same time.
    """
    assert model.quantization is not None
    paths = [(*leaf.path[:-1], name) for name in (CODES, SCALES)]
    dtype = _NUMPY_TYPES[stored]
    dtype = np.dtype(np.float32) if dtype.itemsize > 4 else dtype
    on_device = targets[paths[0]].with_memory_kind("device")
    whole = _load_leaf(leaf, tensors, on_device, dtype)
    parts = quantize_on_device(whole, model.quantization)
    return {
        path: jax.device_put(part, targets[path])
        for path, part in zip(paths, parts, strict=True)
    }


def _read_slice(
    leaf: Leaf, tensors: Mapping[str, Any], bounds: tuple[range, ...], dtype: np.dtype
) -> np.ndarray:
    out = np.empty([len(part) for part in bounds], dtype)
    stacked = bounds[: leaf.stacked_axes]
    inner = [slice(part.start, part.stop) for part in bounds[leaf.stacked_axes :]]
    for place in itertools.product(*stacked):
        tensor = tensors[leaf.tensor_name(place)]
        transposed = leaf.transposed
        values = tensor[tuple(inner[::-1])].T if transposed else tensor[tuple(inner)]
        at = tuple(i - part.start for i, part in zip(place, stacked, strict=True))
        out[at or ...] = values
    return out
