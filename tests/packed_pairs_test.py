"""Packed preference pairs: the same losses, metrics and gradients as a pair a row."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.objectives import make_objective
from jaxtrain.types import Batch, PairBatch, TokenLogProbs

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import train_pairs

WIDTH, VOCABULARY = 24, 11


def documents(seed, count):
    """(tokens, first trained position) of chosen and rejected, by pair."""
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt = random.integers(1, VOCABULARY, random.integers(1, 4))
        sides = [
            np.concatenate([prompt, random.integers(1, VOCABULARY, n)])
            for n in random.integers(1, 6, 2)
        ]
        pairs.append((sides, len(prompt)))
    return pairs


def side_of(rows, side):
    """Rows of pairs as a Batch; shifted and numbered as the pipeline does."""
    shape = (len(rows), WIDTH)
    arrays = {n: np.zeros(shape, np.int32) for n in ("tokens", "targets")}
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    for row, pairs in enumerate(rows):
        at = 0
        for number, (sides, prompt) in enumerate(pairs, start=1):
            ids = sides[side]
            stop = at + len(ids)
            arrays["tokens"][row, at:stop] = ids
            arrays["targets"][row, at : stop - 1] = ids[1:]
            mask[row, at + prompt - 1 : stop - 1] = 1
            segments[row, at:stop] = number
            positions[row, at:stop] = np.arange(len(ids))
            at = stop
    return Batch(*arrays.values(), segments, positions, mask)


def batch_of(rows, *, packed):
    ids = None
    if packed:
        most = max(map(len, rows))
        ids = np.array([[*range(1, len(r) + 1), *[0] * (most - len(r))] for r in rows])
    return PairBatch(side_of(rows, 0), side_of(rows, 1), pair_ids=ids)


def score(table, batch):
    """A bigram model, and NaN wherever nothing counts."""
    logits = table[batch.tokens]
    logps = jax.nn.log_softmax(logits)
    of_target = jnp.take_along_axis(logps, batch.targets[..., None], -1)[..., 0]
    of_target = jnp.where(batch.loss_mask > 0, of_target, jnp.nan)
    entropy = -(jnp.exp(logps) * logps).sum(-1)
    correct = (logits.argmax(-1) == batch.targets).astype(jnp.float32)
    collision = jax.nn.logsumexp(2 * logps, -1)
    return TokenLogProbs(of_target, entropy, correct, logits.mean(-1), collision)


def loss_and_gradient(objective, table, reference, batch):
    def mean(table):
        loss, metrics = objective(
            lambda b: score(table, b), lambda b: score(reference, b), batch
        )
        return loss.mean(), metrics

    (loss, metrics), gradient = jax.value_and_grad(mean, has_aux=True)(table)
    means = {k: (float(m.total), float(m.weight)) for k, m in metrics.items()}
    return float(loss), means, gradient


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": "ipo"},
        {"loss_type": ["sigmoid_norm", "sft"], "loss_weights": [1.0, 0.3]},
        {"loss_type": "aot"},
        {"use_weighting": True},
        {"reference_free": True},
    ],
)
def test_packed_pairs_have_the_losses_of_pairs_alone(options):
    table, reference = jax.random.normal(jax.random.key(0), (2, VOCABULARY, VOCABULARY))
    pairs = documents(1, 7)
    alone = batch_of([[pair] for pair in pairs], packed=False)
    rows = [[pairs[3], pairs[0]], [pairs[5]], [], [pairs[1], pairs[2], pairs[6]]]
    rows[1].append(pairs[4])
    packed = batch_of(rows, packed=True)
    objective = make_objective("preference", **options)
    expected = loss_and_gradient(objective, table, reference, alone)
    found = loss_and_gradient(objective, table, reference, packed)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert found[1][name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_packed_run_trains_on_every_pair(tmp_path, monkeypatch):
    """Steps over all pairs: in fewer rows, the losses are those of pairs alone."""
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    rows = [
        {"prompt": f"{n}?", "chosen": " The earth" * (1 + n % 3), "rejected": " void"}
        for n in range(8)
    ]
    alone, packed = (
        train_pairs(rows, tmp_path / str(packing), packing=packing)
        for packing in (False, True)
    )
    assert packed["num_tokens"] == alone["num_tokens"]
    for name in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
        # The same sums, taken in other rows: float32 rounding.
        assert packed[name] == pytest.approx(alone[name], rel=1e-3, abs=2e-4), name
