"""Checkpoints in buckets: saved, restored, kept, damaged, uncommitted."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.run import preflight
from jaxtrain.run.checkpoint import CheckpointManager, restore_newest
from jaxtrain.run.ledger import find_loss
from jaxtrain.run.saved_record import COMMIT_FILE
from jaxtrain.storage import folders
from jaxtrain.storage.address import as_path

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from buckets import bucket

__all__ = ["bucket"]


def make_state(seed):
    """Every kind of leaf: sharded, scalar, keys, small floats, bools."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    spread = NamedSharding(mesh, PartitionSpec("fsdp"))
    values = jax.random.normal(jax.random.key(seed), (8, 3))
    return {
        "spread": jax.device_put(values, spread),
        "half": values.astype(jnp.bfloat16),
        "flags": values > 0,
        "step": jnp.int32(seed),
        "rng": jax.random.key(seed),
    }


def bits(state):
    raw = jax.tree.map(
        lambda x: (
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        ),
        state,
    )
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(raw)]


def open_manager(bucket, **options):
    path = as_path(bucket)
    return CheckpointManager(
        path / "checkpoints", ledger=path / "newest_checkpoint.json", **options
    )


def test_saves_restores_and_keeps_what_a_disk_does(bucket):
    calls = []
    kept = {"save_total_limit": 2, "best_metric": "eval_loss"}
    with open_manager(bucket, before_commit=lambda: calls.append(1), **kept) as manager:
        for step in range(1, 6):
            metrics = {"eval_loss": abs(step - 2.0)}
            assert manager.save(step, make_state(step), metrics=metrics)
    assert len(calls) == 5  # once a step, and not once an item
    with open_manager(bucket, **kept) as manager:
        assert manager.all_steps() == [2, 4, 5]
        assert manager.best_step() == 2
        for step in (2, 5):
            restored = manager.restore(make_state(0), step)
            assert bits(restored.state) == bits(make_state(step))
        part = manager.restore({"half": make_state(0)["half"]}, partial=True)
        assert bits(part.state) == bits({"half": make_state(5)["half"]})
        # Onto another layout: the blocks of the checksums are then in several shards.
        one = {**make_state(0), "spread": jnp.zeros((8, 3))}
        assert bits(manager.restore(one).state) == bits(make_state(5))
        manager.delete_after(4)
        assert manager.all_steps() == [2, 4]
    assert preflight.saved_steps(as_path(bucket) / "checkpoints") == [2, 4]
    left = {name.split("/")[1] for name in folders.sizes(bucket) if "/" in name}
    assert left == {"2", "4"}


def test_a_step_without_its_marker_does_not_count_and_is_removed(bucket):
    with open_manager(bucket) as manager:
        for step in (1, 2):
            manager.save(step, make_state(step))
    at = as_path(bucket) / "checkpoints"
    folders.delete(at / "2", [COMMIT_FILE])
    assert preflight.saved_steps(at) == [1]
    with open_manager(bucket, read_only=True) as manager:
        assert manager.all_steps() == [1]
    assert folders.sizes(at / "2")  # a reader changes nothing
    with open_manager(bucket) as manager:
        restored = restore_newest(manager, make_state(0))
        assert restored.step == 1 and bits(restored.state) == bits(make_state(1))
    assert not folders.sizes(at / "2")


DAMAGES = {
    "arrays": lambda files: max(
        (name for name in files if name.startswith("state/")), key=files.get
    ),
    "record": lambda files: "record/metadata",
    "checksums": lambda files: "checksums/process_0.json",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_named_and_set_aside(bucket, damage, caplog):
    if bucket.startswith("s3") and damage != "arrays":
        pytest.skip("read as on gs://")
    with open_manager(bucket) as manager:
        for step in (1, 2):
            manager.save(step, make_state(step))
    at = as_path(bucket) / "checkpoints"
    name = DAMAGES[damage](folders.sizes(at / "2"))
    content = bytearray((at / "2" / name).read_bytes())
    content[len(content) // 2] ^= 1
    (at / "2" / name).write_bytes(bytes(content))
    with open_manager(bucket) as manager:
        restored = restore_newest(manager, make_state(0))
        assert restored.step == 1 and bits(restored.state) == bits(make_state(1))
        assert manager.all_steps() == [1]
    assert f"kept as {at}/damaged-2" in caplog.text
    assert folders.sizes(at / "damaged-2") and not folders.sizes(at / "2")
    with open_manager(bucket) as manager:  # nothing removes it later
        manager.save(2, make_state(2))
    assert folders.sizes(at / "damaged-2")


def test_a_work_directory_that_has_lost_its_checkpoints_is_known(bucket):
    with open_manager(bucket) as manager:
        manager.save(3, make_state(3))
    assert find_loss(as_path(bucket)) is None or preflight.saved_steps(
        as_path(bucket) / "checkpoints"
    )
    folders.remove(f"{bucket}/checkpoints")
    assert "step 3 was saved" in find_loss(as_path(bucket))
