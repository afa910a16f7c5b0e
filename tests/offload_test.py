"""Updates a layer at a time: the numbers of updates of everything at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import sharding
from jaxtrain.optimizers import optim
from jaxtrain.optimizers.offload import make_streamed_update
from jaxtrain.step import make_whole_update

SHAPES = {
    "embed_tokens": {"embedding": (12, 8)},
    "layers": {
        "mlp": {"up_proj": {"kernel": (3, 8, 16), "bias": (3, 16)}},
        "input_layernorm": {"scale": (3, 8)},
    },
    "norm": {"scale": (8,)},
}


def draw(shapes, seed):
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: type(x) is tuple)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def layouts_of(optimizer, params, *, offload_params):
    """Shardings over a mesh of two devices, with the optimizer's state on the host."""
    mesh = sharding.make_mesh(
        {axis: 2 if axis == "fsdp" else 1 for axis in sharding.MESH_AXES},
        jax.devices()[:2],
    )
    plan = sharding.ShardingPlan(
        mesh, zero_stage=1, offload_optimizer=True, offload_params=offload_params
    )
    names = ("layers", "embed", "mlp", None)
    axes = jax.tree.map(lambda p: names[: p.ndim], params)
    parameters = plan.parameters(params, axes)
    moments = plan.optimizer_moments(params, axes)
    state = optim.state_shardings(optimizer, params, moments, plan.replicated)
    return parameters, plan.store_optimizer(state)


# Layers 0 and 2, and layer 1 of another kind.
OF_KINDS = {
    "embed_tokens": {"embedding": (12, 8)},
    "layers": {
        "0to2by2": {"mlp": {"up_proj": {"kernel": (2, 8, 16)}}},
        "1": {"conv": {"conv": {"weight": (1, 3, 1, 8)}}},
    },
}


@pytest.mark.parametrize(
    ("name", "good", "shapes"),
    [
        *((name, None, SHAPES) for name in optim.OPTIMIZERS),
        ("adamw", True, SHAPES),
        ("muon", False, SHAPES),
        ("muon", None, OF_KINDS),
    ],
)
def test_an_update_by_layers_is_the_whole_update(name, good, shapes):
    optimizer = optim.make_optimizer(name, lambda step: 0.1 / (1 + step))
    params = draw(shapes, 0)
    parameters, stored = layouts_of(optimizer, params, offload_params=name == "lion")
    streamed = jax.jit(
        make_streamed_update(optimizer, parameters, stored),
        in_shardings=(None, stored, parameters, None),
        out_shardings=(parameters, stored),
    )
    whole = jax.jit(make_whole_update(optimizer))
    state = optimizer.init(params)
    kept = jax.device_put((params, state), (parameters, stored), may_alias=False)
    flag = None if good is None else jnp.bool_(good)
    before = jax.tree.map(np.asarray, params)
    for step in range(3):
        grads = draw(shapes, 1 + step)
        params, state = whole(grads, state, params, flag)
        kept = streamed(grads, kept[1], kept[0], flag)
    memory = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(kept[1])}
    assert memory == {"pinned_host"}
    for found, expected in zip(
        jax.tree.leaves(kept), jax.tree.leaves((params, state)), strict=True
    ):
        # Other programs: sums within a matrix may be taken in another order.
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), kept[0], before)
    assert all(jax.tree.leaves(changed)) == (good is not False)


def test_adapters_alone_are_only_of_layers():
    shapes = {"layers": {"q_proj": {"lora_a": (2, 4, 2), "lora_b": (2, 2, 4)}}}
    params, grads = draw(shapes, 0), draw(shapes, 1)
    optimizer = optim.make_optimizer("adamw", lambda step: 0.1)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = optimizer.init(params)
    on_host = device.with_memory_kind("pinned_host")
    layouts = [jax.tree.map(lambda _: on_host, tree) for tree in (params, state)]
    update = jax.jit(
        make_streamed_update(optimizer, *layouts),
        in_shardings=(None, *layouts[::-1], None),
    )
    found = update(grads, *jax.device_put((state, params), tuple(layouts[::-1])), None)
    expected = jax.jit(functools.partial(make_whole_update(optimizer), good=None))(
        grads, state, params
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
