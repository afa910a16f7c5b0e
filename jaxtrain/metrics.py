"""MetricsCalculator: what a run reports of its training and of its evaluations.

Beside it stand `text_metrics`, which compares generated texts with references, and
`throughput`, which times the loop.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxtrain.batch import Batch
from jaxtrain.evaluation.held_out import add_metrics, perplexity, to_floats
from jaxtrain.evaluation.inference import unpacked_rows
from jaxtrain.evaluation.text_metrics import align_references, make_text_metric
from jaxtrain.record.writers import Writer
from jaxtrain.types import Metrics, WeightedSum

logger = logging.getLogger(__name__)

_IGNORED_LABEL = -100  # Hugging Face's mark for a label that is not scored
_REFERENCE_FIELDS = ("completion", "response", "reference", "references", "chosen")


class ScoringModel(Protocol):
    """What `compute_evaluation_metrics` needs of a model.

    A model may also have `generate(prompts) -> texts`, over lists of strings; then the
    text metrics are computed for rows that hold references.
    """

    def score(self, batch: Any) -> Mapping[str, WeightedSum]:
        """Sums over one batch of numpy arrays [B T], "loss" (nats) among them.

        The batch is a `types.Batch`, one of a prepared data set, or an item of
        `eval_dataset` that is no row of text, as it is. The sums are what an
        evaluation step returns, with its state bound.
        """


class MetricsCalculator:
    """Training and evaluation metrics, as plain floats."""

    def __init__(
        self,
        config: Any = None,
        *,
        writers: Sequence[Writer] = (),
        text_metrics: Sequence[str] | None = None,
        bertscore_model: str | None = None,
        batch_size: int = 8,
        max_length: int = 1024,
    ) -> None:
        """Check the names of the metrics and that their libraries are installed.

        Args:
            config: the run's config; its `training.generation` names the metrics where
                the two arguments below do not.
            writers: where `log_metrics` writes; only their `write` is called.
            text_metrics: names from `text_metrics.TEXT_METRICS`, or functions of your
                own as `module:function`; without a config, exact_match.
            bertscore_model: directory of the encoder that BERTScore uses.
            batch_size: rows of a batch made from text rows or a prepared data set.
            max_length: tokens after which a text row is cut.

        Raises:
            ValueError: an unknown metric, or BERTScore without a model.
            ImportError: a metric's library is missing; names the pip extra.
        """
        self.config = config
        self._writers = tuple(writers)
        # A ConfigManager, a ConfigDict and a RunConfig have it at one of two places.
        training = getattr(config, "training", config)
        settings = getattr(training, "generation", None)
        if text_metrics is None:
            text_metrics = getattr(settings, "metrics", None) or ("exact_match",)
        if bertscore_model is None:
            bertscore_model = getattr(settings, "bertscore_model", None)
        make = functools.partial(make_text_metric, bertscore_model=bertscore_model)
        self._text_metrics = list(map(make, text_metrics))
        self._batch_size = batch_size
        self._max_length = max_length

    def compute_training_metrics(
        self, predictions: Any, references: Any, loss: Any
    ) -> dict[str, float]:
        """`loss`, `perplexity`, and how well `predictions` match `references`.

        Args:
            predictions: token ids [...]; or logits [..., V], or an object with such
                `.logits`; or strings. Position t predicts position t of `references`:
                nothing is shifted here.
            references: token ids [...], -100 where not scored; or strings, or a list
                of acceptable strings for each.
            loss: mean negative log-likelihood in nats, or a `WeightedSum` of it.

        Returns:
            Beside the first two, `token_accuracy` for arrays, the chosen text metrics
            for strings.

        Raises:
            ValueError: the shapes or the lengths differ.
        """
        mean = _mean(loss)
        metrics = {"loss": mean, "perplexity": perplexity(mean)}
        if _are_texts(references):
            return metrics | self.compute_text_metrics(predictions, references)
        predictions = getattr(predictions, "logits", predictions)
        metrics["token_accuracy"] = token_accuracy(predictions, references)
        return metrics

    def compute_evaluation_metrics(
        self, model: ScoringModel, eval_dataset: Iterable[Any], tokenizer: Any = None
    ) -> dict[str, float]:
        """`eval_loss`, `eval_perplexity`, what else the model scores, text metrics.

        Args:
            model: see `ScoringModel`.
            eval_dataset: batches for `model.score`; or a prepared data set, with
                `len` and `batch(rows)`; or text rows, which are dicts with `text`, or
                `messages`, or `prompt` and one of `completion`, `response`,
                `reference`, `references`, `chosen`.
            tokenizer: a Hugging Face tokenizer, needed for text rows.

        Returns:
            Means over all scored tokens of the set, however it is batched. Where the
            model generates and rows have a prompt, `eval_*` of the text metrics too.

        Raises:
            ValueError: there is no token to score, or a row has none of the fields.
        """
        rows: list[_TextRow] = []
        sums: Metrics | None = None
        for batch in self._batches(eval_dataset, tokenizer, rows):
            scored = jax.device_get(dict(model.score(batch)))
            sums = add_metrics(sums, jax.tree.map(float, scored))  # in double precision
        if sums is None or not sums["loss"].weight:
            raise ValueError("eval_dataset has no token to score: is it empty?")
        metrics = {f"eval_{name}": value for name, value in to_floats(sums).items()}
        metrics["eval_perplexity"] = perplexity(metrics["eval_loss"])
        generate = getattr(model, "generate", None)
        asked = [row for row in rows if row.prompt]
        if generate is not None and asked:
            texts = generate([row.prompt for row in asked])
            scores = self.compute_text_metrics(texts, [row.references for row in asked])
            metrics |= {f"eval_{name}": value for name, value in scores.items()}
        return metrics

    def compute_text_metrics(
        self, predictions: Sequence[str], references: Sequence[str | Sequence[str]]
    ) -> dict[str, float]:
        """The chosen text metrics of `predictions` against their references.

        Raises:
            ValueError: the numbers of texts differ, there are none, or a prediction
                has no reference.
        """
        texts, alternatives = align_references(predictions, references)
        result: dict[str, float] = {}
        for metric in self._text_metrics:
            result |= metric(texts, alternatives)
        return result

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Log one line and write to every writer; `step` in `metrics` is the step."""
        numbers = {name: _mean(value) for name, value in metrics.items()}
        step = int(numbers.pop("step", 0))
        shown = ", ".join(f"{name} {value:.6g}" for name, value in numbers.items())
        logger.info("step %d: %s", step, shown)
        for writer in self._writers:
            writer.write(step, numbers)

    def _batches(
        self, eval_dataset: Any, tokenizer: Any, read: list["_TextRow"]
    ) -> Iterator[Any]:
        """Batches of any kind of data set; text rows are appended to `read`."""
        size = self._batch_size
        if hasattr(eval_dataset, "batch") and hasattr(eval_dataset, "row_lengths"):
            for start in range(0, len(eval_dataset), size):
                ids = np.arange(start, start + size)
                # Row -1 is an empty row: every batch has one shape.
                yield eval_dataset.batch(np.where(ids < len(eval_dataset), ids, -1))
            return
        for index, item in enumerate(eval_dataset):
            if not _is_text_row(item):
                yield item
                continue
            if tokenizer is None:
                raise ValueError(f"row {index} of eval_dataset is text: pass tokenizer")
            read.append(_read_text_row(item, index, tokenizer))
            if len(read) % size == 0:
                yield _make_text_batch(read[-size:], tokenizer, size, self._max_length)
        if rest := len(read) % size:
            yield _make_text_batch(read[-rest:], tokenizer, size, self._max_length)


def token_accuracy(predictions: Any, references: Any) -> float:
    """Share of the scored tokens that are predicted; NaN where none is scored.

    Args:
        predictions: token ids [...] or logits [..., V].
        references: token ids [...], -100 where not scored.

    Raises:
        ValueError: the shapes do not fit.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.ndim == references.ndim + 1:
        predictions = predictions.argmax(axis=-1)
    if predictions.shape != references.shape:
        raise ValueError(
            f"predictions have shape {predictions.shape}, references "
            f"{references.shape}: pass ids of the same shape, or logits with one more "
            "dimension, aligned with the references"
        )
    scored = references != _IGNORED_LABEL
    hits = (predictions == references)[scored]
    return float(hits.mean()) if hits.size else math.nan


def _mean(value: Any) -> float:
    if isinstance(value, WeightedSum):
        total, weight = float(value.total), float(value.weight)
        return total / weight if weight else 0.0
    return float(value)


def _are_texts(value: Any) -> bool:
    first = next(iter(value), None) if isinstance(value, list | tuple) else None
    if isinstance(first, list | tuple) and first:
        first = first[0]
    return isinstance(first, str)


@dataclasses.dataclass(frozen=True)
class _TextRow:
    """A prompt, which may be empty, and the texts that may follow it."""

    prompt: str
    references: list[str]
    templated: bool = False  # the chat template wrote the special tokens already


def _is_text_row(item: Any) -> bool:
    fields = ("text", "prompt", "messages") if isinstance(item, Mapping) else ()
    return any(isinstance(item.get(name), str | list) for name in fields)


def _read_text_row(row: Mapping[str, Any], index: int, tokenizer: Any) -> _TextRow:
    if isinstance(row.get("text"), str):
        return _TextRow("", [row["text"]])
    if row.get("messages"):
        return _read_conversation(row["messages"][:-1], row["messages"][-1:], tokenizer)
    prompt = row.get("prompt")
    for answer in filter(None, map(row.get, _REFERENCE_FIELDS)):
        if isinstance(prompt, list) and isinstance(answer, list):
            return _read_conversation(prompt, answer, tokenizer)
        if isinstance(prompt, str):
            texts = [answer] if isinstance(answer, str) else [str(a) for a in answer]
            return _TextRow(prompt, texts)
    raise ValueError(
        f"row {index} of eval_dataset has fields {sorted(row)}: it needs text, "
        f"messages, or prompt with one of {', '.join(_REFERENCE_FIELDS)}"
    )


def _read_conversation(
    prompt: list[Any], answer: list[Any], tokenizer: Any
) -> _TextRow:
    """The template's text up to the answer, and the answer as the template ends it."""
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    asked = render(prompt, add_generation_prompt=True)
    whole = render([*prompt, *answer])
    if not whole.startswith(asked):
        raise ValueError(
            "the chat template changes the prompt once it is answered, so the answer "
            "cannot be told apart: pass rows of prompt and completion strings"
        )
    return _TextRow(asked, [whole[len(asked) :]], templated=True)


def _make_text_batch(
    rows: Sequence[_TextRow], tokenizer: Any, batch_size: int, max_length: int
) -> Batch:
    """One padded batch [batch_size T] in which only what follows prompts is scored.

    T is a power of two, so that few shapes are compiled. Where a row has several
    references, the first is scored.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = []
    for row in rows:
        special = not row.templated
        prompt = []
        if row.prompt:
            prompt = tokenizer(row.prompt, add_special_tokens=special)["input_ids"]
            special = False
        answer = tokenizer(row.references[0], add_special_tokens=special)["input_ids"]
        ids = [*prompt, *answer, *([] if row.templated else eos)]
        encoded.append((ids[: max_length + 1], max(len(prompt) - 1, 0)))
    longest = max(len(ids) for ids, _ in encoded) - 1
    shape = (batch_size, 1 << max(longest - 1, 0).bit_length())
    return unpacked_rows(encoded, shape)
