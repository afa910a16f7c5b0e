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
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtrain.lora import parameters, targets
from jaxtrain.lora.targets import EMBEDDING, HEAD, LoraConfig, TreePath
from jaxtrain.models.quantization import dequantize_on_device, is_part, kept_as
from jaxtrain.sharding import to_host
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
    ranks = targets.resolve_ranks(lora, base_tree)
    for label, (rank, scaling) in sorted(ranks.items()):
        path = targets.label_path(label)
        *layers, width_in, width_out = targets.matrix_shape(base_tree, path)
        draw_key = jax.random.fold_in(key, zlib.crc32(label.encode()))
        if path == EMBEDDING:
            a = jnp.zeros((width_in, rank), jnp.float32)
            b = jax.random.normal(draw_key, (rank, width_out), jnp.float32)
        elif lora.changes_base:
            a, b = _take_out(lora, label, base_tree, rank, scaling)
        else:
            a = _draw(draw_key, (*layers, width_in, rank), lora.init_lora_weights)
            b = jnp.zeros((*layers, rank, width_out), jnp.float32)
        leaves[*path, "lora_a"], leaves[*path, "lora_b"] = a, b
        if lora.use_dora:
            matrix = _matrix(base_tree, path).astype(jnp.float32)
            leaves[*path, "lora_magnitude"] = jnp.linalg.norm(matrix, axis=-2)
    return nest(leaves)


def _take_out(
    lora: LoraConfig, label: str, base: Mapping[str, Any], rank: int, scaling: float
) -> tuple[Float[Array, "*L I R"], Float[Array, "*L R O"]]:
    """The first A and B out of the matrix itself, which its residual shall replace."""
    init, matrix = lora.init_lora_weights, _matrix(base, targets.label_path(label))
    if rank > min(matrix.shape[-2:]):
        raise ValueError(
            f"lora.r = {rank}: {init} needs a rank of at most {min(matrix.shape[-2:])}"
            f" for {label}"
        )
    if label == "lm_head" and targets.is_tied(base):
        raise ValueError(
            f"lora.init_lora_weights = {init!r} takes the head's first adapter out of"
            " the embedding, which this head is: set it to default or gaussian, or"
            " leave lm_head out of target_modules"
        )
    factorize = _pissa if init == "pissa" else _olora
    return factorize(matrix, rank, scaling)


def _matrix(base_tree: Mapping[str, Any], path: TreePath) -> Array:
    """What an adapter adds to, [L in out] or [in out]."""
    if path == HEAD and targets.is_tied(base_tree):
        return _matrix(base_tree, EMBEDDING).T
    name = "embedding" if "embedding" in tree_get(base_tree, path) else "kernel"
    return _whole(base_tree, (*path, name))


def _whole(base_tree: Mapping[str, Any], path: TreePath) -> Array:
    """A leaf on its device, made of codes and scales where it is kept so."""
    leaves, name = tree_get(base_tree, path[:-1]), path[-1]
    if name in leaves:
        return _on_device(leaves[name])
    return dequantize_on_device(*(_on_device(leaves[part]) for part in kept_as(name)))


def _draw(key: Array, shape: tuple[int, ...], init: str) -> Float[Array, "*L I R"]:
    if init == "gaussian":
        return jax.random.normal(key, shape, jnp.float32) / shape[-1]
    # kaiming_uniform_ with a = sqrt(5), as PEFT: sqrt(6 / ((1 + a^2) in)).
    bound = 1 / math.sqrt(shape[-2])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


@functools.partial(jax.jit, static_argnames=("rank", "scaling"))
def _pissa(matrix: Array, rank: int, scaling: float) -> tuple[Array, Array]:
    """W ~ U S V: A = U sqrt(S / s), B = sqrt(S / s) V, of the r largest S."""

    def factorize(w: Array) -> tuple[Array, Array]:
        u, s, v = jnp.linalg.svd(w.astype(jnp.float32), full_matrices=False)
        root = jnp.sqrt(s[:rank] / scaling)
        return u[:, :rank] * root, root[:, None] * v[:rank]

    return _by_layer(factorize, matrix)


@functools.partial(jax.jit, static_argnames="rank")
def _olora(matrix: Array, rank: int, _: float) -> tuple[Array, Array]:
    """W' = Q R: A = R'[:, :r], B = Q'[:r]. W here is [in out], torch's W'."""

    def factorize(w: Array) -> tuple[Array, Array]:
        q, r = jnp.linalg.qr(w.astype(jnp.float32).T)
        return r[:rank].T, q[:, :rank].T

    return _by_layer(factorize, matrix)  # PEFT leaves the scaling out of the factors


def _by_layer(function: Callable[..., Any], matrix: Array, *others: Any) -> Any:
    """`function` of one matrix, or of each in a stack: one at a time is float32."""
    if matrix.ndim == 2:
        return function(matrix, *others)
    return jax.lax.map(lambda one: _by_layer(function, *one), (matrix, *others))


def trainable_and_frozen(
    base_params: Params, adapters: Params, lora: LoraConfig
) -> tuple[Params, Params]:
    """What trains (adapters, chosen biases, modules_to_save; float32) and the base.

    `adapters` read from a file bring biases and saved modules of their own.
    The base stays complete, so that alone it is the DPO reference, except under
    `lora.changes_base`: there it is W - s A B, and only with these adapters the model.
    With tied embeddings, embed_tokens in `modules_to_save` trains the head as well.
    """
    saved = targets.resolve_modules_to_save(lora, base_params)
    labels = targets.resolve_targets(lora, base_params)
    adapted = {targets.label_path(label) for label in labels}
    if both := [path for path in adapted if targets.is_within(path, saved)]:
        raise ValueError(
            f"lora.modules_to_save and target_modules both select {sorted(both)}:"
            " leave them out of one"
        )
    if HEAD in adapted and EMBEDDING in saved and targets.is_tied(base_params):
        raise ValueError(
            "lora.modules_to_save trains embed_tokens, which is the head that"
            " target_modules adapts: leave lm_head out"
        )
    flat = flatten(base_params)
    whole = [path for path in flat if targets.is_within(path, saved)]
    if codes := {".".join(path[1:-1]) for path in whole if is_part(path[-1])}:
        raise ValueError(
            f"lora.modules_to_save trains {sorted(codes)} in full, which the quantized"
            " base keeps as codes: give them adapters (target_modules), or unset"
            " training.lora.quantization (or training.fp8)"
        )
    biased = {"all": {path[:-1] for path in flat}, "lora_only": adapted, "none": set()}
    copies = {
        # A copy even where float32 already: the step donates what trains.
        path: jnp.array(_on_device(leaf), jnp.float32, copy=True)
        for path, leaf in flat.items()
        if path in whole or (path[-1] == "bias" and path[:-1] in biased[lora.bias])
    }
    frozen = base_params
    if lora.changes_base:
        frozen = _add_adapters(base_params, adapters, lora, sign=-1.0)
    return overlay(nest(copies), adapters), frozen


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
    ties = targets.ties_adapters(lora, frozen)
    if not adapted or ties or not targets.is_tied(frozen):
        return merged
    table = frozen["embed_tokens"]["embedding"]
    head: Params = {"lm_head": {"kernel": jnp.asarray(_on_device(table)).T}}
    adapters = {"lm_head": trainable["lm_head"]} if HEAD in adapted else {}
    return merged | _add_adapters(head, adapters, lora, sign=1.0)


def _add_adapters(
    base: Params, adapters: Params, lora: LoraConfig, *, sign: float
) -> Params:
    """W + sign s A B, with DoRA's lengths if sign is 1; other leaves replace theirs."""
    flat, known = flatten(adapters), parameters.find(base)
    merged: dict[TreePath, Any] = {}
    for path, leaf in flatten(base).items():
        module, name = path[:-1], path[-1]
        if name.endswith("_scales"):
            continue
        if is_code := name.endswith("_codes"):
            path = (*module, name.removesuffix("_codes"))
            leaf = _whole(base, path)
        a, b, magnitude = (flat.get((*module, x)) for x in targets.ADAPTER_LEAVES)
        names = targets.full_names(module, leaf.shape[0])
        if path[-1] not in ("kernel", "embedding"):
            a, b, names = parameters.share_of(path, flat, known)
        if a is not None:
            _, scaling = lora.rank_and_scaling(names)
            lengths = magnitude if sign > 0 else None
            operands = [_on_device(x) for x in (leaf, a, b, lengths)]
            total = _add_product(*operands, scaling=sign * scaling)
            merged[path] = _laid_out_as(leaf, total)
        else:
            merged[path] = jnp.asarray(_on_device(flat.get(path, leaf)), leaf.dtype)
        if is_code:
            # In host memory: a model kept in few bits may fit no device whole.
            dtype = base["embed_tokens"]["embedding"].dtype
            merged[path] = to_host(merged[path].astype(dtype))
    return nest(merged)


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
    kernel: Float[Array, "*L I O"],
    lora_a: Float[Array, "*L I R"],
    lora_b: Float[Array, "*L R O"],
    lengths: Float[Array, "*L O"] | None,
    *,
    scaling: float,
) -> Float[Array, "*L I O"]:
    def add(w: Array, a: Array, b: Array, length: Array | None) -> Array:
        delta = scaling * jnp.matmul(
            a.astype(jnp.float32),
            b.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        total = w.astype(jnp.float32) + delta
        if length is not None:
            total *= length.astype(jnp.float32) / jnp.linalg.norm(total, axis=0)
        return total.astype(w.dtype)

    return _by_layer(add, kernel, lora_a, lora_b, lengths)
