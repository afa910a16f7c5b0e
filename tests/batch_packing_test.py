"""Packing each micro-batch: every objective has the numbers of padded rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.data.batches import pipeline
from jaxtrain.data.batches.dataset import DataStats, PreparedDataset, TokenStore
from jaxtrain.data.batches.layout import choose_packing, lengths_of
from jaxtrain.data.batches.pipeline import BatchShape
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.transformer import Decoder
from jaxtrain.objectives import make_objective
from jaxtrain.objectives.options import OBJECTIVES
from jaxtrain.objectives.preference import score_pairs
from jaxtrain.passes.difficulty import row_difficulty
from jaxtrain.types import TokenLogProbs

VOCABULARY, EXAMPLES = 11, 7


def store(sequences, first_trained):
    lengths = np.asarray([len(sequence) for sequence in sequences])
    trained = [
        np.arange(len(s)) >= n for s, n in zip(sequences, first_trained, strict=True)
    ]
    return TokenStore(
        np.concatenate(sequences).astype(np.int32),
        np.concatenate(trained),
        np.cumsum(lengths) - lengths,
        lengths,
        np.arange(len(lengths)),
        np.arange(len(lengths) + 1),
    )


def make_data(objective, seed=0, *, shares_prompts=False):
    random = np.random.default_rng(seed)
    prompts = [
        random.integers(1, VOCABULARY, n) for n in random.integers(1, 5, EXAMPLES)
    ]
    firsts = [len(prompt) for prompt in prompts]

    def side():
        ends = [
            random.integers(1, VOCABULARY, n) for n in random.integers(1, 7, EXAMPLES)
        ]
        return store(
            [np.concatenate(x) for x in zip(prompts, ends, strict=True)], firsts
        )

    names = {
        "next_token": [""],
        "preference": ["chosen", "rejected"],
        "labeled": ["completions", "mismatched"],
    }[objective]
    values, logps = {}, None
    if objective == "labeled":
        values["desirable"] = (np.arange(EXAMPLES) % 3 > 0).astype(np.float32)
    if objective == "preference":
        logps = {name: random.normal(-8, 2, EXAMPLES) for name in names}
    return PreparedDataset(
        objective,
        {name: side() for name in names},
        row_length=24,
        pad_id=0,
        stats=DataStats(),
        reference_logps=logps,
        row_values=values,
        shares_prompts=shares_prompts,
    )


def both_batches(data, scored=0):
    """The same micro-batch padded, a row for each example, and packed in few rows."""
    rows = np.asarray([3, 0, -1, 5, 1, 2, 6, 4])
    packing = choose_packing(
        data.side_lengths, rows[None, None], 1, shards=2, row_length=None
    )
    found = packing.place(rows[None], lengths_of(data.side_lengths, rows[None]))
    slots, (_, length, _) = found
    assert slots.shape == (1, 2, 8)
    return data.batch(rows), data.pack(slots[0], length, scored)


def score(table, batch):
    """A bigram model, and NaN wherever nothing counts."""
    logits = table[batch.tokens]
    logps = jax.nn.log_softmax(logits)
    of_target = jnp.take_along_axis(logps, batch.targets[..., None], -1)[..., 0]
    counts = batch.segment_ids > 0
    if batch.scored is not None:
        at = jnp.arange(len(counts))[:, None], batch.scored
        counts = jnp.zeros_like(counts).at[at].set(True, mode="drop")
    of_target = jnp.where(counts, of_target, jnp.nan)
    entropy = -(jnp.exp(logps) * logps).sum(-1)
    correct = (logits.argmax(-1) == batch.targets).astype(jnp.float32)
    collision = jax.nn.logsumexp(2 * logps, -1)
    return TokenLogProbs(of_target, entropy, correct, logits.mean(-1), collision)


def loss_and_gradient(objective, batch):
    tables = jax.random.normal(jax.random.key(0), (2, VOCABULARY, VOCABULARY))

    def mean(table):
        loss, metrics = objective(
            lambda rows: score(table, rows), lambda rows: score(tables[1], rows), batch
        )
        return loss.mean(), metrics

    (loss, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(tables[0])
    means = {k: (float(m.total), float(m.weight)) for k, m in metrics.items()}
    return float(loss), means, gradient


PAIR_CASES = [
    ("preference", {}),
    ("preference", {"loss_type": "ipo"}),
    ("preference", {"loss_type": ["sigmoid_norm", "sft"], "loss_weights": [1.0, 0.3]}),
    ("preference", {"loss_type": "aot"}),
    ("preference", {"loss_type": "aot_unpaired"}),
    ("preference", {"use_weighting": True}),
    ("preference", {"reference_free": True}),
    ("preference", {"ld_alpha": 0.5}),
    ("preference", {"precompute_ref_log_probs": True}),
    ("orpo", {}),
    ("cpo", {}),
    ("cpo", {"loss_type": "ipo"}),
    ("simpo", {}),
]


@pytest.mark.parametrize(
    "row_kind, name, options, shares",
    [
        ("next_token", "next_token", {}, False),
        *(("preference", *case, 1) for case in PAIR_CASES),
        # Prompts of their own differ in how rows are laid out, for any loss alike.
        ("preference", "preference", {}, 0),
        ("preference", "preference", {"precompute_ref_log_probs": True}, 0),
        ("preference", "orpo", {}, 0),
        ("labeled", "kto", {}, False),
        ("labeled", "kto", {"loss_type": "apo_zero_unpaired"}, False),
    ],
)
def test_packed_examples_have_the_numbers_of_padded_ones(
    row_kind, name, options, shares
):
    data = make_data(row_kind, shares_prompts=bool(shares))
    padded = both_batches(dataclasses.replace(data, shares_prompts=False))[0]
    objective = make_objective(name, **options)
    expected = loss_and_gradient(objective, padded)
    # A head that scores these places of a row alone, where the loss reads no others.
    scored = 40 if shares and not OBJECTIVES[name].scores_prompts else 0
    found = loss_and_gradient(objective, both_batches(data, scored)[1])
    # The same float32 sums, taken in another order.
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for metric, value in expected[1].items():
        assert found[1][metric] == pytest.approx(value, rel=1e-5, abs=1e-5), metric
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("row_kind", ["next_token", "preference", "labeled"])
def test_difficulty_is_that_of_padded_rows(row_kind):
    data = make_data(row_kind)
    table = jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY))
    rows = np.arange(EXAMPLES)[None]
    lengths = data.side_lengths
    packing = choose_packing(lengths, rows[None], 1, shards=1, row_length=None)
    slots, (_, length, _) = packing.place(rows, lengths_of(lengths, rows))

    def of_bigrams(params, batch):
        return score(params, batch)

    expected = row_difficulty(of_bigrams, table, data.batch(rows[0]))
    packed = data.pack(slots[0], length)
    found = row_difficulty(of_bigrams, table, packed, most=packing.most)
    inside = slots[0] >= 0
    ordered = np.asarray(found)[inside][np.argsort(slots[0][inside])]
    np.testing.assert_allclose(ordered, expected, rtol=1e-5)


def test_a_shared_prompt_counts_twice_in_the_load_of_experts():
    """So the router's loss is that of pairs in rows of their own."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "norm_topk_prob": True,
    }
    config = ModelConfig.from_hf(
        {"model_type": "qwen3_moe", "vocab_size": VOCABULARY}
        | {"max_position_embeddings": 64, "hidden_act": "silu"}
        | sizes
        | heads
        | experts
    )
    decoder = Decoder(config, compute_dtype="float32")
    params = decoder.init(jax.random.key(0))

    def router_loss(batch):
        found = []

        def scored(rows):
            tokens = decoder.token_log_probs(params, rows, with_router_loss=True)
            found.append(tokens.router_loss)
            return dataclasses.replace(tokens, router_loss=None)

        score_pairs(scored, batch)
        return float(found[0])

    data = make_data("preference", shares_prompts=True)
    padded = both_batches(dataclasses.replace(data, shares_prompts=False))[0]
    assert router_loss(both_batches(data)[1]) == pytest.approx(
        router_loss(padded), rel=1e-5
    )


def test_the_shapes_of_an_evaluation_set_are_chosen_once(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(options)
        return choose_packing(*args, **options)

    monkeypatch.setattr(pipeline, "choose_packing", counted)
    data, rows = make_data("next_token"), pipeline.PackedRows(1, are_long=True)
    for _ in range(2):
        batches = list(pipeline.make_eval_iterator(data, BatchShape(4), rows))
        assert sum(np.count_nonzero(b.loss_mask) for b in batches) > 0
    assert len(calls) == 1
    list(pipeline.make_eval_iterator(data, BatchShape(2), rows))
    assert len(calls) == 2, "another batch size has shapes of its own"
