"""Sampling with a key-value cache: sample outputs and generation metrics.

`make_generate` compiles the whole loop; `generate_texts` feeds it prompts in batches
of few static shapes.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, Key

from jaxtrain.record.safe_text import is_unicode
from jaxtrain.sharding import to_host
from jaxtrain.types import Params

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
_SHORTEST_BUCKET = 16


class CachedDecoder(Protocol):
    """What generation needs of a model; `models.transformer.Decoder` has it."""

    def init_cache(self, batch: int, max_len: int) -> Any:
        """An empty cache for `max_len` tokens a row."""

    def decode(
        self,
        params: Params,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        cache: Any,
        segment_ids: Int32[Array, "B T"],
    ) -> tuple[Float[Array, "B V"], Any]:
        """Append tokens (segment 0 = padding); logits after each row's last one."""


@dataclasses.dataclass(frozen=True)
class Generator:
    """A compiled generation loop and the settings it was made with."""

    max_new_tokens: int
    eos_ids: tuple[int, ...]
    pad_id: int
    compiled: Callable[[Params, Array, Array, Array], Array]

    def __call__(
        self,
        params: Params,
        prompt_tokens: Int[Array | np.ndarray, "B T"],
        prompt_mask: Int[Array | np.ndarray, "B T"] | Bool[Array | np.ndarray, "B T"],
        key: Key[Array, "..."],
    ) -> Int32[Array, "B N"]:
        """Continue each prompt by N = `max_new_tokens` tokens.

        Args:
            prompt_tokens: prompts, padded on either side.
            prompt_mask: 1 for a prompt's tokens, 0 for padding; at least one a row.
            key: one PRNG key, or one for each row: a row's text then does not depend
                on the rows beside it.

        Returns:
            The new tokens; after a row's end token, `pad_id`.
        """
        if key.ndim == 0:
            key = jax.random.split(key, len(prompt_tokens))
        tokens = jnp.asarray(prompt_tokens, jnp.int32)
        return self.compiled(params, tokens, jnp.asarray(prompt_mask, jnp.int32), key)


def make_generate(
    decoder: CachedDecoder,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> Generator:
    """A generator that stops once every row has met an end token.

    Args:
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among so many most likely tokens; 0 among all.
        top_p: and among the fewest that hold this probability (arXiv:1904.09751),
            after temperature and `top_k`, as transformers does.
        eos_ids: the tokens that end a text.

    Raises:
        ValueError: a setting is out of its range.
    """
    decoding = Decoding(
        decoder,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_ids=tuple(eos_ids),
        pad_id=pad_id,
    )

    def generate(
        params: Params, prompts: Array, mask: Array, keys: Array
    ) -> Int32[Array, "B N"]:
        first, cache = decoding.start(params, prompts, mask, keys)
        texts = jnp.full((len(prompts), max_new_tokens), pad_id, jnp.int32)
        carry = (first, cache, texts.at[:, 0].set(first.tokens))

        def unfinished(state: Any) -> Array:
            step, _, _ = state
            return (step.made < max_new_tokens) & ~step.ended.all()

        def extend(state: Any) -> Any:
            step, cache, texts = state
            index = step.made
            step, cache = decoding.extend(params, keys, step, cache)
            texts = jax.lax.dynamic_update_index_in_dim(
                texts, step.tokens, index, axis=1
            )
            return step, cache, texts

        return jax.lax.while_loop(unfinished, extend, carry)[2]

    return Generator(max_new_tokens, tuple(eos_ids), pad_id, jax.jit(generate))


class Step(NamedTuple):
    """Where generation stands: `made` tokens a row, of which `tokens` are the last.

    `ended`: the rows that have met an end token. `lengths`: of the prompts.
    """

    made: Int32[Array, ""]
    tokens: Int32[Array, "B"]
    ended: Bool[Array, "B"]
    lengths: Int32[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The two steps of generation, pure functions; settings as in `make_generate`.

    Raises:
        ValueError: a setting is out of its range.
    """

    decoder: CachedDecoder
    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0

    def __post_init__(self) -> None:
        for name, fits, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
        ):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)}: use {wanted}")

    def start(
        self, params: Params, prompts: Array, mask: Array, keys: Array
    ) -> tuple[Step, Any]:
        """Read the prompts [B T]; the first tokens, and the cache."""
        batch, prompt_length = prompts.shape
        cache = self.decoder.init_cache(batch, prompt_length + self.max_new_tokens)
        positions = jnp.maximum(mask.cumsum(axis=1, dtype=jnp.int32) - 1, 0)
        logits, cache = self.decoder.decode(params, prompts, positions, cache, mask)
        tokens = self._choose(logits, keys, 0)
        lengths = mask.sum(axis=1, dtype=jnp.int32)
        return Step(jnp.int32(1), tokens, self._has_ended(tokens), lengths), cache

    def extend(
        self, params: Params, keys: Array, step: Step, cache: Any
    ) -> tuple[Step, Any]:
        """The next token of each row; `pad_id` where it has ended."""
        made, tokens, ended, lengths = step
        at = (lengths + made - 1)[:, None]
        ones = jnp.ones((len(tokens), 1), jnp.int32)
        logits, cache = self.decoder.decode(params, tokens[:, None], at, cache, ones)
        tokens = jnp.where(ended, self.pad_id, self._choose(logits, keys, made))
        return Step(made + 1, tokens, ended | self._has_ended(tokens), lengths), cache

    def _choose(self, logits: Array, keys: Array, index: Array | int) -> Array:
        if self.temperature == 0:
            return logits.argmax(axis=-1).astype(jnp.int32)
        kept = filter_logits(
            logits / self.temperature, top_k=self.top_k, top_p=self.top_p
        )
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)

    def _has_ended(self, tokens: Array) -> Array:
        ends = jnp.asarray(self.eos_ids, jnp.int32)
        return (tokens[:, None] == ends).any(axis=1)


def filter_logits(
    logits: Float[Array, "*B V"], *, top_k: int = 0, top_p: float = 1.0
) -> Float[Array, "*B V"]:
    """Logits with all but the `top_k` and then the `top_p` most likely at -inf.

    Kept for `top_p` is the smallest set of most likely tokens whose probability, among
    what `top_k` left, reaches it: at least one. Ties with the last one are kept.
    """
    vocabulary = logits.shape[-1]
    top_k = min(top_k, vocabulary) or vocabulary
    if top_k == vocabulary and top_p == 1:
        return logits
    descending = jax.lax.top_k(logits, top_k)[0]
    probabilities = jax.nn.softmax(descending.astype(jnp.float32), axis=-1)
    more_likely = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first stays whatever rounding does.
    stays = (more_likely < top_p).at[..., 0].set(True) if top_p < 1 else True
    least = jnp.where(stays, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits < least, -jnp.inf, logits)


def generate_texts(
    generate: Generator,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message] | Sequence[int]],
    *,
    key: Key[Array, ""],
    batch_size: int = 8,
    vocab_size: int | None = None,
) -> list[str]:
    """Continue each prompt; one text each, in their order, special tokens left out.

    Prompts go by length into batches of `batch_size` rows, left-padded to powers of
    two, so that few shapes are compiled. A prompt's text depends on `key` and its
    index, not on its batch. With several processes, all call with the same prompts.

    Args:
        prompts: strings, lists of messages for the tokenizer's chat template, or
            lists of token ids.
        batch_size: a multiple of the mesh's data-parallel size.
        vocab_size: the model's, where a tokenizer may have more tokens.

    Raises:
        ValueError: a prompt is empty and the tokenizer has no token to begin with, or
            it has a token that the model does not know.
    """
    encoded = [
        encode_prompt(tokenizer, prompt, index, vocab_size)
        for index, prompt in enumerate(prompts)
    ]
    rows = generate_tokens(generate, params, encoded, key=key, batch_size=batch_size)
    return [
        tokenizer.decode(until_end(row, generate.eos_ids), skip_special_tokens=True)
        for row in rows
    ]


def generate_tokens(
    generate: Generator,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    key: Key[Array, ""],
    batch_size: int = 8,
) -> list[np.ndarray]:
    """The new tokens [N] of each prompt of token ids, in their order.

    An end token is among them, and `generate.pad_id` after it. For the rest see
    `generate_texts`.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results = [np.empty(0, np.int32)] * len(prompts)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        # The last batch is filled up with repetitions of its first prompt.
        rows = members + members[:1] * (batch_size - len(members))
        tokens, mask = left_pad([prompts[i] for i in rows], generate.pad_id)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.asarray(rows))
        new_tokens = to_host(generate(params, tokens, mask, keys))
        for index, row in zip(members, new_tokens, strict=False):
            results[index] = row
    return results


def encode_prompt(
    tokenizer: Any,
    prompt: str | Sequence[Message] | Sequence[int],
    index: int,
    vocab_size: int | None = None,
) -> list[int]:
    """The tokens of a text, of a conversation to be answered, or as they are given.

    Raises:
        ValueError: the prompt is empty and the tokenizer has no token to begin with,
            the chat template refuses the conversation, or the model, of `vocab_size`
            tokens, does not know one of them.
    """
    ids: Sequence[int]
    if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], int):
        ids = prompt  # type: ignore[assignment]
    elif isinstance(prompt, str):
        _refuse_surrogates(prompt, index)
        ids = tokenizer(prompt)["input_ids"]
    else:
        try:
            text = tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise ValueError(
                f"prompt {index}: the chat template refuses the conversation: {error}"
            ) from error
        _refuse_surrogates(text, index)
        # The template writes the special tokens itself.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    ids = ids or [token for token in first if token is not None][:1]
    if not ids:
        raise ValueError(
            f"prompt {index} is empty and the tokenizer has neither a bos nor an eos "
            "token to begin with: give it a text"
        )
    if vocab_size is not None:
        refuse_unknown(tokenizer, ids, f"prompt {index}", vocab_size)
    return list(ids)


def refuse_unknown(
    tokenizer: Any, ids: Sequence[int], where: str, vocab_size: int
) -> None:
    """Refuse a token that a model of so many has no embedding for: all would be NaN.

    Raises:
        ValueError: names the token and `where` it is.
    """
    if (token := max(ids, default=0)) >= vocab_size:
        raise ValueError(
            f"{where} holds {tokenizer.convert_ids_to_tokens(token)!r}, token {token},"
            f" for which the model has no embedding (vocab_size = {vocab_size}); take"
            " it out, or give the tokenizer that the model was trained with"
        )


def _refuse_surrogates(text: str, index: int) -> None:
    if not is_unicode(text):
        raise ValueError(f"prompt {index} is no Unicode text: save it as UTF-8")


def left_pad(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask [B T], T a power of two."""
    longest = max(len(row) for row in rows)
    width = max(1 << (longest - 1).bit_length(), _SHORTEST_BUCKET)
    tokens = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        tokens[b, width - len(row) :] = row
        mask[b, width - len(row) :] = 1
    return tokens, mask


def until_end(row: np.ndarray, eos_ids: Sequence[int]) -> list[int]:
    """The tokens before the first of `eos_ids`."""
    ends = np.flatnonzero(np.isin(row, list(eos_ids)))
    return row[: ends[0]].tolist() if ends.size else row.tolist()
