"""Mesh shapes, logical-axis rules and where they put arrays."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxtrain import sharding


def test_a_size_of_minus_one_takes_the_rest():
    shape = sharding.resolve_mesh_shape({"fsdp": -1, "tensor": 2}, 8)
    assert shape == {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("sizes", "count", "words"),
    [
        ({"data": 3}, 8, ["3", "8 are present", "'data': 2"]),
        ({"tensor": 3, "fsdp": -1}, 8, ["multiple of 3", "'tensor': 2", "'fsdp': 4"]),
        ({"data": -1, "fsdp": -1}, 8, ["only one axis"]),
    ],
)
def test_a_mesh_that_does_not_divide_names_the_nearest_that_does(sizes, count, words):
    with pytest.raises(ValueError) as error:
        sharding.resolve_mesh_shape(sizes, count)
    for word in words:
        assert word in str(error.value)


@given(
    data=st.integers(1, 8), tensor=st.integers(1, 8), count=st.sampled_from([1, 6, 8])
)
def test_every_suggested_mesh_is_accepted(data, tensor, count):
    nearest = sharding._nearest({"data": data, "fsdp": -1, "tensor": tensor}, count)
    assert sharding.resolve_mesh_shape(nearest, count) == nearest


AXES = {"kernel": ("layers", "embed", "heads"), "scale": ("layers", "embed")}
TREE = {
    "kernel": jax.ShapeDtypeStruct((3, 16, 8), np.float32),
    "scale": jax.ShapeDtypeStruct((3, 16), np.float32),
}


def specs(tree):
    return jax.tree.map(lambda s: s.spec, tree)


@pytest.mark.parametrize(
    ("stage", "parameter", "moment"),
    [
        (0, P(None, None, "tensor"), P(None, None, "tensor")),
        (2, P(None, None, "tensor"), P(None, ("data", "fsdp"), "tensor")),
        (3, P(None, "fsdp", "tensor"), P(None, "fsdp", "tensor")),
    ],
)
def test_zero_stages_split_what_they_say(stage, parameter, moment):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    plan = sharding.ShardingPlan(mesh, zero_stage=stage)

    def trimmed(spec):  # ("fsdp",) and "fsdp" say the same
        return P(*(e[0] if isinstance(e, tuple) and len(e) == 1 else e for e in spec))

    assert trimmed(specs(plan.parameters(TREE, AXES))["kernel"]) == parameter
    assert trimmed(specs(plan.optimizer_moments(TREE, AXES))["kernel"]) == moment


def test_an_axis_that_does_not_divide_is_kept_whole_and_logged(caplog):
    plan = sharding.ShardingPlan(sharding.make_mesh({"fsdp": 8}))
    tree = {"scale": jax.ShapeDtypeStruct((3, 12), np.float32)}
    with caplog.at_level("INFO"):
        result = plan.parameters(tree, {"scale": ("layers", "embed")})
    assert specs(result)["scale"] == P(None, None)
    assert "size 12 does not divide" in caplog.text


def test_offloaded_state_lies_in_host_memory_and_comes_back_bit_equal():
    mesh = sharding.make_mesh({"fsdp": 8})
    plan = sharding.ShardingPlan(mesh, offload_params=True, offload_optimizer=True)
    layouts = plan.parameters(TREE, AXES)
    assert layouts["kernel"].memory_kind == "pinned_host"
    values = {"kernel": np.random.rand(3, 16, 8), "scale": np.ones((3, 16))}
    values = jax.tree.map(np.float32, values)
    stored = jax.device_put(values, layouts)
    fetch = sharding.make_transfer(sharding.on_device(layouts))
    back = jax.jit(fetch)(stored)
    assert back["kernel"].sharding.memory_kind == "device"
    np.testing.assert_array_equal(back["kernel"], values["kernel"])


def test_a_wrong_number_of_axis_names_is_an_error():
    plan = sharding.ShardingPlan(sharding.make_mesh({"fsdp": 8}))
    with pytest.raises(ValueError, match="has not the axes"):
        plan.parameters({"w": TREE["scale"]}, {"w": ("embed",)})
