"""Writing a Hugging Face directory that transformers loads as the same model."""

import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from jaxtrain.models import hf_composite
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.hf_config import load_config
from jaxtrain.models.hf_experts import are_joined, join_fused, stored_name
from jaxtrain.models.hf_names import (
    NUMPY_TYPES,
    WEIGHTS,
    WEIGHTS_INDEX,
    Leaf,
    Path,
    Place,
    leaves_of,
)
from jaxtrain.models.stacks import split_path
from jaxtrain.models.weight_files import open_weights
from jaxtrain.sharding import to_host
from jaxtrain.tree import flatten
from jaxtrain.types import Params

_OWN_WEIGHTS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


def save_pretrained(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a directory that transformers.AutoModelForCausalLM loads as this model.

    Every process must call it; process 0 writes. Weights are fetched one tensor at a
    time and at most `max_shard_bytes` of them are held at once. `dtype` converts the
    weights; None keeps them.

    Raises:
        ValueError: `params` are not the weights of `config`, adapters included: merge
            them first.
    """
    leaves, flat = leaves_of(config), flatten(params)
    _check_params(config, leaves, flat)
    files = _Files(pathlib.Path(path))
    shards = _plan_shards(leaves, flat, dtype, max_shard_bytes)
    for number, shard in enumerate(shards, start=1):
        file_name = WEIGHTS
        if len(shards) > 1:
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = _fetch_tensors(shard, flat, dtype, files.writes)
        tensors = join_fused(tensors, joined=are_joined(config.model_type))
        files.add_weights(file_name, tensors)
    if len(shards) > 1:
        files.add_index()
    stored = dtype or str(flat[("embed_tokens", "embedding")].dtype)
    files.add_json("config.json", {**config.to_hf(), "dtype": stored})
    # The token ids that generation starts, stops and pads with.
    given = {
        name: value
        for name, value in config.to_hf().items()
        if name.endswith("_token_id") and value is not None
    }
    files.add_json("generation_config.json", given)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_pretrained")


def save_in_wrapper(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    dtype: str | None = None,
) -> None:
    """Write a wrapper's directory anew with these weights as its text decoder.

    Every process must call it; process 0 writes. All that is not the decoder's is
    copied bit by bit; so is config.json, unless the decoder's options changed. One file
    of the wrapper's weights is held at once.

    Args:
        source: the wrapper's directory (hf_composite.py).
        dtype: the type of the decoder's weights; None is what `source` keeps each in.

    Raises:
        ValueError: `params` are not the weights of `config`.
    """
    leaves, flat = leaves_of(config), flatten(params)
    _check_params(config, leaves, flat)
    origin, files = pathlib.Path(source), _Files(pathlib.Path(path))
    joined = hf_composite.has_joined_experts(origin)
    places: dict[str, list[tuple[Leaf, Place]]] = {}
    for leaf in leaves:
        for at in leaf.places:
            whole = stored_name(leaf.tensor_name(at), joined=joined)
            places.setdefault(whole, []).append((leaf, at))
    plan = hf_composite.plan_files(origin, places)
    for file, names in plan:
        tensors = {}
        with open_weights(file) as opened:
            stored = set(opened.keys())
            for name, own in names.items():
                if own is None:
                    if files.writes:
                        tensors[name] = opened.get_tensor(name)
                    continue
                kind = dtype
                if dtype is None and name in stored:
                    kind = NUMPY_TYPES[opened.get_slice(name).get_dtype()].name
                parts = _fetch_tensors(places[own], flat, kind, files.writes)
                if files.writes:
                    tensors[name] = join_fused(parts, joined=joined)[own]
        files.add_weights(file.name, tensors)
    if (origin / WEIGHTS_INDEX).is_file() and plan[0][0].name != WEIGHTS:
        files.add_index()
    before, after = load_config(origin).to_hf(), config.to_hf()
    changed = {k: v for k, v in after.items() if v != before.get(k)}
    if changed:
        files.add_json("config.json", hf_composite.wrapped_config(origin, changed))
    if files.writes:
        hf_composite.copy_others(origin, files.directory)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_in_wrapper")


class _Files:
    """The files of an exported directory; process 0 writes them."""

    def __init__(self, directory: pathlib.Path) -> None:
        """Make the directory, without the weights of an earlier export."""
        self.directory, self.writes = directory, jax.process_index() == 0
        self._weight_map: dict[str, str] = {}
        self._total_bytes = 0
        if not self.writes:
            return
        directory.mkdir(parents=True, exist_ok=True)
        # A shard of an earlier export would be read in place of what is written now.
        for file in directory.iterdir():
            if _OWN_WEIGHTS.fullmatch(file.name) or file.name == "config.json":
                file.unlink()

    def add_weights(self, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Write a file of tensors, and note it for the index."""
        if self.writes:
            file = str(self.directory / name)
            save_file(dict(tensors), file, metadata={"format": "pt"})
            self._weight_map |= dict.fromkeys(tensors, name)
            self._total_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def add_index(self) -> None:
        """Write which file holds which tensor."""
        sizes = {"total_size": self._total_bytes}
        index = {"metadata": sizes, "weight_map": self._weight_map}
        self.add_json(WEIGHTS_INDEX, index)

    def add_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a file of JSON."""
        if self.writes:
            text = json.dumps(content, indent=2) + "\n"
            (self.directory / name).write_text(text)


def _check_params(
    config: ModelConfig, leaves: list[Leaf], flat: Mapping[Path, Any]
) -> None:
    expected = {leaf.path: leaf.shape for leaf in leaves}
    problems = [f"missing {'/'.join(p)}" for p in expected if p not in flat]
    problems += [f"unexpected {'/'.join(p)}" for p in flat if p not in expected]
    problems += [
        f"{'/'.join(p)} has shape {flat[p].shape}, expected {expected[p]}"
        for p in expected.keys() & flat.keys()
        if tuple(flat[p].shape) != expected[p]
    ]
    if problems:
        raise ValueError(
            f"params are not the weights of this {config.model_type} config:"
            f" {'; '.join(sorted(problems))}. Merge adapters before exporting"
        )


def _plan_shards(
    leaves: list[Leaf], flat: Mapping[Path, Any], dtype: str | None, max_bytes: int
) -> list[list[tuple[Leaf, Place]]]:
    """Which tensors go into which file, layer after layer."""
    tensors = [(leaf, place) for leaf in leaves for place in leaf.places]

    def order(tensor: tuple[Leaf, Place]) -> tuple[Any, ...]:
        leaf, place = tensor
        layer = leaf.layer(place)
        return (-1 if layer is None else layer), split_path(leaf.path)[1], place

    tensors.sort(key=order)
    joined = are_joined(leaves[0].model_type)
    whole_of = {t: stored_name(t[0].tensor_name(t[1]), joined=joined) for t in tensors}
    # Parts of one tensor come together; places of the others stay.
    first = {name: i for i, name in reversed([*enumerate(whole_of.values())])}
    tensors.sort(key=lambda t: first[whole_of[t]])
    shards: list[list[tuple[Leaf, Place]]] = [[]]
    used = 0
    for leaf, place in tensors:
        item_bytes = jnp.dtype(dtype or flat[leaf.path].dtype).itemsize
        size = int(np.prod(leaf.tensor_shape)) * item_bytes
        name = whole_of[leaf, place]
        begun = shards[-1] and whole_of[shards[-1][-1]] == name
        if shards[-1] and used + size > max_bytes and not begun:
            shards.append([])
            used = 0
        shards[-1].append((leaf, place))
        used += size
    return shards


# The number is an argument of the compiled program, so one serves all layers.
_take = jax.jit(functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False))


def _fetch_tensors(
    tensors: Sequence[tuple[Leaf, Place]],
    flat: Mapping[Path, Any],
    dtype: str | None,
    writes: bool,
) -> dict[str, np.ndarray]:
    """Tensors by name, in host memory where they are to be written.

    A collective call; where nothing is written, the result is empty.
    """
    found = {}
    for leaf, place in tensors:
        array = flat[leaf.path]
        for number in place:
            on_host = isinstance(array, np.ndarray)
            array = array[number] if on_host else _take(array, number)
        values = to_host(array)
        if writes:
            values = values.T if leaf.transposed else values
            kind = "float32" if leaf.stays_float32 else dtype
            values = values.astype(jnp.dtype(kind or values.dtype))
            found[leaf.tensor_name(place)] = np.ascontiguousarray(values)
    return found
