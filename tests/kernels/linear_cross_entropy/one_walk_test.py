"""The head whose gradients are taken up on the way forward, against float64 numpy.

The kernel is interpreted where this jax can; else plain jax stands in for it, so that
what is made of its weights is compared either way.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxtrain.kernels.linear_cross_entropy import (
    fused,
    hopper,
    linear_log_probs,
    one_walk,
)
from jaxtrain.kernels.linear_cross_entropy.level import level
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.objectives import make_objective
from jaxtrain.types import Batch
from tests.plain_kernels import weigh_plainly

WIDTH, VOCAB = 64, 320
needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="this jax has no interpreter for Mosaic GPU",
)


def make_inputs(tokens, seed=0):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(tokens, WIDTH)), jnp.bfloat16),
        jnp.asarray(rng.normal(size=(VOCAB, WIDTH)) / 4, jnp.float32),
        jnp.asarray(rng.integers(0, VOCAB, tokens), jnp.int32),
        jnp.asarray(rng.uniform(size=tokens) * (rng.uniform(size=tokens) > 0.3)),
    )


def in_float64(hidden, table, targets, shares, scale=1.0):
    """Log-probs, entropies and, of shares times log-probs, both gradients."""
    hidden, shares = np.asarray(hidden, np.float64), np.asarray(shares, np.float64)
    table = np.asarray(jnp.asarray(table, jnp.bfloat16), np.float64)
    logits = hidden @ table.T * scale
    logits -= logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    p, rows = np.exp(log_p), np.arange(len(hidden))
    slopes = -p
    slopes[rows, targets] += 1
    slopes *= shares[:, None] * scale
    return (
        log_p[rows, targets],
        -(p * log_p).sum(1),
        slopes @ table,
        slopes.T @ hidden,
    )


@pytest.fixture(params=["plain", pytest.param("kernel", marks=needs_interpreter)])
def kernels(request, monkeypatch):
    """The head takes kernels, whatever the device; the number of calls so far."""
    tiles = hopper.Tiles(columns=128, stages=2, interpret=True)
    monkeypatch.setattr(fused, "choose_tiles", lambda *_: tiles)
    own = fused.weigh_logits if request.param == "kernel" else weigh_plainly
    monkeypatch.setattr(fused, "weigh_logits", own)
    return request.param


@needs_interpreter
@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_weights_and_sums_are_those_of_float64(vocab_axis):
    """Three tiles of columns, the last half outside the vocabulary; one row far off."""
    hidden, table, targets, _ = make_inputs(128)
    hidden = hidden.at[3].set(40.0 * table[7].astype(jnp.bfloat16))
    table = table.astype(jnp.bfloat16).at[70].set(table[5].astype(jnp.bfloat16))
    logits = 0.7 * np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    targets = targets.at[:60].set(jnp.asarray(logits.argmax(1)[:60], jnp.int32))
    targets = targets.at[3].set(int(logits[3].argmin()))
    rows = np.arange(128)
    base = logits[rows, targets] + 0.5
    head = hopper.Head(hidden, table if vocab_axis == 0 else table.T, vocab_axis, 0.7)
    tiles = hopper.Tiles(columns=128, stages=2, interpret=True)
    found = hopper.weigh_logits(head, targets, jnp.asarray(base, jnp.float32), tiles)
    # The row that is far off has its highest logit for the base, all others their own.
    assert logits[3].max() > base[3] + 2 * hopper.FAR
    base[3] = logits[3].max()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    close(found.base, base)
    weights = np.exp(logits - base[:, None])
    # bfloat16's rounding, and exponents in float32. The far row is rounded once more
    # when its tiles are levelled, and what fades below float32's range is zero there.
    given, near = np.asarray(found.weights, np.float64), rows != 3
    close(given[near], weights[near], rtol=2**-8)
    close(given[3], weights[3], rtol=2**-7, atol=1e-30)
    others = weights.copy()
    others[rows, np.asarray(targets)] = 0
    close(found.others, others.sum(1), rtol=3e-5)
    close(found.weighted, (weights * logits).sum(1), rtol=1e-4, atol=1e-3)
    close(found.target, logits[rows, targets])
    # Of two that are equal the first is the highest.
    np.testing.assert_array_equal(found.is_first, logits.argmax(1) == targets)


@pytest.mark.parametrize(("entries", "columns"), [(320, 128), (320, 256), (2304, 128)])
@pytest.mark.parametrize("far", [(), (5,), (3, 130, 383)])
def test_tiles_of_far_rows_are_brought_to_one_base(entries, columns, far):
    """The last tile is cut; blocks of rows without a far one stay as they were."""
    rng = np.random.default_rng(0)
    rows, parts = 384, -(-entries // columns)
    weights = jnp.asarray(rng.uniform(size=(rows, entries)), jnp.bfloat16)
    is_far = np.isin(np.arange(rows), far)
    fade = np.where(is_far, rng.uniform(size=(parts, rows)), 1).astype(np.float32)
    found = level(weights, fade, jnp.asarray(is_far), columns, interpret=True)
    factors = np.repeat(fade, columns, axis=0)[:entries].T
    wanted = np.asarray(weights, np.float32) * factors
    np.testing.assert_array_equal(found, jnp.asarray(wanted).astype(jnp.bfloat16))


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("trained", [True, False])
def test_sums_and_gradients_are_those_of_float64(trained, vocab_axis, kernels):
    """Slices of 128 tokens, the last filled up; the sum's cotangent is not 1."""
    hidden, table, targets, shares = make_inputs(300)
    logps, entropy, d_hidden, d_table = in_float64(hidden, table, targets, shares, 0.8)
    own = table if vocab_axis == 0 else table.T

    def loss(hidden, table):
        *scores, total = linear_log_probs(
            *(hidden, table, targets),
            vocab_axis=vocab_axis, scale=0.8, chunk=40, fuse=True, shares=shares,
        )  # fmt: skip
        return -3.0 * total[0], (scores, total)

    grad = jax.grad(loss, (0, 1) if trained else 0, has_aux=True)
    gradients, (scores, total) = jax.jit(grad)(hidden, own)
    np.testing.assert_allclose(scores[0], logps, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores[1], entropy, rtol=1e-4)
    np.testing.assert_allclose(total[0], (logps * np.asarray(shares)).sum(), rtol=1e-5)
    found = gradients if trained else (gradients,)
    wanted = (d_hidden, d_table if vocab_axis == 0 else d_table.T)
    assert found[0].dtype == jnp.bfloat16
    # Factors are rounded to bfloat16, and so are the gradients of hidden states.
    for a, b in zip(found, wanted, strict=False):
        a, b = np.asarray(a, np.float64), -3.0 * b
        np.testing.assert_allclose(a, b, rtol=2**-6, atol=4e-3 * np.abs(b).max())


def test_tokens_that_are_far_off_have_another_base(kernels):
    """Their logits are 100 and more above their target's; all others count once."""
    hidden, table, targets, shares = make_inputs(200, seed=1)
    rows = jnp.asarray([5, 130, 131])
    hidden = hidden.at[rows].multiply(60)
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    targets = targets.at[rows].set(jnp.asarray(logits[rows].argmin(1), jnp.int32))
    shares = shares.at[rows].set(0.5)
    logps, _, d_hidden, d_table = in_float64(hidden, table, targets, shares)
    assert (logps[rows] < -100).all()

    def loss(hidden, table):
        scores = linear_log_probs(
            hidden, table, targets, chunk=40, fuse=True, shares=shares
        )
        return scores[-1][0], scores

    grad = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    found, scores = grad(hidden, table)
    np.testing.assert_allclose(scores[0], logps, rtol=1e-4, atol=1e-5)
    for a, b in zip(found, (d_hidden, d_table), strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, rtol=2**-6, atol=4e-3 * np.abs(b).max()
        )


@pytest.mark.parametrize("trained", [True, False])
def test_the_host_need_not_wait_for_a_condition(trained, monkeypatch):
    """A GPU's program goes on behind a loop or a branch by data when the host read it.

    Until then the GPU has nothing to do: 5 of 124 ms of a step of 0.5B on an H100.
    """
    tiles = hopper.Tiles(columns=128, stages=2, interpret=True)
    monkeypatch.setattr(fused, "choose_tiles", lambda *_: tiles)
    monkeypatch.setattr(fused, "weigh_logits", weigh_plainly)
    hidden, table, targets, shares = make_inputs(300)

    def loss(hidden, table):
        given = shares if trained else None
        scores = linear_log_probs(
            hidden, table, targets, chunk=40, fuse=True, shares=given
        )
        return scores[-1][0] if trained else scores[0].sum()

    grad = jax.grad(loss, (0, 1) if trained else 0)
    text = str(jax.make_jaxpr(grad)(hidden, table))
    assert "scan[" in text
    assert "while[" not in text
    assert "cond[" not in text


def test_a_frozen_table_leaves_each_cotangent_to_its_token(kernels):
    """As a preference needs it, whose slopes are known at the end alone."""
    hidden, table, targets, shares = make_inputs(150, seed=2)
    _, _, wanted, _ = in_float64(hidden, table, targets, 1 + 2 * shares)

    def loss(hidden):
        logps, *_ = linear_log_probs(hidden, table, targets, chunk=40, fuse=True)
        return (logps + shares * logps * 2).sum()

    found = np.asarray(jax.jit(jax.grad(loss))(hidden), np.float64)
    np.testing.assert_allclose(
        found, wanted, rtol=2**-6, atol=4e-3 * np.abs(wanted).max()
    )


def test_without_kernels_the_sum_has_the_same_gradient():
    hidden, table, targets, shares = make_inputs(100, seed=3)

    def total(hidden, table):
        return linear_log_probs(hidden, table, targets, shares=shares)[-1][0]

    def by_token(hidden, table):
        return (linear_log_probs(hidden, table, targets)[0] * shares).sum()

    for a, b in zip(
        *(jax.jit(jax.grad(f, (0, 1)))(hidden, table) for f in (total, by_token)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_slices_are_as_large_as_their_memory_allows():
    choose = one_walk.choose_rows
    assert choose(16384, 151936, None, trained=True) == 4096
    assert choose(16384, 151936, None, trained=False) == 4096
    assert choose(8192, 151936, None, trained=False) == 2048
    assert choose(1024, 151936, None, trained=False) == 2048
    assert choose(16384, 262144, None, trained=True) == 2560
    assert choose(16384, 151936, 256, trained=True) == 768


@pytest.mark.parametrize("scored", [False, True])
def test_the_next_token_loss_and_its_gradient_are_those_without(scored, monkeypatch):
    """A whole decoder, tied; only the loss of next tokens asks for the sum."""
    decoder = Decoder(
        ModelConfig.from_hf(
            {
                "model_type": "qwen2", "vocab_size": VOCAB, "hidden_size": WIDTH,
                "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 2,
                "tie_word_embeddings": True, "max_position_embeddings": 512,
            }
        ),
        compute_dtype="bfloat16",
        attention="xla",
    )  # fmt: skip
    params = jax.jit(decoder.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    mask = (rng.uniform(size=(2, 256)) > 0.4).astype(np.float32)
    mask[0, -20:] = 2.5
    tokens = rng.integers(0, VOCAB, (2, 257), np.int32)
    batch = Batch(
        tokens[:, :-1], tokens[:, 1:], np.ones((2, 256), np.int32),
        np.broadcast_to(np.arange(256, dtype=np.int32), (2, 256)), mask,
    )  # fmt: skip
    if scored:
        places = np.flatnonzero(mask.reshape(-1))
        places = np.pad(places, (0, 384 - len(places)), constant_values=512)
        batch = dataclasses.replace(batch, scored=places[None].astype(np.int32))
    monkeypatch.setattr(fused, "weigh_logits", weigh_plainly)
    objective = make_objective("next_token")

    def loss(params, with_total):
        def policy(rows):
            return decoder.token_log_probs(params, rows, with_total=with_total)

        total, metrics = objective(policy, None, batch)
        return total.total, (total.weight, metrics)

    def run(with_total):
        step = jax.value_and_grad(
            functools.partial(loss, with_total=with_total), has_aux=True
        )
        return jax.jit(step)(params)

    plain = run(False)
    same = run(True)  # where no kernel is taken
    jax.tree.map(np.testing.assert_array_equal, plain, same)
    monkeypatch.setattr(fused, "choose_tiles", lambda *_: hopper.Tiles())
    (value, numbers), gradients = run(True)
    np.testing.assert_allclose(value, plain[0][0], rtol=1e-4)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-3)
    jax.tree.map(close, numbers, plain[0][1])
    # In bfloat16 either way rounds in every layer: against float32 it is as near.
    monkeypatch.undo()
    decoder = dataclasses.replace(decoder, compute_dtype="float32")
    trees = (gradients, plain[1], run(False)[1])
    whole = float(optax.global_norm(trees[2]))
    for a, b, exact in zip(*map(jax.tree.leaves, trees), strict=True):
        ours, without = (np.linalg.norm(np.float64(x) - exact) for x in (a, b))
        assert ours < 1.5 * without + 1e-4 * whole
