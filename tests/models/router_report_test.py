"""What is reported of routers, and the z-loss on their logits, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.models.moe import choose_experts, measure_load
from jaxtrain.models.router_report import summarize, with_report
from jaxtrain.types import TokenLogProbs, WeightedSum

L, B, T, E, K = 3, 2, 7, 4, 2


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(L, B, T, E)).astype(np.float32) * 2


def summary(logits, mask):
    def layer_load(layer):
        probabilities, _, experts = choose_experts(layer, K, normalize=True)
        return measure_load(probabilities, experts, mask, layer)

    return summarize(jax.vmap(layer_load)(logits))


def test_the_numbers_are_their_definitions_over_real_tokens(logits):
    mask = np.arange(T) < np.array([[T], [3]])
    real = logits[:, mask].astype(np.float64)  # [L M E]
    total = np.exp(real).sum(-1)
    shares = np.exp(real) / total[..., None]
    chosen = shares >= np.sort(shares, axis=-1)[..., [-K]]
    counts = chosen.sum(axis=1)
    value = jax.jit(summary)(logits, mask)
    expected = {
        "router_load": (counts.max(-1) / counts.mean(-1)).mean(),
        "router_entropy": -(shares * np.log(shares)).sum(-1).mean(),
        "router_dropped": 0.0,
        "router_z_loss": (np.log(total) ** 2).mean(),
    }
    assert value.keys() == expected.keys()
    for name, number in expected.items():
        np.testing.assert_allclose(value[name], number, rtol=1e-5, err_msg=name)
    gradients = jax.jacobian(summary)(jnp.asarray(logits), mask)
    flowing = {name for name, gradient in gradients.items() if np.any(gradient)}
    assert flowing == {"router_z_loss"}
    # d mean(log^2 Z) / d logit = 2 log Z softmax / tokens.
    np.testing.assert_allclose(
        gradients["router_z_loss"][:, mask],
        2 * np.log(total)[..., None] * shares / total.size,
        rtol=1e-5,
    )


def test_nothing_but_padding_is_no_nan(logits):
    numbers = summary(logits, np.zeros((B, T), bool))
    assert all(np.isfinite(number) for number in numbers.values())


@pytest.mark.parametrize("weight", [None, 0.5])
def test_the_z_loss_is_the_policys_and_hidden_from_the_objective(weight):
    zeros = jnp.zeros((1, 3))

    def scored(z_loss):
        return TokenLogProbs(zeros - 1, *[zeros] * 3, router={"router_z_loss": z_loss})

    def objective(policy, reference, batch):
        rows = [reference(batch), policy(batch)]
        assert all(row.router is None for row in rows)
        return WeightedSum(-rows[1].logps.sum(), jnp.float32(3)), {}

    whole, score = with_report(objective, lambda *, with_router: with_router, weight)
    assert score() is True
    loss, metrics = whole(lambda rows: scored(8.0), lambda rows: scored(99.0), None)
    np.testing.assert_allclose(loss.mean(), 1 + (weight or 0) * 8)
    np.testing.assert_allclose(metrics["router_z_loss"].mean(), 8)
