"""LoRA: adapters beside frozen kernels, the trainable tree, merging.

A kernel W [in out] with an adapter acts as W + (alpha / r) A B, with A [in r] and
B [r out] (arXiv:2106.09685), or alpha / sqrt(r) under rsLoRA (arXiv:2312.03732). Under
DoRA (arXiv:2402.09353) each column of that sum is brought to a trained length. The
model applies it wherever it finds `lora_a` and `lora_b` beside a kernel. Names, rules
and initial values are PEFT's.
"""

import functools
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from jaxtrain.lora.targets import (
    ADAPTER_LEAVES,
    EMBEDDING,
    HEAD,
    LoraConfig,
    TreePath,
    full_names,
    is_tied,
    is_within,
    label_path,
    matrix_shape,
    resolve_modules_to_save,
    resolve_ranks,
    resolve_targets,
    ties_adapters,
)
from jaxtrain.models.quantization import CODES, SCALES, dequantize_on_device
from jaxtrain.tree import flatten, nest, overlay
from jaxtrain.tree import get as tree_get
from jaxtrain.types import Params


def init_adapters(key: Array, base_tree: Mapping[str, Any], lora: LoraConfig) -> Params:
    """The first adapters, float32, by `lora.init_lora_weights`.

    default: A uniform in +-1/sqrt(in), B zero. gaussian: A normal with deviation 1/r.
    pissa (arXiv:2404.02948): the r largest singular values of W, split between A and
    B. olora (arXiv:2406.01775): the first r rows and columns of a QR factorization.
    DoRA's magnitudes are the lengths of W's columns. The embedding's A starts at zero
    and its B normal with deviation 1, by any of these.

    A module's draw depends on its name alone, not on the other targets. Traceable; for
    the first two without DoRA, `base_tree` may be abstract.

    Raises:
        ValueError: a rank is too large for pissa or olora.
    """
    leaves: dict[TreePath, Array] = {}
    for label, (rank, scaling) in sorted(resolve_ranks(lora, base_tree).items()):
        path = label_path(label)
        *layers, width_in, width_out = matrix_shape(base_tree, path)
        draw_key = jax.random.fold_in(key, zlib.crc32(label.encode()))
        if path == EMBEDDING:
            a = jnp.zeros((width_in, rank), jnp.float32)
            b = jax.random.normal(draw_key, (rank, width_out), jnp.float32)
        elif lora.changes_base:
            _check_factors(lora, label, rank, base_tree)
            factorize = _pissa if lora.init_lora_weights == "pissa" else _olora
            kernel = _matrix(base_tree, path)
            a, b = factorize(_stacked(kernel), rank=rank, scaling=scaling)
            a, b = (a, b) if layers else (a[0], b[0])
        else:
            a = _draw(draw_key, (*layers, width_in, rank), lora.init_lora_weights)
            b = jnp.zeros((*layers, rank, width_out), jnp.float32)
        leaves[*path, "lora_a"], leaves[*path, "lora_b"] = a, b
        if lora.use_dora:
            leaves[*path, "lora_magnitude"] = _column_lengths(_matrix(base_tree, path))
    return nest(leaves)


def _check_factors(
    lora: LoraConfig, label: str, rank: int, base_tree: Mapping[str, Any]
) -> None:
    """Whether a matrix can be factorized, and its residual take its place."""
    init, shape = lora.init_lora_weights, matrix_shape(base_tree, label_path(label))
    if rank > min(shape[-2:]):
        raise ValueError(
            f"lora.r = {rank}: {init} needs a rank of at most {min(shape[-2:])} for"
            f" {label}"
        )
    if label == "lm_head" and is_tied(base_tree):
        raise ValueError(
            f"lora.init_lora_weights = {init!r} takes the head's first adapter out of"
            " the embedding, which this head is: set it to default or gaussian, or"
            " leave lm_head out of target_modules"
        )


def _matrix(base_tree: Mapping[str, Any], path: TreePath) -> Array:
    """What an adapter adds to, [L in out] or [in out]."""
    if path == HEAD and is_tied(base_tree):
        return _matrix(base_tree, EMBEDDING).T
    leaves = tree_get(base_tree, path)
    if CODES in leaves:
        codes, scales = (_on_device(leaves[name]) for name in (CODES, SCALES))
        return dequantize_on_device(codes, scales)
    return _on_device(leaves["kernel" if "kernel" in leaves else "embedding"])


def _stacked(matrix: Array) -> Float[Array, "L I O"]:
    return matrix if matrix.ndim == 3 else matrix[None]


def _draw(key: Array, shape: tuple[int, ...], init: str) -> Float[Array, "*L I R"]:
    if init == "gaussian":
        return jax.random.normal(key, shape, jnp.float32) / shape[-1]
    # kaiming_uniform_ with a = sqrt(5), as PEFT: sqrt(6 / ((1 + a^2) in)).
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


@functools.partial(jax.jit, static_argnames=("rank", "scaling"))
def _pissa(
    kernel: Float[Array, "L I O"], *, rank: int, scaling: float
) -> tuple[Float[Array, "L I R"], Float[Array, "L R O"]]:
    """W ~ U S V: A = U sqrt(S / s), B = sqrt(S / s) V, of the r largest S."""

    def factorize(w: Array) -> tuple[Array, Array]:
        u, s, v = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(s[:rank] / scaling)
        return u[:, :rank] * root, root[:, None] * v[:rank]

    return jax.lax.map(factorize, kernel)


@functools.partial(jax.jit, static_argnames=("rank", "scaling"))
def _olora(
    kernel: Float[Array, "L I O"], *, rank: int, scaling: float
) -> tuple[Float[Array, "L I R"], Float[Array, "L R O"]]:
    """W' = Q R: A = R'[:, :r], B = Q'[:r]. W here is [in out], torch's W'."""
    del scaling  # PEFT leaves it out of the factors

    def factorize(w: Array) -> tuple[Array, Array]:
        q, r = jnp.linalg.qr(w.astype(jnp.float32).T)
        return r[:rank].T, q[:, :rank].T

    return jax.lax.map(factorize, kernel)


def _column_lengths(matrix: Float[Array, "*L I O"]) -> Float[Array, "*L O"]:
    return jnp.linalg.norm(matrix.astype(jnp.float32), axis=-2)


def trainable_and_frozen(
    base_params: Params, adapters: Params, lora: LoraConfig
) -> tuple[Params, Params]:
    """What trains (adapters, chosen biases, modules_to_save; float32) and the base.

    The base stays complete, so that alone it is the DPO reference, except under
    `lora.changes_base`: there it is W - s A B, and only with these adapters the model.
    With tied embeddings, embed_tokens in `modules_to_save` trains the head as well.
    """
    saved = resolve_modules_to_save(lora, base_params)
    labels = resolve_targets(lora, base_params)
    targets = {label_path(label) for label in labels}
    if both := [path for path in targets if is_within(path, saved)]:
        raise ValueError(
            f"lora.modules_to_save and target_modules both select {sorted(both)}:"
            " leave them out of one"
        )
    if HEAD in targets and EMBEDDING in saved and is_tied(base_params):
        raise ValueError(
            "lora.modules_to_save trains embed_tokens, which is the head that"
            " target_modules adapts: leave lm_head out"
        )

    whole = [path[:-1] for path in flatten(base_params) if path[-1] == CODES]
    if frozen_only := [path for path in whole if is_within(path, saved)]:
        names = sorted({".".join(path[1:]) for path in frozen_only})
        raise ValueError(
            f"lora.modules_to_save trains {names} in full, which the quantized base"
            " keeps as codes: give them adapters (target_modules), or unset"
            " training.lora.quantization"
        )

    def is_trained(path: TreePath) -> bool:
        if is_within(path, saved):
            return True
        is_chosen = lora.bias == "all" or (
            lora.bias == "lora_only" and path[:-1] in targets
        )
        return path[-1] == "bias" and is_chosen

    copies = {
        # A copy even where float32 already: the step donates what trains.
        path: jnp.array(_on_device(leaf), jnp.float32, copy=True)
        for path, leaf in flatten(base_params).items()
        if is_trained(path)
    }
    frozen = base_params
    if lora.changes_base:
        frozen = _add_adapters(base_params, adapters, lora, sign=-1.0)
    return overlay(adapters, nest(copies)), frozen


def merge_into_base(frozen: Params, trainable: Params, lora: LoraConfig) -> Params:
    """The plain model that acts as base and adapters together, in the base's dtypes.

    Sums are float32 and rounded once; kernels kept in few bits take the embedding's
    type, and are left in host memory. Where the head was the embedding and only one of
    them, or each its own, has an adapter, they are two matrices afterwards: the tree
    then has `lm_head` (PEFT's merge would change both).
    """
    merged = _add_adapters(frozen, trainable, lora, sign=1.0)
    adapted = {
        path for path in (EMBEDDING, HEAD) if "lora_a" in trainable.get(path[0], {})
    }
    if not adapted or not is_tied(frozen) or ties_adapters(lora, frozen):
        return merged
    table = frozen["embed_tokens"]["embedding"]
    head: Params = {"lm_head": {"kernel": jnp.asarray(_on_device(table)).T}}
    adapters = {"lm_head": trainable["lm_head"]} if HEAD in adapted else {}
    return merged | _add_adapters(head, adapters, lora, sign=1.0)


def _add_adapters(
    base: Params, adapters: Params, lora: LoraConfig, *, sign: float
) -> Params:
    """W + sign s A B, with DoRA's lengths if sign is 1; other leaves replace theirs."""
    flat = flatten(adapters)
    merged: dict[TreePath, Any] = {}
    for path, leaf, from_codes in _plain_leaves(base):
        a, b, magnitude = (flat.get((*path[:-1], name)) for name in ADAPTER_LEAVES)
        if path[-1] in ("kernel", "embedding") and a is not None:
            _, scaling = lora.rank_and_scaling(full_names(path[:-1], leaf.shape[0]))
            operands = [_on_device(x) for x in (leaf, a, b)]
            operands.append(_on_device(magnitude) if sign > 0 else None)
            if leaf.ndim == 2:
                operands = [x if x is None else x[None] for x in operands]
            total = _add_product(*operands, scaling=sign * scaling)
            merged[path] = _laid_out_as(leaf, total.reshape(leaf.shape))
        else:
            merged[path] = jnp.asarray(_on_device(flat.get(path, leaf)), leaf.dtype)
        if from_codes:
            dtype = base["embed_tokens"]["embedding"].dtype
            merged[path] = _on_host(merged[path].astype(dtype))
    return nest(merged)


def _plain_leaves(base: Params) -> Iterator[tuple[TreePath, Any, bool]]:
    """Leaves by path; a kernel kept in few bits as float32, and whether it was one."""
    for path, leaf in flatten(base).items():
        if path[-1] == CODES:
            yield (*path[:-1], "kernel"), _matrix(base, path[:-1]), True
        elif path[-1] != SCALES:
            yield path, leaf, False


def _on_host(array: Array) -> np.ndarray:
    """All of it in host memory: a model kept in few bits may fit no device whole."""
    if not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _laid_out_as(leaf: Any, value: Array) -> Array:
    """In the layout of the leaf that it replaces, unless that is in host memory."""
    is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    if not is_array or leaf.sharding.memory_kind == "pinned_host":
        return value
    return jax.device_put(value, leaf.sharding)


def _on_device(leaf: Any) -> Any:
    """Out of host memory, where offloading keeps parameters between steps."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
        return leaf
    if leaf.sharding.memory_kind != "pinned_host":
        return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))


@functools.partial(jax.jit, static_argnames="scaling")
def _add_product(
    kernel: Float[Array, "L I O"],
    lora_a: Float[Array, "L I R"],
    lora_b: Float[Array, "L R O"],
    lengths: Float[Array, "L O"] | None,
    *,
    scaling: float,
) -> Float[Array, "L I O"]:
    def add(layer: tuple[Array, Array, Array, Array | None]) -> Array:
        w, a, b, length = layer
        delta = scaling * jnp.matmul(
            a.astype(jnp.float32),
            b.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        total = w.astype(jnp.float32) + delta
        if length is not None:
            total *= length.astype(jnp.float32) / jnp.linalg.norm(total, axis=0)
        return total.astype(w.dtype)

    # Layer by layer: only one float32 kernel is held at a time.
    return jax.lax.map(add, (kernel, lora_a, lora_b, lengths))
