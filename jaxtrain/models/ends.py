"""A head apart from the embedding, for adapters that train one of the two alone.

PEFT's `modules_to_save` copies the modules that it names. Of a base whose head is its
embedding it so makes two matrices of one, and the adapter fits a base that is not tied.
"""

import dataclasses
import logging

import jax

from jaxtrain import sharding
from jaxtrain.config import RunConfig
from jaxtrain.lora import has_own_ends
from jaxtrain.lora.targets import EMBEDDING, HEAD
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Decoder
from jaxtrain.tree import flatten, nest
from jaxtrain.types import Params

logger = logging.getLogger(__name__)

_TABLE, _KERNEL = (*EMBEDDING, "embedding"), (*HEAD, "kernel")


def fit_ends(run: RunConfig, config: ModelConfig) -> ModelConfig:
    """The config, not tied where the adapter that the run starts from is for that.

    Raises:
        ValueError: that adapter cannot be read.
    """
    start = run.lora.init_from if run.lora is not None else ""
    if not start or not config.tie_word_embeddings or not has_own_ends(start):
        return config
    logger.info(
        "the adapter %s has an embedding or a head of its own: the base's one matrix"
        " for both becomes two, and the merged model has tie_word_embeddings = false",
        start,
    )
    return dataclasses.replace(config, tie_word_embeddings=False)


def as_stored(decoder: Decoder, stored: ModelConfig) -> Decoder:
    """The same decoder with the rows and the ends that its directory has."""
    config = dataclasses.replace(
        decoder.config,
        vocab_size=stored.vocab_size,
        tie_word_embeddings=stored.tie_word_embeddings,
    )
    return dataclasses.replace(decoder, config=config)


def add_head(params: Params, described: Params) -> Params:
    """Where `described` has a head and the weights have none, it is the embedding."""
    wanted, found = flatten(described), flatten(params)
    if _KERNEL not in wanted or _KERNEL in found:
        return params
    table, layout = found[_TABLE], wanted[_KERNEL].sharding
    transpose = jax.jit(lambda rows: rows.T, out_shardings=sharding.on_device(layout))
    head = transpose(jax.device_put(table, sharding.on_device(table.sharding)))
    return nest({**found, _KERNEL: jax.device_put(head, layout)})
