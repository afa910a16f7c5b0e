"""MetricsCalculator: hand-derived values, any batching, refusals."""

import json
import logging
import math
import types

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.metrics import MetricsCalculator, perplexity, token_accuracy
from jaxtrain.types import Batch, WeightedSum


class WordTokenizer:
    """Ids are word lengths; special tokens 1 (begin) and 2 (end)."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool = True):
        ids = [10 + len(word) for word in text.split()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        assert not tokenize
        text = "".join(f"<{m['role']}> {m['content']} " for m in messages)
        return text + ("<assistant> " if add_generation_prompt else "")


class RecordingModel:
    """Loss = 0.1 * target of each scored token; keeps the batches it sees."""

    def __init__(self, answers: dict[str, str] | None = None) -> None:
        self.batches: list[Batch] = []
        if answers is not None:
            self.generate = lambda prompts: [answers[prompt] for prompt in prompts]

    def score(self, batch):
        self.batches.append(batch)
        mask = jnp.asarray(batch.loss_mask)
        loss = 0.1 * (jnp.asarray(batch.targets) * mask).sum()
        return {
            "loss": WeightedSum(loss, mask.sum()),
            "never": WeightedSum(jnp.float32(0), jnp.float32(0)),
        }


def test_training_metrics_of_ids_and_logits_and_model_outputs_agree():
    references = np.array([[3, 1, -100], [0, 2, 2]])
    ids = np.array([[3, 0, 9], [0, 2, 1]])  # 3 of the 5 scored are right
    logits = np.eye(10)[ids]
    calculator = MetricsCalculator()
    for predictions in (ids, logits, types.SimpleNamespace(logits=jnp.asarray(logits))):
        metrics = calculator.compute_training_metrics(predictions, references, 0.5)
        assert metrics == {
            "loss": 0.5,
            "perplexity": pytest.approx(math.exp(0.5)),
            "token_accuracy": pytest.approx(3 / 5),
        }


def test_training_metrics_of_strings_use_the_text_metrics():
    loss = WeightedSum(jnp.float32(6.0), jnp.float32(3.0))
    metrics = MetricsCalculator().compute_training_metrics(
        ["yes", "no"], ["yes", ["maybe", "never"]], loss
    )
    assert metrics["loss"] == 2
    assert metrics["exact_match"] == 0.5


def test_perplexity_overflows_to_infinity_and_keeps_nan():
    assert perplexity(0) == 1
    assert perplexity(1e4) == math.inf
    assert perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_token_accuracy_without_a_scored_token_is_nan():
    assert math.isnan(token_accuracy(np.array([1]), np.array([-100])))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(2, 3\), references \(2, 4\)"):
        token_accuracy(np.zeros((2, 3), int), np.zeros((2, 4), int))


def test_text_rows_become_batches_that_score_only_the_answers():
    rows = [
        {"prompt": "a bb", "completion": "ccc dddd"},
        {"text": "a bb"},
    ]
    model = RecordingModel()
    calculator = MetricsCalculator(batch_size=3)
    metrics = calculator.compute_evaluation_metrics(model, rows, WordTokenizer())
    (batch,) = model.batches
    # begin, prompt, answer, end; T = 8 holds the 5 predictions.
    assert batch.tokens.shape == (3, 8)
    np.testing.assert_array_equal(batch.tokens[0, :5], [1, 11, 12, 13, 14])
    np.testing.assert_array_equal(batch.targets[0, :5], [11, 12, 13, 14, 2])
    np.testing.assert_array_equal(batch.loss_mask[0], [0, 0, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch.segment_ids[0], [1, 1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch.positions[0, :5], np.arange(5))
    np.testing.assert_array_equal(batch.loss_mask[1], [1, 1, 1, 0, 0, 0, 0, 0])
    assert not batch.loss_mask[2].any() and not batch.segment_ids[2].any()
    expected = 0.1 * (13 + 14 + 2 + 11 + 12 + 2) / 6
    assert metrics["eval_loss"] == pytest.approx(expected)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected))
    assert metrics["eval_never"] == 0


def test_conversations_are_scored_on_the_last_answer_as_the_template_writes_it():
    conversation = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello you"},
    ]
    model = RecordingModel()
    MetricsCalculator(batch_size=1).compute_evaluation_metrics(
        model, [{"messages": conversation}], WordTokenizer()
    )
    (batch,) = model.batches
    # <user> hi <assistant> | hello you; the template ends it, so no eos is added.
    np.testing.assert_array_equal(batch.tokens[0], [16, 12, 21, 15])
    np.testing.assert_array_equal(batch.targets[0], [12, 21, 15, 13])
    np.testing.assert_array_equal(batch.loss_mask[0], [0, 0, 1, 1])


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=9),
    st.integers(1, 5),
)
def test_the_batch_size_changes_no_metric(lengths, batch_size):
    rows = [{"text": " ".join("x" * n for n in range(1, k + 1))} for k in lengths]
    one, some = (
        MetricsCalculator(batch_size=size).compute_evaluation_metrics(
            RecordingModel(), rows, WordTokenizer()
        )
        for size in (len(rows), batch_size)
    )
    assert one == pytest.approx(some, rel=1e-5)


def test_long_rows_are_cut_at_max_length():
    model = RecordingModel()
    MetricsCalculator(batch_size=1, max_length=4).compute_evaluation_metrics(
        model, [{"text": "a " * 50}], WordTokenizer()
    )
    assert model.batches[0].tokens.shape == (1, 4)


def test_a_prepared_data_set_is_read_by_rows_and_filled_up_with_empty_ones():
    class Prepared:
        def __len__(self):
            return 3

        def row_lengths(self):
            return np.full(3, 2)

        def batch(self, rows):
            mask = np.where(rows[:, None] < 0, 0.0, 1.0) * np.ones((1, 2))
            return types.SimpleNamespace(
                targets=np.stack([rows, rows], 1), loss_mask=mask
            )

    model = RecordingModel()
    metrics = MetricsCalculator(batch_size=2).compute_evaluation_metrics(
        model, Prepared()
    )
    assert [batch.targets[:, 0].tolist() for batch in model.batches] == [
        [0, 1],
        [2, -1],
    ]
    assert metrics["eval_loss"] == pytest.approx(0.1)


def test_ready_batches_pass_through_unchanged():
    batch = types.SimpleNamespace(
        targets=np.array([[4, 9]]), loss_mask=np.array([[1.0, 0.0]])
    )
    model = RecordingModel()
    metrics = MetricsCalculator().compute_evaluation_metrics(model, [batch])
    assert model.batches[0] is batch
    assert metrics["eval_loss"] == pytest.approx(0.4)


def test_generation_metrics_need_prompts_references_and_a_generating_model():
    rows = [
        {"prompt": "1 + 1", "completion": "2"},
        {"prompt": "1 + 2", "references": ["three", "3"]},
        {"prompt": "say", "chosen": "a", "rejected": "b"},
        {"text": "no prompt here"},
    ]
    answers = {"1 + 1": "2", "1 + 2": "3", "say": "b"}
    calculator = MetricsCalculator()
    metrics = calculator.compute_evaluation_metrics(
        RecordingModel(answers), rows, WordTokenizer()
    )
    assert metrics["eval_exact_match"] == pytest.approx(2 / 3)
    silent = calculator.compute_evaluation_metrics(
        RecordingModel(), rows, WordTokenizer()
    )
    assert "eval_exact_match" not in silent


def test_bad_evaluation_sets_are_refused():
    calculator = MetricsCalculator()
    with pytest.raises(ValueError, match="is it empty"):
        calculator.compute_evaluation_metrics(RecordingModel(), [])
    with pytest.raises(ValueError, match="row 0 of eval_dataset is text"):
        calculator.compute_evaluation_metrics(RecordingModel(), [{"text": "a"}])
    with pytest.raises(ValueError, match=r"row 1 .* fields \['prompt'\].*completion"):
        calculator.compute_evaluation_metrics(
            RecordingModel(), [{"text": "a"}, {"prompt": "b"}], WordTokenizer()
        )
    with pytest.raises(ValueError, match="unknown text metric 'nope'"):
        MetricsCalculator(text_metrics=["nope"])


def test_log_metrics_writes_floats_at_the_step(caplog):
    class Writer:
        def write(self, step, metrics):
            self.record = (step, json.loads(json.dumps(metrics)))

    writer = Writer()
    calculator = MetricsCalculator(writers=[writer])
    with caplog.at_level(logging.INFO):
        calculator.log_metrics(
            {"loss": jnp.float32(1.5), "step": np.int32(7), "epoch": 0.25}
        )
    assert writer.record == (7, {"loss": 1.5, "epoch": 0.25})
    assert "step 7: loss 1.5, epoch 0.25" in caplog.text
