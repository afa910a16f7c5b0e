"""SIGKILL a tiny run again and again, and look whether it ends as without kills.

A round is one work directory: a few starts that are killed at random moments, and one
that runs to its end. The weights that it exports must be bit by bit those of a run that
was never killed, each record must stand in metrics.jsonl once, with the same numbers,
and nothing may be left behind. Each start is a fork of a process that has imported
everything and started nothing, so a kill costs two seconds and not ten.
"""

import dataclasses
import fcntl
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import sys
import time
from typing import Any, NamedTuple

import pool

TESTS = pathlib.Path(__file__).resolve().parent.parent
STEPS = 12
KILLS_IN_A_ROUND = 5
_LONGEST_START_SECS = 300.0
_POLL_SECS = 0.002


@dataclasses.dataclass(frozen=True)
class Run:
    """A kind of run, and where in it kills fall: names of `_LATEST_SECS`."""

    training_type: str
    events: tuple[str, ...] = ("start", "save", "save", "save", "save")
    processes: int = 1


RUNS = {
    "sft": Run("sft"),
    "stream": Run("from_scratch"),
    "lora": Run("lora"),
    "caches": Run("dpo", ("cache", "cache", "reference", "reference", "save")),
    "from_scratch": Run("from_scratch"),
    "processes": Run("lora", processes=2),
    "dpo": Run("dpo"),
    "export": Run("lora", ("save", "export", "export", "export", "export")),
}
# Events in the order in which a run comes to them, and how long after one a kill may
# fall: as long as what is written there takes.
_LATEST_SECS = {
    "start": 4.0,
    "cache": 0.15,
    "reference": 0.5,
    "save": 0.3,
    "export": 0.05,
}


_OF_EXPORTS = {
    "exported.json",
    *(f"{name}{end}" for name in ("model", "adapter") for end in (".partial", ".old")),
}


@dataclasses.dataclass(frozen=True)
class Round:
    """What became of one work directory.

    `kills`: starts that were killed before their end, and `events`, where. `lost`: what
    differs from the run without kills, or how a start failed; None if nothing.
    """

    number: int
    run: str
    kills: int
    events: dict[str, int]
    lost: str | None


class Moment(NamedTuple):
    """When to kill: `secs` after an event was seen to begin for the `count`th time."""

    event: str
    count: int
    secs: float


class Hang(NamedTuple):
    """When the disk stops to answer, and the run's limit on the time of a step.

    So many flushes end after the event was seen to begin ("start": from the first on).
    """

    event: str
    after: int
    timeout_secs: float


def play(name: str, number: int, seed: int, folder: pathlib.Path) -> Round:
    """One round of a kind of run; all its moments are drawn by `seed` and `number`.

    What is compared with is made beside `folder`, for all who have a folder there.
    """
    run, events = RUNS[name], dict.fromkeys(_LATEST_SECS, 0)
    whole = reference(name, folder.parent)
    work = folder / "killed"
    shutil.rmtree(work, ignore_errors=True)
    code = -signal.SIGKILL
    for moment in _moments(run, random.Random(f"{seed} {number}")):
        code = start(name, work, moment)
        if code != -signal.SIGKILL:
            break
        events[moment.event] += 1
    if code == -signal.SIGKILL:
        code = start(name, work)
    lost = describe(code, work) if code else difference(whole, work)
    seen = {event: count for event, count in events.items() if count}
    return Round(number, name, sum(seen.values()), seen, lost)


def _moments(run: Run, draws: random.Random) -> list[Moment]:
    """Kills within starts may come at any time; the others as a run comes to them."""
    drawn = draws.choices(run.events, k=KILLS_IN_A_ROUND)
    order = list(_LATEST_SECS)
    later = iter(sorted((e for e in drawn if e != "start"), key=order.index))
    events = [event if event == "start" else next(later) for event in drawn]
    return [
        Moment(
            event,
            draws.choice((1, 2)) if event == "save" else 1,
            draws.uniform(0, _LATEST_SECS[event]),
        )
        for event in events
    ]


def reference(name: str, folder: pathlib.Path) -> pathlib.Path:
    """The work directory of a run that nothing interrupts.

    Of several processes that ask for one, the first makes it and the others wait.
    """
    work = folder / f"reference-{name}"
    finished = work / "finished"
    with work.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            shutil.rmtree(work, ignore_errors=True)
            code = start(name, work)
            if code:
                raise RuntimeError(describe(code, work))
            finished.touch()
        fcntl.flock(lock, fcntl.LOCK_UN)
    return work


# --- processes -----------------------------------------------------------------------


def start(
    name: str,
    work: pathlib.Path,
    kill: Moment | None = None,
    hang: Hang | None = None,
) -> int:
    """Train in processes of their own; the exit code, negative for a signal.

    Of several processes the code is that of the first one that failed. What they print
    is in `log_of(work, rank)`.
    """
    work.parent.mkdir(parents=True, exist_ok=True)
    before = {event: _marks(work, event) for event in _LATEST_SECS}
    children = _fork(name, work, hang)
    started, at = time.monotonic(), None
    if kill is None:
        at = started + _LONGEST_START_SECS
    elif kill.event == "start":
        at = started + kill.secs
    while True:
        failed = _reap(children)
        if failed or not children:
            _kill(children)
            return failed
        if kill and at is None and _has_begun(work, kill, before):
            at = time.monotonic() + kill.secs
        if at is not None and time.monotonic() >= at:
            _kill(children)
            return -signal.SIGKILL if kill else -signal.SIGALRM
        time.sleep(_POLL_SECS)


def _fork(name: str, work: pathlib.Path, hang: Hang | None) -> list[int]:
    count = RUNS[name].processes
    environment = {}
    if count > 1:
        environment = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{_free_port()}",
            "JAX_NUM_PROCESSES": str(count),
            "JAXTRAIN_HEARTBEAT_TIMEOUT_SECS": "30",
        }
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            pool.die_with_parent()
            if count > 1:
                os.environ.update(environment, JAX_PROCESS_ID=str(rank))
            _train_and_leave(name, work, log_of(work, rank), hang)
        children.append(child)
    return children


def _free_port() -> int:
    """One below those that the system hands out, so that nobody gets it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as trial:
            try:
                trial.bind(("localhost", port))
            except OSError:
                continue
        return port


def _reap(children: list[int]) -> int:
    """Take the processes that have ended off the list; the first code that is not 0."""
    failed = 0
    for child in list(children):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            children.remove(child)
            failed = failed or os.waitstatus_to_exitcode(status)
    return failed


def _kill(children: list[int]) -> None:
    """In any order, at moments apart: one may go on without the other for a while."""
    draws = random.SystemRandom()
    for number, child in enumerate(draws.sample(children, len(children))):
        time.sleep(draws.uniform(0, 0.3) if number else 0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- where a run is ------------------------------------------------------------------


def _has_begun(work: pathlib.Path, kill: Moment, before: dict[str, set[str]]) -> bool:
    """Whether a run came to an event since it was started, or has passed it by."""
    new = _marks(work, kill.event) - before[kill.event]
    if len(new) >= kill.count:
        return True
    events = list(_LATEST_SECS)
    later = events[events.index(kill.event) + 1 :]
    return any(_marks(work, event) - before[event] for event in later)


def _marks(work: pathlib.Path, event: str) -> set[str]:
    """What there is on the disk of an event; something new tells that it begins."""
    if event == "cache":
        rooms = (work / "cache").glob("new-*")
        return {f"{room.name} {_changed_ns(room)}" for room in rooms}
    if event == "reference":
        sides = [work / "reference" / side for side in ("train", "eval")]
        return {f"{side} {_size(side / 'logps.float32')}" for side in sides}
    if event == "save":
        return {name for name in _names(work / "checkpoints") if name.isdecimal()}
    if event == "export":
        return {name for name in _names(work) if name in _OF_EXPORTS}
    return set()


def _names(folder: pathlib.Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _changed_ns(path: pathlib.Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _size(path: pathlib.Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


# --- one run -------------------------------------------------------------------------


def log_of(work: pathlib.Path, rank: int) -> pathlib.Path:
    """Where a process's output is, beside the work directory."""
    return work.with_name(f"{work.name}-{rank}.log")


def _train_and_leave(
    name: str, work: pathlib.Path, log: pathlib.Path, hang: Hang | None
) -> None:
    """In the child: train to the end, and leave as a command does; never returns."""
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        from jaxtrain.cli.ending import run_command
        from jaxtrain.record import logs

        # As in a command, which sets these before any library does.
        sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
        logs.set_up()
        code = run_command(lambda _: _train(name, work, hang), [])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _train(name: str, work: pathlib.Path, hang: Hang | None) -> None:
    import checkpoint_runs

    from jaxtrain.run import distributed
    from jaxtrain.trainer import TrainingOrchestrator

    distributed.initialize()
    config, rows = _make_config(name, work), {}
    if name != "stream":
        rows = checkpoint_runs.make_datasets(RUNS[name].training_type)
    if name == "caches":  # enough of them that a kill falls between two batches
        rows["train_dataset"] = checkpoint_runs.make_rows("dpo", 300)
    if hang is not None:
        config.training.step_timeout_secs = hang.timeout_secs
        _let_the_disk_hang(work, hang)
    orchestrator = TrainingOrchestrator(config, workdir=work)
    orchestrator.prepare()
    orchestrator.train(**rows)


def _let_the_disk_hang(work: pathlib.Path, when: Hang) -> None:
    """From a moment on no flush of a file of the work directory ends."""
    flush, count = os.fsync, itertools.count()

    def hang(descriptor: int) -> None:
        at = os.readlink(f"/proc/self/fd/{descriptor}")
        has_begun = when.event == "start" or _marks(work, when.event)
        if at.startswith(str(work)) and has_begun and next(count) >= when.after:
            time.sleep(10 * _LONGEST_START_SECS)
        flush(descriptor)

    os.fsync = hang


def _make_config(name: str, work: pathlib.Path) -> Any:
    import checkpoint_runs

    run = RUNS[name]
    config = checkpoint_runs.make_config(run.training_type)
    config.training.max_steps = STEPS
    config.training.save_steps = 1
    config.training.save_total_limit = 3
    config.training.eval_steps = 4
    if name == "stream":
        config.data.streaming = True
        config.data.shuffle_buffer_size, config.data.stream_window_rows = 8, 4
        config.data.train, config.data.eval = _write_rows(work.parent)
    if name == "caches":
        config.data.cache, config.data.cache_dir = True, str(work / "cache")
        config.training.dpo.sync_ref_model = False
        config.training.dpo.precompute_ref_log_probs = True
    if run.processes > 1:
        config.training.num_gpus = None
        config.training.per_device_train_batch_size = 1
        config.training.deepspeed.zero_stage = 3
    return config


def _write_rows(folder: pathlib.Path) -> tuple[str, str]:
    """Files of rows to stream and to evaluate on."""
    import checkpoint_runs

    paths = {"train": folder / "train.jsonl", "eval": folder / "eval.jsonl"}
    for name, rows in checkpoint_runs.make_datasets("from_scratch").items():
        path = paths[name.removesuffix("_dataset")]
        if not path.exists():
            aside = path.with_suffix(".new")
            aside.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            aside.rename(path)
    return str(paths["train"]), str(paths["eval"])


# --- what came of it -----------------------------------------------------------------


def describe(code: int, work: pathlib.Path) -> str:
    told = []
    for log in sorted(work.parent.glob(f"{work.name}-*.log")):
        lines = log.read_text(errors="replace").splitlines()
        told.append(" | ".join(lines[-3:])[-400:])
    return f"exit code {code}: {' || '.join(told)}"


def difference(reference: pathlib.Path, work: pathlib.Path) -> str | None:
    """What a run that was killed ended with that the other one did not; None if so."""
    for pattern in ("*.safetensors", "logps.float32"):
        for path in sorted(reference.rglob(pattern)):
            other = work / path.relative_to(reference)
            if not other.exists() or other.read_bytes() != path.read_bytes():
                return f"{path.relative_to(reference)} differs"
    from runs import records

    expected, found = records(reference), records(work)
    if expected != found:
        where = [at for at, line in enumerate(expected) if found[at : at + 1] != [line]]
        return f"metrics.jsonl differs from line {where[:1] or [len(expected)]}"
    strange = [name for name in _names(work / "checkpoints") if not name.isdecimal()]
    for folder in (".", "cache"):
        known = set(_names(reference / folder)) - {"finished"}
        strange += set(_names(work / folder)) ^ known
    return f"left behind or missing: {sorted(strange)}" if strange else None


def prepare(folder: pathlib.Path) -> None:
    """Import everything that a run needs, and start nothing that a fork would lose."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Of its own, for a process that is killed leaves half a file there.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    sys.path.insert(0, str(TESTS))
    import checkpoint_runs  # noqa: F401
    import runs  # noqa: F401
    import transformers  # noqa: F401

    import jaxtrain.trainer  # noqa: F401
