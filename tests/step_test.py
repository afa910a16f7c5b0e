"""The step against numpy float64, and its invariances, on a model of two matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain import sharding, step
from jaxtrain.types import Batch, TokenLogProbs, TrainState, WeightedSum

V, D, T = 11, 8, 6


def score(params, batch, *, dropout_key=None):
    logits = params["embed"][batch.tokens] @ params["head"]
    if dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 0.5, logits.shape)
        logits = jnp.where(keep, logits * 2, 0)
    logps = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logps, batch.targets[..., None], -1)[..., 0]
    zeros = jnp.zeros_like(chosen)
    return TokenLogProbs(chosen, zeros, zeros, zeros)


def next_token(policy, reference, batch):
    loss = WeightedSum(
        -(policy(batch).logps * batch.loss_mask).sum(), batch.loss_mask.sum()
    )
    metrics = {}
    if reference is not None:
        difference = policy(batch).logps - reference(batch).logps
        metrics["kl"] = WeightedSum(
            (difference * batch.loss_mask).sum(), batch.loss_mask.sum()
        )
    return loss, metrics


def make_params(seed=0):
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "embed": jax.random.normal(a, (V, D)),
        "head": jax.random.normal(b, (D, V)),
    }


def make_batch(accumulation, rows, seed=0, mask_rate=0.3):
    rng = np.random.default_rng(seed)
    shape = (accumulation, rows, T)
    return Batch(
        tokens=rng.integers(0, V, shape, np.int32),
        targets=rng.integers(0, V, shape, np.int32),
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(T, dtype=np.int32), shape).copy(),
        loss_mask=(rng.random(shape) > mask_rate).astype(np.float32),
    )


def make_state(optimizer, params=None, frozen=None, loss_scale=None):
    params = make_params() if params is None else params
    return TrainState(
        step=jnp.int32(0),
        trainable=params,
        frozen={} if frozen is None else frozen,
        opt_state=optimizer.init(params),
        rng=jax.random.key(1),
        loss_scale=loss_scale,
    )


OPTIMIZER = optax.sgd(0.1)


@functools.cache
def jitted(**options):
    return jax.jit(
        step.make_train_step(
            next_token,
            score,
            OPTIMIZER,
            lambda _: jnp.float32(0.1),
            step.StepOptions(**options),
        )
    )


def numpy_gradient(params, batch):
    """The mean loss over counted tokens and its gradients, by hand in float64."""
    embed, head = (np.asarray(params[k], np.float64) for k in ("embed", "head"))
    tokens, targets, mask = (
        np.asarray(x).reshape(-1)
        for x in (batch.tokens, batch.targets, batch.loss_mask)
    )
    hidden = embed[tokens]
    logits = hidden @ head
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    rows = np.arange(len(tokens))
    loss = -(np.log(p[rows, targets]) * mask).sum() / mask.sum()
    p[rows, targets] -= 1
    p *= mask[:, None] / mask.sum()
    d_embed = np.zeros_like(embed)
    np.add.at(d_embed, tokens, p @ head.T)
    return loss, {"embed": d_embed, "head": hidden.T @ p}


def test_one_step_equals_numpy_float64():
    state, batch = make_state(OPTIMIZER), make_batch(1, 4)
    new_state, metrics = jitted()(state, batch)
    loss, grads = numpy_gradient(state.trainable, batch)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    # float32 sums of a few dozen terms: about 1e-6 relative.
    np.testing.assert_allclose(metrics["loss"].mean(), loss, rtol=2e-6)
    np.testing.assert_allclose(metrics["grad_norm"].mean(), norm, rtol=2e-6)
    for name, grad in grads.items():
        expected = np.asarray(state.trainable[name]) - 0.1 * grad
        np.testing.assert_allclose(new_state.trainable[name], expected, atol=2e-6)
    assert int(new_state.step) == 1


@given(seed=st.integers(0, 100), mask_rate=st.floats(0, 1))
def test_micro_batches_equal_one_batch(seed, mask_rate):
    """However unevenly the counted tokens fall among the micro-batches."""
    split = make_batch(4, 2, seed, mask_rate)
    joined = jax.tree.map(lambda x: x.reshape(1, 8, T), split)
    one, one_metrics = jitted()(make_state(OPTIMIZER), joined)
    four, four_metrics = jitted()(make_state(OPTIMIZER), split)
    for a, b in zip(
        jax.tree.leaves((one.trainable, one_metrics)),
        jax.tree.leaves((four.trainable, four_metrics)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # order of float32 sums


def test_clipping_scales_the_update_to_the_norm_and_logs_the_norm_before():
    state, batch = make_state(OPTIMIZER), make_batch(1, 4)
    plain, metrics = jitted()(state, batch)
    clipped, clipped_metrics = jitted(max_grad_norm=0.1)(state, batch)
    norm = float(metrics["grad_norm"].mean())
    assert norm > 0.2
    np.testing.assert_allclose(clipped_metrics["grad_norm"].mean(), norm, rtol=1e-6)
    for name in state.trainable:
        full = plain.trainable[name] - state.trainable[name]
        small = clipped.trainable[name] - state.trainable[name]
        # Differences of parameters near 2 carry one rounding of 2.4e-7.
        expected = full * 0.1 / (norm + 1e-6)
        np.testing.assert_allclose(small, expected, atol=3e-7)


@pytest.mark.torch
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clipping_equals_torch(max_norm):
    torch = pytest.importorskip("torch")
    grads = make_params()
    tensors = []
    for leaf in jax.tree.leaves(grads):
        tensor = torch.zeros(leaf.shape, requires_grad=True)
        tensor.grad = torch.tensor(np.asarray(leaf))
        tensors.append(tensor)
    norm = torch.nn.utils.clip_grad_norm_(tensors, max_norm)
    clipped = step.clip_to_norm(grads, jnp.float32(norm), max_norm)
    for leaf, tensor in zip(jax.tree.leaves(clipped), tensors, strict=True):
        np.testing.assert_allclose(leaf, tensor.grad.numpy(), rtol=1e-6)


def test_a_batch_without_counted_tokens_changes_nothing():
    state, batch = make_state(OPTIMIZER), make_batch(2, 4, mask_rate=1.0)
    new_state, metrics = jitted()(state, batch)
    assert float(metrics["loss"].mean()) == 0.0
    for name in state.trainable:
        np.testing.assert_array_equal(new_state.trainable[name], state.trainable[name])


def test_the_reference_is_frozen_and_equals_the_policy_at_the_start():
    params = make_params()
    state = make_state(OPTIMIZER, params, frozen=params)
    new_state, metrics = jitted(with_reference=True)(state, make_batch(1, 4))
    assert float(metrics["kl"].mean()) == 0.0
    for name in params:
        np.testing.assert_array_equal(new_state.frozen[name], params[name])
    _, metrics = jitted(with_reference=True)(new_state, make_batch(1, 4))
    assert abs(float(metrics["kl"].mean())) > 1e-4


def test_only_the_trainable_overlay_moves():
    params = make_params()
    state = make_state(OPTIMIZER, {"head": params["head"]}, frozen=params)
    new_state, _ = jitted()(state, make_batch(1, 4))
    assert set(new_state.trainable) == {"head"}
    assert float(jnp.abs(new_state.trainable["head"] - params["head"]).max()) > 0


def test_dropout_differs_by_step_and_micro_batch_and_repeats_by_seed():
    batch = jax.tree.map(lambda x: np.stack([x[0], x[0]]), make_batch(1, 4))
    state = make_state(OPTIMIZER)
    run = jitted(with_dropout=True)
    once, _ = run(state, batch)
    again, _ = run(state, batch)
    np.testing.assert_array_equal(once.trainable["head"], again.trainable["head"])
    later = TrainState(**{**vars(state), "step": jnp.int32(5)})
    other, _ = run(later, batch)
    assert not np.array_equal(once.trainable["head"], other.trainable["head"])
    single, _ = run(state, jax.tree.map(lambda x: x[:1], batch))
    assert not np.array_equal(once.trainable["head"], single.trainable["head"])


def test_a_nonfinite_gradient_is_reported_and_can_be_skipped():
    params = make_params()
    params["head"] = params["head"].at[0, 0].set(jnp.inf)
    state = make_state(OPTIMIZER, params)
    new_state, metrics = jitted(skip_nonfinite=True)(state, make_batch(1, 4))
    assert float(metrics["nonfinite"].mean()) == 1.0
    np.testing.assert_array_equal(new_state.trainable["embed"], params["embed"])
    assert int(new_state.step) == 1


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": -1}])
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_one_device_equals_eight(sizes, zero_stage):
    plan = sharding.ShardingPlan(sharding.make_mesh(sizes), zero_stage)
    axes = {"embed": ("vocab", "embed"), "head": ("embed", "vocab")}
    state, batch = make_state(OPTIMIZER), make_batch(2, 8)
    expected, expected_metrics = jitted()(state, batch)
    layouts = plan.parameters(state.trainable, axes)
    sharded = TrainState(
        **{**vars(state), "trainable": jax.device_put(state.trainable, layouts)}
    )
    result, metrics = jitted()(sharded, sharding.place_batch(batch, plan.batch(1)))
    for a, b in zip(
        jax.tree.leaves((result.trainable, metrics)),
        jax.tree.leaves((expected.trainable, expected_metrics)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # order of float32 sums


def test_eval_sums_of_batches_add_up_to_those_of_the_whole():
    evaluate = jax.jit(step.make_eval_step(next_token, score))
    state, batch = make_state(OPTIMIZER), make_batch(2, 4)
    parts = [evaluate(state, jax.tree.map(lambda x, i=i: x[i], batch)) for i in (0, 1)]
    whole = evaluate(state, jax.tree.map(lambda x: x.reshape(8, T), batch))
    total = parts[0]["loss"] + parts[1]["loss"]
    np.testing.assert_allclose(total.mean(), whole["loss"].mean(), rtol=1e-6)
