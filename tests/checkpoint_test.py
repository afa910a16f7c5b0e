"""Checkpoints: exact round trips, retention, refusals, and a kill in mid-save."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from two_processes import run_two

from jaxtrain.run.checkpoint import (
    CheckpointManager,
    CheckpointMismatchError,
)
from jaxtrain.types import TrainState

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def make_mesh(shape: tuple[int, int]) -> Mesh:
    count = shape[0] * shape[1]
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), ("data", "fsdp"))


def make_state(mesh: Mesh, seed: int = 0) -> TrainState:
    """A small train state with every kind of leaf that we save."""
    split = NamedSharding(mesh, PartitionSpec("data", "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    host = NamedSharding(mesh, PartitionSpec("fsdp"), memory_kind="pinned_host")
    keys = jax.random.split(jax.random.key(seed), 3)
    trainable = {
        "layers": {"kernel": jax.random.normal(keys[0], (8, 16))},
        "norm": {"scale": jax.random.normal(keys[1], (8, 4), jnp.bfloat16)},
    }
    trainable = jax.device_put(trainable, split)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = jax.tree.map(
        lambda x: jax.device_put(x + 1, split if x.ndim else whole), tx.init(trainable)
    )
    return TrainState(
        step=jax.device_put(jnp.int32(7), whole),
        trainable=trainable,
        frozen={
            "codes": jax.device_put(jnp.arange(32, dtype=jnp.uint8), host),
            "special": jax.device_put(
                jnp.array([jnp.nan, jnp.inf, -0.0, 1e-45, 3.0]), whole
            ),
        },
        opt_state=opt_state,
        rng=jax.device_put(jax.random.key(seed, impl="rbg"), whole),
        loss_scale={"raw_key": jax.device_put(jax.random.PRNGKey(5), whole)},
    )


def abstract(state, mesh: Mesh | None = None):
    def describe(leaf):
        sharding = leaf.sharding
        if mesh is not None:
            sharding = NamedSharding(mesh, sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, state)


def as_bytes(leaf) -> bytes:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def assert_same_bits(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert as_bytes(a) == as_bytes(b)


def test_round_trip_keeps_every_bit_and_sharding(tmp_path):
    state = make_state(make_mesh((4, 2)))
    data_state = {"position": 12, "sources": [{"epoch": 1, "name": "Ω"}]}
    config = {"model": {"layers": 2, "name": "tiny"}, "rates": (0.1, 0.2)}
    with CheckpointManager(tmp_path) as manager:
        assert manager.save(
            7, state, data_state=data_state, config=config, metrics={"loss": 2.5}
        )
    with CheckpointManager(tmp_path) as manager:
        restored = manager.restore(abstract(state))
    assert_same_bits(state, restored.state)
    for a, b in zip(
        jax.tree.leaves(state), jax.tree.leaves(restored.state), strict=True
    ):
        assert a.sharding == b.sharding
    assert restored.step == 7
    assert restored.data_state == data_state
    assert restored.config == json.loads(json.dumps(config))
    assert restored.metrics == {"loss": 2.5}
    # The key still draws the same numbers.
    draws = [jax.random.normal(s.rng, (4,)) for s in (state, restored.state)]
    np.testing.assert_array_equal(*draws)


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (8, 1)])
def test_a_checkpoint_restores_onto_another_mesh(tmp_path, shape):
    state = make_state(make_mesh((4, 2)))
    other = make_mesh(shape)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
        restored = manager.restore(abstract(state, other)).state
    assert_same_bits(state, restored)
    kernel = restored.trainable["layers"]["kernel"]
    assert kernel.sharding.mesh.shape == other.shape
    assert kernel.addressable_shards[0].data.shape == (8 // shape[0], 16 // shape[1])


def test_an_abstract_state_with_no_shardings_goes_to_the_first_device(tmp_path):
    state = make_state(make_mesh((4, 2)))
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
        restored = manager.restore(bare).state
    assert_same_bits(state, restored)
    assert restored.rng.devices() == {jax.devices()[0]}


@pytest.mark.parametrize("shape", [(4, 2), pytest.param((1, 1), marks=pytest.mark.gpu)])
def test_the_state_may_be_donated_as_soon_as_save_returns(tmp_path, shape):
    spec = PartitionSpec("data", "fsdp")
    on_device = NamedSharding(make_mesh(shape), spec, memory_kind="device")
    expected = np.arange(2.0**24, dtype=np.float32).reshape(4096, -1)
    abstract_state = {"w": jax.ShapeDtypeStruct(expected.shape, expected.dtype)}
    for kind in ("device", "pinned_host"):
        sharding = on_device.with_memory_kind(kind)

        @functools.partial(jax.jit, donate_argnums=0, out_shardings={"w": sharding})
        def update(state, sharding=sharding):
            computed = -jax.device_put(state["w"], on_device) - 1
            return {"w": jax.device_put(computed, sharding)}

        state = jax.device_put({"w": expected}, sharding)
        jax.block_until_ready(update(jax.tree.map(jnp.copy, state)))  # compile
        with CheckpointManager(tmp_path / kind) as manager:
            manager.save(1, state)
            for _ in range(3):
                before, state = state, update(state)
            jax.block_until_ready(state)
            assert before["w"].is_deleted()
            restored = manager.restore(abstract_state).state
        np.testing.assert_array_equal(restored["w"], expected)


def small(value: float) -> dict[str, jax.Array]:
    return {"w": jnp.full((4,), value)}


def save_all(manager: CheckpointManager, losses: list[float | None]) -> None:
    for step, loss in enumerate(losses, start=1):
        manager.save(step, small(step), metrics=None if loss is None else {"l": loss})
    manager.wait()


@pytest.mark.parametrize(
    ("limit", "greater", "losses", "kept", "best"),
    [
        (None, False, [3.0, 1.0, 2.0], [1, 2, 3], 2),
        (1, False, [3.0, 1.0, 2.0, 4.0], [2, 4], 2),
        (2, False, [3.0, 1.0, 2.0, 4.0, 5.0], [2, 4, 5], 2),
        (2, True, [9.0, 1.0, 2.0, 4.0], [1, 3, 4], 1),
        (1, False, [2.0, 1.0, 0.5], [3], 3),
        (1, False, [2.0, 1.0, 1.0], [2, 3], 2),
        (1, False, [2.0, float("nan"), 3.0], [1, 3], 1),
        (1, True, [float("-inf"), None, None], [3], None),
        (1, False, [None, None], [2], None),
    ],
)
def test_retention_keeps_the_newest_and_the_best(
    tmp_path, limit, greater, losses, kept, best
):
    options = {
        "save_total_limit": limit,
        "best_metric": "l",
        "greater_is_better": greater,
    }
    with CheckpointManager(tmp_path, **options) as manager:
        save_all(manager, losses)
        assert manager.all_steps() == kept
        assert manager.best_step() == best
    # What is on disk is what was said, and a new process sees the same.
    assert sorted(int(p.name) for p in tmp_path.glob("[0-9]*")) == kept
    assert not list(tmp_path.glob(".trash*"))
    with CheckpointManager(tmp_path, **options) as manager:
        assert manager.all_steps() == kept
        assert manager.best_step() == best
        assert manager.latest_step() == kept[-1]


def test_a_best_checkpoint_of_an_earlier_process_survives_later_saves(tmp_path):
    options = {"save_total_limit": 1, "best_metric": "l"}
    with CheckpointManager(tmp_path, **options) as manager:
        save_all(manager, [1.0, 2.0])
    with CheckpointManager(tmp_path, **options) as manager:
        for step in (3, 4):
            manager.save(step, small(step), metrics={"l": 5.0})
        manager.wait()
        assert manager.all_steps() == [1, 4]
        np.testing.assert_array_equal(manager.restore(small(0), 1).state["w"], 1.0)


def test_a_step_is_saved_once_and_never_before_a_later_one(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() is None and manager.best_step() is None
        assert manager.save(5, small(5))
        assert not manager.save(5, small(6))
        with pytest.raises(ValueError, match=r"holds step 5.*delete_after"):
            manager.save(4, small(4))
        np.testing.assert_array_equal(manager.restore(small(0)).state["w"], 5.0)
        manager.save(6, small(6))
        manager.delete_after(4)
        assert manager.all_steps() == []
        assert manager.save(5, small(7))
        np.testing.assert_array_equal(manager.restore(small(0)).state["w"], 7.0)


def test_partial_restore_takes_only_what_is_asked_for(tmp_path):
    state = make_state(make_mesh((4, 2)))
    part = {"trainable": abstract(state).trainable}
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, state)
        restored = manager.restore(part, partial=True).state
        assert_same_bits(restored, {"trainable": state.trainable})
        with pytest.raises(CheckpointMismatchError, match="not in the model"):
            manager.restore(part)


def test_a_checkpoint_of_another_model_is_refused_by_leaf_and_shape(tmp_path):
    state = {
        "layers": {"kernel": jnp.zeros((4, 8)), "scale": jnp.zeros(4, jnp.bfloat16)},
        "gone": jnp.zeros(2),
    }
    model = {
        "layers": {"kernel": jnp.zeros((4, 16)), "scale": jnp.zeros(4)},
        "new": jnp.zeros(3),
    }
    with CheckpointManager(tmp_path) as manager:
        manager.save(3, state)
        with pytest.raises(ValueError) as error:
            manager.restore(model)
    message = str(error.value)
    assert isinstance(error.value, CheckpointMismatchError)
    assert "4 leaves differ" in message
    for line in (
        "layers.kernel: float32[4, 8] in the checkpoint, the model has float32[4, 16]",
        "layers.scale: bfloat16[4] in the checkpoint, the model has float32[4]",
        "new: not in the checkpoint, the model has float32[3]",
        "gone: float32[2] in the checkpoint, not in the model",
    ):
        assert line in message


def test_a_message_names_only_the_first_of_many_differences(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {f"w{i:02}": jnp.zeros(2) for i in range(30)})
        with pytest.raises(CheckpointMismatchError) as error:
            manager.restore({f"w{i:02}": jnp.zeros(3) for i in range(30)})
    assert "w03" in str(error.value) and "w04" not in str(error.value)
    assert "and 26 more" in str(error.value)


def test_bad_input_is_refused_with_its_name(tmp_path):
    with pytest.raises(ValueError, match="save_total_limit=0"):
        CheckpointManager(tmp_path, save_total_limit=0)
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            manager.restore(small(0))
        with pytest.raises(ValueError, match=r"a\.0 is a float"):
            manager.save(1, {"a": [1.0]})
        with pytest.raises(ValueError, match=r"two leaves of the state are named a\.b"):
            manager.save(1, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)})
        with pytest.raises(ValueError, match="data_state changes"):
            manager.save(1, small(1), data_state={"seen": {3: "int key"}})
        with pytest.raises(ValueError, match="config has no JSON form"):
            manager.save(1, small(1), config={"f": print})
        assert manager.all_steps() == []
        manager.save(1, small(1))
        with pytest.raises(FileNotFoundError, match=r"step 2 .*there are \[1\]"):
            manager.restore(small(0), 2)


def test_nothing_on_disk_is_a_pickle(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, make_state(make_mesh((2, 2))), config={"a": 1})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.suffix not in (".pkl", ".pickle", ".npy")
        assert path.read_bytes()[:2] not in (b"\x80\x03", b"\x80\x04", b"\x80\x05")


_ENDLESS_SAVES = """
import sys, jax
from jaxtrain.run.checkpoint import CheckpointManager
manager = CheckpointManager(sys.argv[1], save_total_limit=2)
make = jax.jit(lambda step: jax.random.normal(jax.random.key(step), (2048, 4096)))
for step in range((manager.latest_step() or 0) + 1, 1000):
    manager.save(step, {"w": make(step)}, data_state={"position": step})
    print(step, flush=True)
"""


def _start_endless_saves(directory: pathlib.Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _ENDLESS_SAVES, str(directory)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_kill_in_mid_save_loses_nothing_that_was_saved(tmp_path):
    make = jax.jit(lambda step: jax.random.normal(jax.random.key(step), (2048, 4096)))
    latest_before = 0
    for _ in range(2):  # the second run starts on what the first kill left
        process = _start_endless_saves(tmp_path)
        assert process.stdout is not None
        while int(process.stdout.readline()) < latest_before + 3:
            pass
        deadline = time.monotonic() + 30
        while not list(tmp_path.glob("*.orbax-checkpoint-tmp*")):
            assert time.monotonic() < deadline
        complete = {int(p.name) for p in tmp_path.glob("[0-9]*") if p.name.isdigit()}
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert list(tmp_path.glob("*.orbax-checkpoint-tmp*")), "not killed in mid-save"

        with CheckpointManager(tmp_path, save_total_limit=2) as manager:
            steps = manager.all_steps()
            # At most one save, or one retirement, ended between the look and the kill.
            assert steps and max(complete) <= steps[-1]
            for step in steps:
                restored = manager.restore(
                    {"w": jax.ShapeDtypeStruct((2048, 4096), jnp.float32)}, step
                )
                np.testing.assert_array_equal(restored.state["w"], make(step))
                assert restored.data_state == {"position": step}
            assert not list(tmp_path.glob("*.orbax-checkpoint-tmp*"))
            latest_before = steps[-1]


def test_remains_of_an_interrupted_deletion_are_no_checkpoint(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, small(1))
        manager.save(2, small(2))
    # As a kill leaves it: step 1 was renamed, then half deleted.
    trash = tmp_path / ".trash"
    trash.mkdir()
    (tmp_path / "1").rename(trash / "1")
    (trash / "1" / "record" / "metadata").unlink()
    with CheckpointManager(tmp_path) as manager:
        assert manager.all_steps() == [2]
        np.testing.assert_array_equal(manager.restore(small(0)).state["w"], 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


_ONE_OF_TWO_PROCESSES = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtrain.run.checkpoint import CheckpointManager
directory, address, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, rank)
mesh = Mesh(np.array(jax.devices()), ("data",))
split = NamedSharding(mesh, PartitionSpec("data"))
state = jax.jit(lambda: {"w": jnp.arange(16.0)}, out_shardings=split)()
with CheckpointManager(directory, save_total_limit=1) as manager:
    for step in (1, 2):
        # Of unequal length, so that gathering must pad.
        manager.save(step, state, data_state={"rank": rank, "seen": [step] * rank * 50})
    restored = manager.restore(state)
    assert manager.all_steps() == [2]
    assert restored.data_state == {"rank": rank, "seen": [2] * rank * 50}
    for shard in restored.state["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(16.0)[shard.index])
"""


def test_two_processes_save_one_checkpoint_and_each_its_own_data_position(tmp_path):
    run_two(_ONE_OF_TWO_PROCESSES, tmp_path)
    with CheckpointManager(tmp_path) as manager:
        restored = manager.restore({"w": jax.ShapeDtypeStruct((16,), jnp.float32)})
    np.testing.assert_array_equal(restored.state["w"], np.arange(16.0))
    with pytest.raises(ValueError, match="2 processes, but 1 run now"):
        _ = restored.data_state


def test_a_reader_leaves_alone_what_another_process_is_writing(tmp_path):
    state = {"x": jax.device_put(jnp.arange(4.0))}
    with CheckpointManager(tmp_path, best_metric="eval_loss") as writing:
        for step, loss in ((1, 2.0), (2, 3.0)):
            writing.save(step, state, metrics={"eval_loss": loss})
        writing.wait()
    # A save that is under way, and a checkpoint that is being deleted.
    others = [tmp_path / "3.orbax-checkpoint-tmp", tmp_path / ".trash" / "0"]
    for folder in others:
        folder.mkdir(parents=True)
    with CheckpointManager(
        tmp_path, best_metric="eval_loss", read_only=True
    ) as reading:
        assert reading.all_steps() == [1, 2] and reading.best_step() == 1
        read = reading.restore(state, 2).state
    np.testing.assert_array_equal(read["x"], state["x"])
    assert all(folder.is_dir() for folder in others)
