"""Meshes over slices, logical-axis rules and where they put arrays."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxtrain import sharding

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


def test_devices_that_share_rows_split_weights_too_as_far_as_that_divides():
    sizes = {"fsdp": 2, "context": 4}
    plan = sharding.ShardingPlan(sharding.make_mesh(sizes), zero_stage=3)
    tree = {"a": jax.ShapeDtypeStruct((16,), np.float32)}
    tree["b"] = jax.ShapeDtypeStruct((10,), np.float32)
    result = specs(plan.parameters(tree, {"a": ("embed",), "b": ("embed",)}))
    assert result["a"] == P(("fsdp", "context"))
    assert result["b"] == P("fsdp")
    batch = jax.ShapeDtypeStruct((4, 64), np.int32)
    layout = sharding._partition_spec(
        batch.shape, ("batch", "sequence"), sharding.ACTIVATION_RULES, plan.mesh
    )
    assert layout == P("fsdp", "context")


def test_offloaded_state_lies_in_host_memory_and_comes_back_bit_equal():
    mesh = sharding.make_mesh({"fsdp": 8})
    plan = sharding.ShardingPlan(mesh, offload_params=True, offload_optimizer=True)
    layouts = plan.parameters(TREE, AXES)
    assert layouts["kernel"].memory_kind == "pinned_host"
    values = {"kernel": np.random.rand(3, 16, 8), "scale": np.ones((3, 16))}
    values = jax.tree.map(np.float32, values)
    stored = jax.device_put(values, layouts)
    wanted = sharding.on_device(layouts)
    back = jax.jit(lambda tree: jax.device_put(tree, wanted))(stored)
    assert back["kernel"].sharding.memory_kind == "device"
    np.testing.assert_array_equal(back["kernel"], values["kernel"])


def test_a_wrong_number_of_axis_names_is_an_error():
    plan = sharding.ShardingPlan(sharding.make_mesh({"fsdp": 8}))
    with pytest.raises(ValueError, match="has not the axes"):
        plan.parameters({"w": TREE["scale"]}, {"w": ("embed",)})


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What a mesh over slices asks of a device."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "fake"
    device_kind: str = "fake"


def fakes(processes, slices):
    """Four devices for each process, or for each slice."""
    count = max(processes, slices)
    groups = [i // 4 for i in range(4 * count)]
    return [
        FakeDevice(i, group * processes // count, group * slices // count)
        for i, group in enumerate(groups)
    ]


def granules(mesh, axis, attribute):
    """For each place on the axis, the slices (or processes) of its devices."""
    index = sharding.MESH_AXES.index(axis)
    devices = np.moveaxis(mesh.devices, index, 0)
    return [{getattr(d, attribute) for d in part.flat} for part in devices]


def test_data_goes_over_slices_and_nothing_else_does():
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2}, fakes(1, 2))
    assert granules(mesh, "data", "slice_index") == [{0}, {0}, {1}, {1}]
    mesh = sharding.make_mesh({"fsdp": -1}, fakes(1, 4))
    assert granules(mesh, "fsdp", "slice_index") == [{i // 4} for i in range(16)]


def test_slices_are_shared_out_as_the_keys_say():
    slices = {"data": 2, "fsdp": 2}
    mesh = sharding.make_mesh({"data": 2, "fsdp": 8}, fakes(1, 4), slices=slices)
    assert granules(mesh, "data", "slice_index") == [{0, 1}, {2, 3}]
    assert granules(mesh, "fsdp", "slice_index") == [{0, 2}] * 4 + [{1, 3}] * 4


def test_processes_stand_for_slices_where_a_key_says_so():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4}, fakes(2, 1), slices={"data": 2})
    assert granules(mesh, "data", "process_index") == [{0}, {1}]


@pytest.mark.parametrize(
    ("sizes", "slices", "words"),
    [
        ({"tensor": 8}, None, "number of slices, 2"),
        ({"data": 8}, {"data": 4}, "number of slices, 2"),
        ({"data": 2, "fsdp": 4}, {"data": 4}, "mesh.dcn_data = 4 does not divide"),
    ],
)
def test_a_mesh_that_does_not_fit_the_slices_says_what_would(sizes, slices, words):
    with pytest.raises(ValueError, match=words):
        sharding.make_mesh(sizes, fakes(1, 2), slices=slices)


@pytest.mark.parametrize(
    ("sizes", "processes", "of_process"),
    [
        ({"data": 8}, 2, [(0, 2), (1, 2)]),
        ({"fsdp": 2, "context": 4}, 2, [(0, 2), (1, 2)]),
        ({"context": 8}, 2, [(0, 1), (0, 1)]),
        ({"data": 2, "tensor": 8}, 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_whose_devices_split_the_same_rows_read_the_same(
    sizes, processes, of_process, monkeypatch
):
    devices = np.array(fakes(processes, 1)).reshape(
        [sizes.get(axis, 1) for axis in sharding.MESH_AXES]
    )
    plan = sharding.ShardingPlan(jax.sharding.Mesh(devices, sharding.MESH_AXES))
    for process, expected in enumerate(of_process):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert plan.readers == expected


def test_processes_that_share_some_rows_only_are_refused():
    devices = np.array(fakes(2, 1)).reshape(1, 1, 4, 1, 2, 1)
    # Each row's two devices are neighbours but for the second and the third.
    devices = devices.reshape(-1)[[0, 1, 2, 4, 3, 5, 6, 7]].reshape(devices.shape)
    plan = sharding.ShardingPlan(jax.sharding.Mesh(devices, sharding.MESH_AXES))
    with pytest.raises(ValueError, match="divided evenly among 2 processes"):
        print(plan.readers)
