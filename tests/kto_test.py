"""KTO by hand: its KL term, weights, padding and refusals. TRL: trl_losses_test.py."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.objectives import make_objective
from jaxtrain.types import Batch, LabeledBatch, TokenLogProbs


def rows_of(first: int, count: int, width: int = 2) -> Batch:
    """Rows whose tokens are all their row number; a negative one is padding."""
    tokens = np.repeat(np.arange(first, first + count)[:, None], width, 1)
    return with_tokens(tokens.astype(np.int32))


def with_tokens(tokens: np.ndarray) -> Batch:
    ones = np.ones_like(tokens)
    return Batch(tokens, tokens, ones, ones, np.float32(tokens >= 0))


def model(per_token: list[float]) -> Callable[[Batch], TokenLogProbs]:
    """Row k's tokens have log-prob per_token[k]; padding rows have NaN."""

    def score(batch: Batch) -> TokenLogProbs:
        logps = jnp.float32(per_token)[batch.tokens]
        logps = jnp.where(batch.tokens < 0, jnp.nan, logps)
        return TokenLogProbs(logps, -logps, logps, 2 * logps)

    return score


# rho of rows 0..3 = 2 * (policy - reference) = 1, -2, 3, -1; 0 and 2 are desirable.
POLICY, REFERENCE = [-1.0, -2.0, -0.5, -1.5], [-1.5, -1.0, -2.0, -1.0]
BATCH = LabeledBatch(
    completions=rows_of(0, 2),
    desirable=np.float32([1, 0]),
    mismatched=rows_of(2, 2),
)


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_kto_of_two_completions_by_hand() -> None:
    objective = make_objective(
        "kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0
    )
    loss, metrics = objective(model(POLICY), model(REFERENCE), BATCH)
    z = (3 - 1) / 2
    good, bad = 1 - sigma(0.5 * (1 - z)), 1 - sigma(0.5 * (z + 2))
    assert float(loss.mean()) == pytest.approx((2 * good + 3 * bad) / 2)
    means = {key: float(value.mean()) for key, value in metrics.items()}
    assert means == pytest.approx(
        {
            "rewards/chosen": 0.5,
            "rewards/rejected": -1.0,
            "rewards/margins": 1.5,
            "logps/chosen": -2.0,
            "logps/rejected": -4.0,
            "logits/chosen": -2.0,
            "logits/rejected": -4.0,
            "entropy": 1.5,
            "kl": z,
            "num_tokens": 4,
        }
    )


def test_a_negative_kl_estimate_counts_as_zero() -> None:
    _, metrics = make_objective("kto")(model(REFERENCE), model(POLICY), BATCH)
    assert float(metrics["kl"].mean()) == 0


def test_the_kl_term_is_not_differentiated() -> None:
    def total(shift: jax.Array) -> jax.Array:
        def policy(batch: Batch) -> TokenLogProbs:
            scored = model(POLICY)(batch)
            moved = jnp.where(batch.tokens >= 2, scored.logps * shift, scored.logps)
            return TokenLogProbs(
                moved, scored.entropy, scored.correct, scored.mean_logit
            )

        return make_objective("kto")(policy, model(REFERENCE), BATCH)[0].total

    assert float(jax.grad(total)(jnp.float32(1.0))) == 0


def test_padding_rows_change_nothing() -> None:
    def pad(batch: Batch) -> Batch:
        return with_tokens(np.insert(batch.tokens, 1, -1, axis=0))

    padded = LabeledBatch(
        completions=pad(BATCH.completions),
        desirable=np.float32([1, 1, 0]),
        mismatched=pad(BATCH.mismatched),
    )
    objective = make_objective("kto", desirable_weight=2.0)
    expected = objective(model(POLICY), model(REFERENCE), BATCH)
    actual = objective(model(POLICY), model(REFERENCE), padded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected
    )


def test_precomputed_sums_give_the_loss_of_the_reference_model() -> None:
    sums = 2 * np.float32(REFERENCE)
    precomputed = LabeledBatch(
        BATCH.completions, BATCH.desirable, BATCH.mismatched, sums[:2], sums[2:]
    )
    expected = make_objective("kto")(model(POLICY), model(REFERENCE), BATCH)
    actual = make_objective("kto", precompute_ref_log_probs=True)(
        model(POLICY), None, precomputed
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected
    )


def test_missing_parts_are_refused() -> None:
    alone = LabeledBatch(BATCH.completions, BATCH.desirable)
    with pytest.raises(ValueError, match="no mismatched completions"):
        make_objective("kto")(model(POLICY), model(REFERENCE), alone)
    with pytest.raises(ValueError, match="reference=None"):
        make_objective("kto")(model(POLICY), None, BATCH)
    with pytest.raises(ValueError, match="no precomputed reference log-probs"):
        make_objective("kto", precompute_ref_log_probs=True)(
            model(POLICY), model(REFERENCE), BATCH
        )
    loss, _ = make_objective("kto", loss_type="apo_zero_unpaired")(
        model(POLICY), model(REFERENCE), alone
    )
    assert np.isfinite(float(loss.total))
