"""Tokens that a model has no row for: said, or given rows (`model.grow_vocabulary`).

A new row of the embedding, and of the head, is the mean of those in the directory.
transformers draws it around that mean with a variance of a billionth of the rows'
(`resize_token_embeddings`, https://nlp.stanford.edu/~johnhew/vocab-expansion.html); the
mean itself needs no seed, and is the same on every mesh but for the order of a sum.
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtrain import sharding
from jaxtrain.config import RunConfig
from jaxtrain.data.rows.tokenize import highest_id
from jaxtrain.lora.targets import (
    EMBEDDING,
    HEAD,
    LoraConfig,
    is_tied,
    resolve_modules_to_save,
)
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Decoder
from jaxtrain.tree import flatten, nest
from jaxtrain.types import Params

logger = logging.getLogger(__name__)

# The leaves that have the vocabulary as an axis, and which axis it is.
_AXES = {(*EMBEDDING, "embedding"): 0, (*HEAD, "kernel"): 1}


def fit_vocabulary(run: RunConfig, config: ModelConfig, tokenizer: Any) -> ModelConfig:
    """The config with a row for each token if the run lets it grow; else a warning.

    Raises:
        ValueError: a model made from scratch has too few rows, and may not grow.
    """
    needed = highest_id(tokenizer) + 1
    if needed <= config.vocab_size:
        return config
    if run.model.grow_vocabulary:
        logger.info("the vocabulary grows from %d to %d", config.vocab_size, needed)
        return dataclasses.replace(config, vocab_size=needed)
    if run.training_type == "from_scratch":
        raise ValueError(
            f"the tokenizer has {needed} tokens, but the model's vocab_size ="
            f" {config.vocab_size}: set model.architecture.vocab_size to at"
            " least that, or set model.grow_vocabulary"
        )
    logger.warning(
        "the tokenizer has tokens up to %d, but the model's vocab_size = %d: a row of"
        " data that holds one without an embedding is a bad row; model.grow_vocabulary"
        " adds embeddings for them",
        *(needed - 1, config.vocab_size),
    )
    return config


def check_new_rows_train(
    base: Decoder, stored: ModelConfig, lora: LoraConfig, init_from: str
) -> None:
    """Refuse adapters beside new rows that would stay as they start.

    Args:
        stored: the model as its directory has it, before it got the new rows.
        init_from: the adapter that `lora` is of, if it is not new.

    Raises:
        ValueError: `lora.modules_to_save` names not all matrices that have new rows.
    """
    added = base.config.vocab_size - stored.vocab_size
    if not added:
        return
    tree = base.abstract_params()
    needed = [EMBEDDING] if is_tied(tree) else [EMBEDDING, HEAD]
    saved = resolve_modules_to_save(lora, tree) if lora.modules_to_save else set()
    if missing := [path[0] for path in needed if path not in saved]:
        fix = f"set training.lora.modules_to_save = {[path[0] for path in needed]}"
        if init_from:
            fix = (
                f"the adapter {init_from!r} has none of its own there; merge it into"
                " its base (merge_and_unload in PEFT) and train a new adapter on that"
            )
        raise ValueError(
            f"model.grow_vocabulary = True adds rows for {added} tokens to"
            f" {' and '.join(missing)}, which LoRA would not train: {fix}"
        )


def add_rows(params: Params, described: Params) -> Params:
    """Append rows until every leaf is as `described`: its shape and its sharding."""
    wanted, grown = flatten(described), flatten(params)
    for path, axis in _AXES.items():
        if path not in grown or grown[path].shape == wanted[path].shape:
            continue
        table, layout = grown[path], wanted[path].sharding
        append = jax.jit(
            functools.partial(_append_mean, axis=axis, size=wanted[path].shape[axis]),
            out_shardings=sharding.on_device(layout),
        )
        table = jax.device_put(table, sharding.on_device(table.sharding))
        grown[path] = jax.device_put(append(table), layout)
    return nest(grown)


def _append_mean(
    table: Float[Array, "V D"] | Float[Array, "D V"], *, axis: int, size: int
) -> Float[Array, "W D"] | Float[Array, "D W"]:
    """The table with its mean along `axis` appended, up to `size` rows or columns."""
    mean = table.astype(jnp.float32).mean(axis, keepdims=True).astype(table.dtype)
    added = jnp.repeat(mean, size - table.shape[axis], axis)
    return jnp.concatenate([table, added], axis)
