"""Routing, grouped products and the router's loss against plain definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.models.moe import (
    RouterLoad,
    apply_experts,
    choose_experts,
    load_balancing_loss,
    measure_load,
)

B, T, D, F, E, K = 2, 7, 6, 5, 4, 2


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = {
        "x": (B, T, D),
        "gate": (E, D, F),
        "up": (E, D, F),
        "down": (E, F, D),
        "logits": (B, T, E),
    }
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    values["logits"][..., 2] = -50.0  # nobody's choice: its run of rows is empty
    return {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def run_all(x, logits, gate, up, down):
    """The layer by its definition: every expert on every token, most weighed 0."""
    probabilities = jax.nn.softmax(logits)
    order = jnp.argsort(-probabilities)[..., :K]
    chosen = jax.nn.one_hot(order, len(gate)).sum(-2) * probabilities
    weights = chosen / chosen.sum(-1, keepdims=True)
    inner = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate))
    inner *= jnp.einsum("btd,edf->btef", x, up)
    return jnp.einsum("btef,efd,bte->btd", inner, down, weights)


def run_grouped(x, logits, gate, up, down):
    _, weights, experts = choose_experts(logits, K, normalize=True)
    return apply_experts(
        x, weights, experts, gate, up, down, combine=lambda g, u: jax.nn.silu(g) * u
    )


def test_sorted_and_grouped_experts_equal_every_expert_on_every_token(arrays):
    names = ("x", "logits", "gate", "up", "down")

    @functools.partial(jax.jit, static_argnums=0)
    def outputs_and_gradients(run, arrays):
        def total(*values):
            y = run(*values)
            return jnp.sum(jnp.sin(y)), y

        values = [arrays[name] for name in names]
        return jax.value_and_grad(total, argnums=range(5), has_aux=True)(*values)

    (_, ours), gradients = outputs_and_gradients(run_grouped, arrays)
    (_, expected), expected_gradients = outputs_and_gradients(run_all, arrays)
    # Sums of up to 14 float32 products of order 1, in another order.
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    for name, ours, expected in zip(names, gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, expected, atol=2e-5, err_msg=name)
        assert np.abs(expected).max() > 0.1, name


def test_a_token_does_not_depend_on_what_else_is_in_the_batch(arrays):
    run = jax.jit(run_grouped)
    weights = [arrays[name] for name in ("gate", "up", "down")]
    together = run(arrays["x"], arrays["logits"], *weights)
    alone = run(arrays["x"][1:, 3:4], arrays["logits"][1:, 3:4], *weights)
    np.testing.assert_allclose(alone[0, 0], together[1, 3], atol=1e-6)


def test_weights_are_probabilities_and_sum_to_one_if_normalized(arrays):
    probabilities, plain, experts = choose_experts(arrays["logits"], K, normalize=False)
    _, normalized, same = choose_experts(arrays["logits"], K, normalize=True)
    np.testing.assert_array_equal(experts, same)
    taken = np.take_along_axis(np.asarray(probabilities), np.asarray(experts), axis=-1)
    np.testing.assert_array_equal(plain, taken)
    np.testing.assert_allclose(normalized, taken / taken.sum(-1, keepdims=True))
    assert plain.sum(-1).max() < 0.999


def loss_of(logits, mask):
    """Through our own functions; `logits` [L B T E]."""

    def layer_load(layer):
        probabilities, _, experts = choose_experts(layer, K, normalize=True)
        return measure_load(probabilities, experts, mask, layer)

    return load_balancing_loss(jax.vmap(layer_load)(logits))


compiled_loss = jax.jit(loss_of)


def test_an_even_router_has_the_loss_k_and_one_that_collapsed_e():
    tokens = jnp.full(1, 8.0)
    even = RouterLoad(jnp.full((1, E), 8.0 * K / E), jnp.full((1, E), 8.0 / E), tokens)
    assert load_balancing_loss(even) == K
    # All tokens go to the first two experts, and the first has all probability.
    collapsed = RouterLoad(
        jnp.asarray([[8.0, 8.0, 0, 0]]), jnp.asarray([[8.0, 0, 0, 0]]), tokens
    )
    assert load_balancing_loss(collapsed) == E
    nothing = RouterLoad(jnp.zeros((1, E)), jnp.zeros((1, E)), jnp.zeros(1))
    assert load_balancing_loss(nothing) == 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 99), real=st.integers(1, T))
def test_the_loss_is_its_definition_over_real_tokens_only(seed, real):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, B, T, E)).astype(np.float32)
    mask = np.arange(T) < np.full((B, 1), real)
    kept = np.exp(logits[:, mask]).reshape(-1, E)  # layers and tokens alike
    probabilities = kept / kept.sum(-1, keepdims=True)
    chosen = probabilities >= np.sort(probabilities)[:, [-K]]
    expected = E * (chosen.mean(0) * probabilities.mean(0)).sum()
    np.testing.assert_allclose(compiled_loss(logits, mask), expected, rtol=2e-6)


@pytest.mark.torch
def test_loss_and_gradient_equal_transformers_own():
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, B, T, E)).astype(np.float32)
    mask = np.arange(T) < np.asarray([[T], [4]])
    theirs = [torch.tensor(x.reshape(-1, E), requires_grad=True) for x in logits]
    expected = mixtral.load_balancing_loss_func(
        tuple(theirs), E, K, torch.tensor(mask.astype(np.int64))
    )
    expected.backward()
    value, gradient = jax.value_and_grad(loss_of)(logits, mask)
    np.testing.assert_allclose(value, expected.item(), rtol=1e-6)
    for ours, layer in zip(gradient, theirs, strict=True):
        ours = np.reshape(ours, (-1, E))
        np.testing.assert_allclose(ours, layer.grad.numpy(), atol=1e-7)


def test_what_is_computed_again_leaves_out_the_last_product(arrays):
    """Of three products forward all but down's; and two gradients of each."""

    keep_nothing = jax.checkpoint_policies.nothing_saveable
    again = jax.checkpoint(run_grouped, policy=keep_nothing)

    def total(*values):
        return jnp.sin(again(*values)).sum()

    values = [arrays[name] for name in ("x", "logits", "gate", "up", "down")]
    program = str(jax.make_jaxpr(jax.grad(total, argnums=range(5)))(*values))
    assert program.count("= ragged_dot") == 3 + 2 + 6
