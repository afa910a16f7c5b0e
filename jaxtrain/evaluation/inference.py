"""Use a loaded model outside a training run: score batches and generate texts."""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxtrain import sharding
from jaxtrain.evaluation.generate import Generator, generate_texts, make_generate
from jaxtrain.models.generation_config import GenerationConfig, as_ids
from jaxtrain.models.transformer import Decoder
from jaxtrain.objectives import next_token
from jaxtrain.types import Batch, Metrics, PairBatch, Params


class Inference(abc.ABC):
    """Scoring and generation with a decoder.

    `models.load.LoadedModel` is the implementation that holds the weights.
    """

    decoder: Decoder
    tokenizer: Any
    plan: sharding.ShardingPlan
    generation: GenerationConfig

    @property
    @abc.abstractmethod
    def params(self) -> Params:
        """The weights, in device memory or in the host memory they are offloaded to."""

    def on_device(self, params: Params) -> Params:
        """Return the weights whole in device memory: copies of what is not kept so."""
        if self.plan.parted:
            return jax.device_put(params, self.plan.replicated)
        if not self.plan.offload_params:
            return params
        layouts = sharding.layouts_of(params)
        return jax.device_put(params, sharding.on_device(layouts))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids of the tokens that end a text, from the tokenizer and from the model."""
        ids = {self.tokenizer.eos_token_id, *as_ids(self.decoder.config.eos_token_id)}
        return tuple(sorted(ids.union(self.generation.eos_ids) - {None}))

    def make_generator(
        self, max_new_tokens: int | None = None, **options: Any
    ) -> Generator:
        """Call `generate.make_generate` for this model, and remember the result.

        A setting that is None or absent takes its value from generation_config.json.
        """
        given = tuple(sorted({"max_new_tokens": max_new_tokens, **options}.items()))
        if given not in self._generators:
            self._generators[given] = make_generate(
                self.decoder,
                eos_ids=self.eos_ids,
                pad_id=self.tokenizer.pad_token_id,
                **self.generation.settings(**dict(given)),
            )
        return self._generators[given]

    def score(self, batch: Batch | PairBatch | Mapping[str, Any]) -> Metrics:
        """Sums of loss (nats), accuracy and entropy over one batch of numpy [B, T].

        For a `PairBatch` this scores the chosen completions. A mapping holds arrays
        under the names of the fields of `types.Batch`. If B is not a multiple of the
        number of data-parallel devices, empty rows are added.
        """
        if isinstance(batch, Mapping):
            names = [n for n in Batch.__dataclass_fields__ if n in batch]
            batch = Batch(**{n: np.asarray(batch[n]) for n in names})
        rows = batch.chosen if isinstance(batch, PairBatch) else batch
        missing = -len(rows.tokens) % self.plan.batch_shards
        if missing:
            rows = jax.tree.map(lambda x: np.pad(x, ((0, missing), (0, 0))), rows)
        placed: Any = sharding.place_batch(rows, self.plan.batch())
        return self._score(self.on_device(self.params), placed)

    def generate(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any]]],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> list[str]:
        """Continue each string or conversation with one text. See `generate_texts`.

        A setting that is None takes its value from the model's generation_config.json.
        Without that file, up to 64 new tokens are generated, and each is the most
        likely one.

        Raises:
            ValueError: the weights were handed to a training run, or a setting is out
                of range.
        """
        return generate_texts(
            self.make_generator(
                max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p
            ),
            self.on_device(self.params),
            self.tokenizer,
            prompts,
            key=jax.random.key(seed),
            batch_size=self.plan.fill_up(batch_size),
            vocab_size=self.decoder.config.vocab_size,
        )

    @functools.cached_property
    def _score(self) -> Callable[[Params, Batch], Metrics]:
        def score(params: Params, batch: Batch) -> Metrics:
            policy = functools.partial(self.decoder.token_log_probs, params)
            loss, metrics = next_token(policy, None, batch)
            return {"loss": loss, **metrics}

        return self.plan.jit(score)

    @functools.cached_property
    def _generators(self) -> dict[Any, Generator]:
        return {}


def unpacked_rows(
    documents: Sequence[tuple[Sequence[int], int]], shape: tuple[int, int]
) -> Batch:
    """Put each document in a row of its own, padded to `shape` [B, T]; numpy arrays.

    Args:
        documents: token ids, and the index of the first prediction that counts. With
            index i the loss starts at the prediction of token i + 1 from tokens 0 to i.
    """
    tokens, targets, segment_ids, positions = np.zeros((4, *shape), np.int32)
    loss_mask = np.zeros(shape, np.float32)
    for b, (ids, first_counted) in enumerate(documents):
        length = max(len(ids) - 1, 0)
        tokens[b, :length] = ids[:-1]
        targets[b, :length] = ids[1:]
        segment_ids[b, :length] = 1
        positions[b, :length] = np.arange(length)
        loss_mask[b, first_counted:length] = 1
    return Batch(tokens, targets, segment_ids, positions, loss_mask)
