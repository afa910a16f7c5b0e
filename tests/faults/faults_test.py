"""Damage to checkpoints: found, told, set aside; nothing is lost or begun anew."""

import json
import logging
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

import jax
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import checkpoint_runs
import damage
import damaged_restores as restores
import disks
from two_processes import run_two

import jaxtrain
from jaxtrain import cli
from jaxtrain.cli import ending
from jaxtrain.cli.ending import describe
from jaxtrain.config import resolve
from jaxtrain.record import logs
from jaxtrain.run import ledger, preflight
from jaxtrain.run.bad_steps import PendingSteps
from jaxtrain.run.checkpoint import (
    CheckpointManager,
    DamagedCheckpointError,
    checksums,
    restore_newest,
    storage,
)
from jaxtrain.types import WeightedSum

FLIPS = 60


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    restores.save_all(folder)
    return folder


@pytest.mark.parametrize("kind", damage.KINDS)
def test_a_damaged_checkpoint_is_set_aside_or_restored_bit_by_bit(
    saved, tmp_path, kind
):
    outcome = restores.try_damage(saved, tmp_path / "work", damage.KINDS[kind])
    assert outcome.handled, outcome


def test_a_flipped_bit_is_found_or_changes_nothing(saved, tmp_path):
    for seed in range(FLIPS):

        def flip(newest: pathlib.Path, _: pathlib.Path, seed: int = seed) -> None:
            damage.flip_random_bit(newest, seed)

        outcome = restores.try_damage(saved, tmp_path / "work", flip)
        assert outcome.handled, (seed, outcome)


def test_where_no_checkpoint_is_sound_the_run_stops_and_nothing_is_moved(
    saved, tmp_path
):
    work = tmp_path / "work"
    shutil.copytree(saved, work)
    for step in restores.STEPS:
        (work / str(step) / "record" / "metadata").write_text("{}")
    with (
        CheckpointManager(work) as manager,
        pytest.raises(DamagedCheckpointError) as caught,
    ):
        restore_newest(manager, restores.make_state(0))
    assert sorted(path.name for path in work.iterdir()) == ["1", "2", "3"]
    code, message = describe(caught.value)
    assert code == 2 and "\n" not in message
    assert "no checkpoint in" in message and "another workdir" in message
    assert all(f"step {step}: record/metadata" in message for step in restores.STEPS)


def test_no_room_and_no_permission_are_not_damage(saved, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(saved, work)
    no_room = ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
    for error in (MemoryError(), PermissionError(13, "Permission denied"), no_room):
        with (
            CheckpointManager(work) as manager,
            mock.patch.object(storage, "read_arrays", side_effect=error),
            pytest.raises(type(error)),
        ):
            restore_newest(manager, restores.make_state(0))
    assert sorted(path.name for path in work.iterdir()) == ["1", "2", "3"]


def test_a_checkpoint_without_checksums_is_restored_with_one_line(
    saved, tmp_path, caplog
):
    work = tmp_path / "work"
    shutil.copytree(saved, work)
    shutil.rmtree(work / "3" / "checksums")
    path = work / "3" / "record" / "metadata"
    record = json.loads(path.read_text())
    for name in ("checksums", "jaxtrain", "metrics"):
        del record[name]
    path.write_text(json.dumps(record))
    with caplog.at_level(logging.INFO, "jaxtrain"), CheckpointManager(work) as manager:
        assert restore_newest(manager, restores.make_state(0)).step == 3
    assert [r.message for r in caplog.records if "no checksums" in r.message]
    assert len([r for r in caplog.records if r.name.startswith("jaxtrain")]) == 1


def test_another_format_is_refused_with_the_version_that_reads_it(saved, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(saved, work)
    path = work / "3" / "record" / "metadata"
    record = json.loads(path.read_text())
    assert record["jaxtrain"] == jaxtrain.__version__
    shutil.rmtree(work / "3" / "checksums")
    del record["checksums"]
    path.write_text(json.dumps(record | {"format": 2, "jaxtrain": "9.8.7"}))
    told = r"format 2.*pip install jaxtrain==9\.8\.7"
    with CheckpointManager(work) as manager, pytest.raises(ValueError, match=told):
        restore_newest(manager, restores.make_state(0))
    assert (work / "3").is_dir()  # it is not damaged, so it stays


def test_checksums_do_not_depend_on_the_mesh():
    """Blocks cut small, hashed under one layout, hold under each other one."""
    devices = np.array(jax.devices())
    meshes = [
        jax.sharding.Mesh(devices[:8].reshape(shape), ("a", "b"))
        for shape in ((8, 1), (2, 4), (1, 8))
    ]
    specs = [("a", "b"), ("b", "a"), (None, "b"), ()]
    value = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    layouts = [
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        for mesh in meshes
        for spec in specs
    ]
    broken = value.copy()
    broken[11, 17] = np.nextafter(broken[11, 17], np.inf)
    with mock.patch.object(checksums, "BLOCK_BYTES", 200):
        for layout in layouts:
            array = jax.device_put(value, layout)
            found = checksums.hash_pieces(checksums.on_host({"w": array}))
            assert sum(len(blocks) for blocks in found.values()) >= 8
            for other in layouts:
                moved = {"w": jax.device_put(value, other)}
                assert checksums.find_damage(moved, found) is None
            wrong = {"w": jax.device_put(broken, layouts[-1])}
            assert "the array w" in checksums.find_damage(wrong, found)
            found["w"].pop()
            assert "do not cover w" in checksums.find_damage(moved, found)


def test_all_is_on_the_disk_before_the_step_gets_its_name(tmp_path):
    synced: list[bool] = []
    sync = storage.flush_tree

    def watch(folder: pathlib.Path) -> None:
        sync(folder)
        synced.append((tmp_path / "checkpoints" / "1").exists())

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    flushed = mock.Mock()
    folder = tmp_path / "checkpoints"
    with (
        mock.patch.object(storage, "flush_tree", watch),
        mock.patch.object(ledger, "flush", flushed),
        CheckpointManager(folder, ledger=tmp_path / ledger.LEDGER) as manager,
    ):
        manager.save(1, restores.make_state(1))
        # The lines up to the step, before anything of it is written.
        flushed.assert_called_once_with(tmp_path / "metrics.jsonl")
    assert len(synced) == 4 and not any(synced)  # three parts, and the whole


# --- lost checkpoints ----------------------------------------------------------------


def _check(workdir: pathlib.Path, **training: object) -> None:
    preflight.check(resolve({"training": training}, device_count=1), workdir)


def test_lost_checkpoints_are_no_reason_to_begin_at_zero(tmp_path):
    folder = tmp_path / "checkpoints"
    with CheckpointManager(folder, ledger=tmp_path / ledger.LEDGER) as manager:
        _check(tmp_path)  # nothing was saved yet
        manager.save(5, restores.make_state(5))
    _check(tmp_path)
    (folder / "5").rename(tmp_path / "away")
    for lose in (lambda: None, folder.rmdir):
        lose()
        with pytest.raises(ValueError, match=r"step 5 was saved in .*'never'"):
            _check(tmp_path)
        _check(tmp_path, resume_from_checkpoint="never")
    folder.mkdir()
    (tmp_path / "away").rename(folder / "damaged-5")
    (tmp_path / ledger.LEDGER).unlink()
    with pytest.raises(ValueError, match=r"only damaged checkpoints \(damaged-5\)"):
        _check(tmp_path)


def test_records_of_training_without_their_folder_of_checkpoints(tmp_path):
    """As a version without the ledger left them."""
    records = tmp_path / "metrics.jsonl"
    records.write_text('{"step": 0, "eval_loss": 3}\n{"st')
    _check(tmp_path)
    records.write_text('{"step": 0, "eval_loss": 3}\n{"step": 4, "loss": 2}\n{"st')
    with pytest.raises(ValueError, match=r"tells of training, but .* is gone"):
        _check(tmp_path)
    (tmp_path / "checkpoints").mkdir()  # killed before its first save
    _check(tmp_path)


# --- a whole run ---------------------------------------------------------------------


def _exported(workdir: pathlib.Path) -> bytes:
    return (workdir / "model" / "model.safetensors").read_bytes()


def test_a_run_goes_on_from_the_last_sound_step_and_ends_the_same(
    tmp_path, caplog, capsys
):
    config = checkpoint_runs.make_config("sft")
    config.training.save_steps = 3
    workdir = tmp_path / "run"
    checkpoint_runs.train(config, workdir)
    expected = _exported(workdir)
    for path in (workdir / "checkpoints" / "9" / "state").rglob("d/*"):
        damage.garble(path)
    # What only reads names the damage, and leaves everything where it is.
    code = cli.main(["export", str(workdir), "--step=9", f"--output={tmp_path / 'x'}"])
    told = capsys.readouterr().err
    assert code == 2 and "checkpoints/9 is damaged" in told, told
    assert (workdir / "checkpoints" / "9").is_dir()

    shutil.rmtree(workdir / "model")
    live: list[int] = []
    read = storage.read_arrays

    def watch(*arguments: object, **named: object) -> dict[str, jax.Array]:
        live.append(sum(array.nbytes for array in _live_large()))
        return read(*arguments, **named)

    with mock.patch.object(storage, "read_arrays", watch):
        checkpoint_runs.train(config, workdir)
    # The first state was freed before each was read; the export reads the best later.
    assert live[:2] == [0, 0]
    warnings = [r.getMessage() for r in caplog.records if "DAMAGED" in r.getMessage()]
    assert len(warnings) == 1
    assert "step 9 (" in warnings[0] and "from step 6" in warnings[0]
    assert (workdir / "checkpoints" / "damaged-9").is_dir()
    assert (workdir / "checkpoints" / "9").is_dir()  # saved again
    assert _exported(workdir) == expected


def _live_large() -> list[jax.Array]:
    """Arrays of the size of the tiny model's embedding and its moments."""
    return [array for array in jax.live_arrays() if array.shape == (40, 4)]


_ONE_OF_TWO_PROCESSES = """
import sys, jax, jax.numpy as jnp, numpy as np
from unittest import mock
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtrain.run.checkpoint import CheckpointManager, checksums, restore_newest
directory, address, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, rank)
devices = np.array(jax.devices())
rows = NamedSharding(Mesh(devices, ("d",)), PartitionSpec("d"))
columns = NamedSharding(Mesh(devices, ("d",)), PartitionSpec(None, "d"))
values = np.arange(64.0, dtype=np.float32).reshape(8, 8)
def make(sharding, step):
    add = jax.jit(lambda: jnp.arange(64.0).reshape(8, 8) + step, out_shardings=sharding)
    return {"w": add()}
def check(state, step):
    for shard in state["w"].addressable_shards:
        np.testing.assert_array_equal(shard.data, (values + step)[shard.index])
with CheckpointManager(directory) as manager:
    for step in (1, 2, 3):
        manager.save(step, make(rows, step))
    # Blocks of rows, restored as columns: each is put together from both processes.
    check(manager.restore(make(columns, 0), 3).state, 3)
    find = checksums.find_damage
    calls = []
    def seen_by_one(*arguments):
        calls.append(1)
        found = find(*arguments)
        return "seen by one process" if rank == 1 and len(calls) == 1 else found
    with mock.patch.object(checksums, "find_damage", seen_by_one):
        restored = restore_newest(manager, make(rows, 0))
    assert restored.step == 2, restored.step
    check(restored.state, 2)
    assert manager.all_steps() == [1, 2]
    manager.save(3, make(rows, 3))
"""


def test_two_processes_take_the_same_step_where_one_sees_damage(tmp_path):
    for errors in run_two(_ONE_OF_TWO_PROCESSES, tmp_path):
        assert errors.count("DAMAGED CHECKPOINT: step 3 (seen by one process)") == 1
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["1", "2", "3", "damaged-3"]
    hashes = sorted(path.name for path in (tmp_path / "3" / "checksums").iterdir())
    assert hashes == ["commit_success.txt", "process_0.json", "process_1.json"]


def test_rows_are_kept_of_steps_in_flight_and_of_bad_ones_alone():
    def metrics(bad: bool) -> dict[str, WeightedSum]:
        one = jax.numpy.float32(1)
        return {"nonfinite": WeightedSum(jax.numpy.float32(bad), one)}

    pending = PendingSteps(2)
    rows = {step: object() for step in range(1, 11)}
    for step, batch in rows.items():
        pending.add(step, metrics(step == 4), batch)
    taken = pending.take()
    kept = {step: batch for step, _, batch in taken if batch is not None}
    assert kept == {step: rows[step] for step in (4, 8, 9, 10)}
    assert len(taken) == 10 and not pending


def _harness(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The harness itself, in a process that has not started jax: it forks."""
    script = pathlib.Path(__file__).with_name("run.py")
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_run_that_is_killed_again_and_again_ends_as_without_kills(tmp_path):
    """In the writing of its caches too."""
    chosen = ("--kinds", "kills", "--runs", "caches", "--count", 4)
    done = _harness(*chosen, "--seed", 3, "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 not handled" in done.stdout
    told = _harness("--summary", tmp_path)
    assert (
        told.returncode == 0
        and told.stdout.splitlines()[-3:] == (done.stdout.splitlines()[-3:])
    )


def test_a_disk_that_is_full_or_hangs_is_told_in_one_line_and_loses_nothing(tmp_path):
    if reason := disks.can_mount(tmp_path):
        pytest.skip(reason)
    chosen = ("--kinds", "disks", "--runs", "hangs,size", "--seed", 3, "--count", 5)
    done = _harness(*chosen, "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 not handled" in done.stdout
    for told in ("as the run starts", "as the run ends", "nothing was finished"):
        assert told in done.stdout  # of the round on a disk that hangs


def test_of_a_failed_save_the_echoes_of_orbax_are_not_shown():
    printed = mock.Mock()
    with (
        mock.patch.object(sys, "__unraisablehook__", printed),
        mock.patch.object(sys, "__excepthook__", printed),
    ):
        for text in ("Event loop is closed", "something else"):
            error = RuntimeError(text)
            ending._without_late_reads(mock.Mock(exc_value=error))
            ending._without_late_callbacks(RuntimeError, error, None)
            assert printed.call_count == (2 if text == "something else" else 0)
    try:
        raise OSError(28, "No space left on device")
    except OSError:
        found = sys.exc_info()
    for name, shown in {"absl": False, "orbax.x": False, "jaxtrain.loop": True}.items():
        record = logging.LogRecord(name, logging.ERROR, "", 1, "failed", (), found)
        for with_all in (True, False):
            text = logs.LineFormatter(with_all_tracebacks=with_all).format(record)
            assert "error: failed" in text
            assert ("Traceback" in text) == (with_all or shown)


_POOL = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import pool
names, done = iter(map(str, range(9))), []
def make_work(number):
    def work(name):
        if name == "2":
            os._exit(7)
        if name == "5":
            time.sleep(60)
        if name == sys.argv[2]:
            raise ValueError("of the harness")
        time.sleep(0.02)
        return {"name": name, "worker": number}
    return work
for case in pool.run_all(lambda: next(names, None), make_work, 3, limit_secs=1):
    done.append(case)
    print(case["name"], case.get("kind", "done"), case.get("worker", "-"))
"""


def test_a_worker_that_ends_or_hangs_loses_its_case_alone():
    def run(failing: str) -> subprocess.CompletedProcess[str]:
        folder = str(pathlib.Path(__file__).parent)
        command = [sys.executable, "-c", _POOL, folder, failing]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    ended = run("none")
    assert ended.returncode == 0, ended.stderr
    told = sorted(line.rpartition(" ")[0] for line in ended.stdout.splitlines())
    expected = {str(name): "done" for name in range(9)}
    expected |= {"2": "the process ended with 7", "5": "the process hung"}
    assert told == [f"{name} {kind}" for name, kind in expected.items()]
    workers = {line.rpartition(" ")[2] for line in ended.stdout.splitlines()}
    assert workers == {"0", "1", "2", "-"}
    broken = run("4")
    assert broken.returncode == 1 and "the harness failed in a worker" in broken.stderr
    assert "ValueError: of the harness" in broken.stderr


def test_the_total_of_several_folders_tells_of_every_failure(tmp_path):
    case = {"kind": "as without kills", "handled": True, "run": "sft", "kills": 3}
    lost = case | {"kind": "LOST", "handled": False, "events": {"save": 3}}
    for name, cases in {"a": [case, case], "b": [case, lost]}.items():
        path = tmp_path / name / "kills" / "seed-1.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(f"{json.dumps(each)}\n" for each in cases) + '{"to')
    fine = _harness("--summary", tmp_path / "a")
    assert fine.returncode == 0 and "kills: 6 cases, 0 not handled" in fine.stdout
    both = _harness("--summary", tmp_path / "a", tmp_path / "b")
    assert both.returncode == 1 and "kills: 12 cases, 1 not handled" in both.stdout
    assert json.dumps(lost) in both.stdout
    assert _harness("--summary", tmp_path / "c").returncode == 1
