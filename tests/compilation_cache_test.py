"""The cache of compiled programs: what it spares, and that it never stops a run."""

import collections
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import filelock
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import xla_flags

from jaxtrain.config import resolve
from jaxtrain.config.sections import CompilationCacheSection
from jaxtrain.run import compilation_cache

ROOT = pathlib.Path(__file__).resolve().parent.parent
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)
EVENTS: collections.Counter[str] = collections.Counter()
jax.monitoring.register_event_listener(
    lambda name, **_: EVENTS.update([name.rpartition("/")[2]])
)


@pytest.fixture(autouse=True)
def jax_as_it_starts(monkeypatch):
    """jax without a cache, every program kept; afterwards as it was."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setattr(compilation_cache, "_in_use", None)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setattr(compilation_cache, "MIN_COMPILE_SECS", 0.0)
    jax.config.update("jax_compilation_cache_dir", None)
    jax_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


def section(folder: pathlib.Path | None = None, **keys) -> CompilationCacheSection:
    return CompilationCacheSection(dir=folder and str(folder), **keys)


def compiled_anew(factor: float) -> tuple[int, int]:
    """Compile a program of its own kind; the entries written and found for it."""
    jax.clear_caches()
    EVENTS.clear()
    twice = jax.jit(lambda x: jnp.tanh(x @ x) * factor)
    x = jnp.full((8, 8), 0.5)
    expected = factor * jnp.tanh(jnp.full((8, 8), 2.0))
    assert jnp.allclose(twice(x), expected)
    return EVENTS["cache_misses"], EVENTS["cache_hits"]


def entries(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*-cache"))


def test_a_program_is_found_again_and_the_key_turns_it_off(tmp_path):
    folder = compilation_cache.set_up(section(tmp_path))
    assert folder == tmp_path / compilation_cache.host_cpu()
    written, found = compiled_anew(3.0)
    assert written > 0 and found == 0
    assert len(entries(folder)) == written
    # Asked for again, as by a second run of this process.
    assert compilation_cache.set_up(section(tmp_path)) == folder
    assert compiled_anew(3.0) == (0, written)
    assert compilation_cache.set_up(section(tmp_path, enabled=False)) is None
    assert compiled_anew(3.0) == (0, 0)


def test_two_folders_in_one_process(tmp_path):
    for name in ("one", "two"):
        folder = compilation_cache.set_up(section(tmp_path / name))
        written, _ = compiled_anew(5.0)
        assert written == len(entries(folder)) > 0


def test_a_folder_of_the_users_own_is_left_alone(tmp_path, monkeypatch):
    own = tmp_path / "own"
    jax.config.update("jax_compilation_cache_dir", str(own))
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    assert compilation_cache.set_up(section()) == own
    assert compilation_cache.set_up(section(enabled=False)) == own
    assert {name: getattr(jax.config, name) for name in SETTINGS} == before
    # A folder that the configuration names goes before it.
    named = compilation_cache.set_up(section(tmp_path / "named"))
    assert named is not None and named.parent == tmp_path / "named"
    assert jax.config.jax_compilation_cache_dir == str(named)
    # A threshold of the user's own holds.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    compilation_cache.set_up(section(tmp_path / "other"))
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0


def test_unset_it_lies_in_the_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path))
    folder = compilation_cache.set_up(section())
    assert folder == tmp_path / "compiled" / compilation_cache.host_cpu()


def test_damaged_entries_are_compiled_again(tmp_path):
    folder = compilation_cache.set_up(section(tmp_path))
    written, _ = compiled_anew(7.0)
    for entry, size in zip(entries(folder), (0, 1, 50, 100), strict=False):
        os.truncate(entry, size)
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        _, found = compiled_anew(7.0)
    assert found < written


def test_an_unfinished_entry_is_swept_away(tmp_path):
    folder = compilation_cache.set_up(section(tmp_path))
    written, _ = compiled_anew(11.0)
    # As a process leaves it that is killed between the two writes.
    killed, *whole = entries(folder)
    os.truncate(killed, 10)
    killed.with_name(killed.name.replace("-cache", "-atime")).unlink()
    compilation_cache.set_up(section(tmp_path, enabled=False))
    compilation_cache.set_up(section(tmp_path))
    assert entries(folder) == whole
    assert compiled_anew(11.0) == (1, written - 1)


def test_beyond_the_limit_the_least_recently_used_go(tmp_path):
    folder = compilation_cache.set_up(section(tmp_path))
    compiled_anew(1.0)
    one = sum(entry.stat().st_size for entry in entries(folder))
    limit = int(1.3 * one)  # all but one program are the same for every factor
    shutil.rmtree(folder)
    compilation_cache.set_up(section(tmp_path, enabled=False))
    compilation_cache.set_up(section(tmp_path, max_gib=limit / 2**30))
    for factor in range(2, 10):
        compiled_anew(float(factor))
        assert sum(entry.stat().st_size for entry in entries(folder)) <= limit
    assert compiled_anew(9.0)[0] == 0
    assert compiled_anew(2.0)[0] > 0


def full_disk(path, data):
    raise OSError(28, "No space left on device", str(path))


@pytest.mark.parametrize("fault", ["a file", "full", "quota", "locked", "no locks"])
def test_a_folder_that_cannot_be_used_is_one_warning(
    fault, tmp_path, monkeypatch, caplog
):
    lock = None
    if fault == "a file":
        (tmp_path / "cache").write_text("")
    elif fault == "full":
        usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    elif fault == "quota":
        monkeypatch.setattr(pathlib.Path, "write_bytes", full_disk)
    elif fault == "locked":
        folder = tmp_path / "cache" / compilation_cache.host_cpu()
        folder.mkdir(parents=True)
        monkeypatch.setattr(compilation_cache, "_LOCK_TIMEOUT_SECS", 0.1)
        lock = filelock.FileLock(folder / ".lockfile")
        lock.acquire()
    else:

        def refuse(*_, **__):
            raise NotImplementedError("no flock here")

        monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING):
        assert compilation_cache.set_up(section(tmp_path / "cache")) is None
    if lock is not None:
        lock.release()
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("jaxtrain")]
    assert "\n" not in line
    assert f"training.compilation_cache.dir = {tmp_path / 'cache'}" in line
    assert "enabled = false" in line
    assert compiled_anew(13.0) == (0, 0)


def test_every_kind_of_cpu_has_a_folder_of_its_own(tmp_path):
    def name(text: str) -> str:
        (tmp_path / "cpuinfo").write_text(text)
        return compilation_cache.host_cpu(tmp_path / "cpuinfo")

    one = "processor: 0\nmodel name: A\ncpu MHz: 2000\nflags: fpu avx avx2\n"
    faster = one.replace("2000", "2500")
    assert name(one) == name(faster) == name(one + faster)
    assert name(one) != name(one.replace(" avx2", ""))
    assert name(one) != name(one.replace("A", "B"))
    # Another system: the machine's own name tells it apart.
    assert compilation_cache.host_cpu(tmp_path / "absent") not in name(one)


def test_the_keys_are_checked_and_recorded():
    run = resolve({"training": {"compilation_cache": {"max_gib": 2}}})
    assert run.compilation_cache == CompilationCacheSection(max_gib=2.0)
    recorded = run.to_dict()["training"]["compilation_cache"]
    assert recorded == dataclasses.asdict(run.compilation_cache)
    with pytest.raises(ValueError, match=r"compilation_cache.max_gib = 0"):
        resolve({"training": {"compilation_cache": {"max_gib": 0}}})


# What a run of the command does, with what it took from the cache and the weights'
# bytes at its end.
RUN = """
import collections, hashlib, json, pathlib, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name]))
from jaxtrain import main
main.main(sys.argv[1:])
workdir = sys.argv[1].removeprefix("--workdir=")
weights = pathlib.Path(workdir, "model", "model.safetensors")
print("RESULT", json.dumps({
    "written": events["/jax/compilation_cache/cache_misses"],
    "found": events["/jax/compilation_cache/cache_hits"],
    "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
}))
"""


def start(workdir: pathlib.Path, cache: pathlib.Path) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMP")}
    arguments = (
        f"--workdir={workdir}",
        f"--config={ROOT / 'configs/dpo.py'}",
        "--config.training.max_steps=2",
        "--config.training.eval_on_start=False",
        "--config.training.eval_steps=0",
        "--config.training.save_steps=0",
        "--config.training.logging_steps=1",
        "--config.data.max_train_rows=16",
        "--config.data.packing=False",  # one shape of rows is enough here
        "--config.training.per_device_train_batch_size=2",
        "--config.training.dpo.max_length=64",
        "--config.training.dpo.max_prompt_length=32",
    )
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments],
        env=environment
        | {
            "JAXTRAIN_CACHE": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": xla_flags.QUICK_TO_COMPILE,
            "PYTHONPATH": str(ROOT),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def result(process: subprocess.Popen) -> dict:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    assert "persistent compilation cache" not in output
    return json.loads(output.rpartition("RESULT ")[2])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[dict]:
    """Two runs at once in an empty folder, then a third."""
    folder = tmp_path_factory.mktemp("runs")
    cold = [start(folder / name, folder) for name in ("one", "two")]
    results = [result(process) for process in cold]
    return [*results, result(start(folder / "three", folder))]


@pytest.mark.slow
def test_two_runs_at_once_fill_it_and_a_third_compiles_nothing(runs):
    first, second, warm = runs
    assert first["written"] + second["written"] > 0
    assert (warm["written"], warm["found"]) == (0, first["written"] + first["found"])
    assert len({each["weights"] for each in runs}) == 1


def test_a_run_imports_no_other_framework(runs):
    """Each is installed with the peers, or may stand beside jaxtrain.

    `datasets`, which brings pandas, is for rows of the hub and saved ones.
    """
    others = {
        "datasets",
        "pandas",
        "torch",
        "tensorflow",
        "sklearn",
        "matplotlib",
        "keras",
    }
    peers = {"trl", "peft", "accelerate", "lm_eval", "wandb", "qwix", "bert_score"}
    for each in runs:
        assert not (others | peers) & set(each["modules"])


def test_a_configuration_is_read_without_jax_and_so_is_what_is_wrong_with_a_run():
    code = """if True:
        import sys, jaxtrain.config
        print(*sys.modules)
        from jaxtrain import cli
        for name in cli.COMMANDS.keys() - {"inspect", "lm-eval"}:
            try:
                cli.main([name, "--help"])
            except SystemExit:
                pass
        assert cli.main(["train", "sft", "--data.train=nowhere.jsonl"]) == 2
        print("then", *sys.modules)
        import jaxtrain.data.inspect
        print(*sys.modules)"""
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    first, *_, then, last = finished.stdout.splitlines()
    roots = {name.partition(".")[0] for name in first.split()}
    assert "jaxtrain" in roots
    heavy = {"jax", "numpy", "flax", "transformers", "datasets", "torch", "orbax"}
    assert not heavy & roots
    # Helps of commands, and a file that is not there; arrays of data take numpy.
    assert then.startswith("then ") and "jaxtrain.aot.__main__" in then
    roots = {name.partition(".")[0] for name in then.split()}
    assert not (heavy - {"numpy"}) & roots
    # A look at data takes tokenizers.
    roots = {name.partition(".")[0] for name in last.split()}
    assert not (heavy - {"numpy", "transformers"}) & roots


# Two processes of one run, in a folder of each one's own and in one that they share.
PROCESS = """
import os, pathlib, sys
from jaxtrain.config.sections import CompilationCacheSection
from jaxtrain.run import compilation_cache, distributed
distributed.initialize()
rank = os.environ["JAX_PROCESS_ID"]
for name in (f"own-{rank}", "shared"):
    section = CompilationCacheSection(dir=os.path.join(sys.argv[1], name))
    print("RESULT", name, compilation_cache.set_up(section) is not None)
"""


def test_processes_of_a_run_use_it_only_where_all_see_it(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)],
            env=environment | {"JAX_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for rank, output in enumerate(outputs):
        assert f"RESULT own-{rank} False" in output, output
        assert "all processes of this run share" in output
        assert "RESULT shared True" in output, output
