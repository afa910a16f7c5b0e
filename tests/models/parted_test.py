"""Weights that every device needs whole, kept and updated in parts.

The reference is the same run with whole weights, and the same on one device.
"""

import dataclasses
import math
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxtrain import loop
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.models import lookup, parted
from jaxtrain.sharding import ShardingPlan, make_mesh
from tests.models.unrolled_test import plan_of
from tests.runs import records, tiny_config, train, weights

ROWS = 4  # an optimizer step's, on one device and on two


def config_on(devices: int, kind: str = "sft", **training: Any) -> Any:
    """Steps on `ROWS` rows: of one model, however many devices there are."""
    given = {
        "num_gpus": devices,
        "per_device_train_batch_size": ROWS // devices // 2,
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
    }
    return tiny_config(kind, **given | training)


def run_whole(monkeypatch: pytest.MonkeyPatch, *args: Any) -> Any:
    """The same with whole weights."""
    with monkeypatch.context() as patch:
        patch.setattr(parted, "serves", lambda *_: False)
        return train(*args)


def assert_same(left: pathlib.Path, right: pathlib.Path, tolerance: float) -> None:
    """Logs and exported weights agree."""
    for one, other in zip(records(left), records(right), strict=True):
        assert one.keys() == other.keys()
        # Others are differences of log-probs, of which float32 leaves few digits.
        for name in {"loss", "grad_norm", "eval_loss", "nll"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=tolerance), name
    for name, tensor in weights(left).items():
        scale = np.abs(tensor).max()
        gap = np.abs(tensor - weights(right)[name]).max()
        assert gap <= tolerance * scale, name


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("sft", {}),
        ("sft", {"optimizer": "lion", "max_grad_norm": 0.1}),
        ("dpo", {"optimizer": "sgd", "ema_decay": 0.5}),
        ("dpo", {"dpo__sync_ref_model": True, "dpo__ref_model_sync_steps": 2}),
        ("from_scratch", {"deepspeed__zero_stage": 1}),
    ],
    ids=["sft", "lion", "sgd and an average", "a reference that moves", "stage 1"],
)
def test_parts_train_as_whole_weights_do(kind, training, tmp_path, monkeypatch):
    """In float32; only the order of sums differs, which Adam makes larger."""
    config = config_on(2, kind, **training)
    train(config, tmp_path / "parts")
    run_whole(monkeypatch, config, tmp_path / "whole")
    assert_same(tmp_path / "parts", tmp_path / "whole", 2e-5)


def test_two_devices_train_as_one_does(tmp_path):
    train(config_on(2), tmp_path / "two")
    train(config_on(1), tmp_path / "one")
    # Rows of one micro-batch are added up in another order, too.
    assert_same(tmp_path / "two", tmp_path / "one", 2e-4)


def test_in_bfloat16_it_is_as_near_as_that_type(tmp_path, monkeypatch):
    """Gradients are rounded once more, by 2^-9 each; losses show a part of it."""
    config = config_on(2, bf16=True)
    train(config, tmp_path / "parts")
    run_whole(monkeypatch, config, tmp_path / "whole")
    for one, other in zip(*map(records, tmp_path.iterdir()), strict=True):
        for name in {"loss", "grad_norm", "eval_loss"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=4e-3), name


def test_a_run_goes_on_from_whole_weights_in_parts(tmp_path, monkeypatch):
    """A checkpoint has no layout: those of earlier versions have whole weights."""
    always = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    run_whole(monkeypatch, config_on(2, max_steps=2, **always), tmp_path / "a")
    train(config_on(2, **always), tmp_path / "a")
    train(config_on(2, **always), tmp_path / "b")
    assert_same(tmp_path / "a", tmp_path / "b", 2e-5)


def test_each_device_keeps_a_part_of_matrices_and_of_their_moments(
    tmp_path, monkeypatch
):
    kept = {}
    run_to_end = loop.Loop.run_to_end

    def shares(tree: Any) -> dict[str, float]:
        """How much of each leaf the first device has."""
        return {
            jax.tree_util.keystr(path): leaf.addressable_shards[0].data.size / leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    def look(self: loop.Loop) -> Any:
        results = run_to_end(self)
        model, state = self.parts.model, self.state
        kept["trained"] = shares((state.trainable, state.opt_state))
        kept["reference"] = shares(state.frozen)
        kept["to generate"] = shares(model.on_device(state.trainable))
        return results

    monkeypatch.setattr(loop.Loop, "run_to_end", look)
    train(config_on(2, "dpo", save_steps=0, eval_steps=0, max_steps=1), tmp_path)
    trained = kept.pop("trained")
    matrices = {n for n in trained if "kernel" in n or "embedding" in n}
    assert matrices and all(trained[name] == 0.5 for name in matrices)
    assert all(trained[name] == 1 for name in trained.keys() - matrices)
    assert all({*found.values()} == {1} for found in kept.values())


@pytest.mark.parametrize(
    ("shape", "training", "in_parts"),
    [
        ({"data": 2}, {}, True),
        ({"data": 4}, {"training_type": "dpo"}, True),
        ({"data": 2}, {"deepspeed": {"zero_stage": 1}}, True),
        ({"data": 2}, {"moment_dtype": "int8"}, True),
        ({"data": 1}, {}, False),
        ({"data": 2, "fsdp": 2}, {}, False),
        ({"data": 2, "context": 2}, {}, False),
        ({"data": 2}, {"training_type": "lora"}, False),
        ({"data": 2}, {"optimizer": "muon"}, False),
        ({"data": 2}, {"optimizer": "adafactor"}, False),
        ({"data": 2}, {"reduce_dtype": "float32"}, False),
        ({"data": 2}, {"cpu_offload": True}, False),
        ({"data": 2}, {"bf16": False, "fp16": True}, False),
    ],
)
def test_where_weights_are_kept_in_parts(shape, training, in_parts):
    devices = math.prod(shape.values())
    _, plan = plan_of(devices=devices, mesh=shape, training=training)
    assert plan.parted is in_parts


def test_over_links_between_hosts_and_on_tpus_weights_stay_whole(monkeypatch):
    run, plan = plan_of(devices=2)
    assert parted.serves(run, plan)
    with monkeypatch.context() as patch:
        patch.setattr(ShardingPlan, "platform", "tpu")
        assert not parted.serves(run, plan)
    apart = [types.SimpleNamespace(process_index=n, platform="cpu") for n in (0, 1)]
    mesh = types.SimpleNamespace(
        devices=np.array(apart), shape=plan.mesh.shape, size=plan.mesh.size
    )
    assert not parted.serves(run, dataclasses.replace(plan, mesh=mesh))


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((6, 8, 5), ("layers", "embed", "mlp"), (None, "data")),
        ((6, 5, 8), ("layers", "mlp", "embed"), (None, None, "data")),
        ((6, 3, 8, 5), ("layers", "experts", "embed", "mlp"), (None, None, "data")),
        ((10, 8), ("vocab", "embed"), ("data",)),
        ((6, 3, 5), ("layers", "embed", "mlp"), ()),  # nothing divides
        ((6, 8), ("layers", "embed"), ()),  # a vector of each layer
        ((6, 8, 4), ("layers", "embed", None), ()),  # narrow
        ((8,), ("embed",), ()),
    ],
)
def test_a_part_is_of_one_piece_where_that_divides(shape, axes, spec):
    plan = ShardingPlan(make_mesh({"data": 2}, jax.devices()[:2]))
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    plan = dataclasses.replace(plan, parted=True)
    layouts = parted.lay_out(plan, {"kernel": leaf}, {"kernel": axes})
    for found in layouts:  # of weights and of moments
        assert tuple(found["kernel"].spec)[: len(spec)] == spec
        assert not any(tuple(found["kernel"].spec)[len(spec) :])


def test_the_gradient_of_a_table_in_parts_is_not_summed_in_bfloat16():
    """1,001 vectors of 1 are 1,000 (of 2^9 bfloat16 knows the next even number)."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    layout = Layout(mesh, rows=("data",), parts=("data",))
    tokens = jnp.zeros((2, 501), jnp.int32).at[0, 0].set(1)
    table = jnp.zeros((4, 8), jnp.bfloat16)

    def total(table: jax.Array) -> jax.Array:
        return lookup.look_up(layout, table, tokens, "bfloat16").sum()

    found = jax.jit(jax.grad(total))(table)
    assert found.dtype == jnp.bfloat16
    assert found.sharding.spec == PartitionSpec("data")
    np.testing.assert_array_equal(found[:, 0], [1000, 1, 0, 0])
