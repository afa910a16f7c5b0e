"""Text metrics: hand-derived values, several references, missing libraries."""

import importlib
import math
import sys

import pytest

from jaxtrain.evaluation.text_metrics import (
    TEXT_METRICS,
    align_references,
    make_text_metric,
)


def score(name: str, predictions, references) -> dict[str, float]:
    metric = make_text_metric(name)
    return metric(*align_references(predictions, references))


def test_exact_match_ignores_outer_whitespace_only():
    predictions = [" Paris\n", "paris", "", "42"]
    references = ["Paris", "Paris", " ", ["41", "42"]]
    assert score("exact_match", predictions, references) == {"exact_match": 0.75}


def test_bleu_matches_the_formula_worked_by_hand():
    pytest.importorskip("sacrebleu")
    # 1- to 4-gram precisions of "the cat sat on the mat" against "the cat sat on a
    # mat": 5/6, 3/5, 2/4, 1/3; same length, so no brevity penalty.
    expected = 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    result = score("bleu", ["the cat sat on the mat"], ["the cat sat on a mat"])
    assert result["bleu"] == pytest.approx(expected)


def test_bleu_takes_rows_with_different_numbers_of_references():
    pytest.importorskip("sacrebleu")
    texts = ["a b c d e", "f g h i j"]
    assert score("bleu", texts, [["x y", "a b c d e"], ["f g h i j"]])[
        "bleu"
    ] == pytest.approx(100)


def test_rouge_matches_the_formula_worked_by_hand_and_takes_the_best_reference():
    pytest.importorskip("rouge_score")
    # Prediction 3 words, reference 4, both unigrams in common in order "the cat":
    # unigrams P = 2/3, R = 2/4; bigrams P = 1/2, R = 1/3.
    result = score("rouge", ["the cat ran"], ["the cat sat down"])
    assert result["rouge1"] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert result["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert result["rougeL"] == pytest.approx(result["rouge1"])
    best = score("rouge", ["the cat ran"], [["no", "the cat ran"]])
    assert best == {"rouge1": 1, "rouge2": 1, "rougeL": 1}


@pytest.mark.parametrize("name", ["exact_match", "bleu", "rouge"])
def test_empty_texts_score_zero_and_do_not_fail(name):
    if name != "exact_match":
        pytest.importorskip({"bleu": "sacrebleu", "rouge": "rouge_score"}[name])
    for predictions, references in ((["", ""], ["a b", "c"]), (["a"], [""])):
        result = score(name, predictions, references)
        assert all(value == 0 for value in result.values())


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("bleu", "sacrebleu", "metrics"),
        ("rouge", "rouge_score", "metrics"),
        ("bertscore", "bert_score", "bertscore"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    monkeypatch, tmp_path, name, module, extra
):
    for loaded in [m for m in sys.modules if m.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 1}')
    with pytest.raises(ImportError, match=rf"{module}.*jaxtrain\[{extra}\]"):
        make_text_metric(name, bertscore_model=str(tmp_path))


def test_bad_requests_are_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'blue'.*exact_match, bleu, rouge"):
        make_text_metric("blue")
    with pytest.raises(ValueError, match="set bertscore_model"):
        make_text_metric("bertscore")
    with pytest.raises(ValueError, match=r"no config\.json"):
        make_text_metric("bertscore", bertscore_model="/nowhere")
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        align_references(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="at least one prediction"):
        align_references([], [])
    with pytest.raises(ValueError, match=r"references\[1\] is an empty list"):
        align_references(["a", "b"], ["a", []])
    assert set(TEXT_METRICS) == {"exact_match", "bleu", "rouge", "bertscore"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """A directory with a tiny random BERT and a word tokenizer."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("bert_score")
    transformers = importlib.import_module("transformers")
    folder = tmp_path_factory.mktemp("encoder")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["the", "cat", "sat", "on", "a", "mat"],
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.torch
def test_bertscore_is_one_for_equal_texts_and_zero_for_empty_ones(encoder):
    metric = make_text_metric("bertscore", bertscore_model=encoder)
    texts = ["the cat sat", "a mat"]
    same = metric(texts, [[text] for text in texts])
    for value in same.values():
        assert value == pytest.approx(1, abs=1e-5)
    other = metric(["the cat sat"], [["on a mat"]])
    assert other["bertscore_f1"] < 1 - 1e-3
    assert metric(["", "the"], [["the"], ["", " "]])["bertscore_f1"] == 0
    half = metric(["", *texts], [["the"], *([text] for text in texts)])
    assert half["bertscore_f1"] == pytest.approx(2 / 3, abs=1e-5)
    # The best of several references counts, and empty ones are passed over.
    best = metric(["the cat sat"], [["on a mat", "", "the cat sat"]])
    assert best["bertscore_f1"] == pytest.approx(1, abs=1e-5)
    # Longer than the encoder's 32 positions.
    long = metric(["cat " * 100], [["cat " * 100]])
    assert math.isclose(long["bertscore_f1"], 1, abs_tol=1e-5)
