"""The tokens that end, begin and pad a text, where model and tokenizer disagree.

A base model that is tuned on chats ends its turns with the tokenizer's EOS, or with the
token that the chat template writes after a turn, and its config.json may name another.
As transformers' Trainer does before TRL trains, the model is told of the tokenizer's
tokens, and of the ends of text none is taken away.
"""

import copy
import dataclasses
import logging
import os
import re
from collections.abc import Collection
from typing import Any, TypeVar

from jaxtrain.data.rows.template import turn_end_id
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.generation_config import GenerationConfig, as_ids

logger = logging.getLogger(__name__)

_Model = TypeVar("_Model", bound=Any)

# Tokens that no text holds and that may pad: made for it, or for whatever one likes.
_FOR_PADDING = re.compile(r"pad", re.IGNORECASE)
_SPARE = re.compile(r"reserved|unused", re.IGNORECASE)
# Those of other modalities count as images or sounds wherever they stand.
_OTHER_MODALITY = re.compile(r"image|img|vision|video|audio", re.IGNORECASE)


def align_special_tokens(
    config: ModelConfig, generation: GenerationConfig, tokenizer: Any
) -> tuple[ModelConfig, GenerationConfig]:
    """Config and generation config that name the tokenizer's special tokens.

    Both name every token that ends a text, those of training first: the tokenizer's
    EOS, then the chat template's end of a turn, then what the model named before. A
    pad token that ends texts, or that the model has no row for, is replaced on the
    tokenizer by one that does neither; where it has none, the tokenizer goes on
    padding with EOS, as TRL's does, and the configs name no pad token.
    """
    trained = dict.fromkeys(
        token
        for token in (tokenizer.eos_token_id, turn_end_id(tokenizer))
        if token is not None
    )
    named, generated = as_ids(config.eos_token_id), generation.eos_ids
    ends = tuple(dict.fromkeys((*trained, *named, *generated)))
    changes: dict[str, Any] = {}
    if not trained.keys() <= set(named):
        changes["eos_token_id"] = ends
        shown = ", ".join(
            f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in ends
        )
        logger.warning(
            "the model's config.json ends texts with token %s, the tokenizer or its"
            " chat template with %s: generation stops at each of %s, and the export's"
            " config.json and generation_config.json name them all",
            ", ".join(map(str, named)) or "none",
            ", ".join(map(str, trained)),
            shown,
        )
    # The publisher may pad with an end of text that training never uses, as Qwen does.
    declared = {config.pad_token_id, generation.values.get("pad_token_id")}
    is_theirs = tokenizer.pad_token_id in declared - trained.keys()
    _settle_padding(tokenizer, trained if is_theirs else ends, config.vocab_size)
    pads_with_end = tokenizer.pad_token_id in (trained if is_theirs else ends)
    changes["pad_token_id"] = None if pads_with_end else tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        changes["bos_token_id"] = tokenizer.bos_token_id
    config = dataclasses.replace(config, **changes)
    return config, _aligned(generation, config, ends, trained)


def with_tokenizer(model: _Model, tokenizer: Any) -> _Model:
    """The same `LoadedModel` for another tokenizer, whose special tokens it takes."""
    config, generation = align_special_tokens(
        model.decoder.config, model.generation, tokenizer
    )
    decoder = dataclasses.replace(model.decoder, config=config)
    return dataclasses.replace(
        model, decoder=decoder, tokenizer=tokenizer, generation=generation
    )


def save_tokenizer(tokenizer: Any, directory: str | os.PathLike[str]) -> None:
    """Save a tokenizer; if it pads with EOS, without a pad token.

    Who masks pad tokens out of a loss would mask the ends of all texts.
    """
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = None
    tokenizer.save_pretrained(str(directory))


def _aligned(
    generation: GenerationConfig,
    config: ModelConfig,
    ends: tuple[int, ...],
    trained: Collection[int],
) -> GenerationConfig:
    """The same settings with the tokens of an aligned config."""
    values = dict(generation.values)
    if not values:
        values["eos_token_id"] = config.eos_token_id
        values["bos_token_id"] = config.bos_token_id
    elif not set(trained) <= set(generation.eos_ids):
        values["eos_token_id"] = ends
    if isinstance(values.get("eos_token_id"), tuple):
        values["eos_token_id"] = list(values["eos_token_id"])
    if config.bos_token_id is not None and "bos_token_id" in values:
        values["bos_token_id"] = config.bos_token_id
    values["pad_token_id"] = config.pad_token_id
    return GenerationConfig({k: v for k, v in values.items() if v is not None})


def _settle_padding(tokenizer: Any, ends: Collection[int], vocab_size: int) -> None:
    """Give the tokenizer a pad token that ends no text, if it has one to give."""
    present = tokenizer.pad_token_id
    if present is not None and present not in ends and present < vocab_size:
        return
    usable = {
        number: str(token)
        for number, token in sorted(tokenizer.added_tokens_decoder.items())
        if number not in ends
        and number < vocab_size
        and not _OTHER_MODALITY.search(str(token))
    }
    unknown = {tokenizer.unk_token_id} & usable.keys()
    choices = [
        *(token for token in usable.values() if _FOR_PADDING.search(token)),
        *(usable[number] for number in unknown),
        *(token for token in usable.values() if _SPARE.search(token)),
    ]
    if choices:
        tokenizer.pad_token = choices[0]
        logger.info(
            "padding with %r, because the tokenizer's pad token ends texts or has no"
            " row in the model",
            choices[0],
        )
    else:
        tokenizer.pad_token = tokenizer.eos_token
        logger.info(
            "padding with EOS %r, for lack of another token (masks come from lengths);"
            " the export names no pad token",
            tokenizer.eos_token,
        )
