"""Texts generated in training: held-out prompts, what the policy makes of them, scores.

Prompts and references are read off the prepared evaluation rows, so they are what the
model is trained and evaluated on, to the token: chat template, truncation and all.
"""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain.data.batches.dataset import PreparedDataset, TokenStore
from jaxtrain.evaluation.generate import Generator, generate_texts
from jaxtrain.evaluation.text_metrics import TextMetric
from jaxtrain.types import Params

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Tokens to continue, the same as text, and the text that should follow."""

    tokens: list[int]
    text: str
    reference: str


def read_prompts(
    data: PreparedDataset, tokenizer: Any, count: int, *, new_tokens: int
) -> list[Prompt]:
    """The first `count` prompts of prepared rows; of pairs, with the chosen answer.

    A prompt is what comes before the last run of trained tokens. Where a document is
    trained from its start, it is what comes before its last assistant turn, or for
    plain text its first half, of which the next `new_tokens` are the reference.
    """
    store = data.stores.get("chosen") or data.stores[""]
    header = _assistant_header(tokenizer)
    prompts = []
    for document in range(len(store.lengths)):
        ids, start, stop = _split(store, document, header, new_tokens)
        if start == 0 or start == stop:
            continue
        prompts.append(
            Prompt(
                ids[:start],
                tokenizer.decode(ids[:start]),
                tokenizer.decode(ids[start:stop], skip_special_tokens=True).strip(),
            )
        )
        if len(prompts) == count:
            break
    return [prompt for prompt in prompts if prompt.reference]


def _split(
    store: TokenStore, document: int, header: list[int], new_tokens: int
) -> tuple[list[int], int, int]:
    """A document's tokens, and where the answer in it starts and ends."""
    first, length = int(store.starts[document]), int(store.lengths[document])
    ids = np.asarray(store.tokens[first : first + length]).tolist()
    trained = np.asarray(store.trained[first : first + length])
    if not trained.any():
        return ids, 0, 0
    stop = int(np.flatnonzero(trained)[-1]) + 1
    untrained = np.flatnonzero(~trained[:stop])
    # A document's first token is never predicted, whatever its flag says.
    start = int(untrained[-1]) + 1 if untrained.size else 0
    if start > 1:
        return ids, start, stop
    if header:
        for at in range(length - len(header), 0, -1):
            if ids[at : at + len(header)] == header:
                return ids, at + len(header), length
    half = length // 2
    return ids, half, min(half + new_tokens, length)


def _assistant_header(tokenizer: Any) -> list[int]:
    """The tokens by which the chat template opens an answer; none if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        return []
    render = functools.partial(
        tokenizer.apply_chat_template,
        [{"role": "user", "content": "?"}],
        tokenize=False,
    )
    closed, opened = (render(add_generation_prompt=opens) for opens in (False, True))
    if not opened.startswith(closed):
        return []
    return tokenizer(opened[len(closed) :], add_special_tokens=False)["input_ids"]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Generate from held-out prompts and measure the texts. Every process calls it."""

    generator: Generator
    tokenizer: Any
    prompts: Sequence[Prompt]
    metrics: Sequence[TextMetric]
    batch_size: int
    num_logged: int
    seed: int

    def __call__(self, params: Params) -> tuple[dict[str, float], dict[str, str]]:
        """Scores by name, and the first texts as `sample_1/prompt`, `/output`, ...

        The draws depend on the seed alone: evaluations differ by the weights only.
        """
        texts = generate_texts(
            self.generator,
            params,
            self.tokenizer,
            [prompt.tokens for prompt in self.prompts],
            key=jax.random.key(self.seed),
            batch_size=self.batch_size,
        )
        references = [[prompt.reference] for prompt in self.prompts]
        scores: dict[str, float] = {}
        for metric in self.metrics:
            scores |= metric([text.strip() for text in texts], references)
        words = [len(text.split()) for text in texts]
        scores["generated_words"] = sum(words) / len(words)
        samples: dict[str, str] = {}
        logged = zip(self.prompts[: self.num_logged], texts, strict=False)
        for number, (prompt, text) in enumerate(logged, start=1):
            samples[f"sample_{number}/prompt"] = prompt.text
            samples[f"sample_{number}/output"] = text
            samples[f"sample_{number}/reference"] = prompt.reference
        return scores, samples
