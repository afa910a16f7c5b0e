"""Hugging Face directories: where a model is, its config, its weights.

`save_pretrained` (hf_save.py) writes what `load_params` reads.
"""

import collections
import dataclasses
import functools
import itertools
import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub.errors import StrictDataclassError
from jax.sharding import Sharding, SingleDeviceSharding

from jaxtrain.models.bucket import fetch_model
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.hf_config import load_config, stored_dtype
from jaxtrain.models.hf_files import (
    check_tokenizer_files,
    find_weights,
    has_weights,
    shorten,
)
from jaxtrain.models.hf_layouts import split_by_rows
from jaxtrain.models.hf_names import (
    EMBEDDING,
    HEAD,
    NUMPY_TYPES,
    TOKENIZER_FILES,
    Leaf,
    Path,
    leaves_of,
)
from jaxtrain.models.hf_save import save_pretrained
from jaxtrain.models.hf_tensors import Tensors, open_tensors
from jaxtrain.models.layer_kinds import kinds_of
from jaxtrain.models.problems import Problems
from jaxtrain.models.quantization import kept_as, quantize_on_device, quantizes
from jaxtrain.models.transformer import Decoder
from jaxtrain.record.safe_text import shown
from jaxtrain.sharding import on_device, to_host
from jaxtrain.storage.address import is_remote
from jaxtrain.tree import flatten, nest
from jaxtrain.types import Params

__all__ = [
    "has_weights",
    "load_config",
    "load_params",
    "match_weights",
    "read_directory",
    "resolve_model_path",
    "save_pretrained",
    "stored_dtype",
]

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Published checkpoints of Gemma 4 have these in layers that read others' keys, too.
_KEYS = re.compile(r"model\.layers\.(\d{1,5})\.self_attn\.([kv]_proj|k_norm)\.weight")
# Buffers that old checkpoints hold beside the weights; the config implies them.
_IMPLIED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def resolve_model_path(name: str, revision: str | None = None) -> pathlib.Path:
    """The directory of a model: `name` itself, or what the hub has under that name.

    For a model in a bucket this is the local copy of its small files
    (`bucket.fetch_model`).

    Raises:
        ValueError: it is neither a directory nor to be had from the hub or a bucket.
    """
    if is_remote(name):
        return fetch_model(name)
    directory = pathlib.Path(name).expanduser()
    if directory.is_dir():
        exported = directory / "model"
        has_weights = any(directory.glob("*.safetensors"))
        if (exported / "config.json").is_file() and not has_weights:
            raise ValueError(
                f"model {shown(name)} is the work directory of a run: give the model"
                f" that it exported, {exported}"
            )
        return directory
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(
            f"model path {shown(name)} is not a directory; check the spelling"
        )
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
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"model {shown(name)} is no local directory, and the hub did not give it"
            f" ({type(error).__name__}: {reason}). Offline, run `hf download {name}` on"
            " a machine with network and give the directory it prints; for a gated"
            " model log in with `hf auth login` first"
        ) from error


def read_directory(
    path: str | os.PathLike[str],
    load_tokenizer: Callable[[], T],
    *,
    own_tokenizer: bool,
    weights: bool,
) -> tuple[T, ModelConfig]:
    """The tokenizer and the config of a directory, its files and weights checked.

    Args:
        load_tokenizer: not called where config.json or the tokenizer's own files are
            wrong, because transformers would then speak of these again.
        own_tokenizer: whether that is the directory's.
        weights: whether the directory's weights are to be loaded; see `match_weights`.

    Raises:
        ValueError: config, tokenizer or weights can't be used; a line for each problem.
    """
    problems, directory = Problems(), pathlib.Path(path)
    config: ModelConfig | None = None
    with problems.noted():
        config = load_config(directory)
    if own_tokenizer:
        with problems.noted():
            check_tokenizer_files(directory)
    tokenizer: list[T] = []
    if not problems.lines:
        try:
            with problems.noted():
                tokenizer.append(load_tokenizer())
        except (KeyError, TypeError, StrictDataclassError) as error:
            # It reads config.json too, by checks of its own that need not be ours.
            problems.lines.append(
                f"{path}: transformers refuses its config.json or its tokenizer:"
                f" {' '.join(str(error).split())}"
            )
    if weights:
        with problems.noted():
            if config is None:
                find_weights(directory)
            else:
                config = match_weights(directory, config)
    problems.check()
    assert config is not None
    return tokenizer[0], config


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
    with open_tensors(path, model.config) as tensors:
        leaves = leaves_of(model.config)
        _check_tensors(path, model.config, leaves, tensors)
        if model.config.tie_word_embeddings and _has_own_head(tensors):
            raise ValueError(
                f"{path} stores an lm_head.weight that is not the embedding, but the"
                " decoder's config ties them: use the config that"
                " jaxtrain.models.hf.match_weights returns"
            )
        loaded: dict[Path, jax.Array] = {}
        sound: dict[Leaf, jax.Array] = {}  # of what is not kept as it is stored
        few_bits, kernels = model.quantization, model.linear_kernels()
        for leaf in leaves:
            stored = tensors[leaf.tensor_name(leaf.places[0])].get_dtype()
            if few_bits and quantizes(leaf.path[1:], kernels, few_bits):
                found = _load_in_few_bits(leaf, tensors, targets, model, stored)
                loaded |= found[0]
                sound[leaf] = found[1]
                continue
            kind = NUMPY_TYPES[stored] if keep else jnp.dtype(dtype)
            kind = np.dtype(np.float32) if leaf.stays_float32 else kind
            whole = _load_leaf(leaf, tensors, targets[leaf.path], kind)
            # One after another: what is on its way to a GPU has a copy in pinned memory
            # of the host, which takes time to get and is used again for the next.
            loaded[leaf.path] = jax.block_until_ready(whole)
    sound |= _find_numbers([leaf for leaf in leaves if leaf.path in loaded], loaded)
    _check_numbers(path, sound)
    return nest(loaded)


def _find_numbers(
    leaves: list[Leaf], loaded: Mapping[Path, jax.Array]
) -> dict[Leaf, jax.Array]:
    """Whether each leaf's tensors are numbers; those of host memory one after another.

    What is in device memory is one program.
    """
    is_far = [loaded[x.path].sharding.memory_kind == "pinned_host" for x in leaves]
    near = [leaf for leaf, far in zip(leaves, is_far, strict=True) if not far]
    axes = tuple(leaf.stacked_axes for leaf in near)
    arrays = [loaded[leaf.path] for leaf in near]
    found = dict(zip(near, _are_numbers(arrays, axes), strict=True))
    for leaf in itertools.compress(leaves, is_far):
        whole = loaded[leaf.path]
        whole = jax.device_put(whole, on_device(whole.sharding))
        (found[leaf],) = _are_numbers([whole], (leaf.stacked_axes,))
    return found


def _check_numbers(
    path: str | os.PathLike[str], sound: Mapping[Leaf, jax.Array]
) -> None:
    """Refuse weights that are no numbers, for all that they score would be none.

    Raises:
        ValueError: names some of the tensors.
    """
    bad: list[str] = []
    for leaf, each in sound.items():
        places = zip(leaf.places, to_host(each).flat, strict=True)
        bad += [leaf.tensor_name(place) for place, is_sound in places if not is_sound]
    if bad:
        raise ValueError(
            f"{path}: NaN or infinity is in {shorten(bad)}: the file is damaged, or the"
            " training that saved it had diverged; take another, or an earlier one"
        )


@functools.partial(jax.jit, static_argnums=1)
def _are_numbers(arrays: list[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Whether all of each tensor is; they are stacked along so many axes."""
    pairs = zip(arrays, axes, strict=True)
    return [jnp.isfinite(x).all(axis=tuple(range(n, x.ndim))) for x, n in pairs]


def match_weights(path: str | os.PathLike[str], config: ModelConfig) -> ModelConfig:
    """The config of a directory as its weights have it; no weights are kept.

    Where the config ties the head to the embedding, but both are stored and differ,
    they are two matrices, as in transformers.

    Raises:
        ValueError: the weights are missing, damaged, or not those of the config; a line
            for each problem.
    """
    with open_tensors(path, config) as tensors:
        _check_tensors(path, config, leaves_of(config), tensors)
        if not config.tie_word_embeddings or not _has_own_head(tensors):
            return config
    logger.warning(
        "%s: config.json has tie_word_embeddings = true, but an lm_head.weight that is"
        " not the embedding is stored: they are loaded as two matrices, and the export"
        " says tie_word_embeddings = false",
        path,
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


def _has_own_head(tensors: Mapping[str, Any]) -> bool:
    """Whether a head is stored that is not the embedding; read some rows at once."""
    if HEAD not in tensors:
        return False
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    if head is embedding:
        return False
    count, step = head.get_shape()[0], 4096
    parts = (slice(at, min(at + step, count)) for at in range(0, count, step))
    return any(
        not np.array_equal(head[part, :], embedding[part, :], equal_nan=True)
        for part in parts
    )


def _is_unread(config: ModelConfig, name: str) -> bool:
    """Whether a tensor may be there, though the model does not read it."""
    if _IMPLIED.fullmatch(name):
        return True
    further = (f"model.layers.{config.num_hidden_layers}.", "mtp.")
    if config.family.extra_layer and name.startswith(further):
        return True
    match = _KEYS.fullmatch(name)
    if match is None or int(match[1]) >= config.num_hidden_layers:
        return False
    return kinds_of(config)[int(match[1])].shares == "reads"


def _check_tensors(
    path: Any, config: ModelConfig, leaves: list[Leaf], tensors: Tensors
) -> None:
    expected = {
        leaf.tensor_name(place): leaf.tensor_shape
        for leaf in leaves
        for place in leaf.places
    }
    if config.tie_word_embeddings and HEAD in tensors:
        expected[HEAD] = expected[EMBEDDING]
    missing = [
        f"missing {name}{tensors.whereabouts(name)}"
        for name in expected
        if name not in tensors
    ]
    unexpected = [
        f"unexpected {name}"
        for name in tensors
        if name not in expected and not _is_unread(config, name)
    ]
    misshapen, mistyped = [], []
    for name in sorted(expected.keys() & tensors.keys()):
        shape, kind = tuple(tensors[name].get_shape()), tensors[name].get_dtype()
        if shape != expected[name]:
            misshapen.append(f"{name} has shape {shape}, expected {expected[name]}")
        if kind not in NUMPY_TYPES:
            mistyped.append(f"{name} has type {kind}, expected a float type")
    problems = [missing, unexpected, misshapen, mistyped]
    if any(problems):
        raise ValueError(
            f"the weights in {path} do not match its config.json"
            f" ({config.model_type}): {'; '.join(map(shorten, filter(None, problems)))}"
        )


def _load_leaf(
    leaf: Leaf, tensors: Tensors, sharding: Sharding, dtype: np.dtype
) -> jax.Array:
    """One leaf, assembled from each layer's and expert's tensor, slice by slice.

    Of tensors in a bucket whole rows are read. Where devices have columns of them, each
    reads as many rows first, and they exchange what they have.
    """
    columns = leaf.columns_axis if tensors.in_bucket else None
    reading = sharding if columns is None else split_by_rows(leaf, sharding)
    parts: dict[Any, np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        bounds = [
            range(size)[part] for part, size in zip(index, leaf.shape, strict=True)
        ]
        cut = [slice(None)] * len(bounds)
        if columns is not None:
            cut[columns] = index[columns]
            bounds[columns] = range(leaf.shape[columns])
        key = tuple(bounds)
        if key not in parts:  # replicas share what was read once
            parts[key] = _read_slice(leaf, tensors, key, dtype)
        return parts[key][tuple(cut)]

    loaded = jax.make_array_from_callback(leaf.shape, reading, read)
    if reading is sharding:
        return loaded
    on_device = sharding.with_memory_kind("device")
    return jax.device_put(_relay(loaded, on_device), sharding)


@functools.partial(jax.jit, static_argnums=1)
def _relay(array: jax.Array, sharding: Sharding) -> jax.Array:
    """The same array in another layout, on all processes together."""
    return jax.lax.with_sharding_constraint(array, sharding)


def _load_in_few_bits(
    leaf: Leaf,
    tensors: Tensors,
    targets: Mapping[Path, Sharding],
    model: Decoder,
    stored: str,
) -> tuple[dict[Path, jax.Array], jax.Array]:
    """The codes and scales of one kernel, and whether the values as stored are numbers.

    No other kernel is on the device as a whole at the same time.
    """
    assert model.quantization is not None
    paths = [(*leaf.path[:-1], name) for name in kept_as(leaf.path[-1])]
    dtype = NUMPY_TYPES[stored]
    dtype = np.dtype(np.float32) if dtype.itemsize > 4 else dtype
    near = on_device(targets[paths[0]])
    whole = _load_leaf(leaf, tensors, near, dtype)
    (sound,) = _are_numbers([whole], (leaf.stacked_axes,))
    parts = quantize_on_device(whole, model.quantization)
    return {
        path: jax.device_put(part, targets[path])
        for path, part in zip(paths, parts, strict=True)
    }, sound


def _read_slice(
    leaf: Leaf, tensors: Tensors, bounds: tuple[range, ...], dtype: np.dtype
) -> np.ndarray:
    out = np.empty([len(part) for part in bounds], dtype)
    stacked = bounds[: leaf.stacked_axes]
    inner = [slice(part.start, part.stop) for part in bounds[leaf.stacked_axes :]]

    def fill(place: tuple[int, ...]) -> None:
        tensor = tensors[leaf.tensor_name(place)]
        transposed = leaf.transposed
        values = tensor[tuple(inner[::-1])].T if transposed else tensor[tuple(inner)]
        at = tuple(i - part.start for i, part in zip(place, stacked, strict=True))
        out[at or ...] = values

    tensors.for_each(fill, itertools.product(*stacked))
    return out
