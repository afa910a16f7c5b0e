"""Mesh sizes: the rest of the devices, and the nearest sizes that divide them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.config.mesh_shape import MESH_AXES, nearest_mesh_shape, resolve_mesh_shape


def shape(**sizes):
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def test_a_size_of_minus_one_takes_the_rest():
    sizes = {"fsdp": -1, "context": 2, "tensor": 2}
    assert resolve_mesh_shape(sizes, 8) == shape(fsdp=2, context=2, tensor=2)


@pytest.mark.parametrize(
    ("sizes", "count", "words"),
    [
        ({"data": 3}, 8, ["3", "8 are present", "{'data': 8}"]),
        ({"tensor": 3, "fsdp": -1}, 8, ["multiple of 3", "{'fsdp': 4, 'tensor': 2}"]),
        ({"fsdp": 2, "context": 3}, 8, ["{'fsdp': 4, 'context': 2}"]),
        ({"data": -1, "fsdp": -1}, 8, ["only one axis"]),
    ],
)
def test_a_mesh_that_does_not_divide_names_the_nearest_that_does(sizes, count, words):
    with pytest.raises(ValueError) as error:
        resolve_mesh_shape(sizes, count)
    for word in words:
        assert word in str(error.value)


SIZES = st.one_of(st.just(-1), st.integers(1, 8))


@given(st.fixed_dictionaries({a: SIZES for a in MESH_AXES}), st.integers(1, 24))
def test_every_suggested_mesh_is_accepted(sizes, count):
    nearest = nearest_mesh_shape(sizes, count)
    assert math.prod(nearest.values()) == count
    assert resolve_mesh_shape(nearest, count) == shape(**nearest)
