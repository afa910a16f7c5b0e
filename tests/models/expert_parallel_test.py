"""Experts over devices: each exchange against every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import sharding
from jaxtrain.models.expert_parallel import ExpertSpread, _Sizes, choose_exchange
from jaxtrain.models.moe import apply_experts, choose_experts
from tests.models.moe_test import run_all

B, T, D, F, E, K = 8, 6, 5, 4, 8, 2


def make_arrays(collapsed: bool) -> dict[str, jax.Array]:
    """Weights and rows; `collapsed`: all tokens want experts 0 and 1."""
    rng = np.random.default_rng(0)
    shapes = {"x": (B, T, D), "logits": (B, T, E)}
    shapes |= {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    arrays = {name: 0.6 * rng.normal(size=shape) for name, shape in shapes.items()}
    if collapsed:
        arrays["logits"][..., :2] += 50
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


def run_spread(plan, spread, x, logits, gate, up, down):
    _, weights, experts = choose_experts(logits, K, normalize=True)
    multiply = functools.partial(apply_experts, combine=lambda g, u: jax.nn.silu(g) * u)
    choice, rows = ("batch", "sequence", None), ("batch", "sequence", "embed")
    inwards, outwards = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
    arguments = (rows, choice, choice, inwards, inwards, outwards)
    apply = plan.map_shards(spread.spread(multiply, x), arguments, rows, "mlp")
    return apply(x, weights, experts, gate, up, down)


def outputs_and_gradients(run, arrays):
    def total(*values):
        y = run(*values)
        return jnp.sum(jnp.sin(y)), y

    step = jax.jit(jax.value_and_grad(total, argnums=range(5), has_aux=True))
    (_, y), gradients = step(*arrays.values())
    return y, gradients


@pytest.mark.parametrize(
    ("exchange", "mesh", "room", "collapsed", "rows"),
    [
        pytest.param(
            "weights",
            {"data": 2, "expert": 4},
            2.0,
            False,
            B,
            marks=pytest.mark.on_request,
        ),
        ("tokens", {"expert": 2, "context": 2, "tensor": 2}, 2.0, False, B),
        pytest.param(
            "tokens",
            {"fsdp": 2, "expert": 4},
            3.0,
            False,
            B,
            marks=pytest.mark.on_request,
        ),
        ("tokens", {"fsdp": 2, "expert": 4}, 1.25, True, B),
        pytest.param(
            "copies", {"expert": 8}, 8.0, True, B, marks=pytest.mark.on_request
        ),
        pytest.param(
            "copies",
            {"data": 2, "expert": 2, "tensor": 2},
            1.9,
            False,
            B,
            marks=pytest.mark.on_request,
        ),
        ("copies", {"data": 2, "expert": 2, "tensor": 2}, 1.25, True, B),
        # Too few rows for all devices: those along `expert` have the same ones.
        ("copies", {"data": 2, "expert": 4}, 2.0, False, 2),
    ],
)
def test_each_exchange_gives_the_layers_definition(
    exchange, mesh, room, collapsed, rows
):
    arrays = make_arrays(collapsed)
    arrays |= {name: arrays[name][:rows] for name in ("x", "logits")}
    plan = sharding.ShardingPlan(sharding.make_mesh(mesh))
    spread = ExpertSpread(mesh["expert"], room, exchange, plan.axes_of)
    run = functools.partial(run_spread, plan, spread)
    ours, gradients = outputs_and_gradients(run, arrays)
    expected, expected_gradients = outputs_and_gradients(run_all, arrays)
    # Sums of float32 products in another order.
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
    for name, ours, expected in zip(arrays, gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(expected).max() > 0.02, name


@pytest.mark.parametrize(
    ("devices", "copies", "experts", "expected"),
    [
        # Few tokens of a small expert: anything but its weights; two devices share
        # nearly every token, sixteen do not.
        (2, 8, 64, "tokens"),
        (16, 8, 8, "copies"),
        # Weights smaller than the tokens.
        (2, 8, 1, "weights"),
    ],
)
def test_the_cheapest_exchange_follows_from_shapes(devices, copies, experts, expected):
    sizes = _Sizes(4096, copies, experts, devices, room=1.25)
    exchange, costs = choose_exchange("auto", sizes, 4096, experts * 3 * 2**21)
    assert exchange == expected == min(costs, key=costs.get)
    assert choose_exchange("weights", sizes, 4096, 1)[0] == "weights"
    # Bytes that arrive, and a fifth of those in memory: by hand.
    tokens = 2 * (devices - 1) * 4096 * 4096
    tokens += 2 * devices * 4096 * copies * 4096 // 5
    assert costs["tokens"] == tokens
