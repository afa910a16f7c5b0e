"""The z-loss against numpy, and against a dense head that jax differentiates."""

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import ConfigError, resolve
from jaxtrain.kernels.linear_cross_entropy import linear_log_probs
from jaxtrain.models.z_loss import with_z_loss
from jaxtrain.objectives import next_token
from jaxtrain.types import Batch, TokenLogProbs

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import records, tiny_config, train

TOKENS, WIDTH, VOCAB, WEIGHT = 24, 16, 1100, 0.03


def head(seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    hidden = jnp.array(rng.normal(size=(TOKENS, WIDTH)), jnp.float32)
    table = jnp.array(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
    return hidden, table, jnp.array(rng.integers(0, VOCAB, TOKENS), jnp.int32)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("chunk", [4, 512])
@pytest.mark.parametrize("parts", ["both", "log_total", "logps"])
def test_the_heads_gradients_are_those_of_the_dense_formula(
    parts: str, chunk: int, softcap: float | None
) -> None:
    hidden, table, targets = head()

    def dense(h: jax.Array, w: jax.Array) -> jax.Array:
        logits = h @ w.T
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        log_total = jax.scipy.special.logsumexp(logits, axis=-1)
        of_target = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
        return combine(of_target - log_total, log_total)

    def combine(logps: jax.Array, log_total: jax.Array) -> jax.Array:
        nll = -logps.sum() if parts != "log_total" else 0.0
        z = WEIGHT * jnp.square(log_total).sum() if parts != "logps" else 0.0
        return nll + z

    def ours(h: jax.Array, w: jax.Array) -> jax.Array:
        logps, *_, log_total = linear_log_probs(
            h, w, targets, softcap=softcap, chunk=chunk, with_log_total=True
        )
        return combine(logps, log_total)

    for got, expected in zip(
        jax.tree.leaves(jax.value_and_grad(ours, (0, 1))(hidden, table)),
        jax.tree.leaves(jax.value_and_grad(dense, (0, 1))(hidden, table)),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_the_loss_is_numpys_mean_over_trained_tokens() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 6, 11)) * 3
    targets = rng.integers(0, 11, (2, 6))
    mask = np.array([[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], np.float32)
    log_total = np.log(np.exp(logits).sum(-1))
    nll = log_total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    expected = ((nll + WEIGHT * log_total**2) * mask).sum() / mask.sum()

    def score(rows: Batch, *, with_log_total: bool) -> TokenLogProbs:
        zeros = jnp.zeros((2, 6))
        total = jnp.array(log_total) if with_log_total else None
        return TokenLogProbs(jnp.array(-nll), zeros, zeros, zeros, log_total=total)

    objective, scored = with_z_loss(next_token, score, WEIGHT)
    ids = jnp.array(targets, jnp.int32)
    batch = Batch(ids, ids, jnp.ones_like(ids), ids, jnp.array(mask))
    loss, metrics = objective(scored, None, batch)
    assert loss.mean() == pytest.approx(expected, rel=1e-5)
    squares = (log_total**2 * mask).sum() / mask.sum()
    assert metrics["z_loss"].mean() == pytest.approx(squares, rel=1e-5)


def config_of(training_type: str = "sft", **training: Any) -> Any:
    config = tiny_config(training_type, max_steps=4, save_steps=0, **training)
    config.training.save_final_model = False
    return config


def test_a_run_adds_it_and_keeps_its_perplexity(
    tmp_path: pathlib.Path,
) -> None:
    keys = {"z_loss_weight": 0.5}
    train(config_of(**keys), tmp_path / "once")
    train(config_of(), tmp_path / "plain")
    with_z, plain = records(tmp_path / "once")[0], records(tmp_path / "plain")[0]
    # The first step's weights are the same.
    added = 0.5 * with_z["z_loss"]
    assert with_z["loss"] == pytest.approx(plain["loss"] + added, rel=1e-5)
    assert with_z["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)
    last = records(tmp_path / "once")[-1]
    assert last["z_loss"] < with_z["z_loss"]


@pytest.mark.parametrize(
    ("training_type", "objective", "match"),
    [("dpo", "auto", "sums over pairs"), ("sft", "my_losses:focal", "weigh tokens")],
)
def test_where_tokens_do_not_make_the_loss_it_is_refused(
    training_type: str, objective: str, match: str
) -> None:
    with pytest.raises(ConfigError, match=rf"z_loss_weight = 0\.1: .*{match}"):
        resolve(tiny_config(training_type, z_loss_weight=0.1, objective=objective))
