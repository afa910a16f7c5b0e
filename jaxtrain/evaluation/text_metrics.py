"""Text metrics by name: how well generated texts match their references.

`make_text_metric(name)` gives a function of predictions and acceptable references.
The libraries are extras; one that is missing is named with its pip command.
"""

import importlib
import importlib.util
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Texts = list[str]
Scores = dict[str, float]
# Each maps predictions [n] and their acceptable references [n][1..] to named scores.
TextMetric = Callable[[Texts, list[Texts]], Scores]


def make_text_metric(name: str, *, bertscore_model: str | None = None) -> TextMetric:
    """The metric called `name`, its library imported.

    `name` may also be `module:function`, see `load_text_metric`.

    Raises:
        ValueError: the name is unknown, or BERTScore has no model.
        ImportError: the library is missing; names the pip extra.
    """
    if ":" in name:
        return load_text_metric(name)
    if name not in TEXT_METRICS:
        raise ValueError(
            f"unknown text metric {name!r}: choose from {', '.join(TEXT_METRICS)}, or "
            "write a function of your own as module:function"
        )
    if name == "bertscore":
        return make_bertscore(bertscore_model)
    return TEXT_METRICS[name]()


def check_text_metric(name: str, *, bertscore_model: str | None = None) -> None:
    """See that `make_text_metric` would work, without loading an encoder.

    Raises:
        ValueError, ImportError: as it would.
    """
    if name != "bertscore":
        make_text_metric(name)
        return
    _encoder_config(bertscore_model)
    if importlib.util.find_spec("bert_score") is None:
        _import("bert_score", extra="bertscore")


def load_text_metric(path: str) -> TextMetric:
    """A metric of your own, from `module:function`.

    The module must be importable: installed, or in the working directory or on
    PYTHONPATH. The function gets the texts and, for each, the list of its references;
    it returns a number, which is then named as the function is, or a dict of numbers.

    Raises:
        ValueError: no such module or function.
    """
    module_name, _, function_name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"text metric {path!r}: {error}; install the module, or put its folder on "
            "PYTHONPATH"
        ) from error
    if not callable(function):
        raise ValueError(
            f"text metric {path!r}: {module_name} has no function {function_name!r}"
        )

    def custom(predictions: Texts, references: list[Texts]) -> Scores:
        result = function(predictions, references)
        scores = result if isinstance(result, Mapping) else {function_name: result}
        return {name: float(value) for name, value in scores.items()}

    return custom


def exact_match(predictions: Texts, references: list[Texts]) -> Scores:
    """`exact_match`: share of texts equal to a reference, but for outer whitespace."""
    hits = [
        text.strip() in {reference.strip() for reference in alternatives}
        for text, alternatives in zip(predictions, references, strict=True)
    ]
    return {"exact_match": sum(hits) / len(hits)}


def make_bleu() -> TextMetric:
    """`bleu`, 0 to 100: corpus BLEU as sacrebleu computes it by default."""
    sacrebleu = _import("sacrebleu", extra="metrics")

    def bleu(predictions: Texts, references: list[Texts]) -> Scores:
        # sacrebleu wants one list for each reference; None fills the gaps.
        columns = list(map(list, itertools.zip_longest(*references)))
        return {"bleu": sacrebleu.corpus_bleu(predictions, columns).score}

    return bleu


def make_rouge() -> TextMetric:
    """`rouge1`, `rouge2`, `rougeL`, 0 to 1: mean F-measure, best over references."""
    scorer_module = _import("rouge_score.rouge_scorer", extra="metrics")
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = scorer_module.RougeScorer(kinds, use_stemmer=False)

    def rouge(predictions: Texts, references: list[Texts]) -> Scores:
        totals = dict.fromkeys(kinds, 0.0)
        for text, alternatives in zip(predictions, references, strict=True):
            scores = scorer.score_multi(alternatives, text)
            for kind in kinds:
                totals[kind] += scores[kind].fmeasure
        return {kind: total / len(predictions) for kind, total in totals.items()}

    return rouge


def make_bertscore(model: str | None = None) -> TextMetric:
    """`bertscore_{precision,recall,f1}`: token similarity (arXiv:1904.09675).

    The last layer of the encoder in directory `model` is used, and no rescaling. An
    empty text or reference has no token to compare, and scores 0.
    """
    sizes = _encoder_config(model)
    layers = sizes.get("num_hidden_layers") or sizes.get("num_layers")
    library = _import("bert_score", extra="bertscore")
    scorer = library.BERTScorer(model_type=model, num_layers=layers, device="cpu")
    longest = sizes.get("max_position_embeddings", 512)
    # Tokenizers with no length of their own overflow the encoder, and the truncation.
    limit = min(scorer._tokenizer.model_max_length, longest)
    scorer._tokenizer.model_max_length = limit

    def bertscore(predictions: Texts, references: list[Texts]) -> Scores:
        totals = [0.0, 0.0, 0.0]
        pairs = [
            (text, [reference for reference in alternatives if reference.strip()])
            for text, alternatives in zip(predictions, references, strict=True)
        ]
        full = [(text, refs) for text, refs in pairs if text.strip() and refs]
        if full:
            scores = scorer.score([text for text, _ in full], [r for _, r in full])
            totals = [float(part.sum()) for part in scores]
        names = ("bertscore_precision", "bertscore_recall", "bertscore_f1")
        means = (total / len(predictions) for total in totals)
        return dict(zip(names, means, strict=True))

    return bertscore


def _encoder_config(model: str | None) -> dict[str, Any]:
    """The config.json of BERTScore's encoder.

    Raises:
        ValueError: there is none.
    """
    if model is None:
        raise ValueError(
            "text metric 'bertscore' needs an encoder: set bertscore_model to a local "
            "Hugging Face directory"
        )
    config = pathlib.Path(model) / "config.json"
    if not config.is_file():
        raise ValueError(
            f"bertscore_model={model!r} is not a Hugging Face directory: it has no "
            "config.json"
        )
    return dict(json.loads(config.read_text()))


TEXT_METRICS: dict[str, Callable[[], TextMetric]] = {
    "exact_match": lambda: exact_match,
    "bleu": make_bleu,
    "rouge": make_rouge,
    "bertscore": make_bertscore,
}


def _import(module: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this metric needs {module.split('.')[0]}, which is missing: "
            f"pip install 'jaxtrain[{extra}]'"
        ) from error


def align_references(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> tuple[Texts, list[Texts]]:
    """Predictions, and for each the list of its references.

    Raises:
        ValueError: the numbers of texts differ, there are none, or a prediction has no
            reference.
    """
    if len(predictions) != len(references) or not len(predictions):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references: pass "
            "one reference, or one list of them, for each of at least one prediction"
        )
    alternatives = [[r] if isinstance(r, str) else list(r) for r in references]
    if [] in alternatives:
        index = alternatives.index([])
        raise ValueError(f"references[{index}] is an empty list: give one or more")
    return list(predictions), alternatives
