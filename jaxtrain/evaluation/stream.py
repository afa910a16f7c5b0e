"""Generation a token at a time, and the text of tokens as it becomes whole."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxtrain.evaluation.generate import CachedDecoder, Decoding, left_pad
from jaxtrain.sharding import to_host
from jaxtrain.types import Params

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class Stream:
    """Continue one prompt; two programs are compiled for each length of prompts.

    Lengths are powers of two. The tokens are those of `generate.generate_tokens` for
    this prompt alone.
    """

    decoding: Decoding
    start: Callable[..., tuple[Any, Any]]
    extend: Callable[..., tuple[Any, Any]]

    def __call__(
        self, params: Params, prompt: Sequence[int], *, key: Key[Array, ""]
    ) -> Iterator[int]:
        """The new tokens, up to an end token, which is left out."""
        tokens, mask = left_pad([prompt], self.decoding.pad_id)
        keys = jax.random.fold_in(key, 0)[None]
        step, cache = self.start(params, jnp.asarray(tokens), jnp.asarray(mask), keys)
        last = self.decoding.max_new_tokens
        for number in range(1, last + 1):
            made = step.tokens
            if number < last:
                # The device works on the next token while this one is shown.
                step, cache = self.extend(params, keys, step, cache)
            token = int(to_host(made)[0])
            if token in self.decoding.eos_ids:
                return
            yield token


def make_stream(
    decoder: CachedDecoder, *, max_new_tokens: int, **settings: Any
) -> Stream:
    """A stream with the settings of `generate.make_generate`.

    Raises:
        ValueError: a setting is out of its range.
    """
    decoding = Decoding(decoder, max_new_tokens, **settings)
    extend = jax.jit(decoding.extend, donate_argnums=3)
    return Stream(decoding, jax.jit(decoding.start), extend)


def text_pieces(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens in pieces, each as soon as its characters are whole.

    Together they are what the tokenizer decodes the tokens to, special ones left out:
    a character of several bytes may be spread over several tokens.
    """
    ids: list[int] = []
    shown = ""
    text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith(_UNFINISHED) or not text.startswith(shown):
            continue
        if text != shown:
            yield text[len(shown) :]
            shown = text
    if text.startswith(shown) and text != shown:
        yield text[len(shown) :]
