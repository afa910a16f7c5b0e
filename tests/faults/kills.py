"""SIGKILL a tiny run again and again, and look whether it ends as without kills.

A round is one work directory: a few starts that are killed at random moments, and one
that runs to its end. The weights that it exports must be bit by bit those of a run that
was never killed, and each step must stand in metrics.jsonl once, with the same loss.
Each start is a fork of a process that has imported everything and started nothing, so a
kill costs two seconds and not ten.
"""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from typing import NamedTuple

TESTS = pathlib.Path(__file__).resolve().parent.parent
TYPES = ("sft", "lora", "from_scratch", "dpo")
STEPS = 12
KILLS_IN_A_ROUND = 5
_LONGEST_START_SECS = 300.0


@dataclasses.dataclass(frozen=True)
class Round:
    """What became of one work directory.

    `kills`: starts that were killed before their end. `lost`: what differs from the
    run without kills, or how a start failed; None if nothing.
    """

    number: int
    training_type: str
    kills: int
    lost: str | None


def play(number: int, seed: int, folder: pathlib.Path) -> Round:
    """One round; all its moments are drawn by `seed` and `number`."""
    kind = TYPES[number % len(TYPES)]
    reference = _reference(kind, folder)
    draws = random.Random(f"{seed} {number}")
    work = folder / "killed"
    shutil.rmtree(work, ignore_errors=True)
    kills, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL and kills < KILLS_IN_A_ROUND:
        # One in five falls somewhere into the start, the others around saved steps.
        wait = draws.choice((None, 1, 1, 2, 2))
        code = _start(
            kind, work, Moment(wait, draws.uniform(0, 4 if not wait else 0.3))
        )
        kills += code == -signal.SIGKILL
    if code == -signal.SIGKILL:
        code = _start(kind, work)
    lost = _describe(code, work) if code else _difference(reference, work)
    return Round(number, kind, kills, lost)


class Moment(NamedTuple):
    """When to kill: `secs` after the start, or after so many more steps are saved."""

    saved_steps: int | None
    secs: float


def _reference(kind: str, folder: pathlib.Path) -> pathlib.Path:
    """The work directory of a run that nothing interrupts."""
    work = folder / f"reference-{kind}"
    finished = work / "finished"
    if not finished.exists():
        shutil.rmtree(work, ignore_errors=True)
        code = _start(kind, work)
        if code:
            raise RuntimeError(_describe(code, work))
        finished.touch()
    return work


def _start(kind: str, work: pathlib.Path, kill: Moment | None = None) -> int:
    """Train in a process of its own; its exit code, negative for a signal."""
    work.parent.mkdir(parents=True, exist_ok=True)
    log = work.with_name(f"{work.name}.log")
    before = _newest(work)
    child = os.fork()
    if not child:
        _train(kind, work, log)
    started, at = time.monotonic(), None
    if kill is None:
        at = started + _LONGEST_START_SECS
    elif kill.saved_steps is None:
        at = started + kill.secs
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if kill and at is None and _newest(work) >= before + (kill.saved_steps or 0):
            at = time.monotonic() + kill.secs
        if at is not None and time.monotonic() >= at:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGKILL if kill else -signal.SIGALRM
        time.sleep(0.002)


def _newest(work: pathlib.Path) -> int:
    """The newest saved step; 0 if there is none."""
    try:
        names = os.listdir(work / "checkpoints")
    except FileNotFoundError:
        return 0
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _train(kind: str, work: pathlib.Path, log: pathlib.Path) -> None:
    """In the child: train to the end, and leave by a code; never returns."""
    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        import checkpoint_runs

        config = checkpoint_runs.make_config(kind)
        config.training.max_steps = STEPS
        config.training.save_steps = 1
        config.training.save_total_limit = 3
        config.training.eval_steps = 4
        checkpoint_runs.train(config, work)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _describe(code: int, work: pathlib.Path) -> str:
    log = work.with_name(f"{work.name}.log")
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return f"exit code {code}: {' | '.join(lines[-3:])[-400:]}"


def _difference(reference: pathlib.Path, work: pathlib.Path) -> str | None:
    """What a run that was killed ended with that the other one did not; None if so."""
    for path in sorted(reference.rglob("*.safetensors")):
        other = work / path.relative_to(reference)
        if not other.exists() or other.read_bytes() != path.read_bytes():
            return f"{path.relative_to(reference)} differs"
    expected, found = _losses(reference), _losses(work)
    if expected != found:
        where = [at for at, line in enumerate(expected) if found[at : at + 1] != [line]]
        return f"metrics.jsonl differs from line {where[:1] or [len(expected)]}"
    left = [path.name for path in (work / "checkpoints").iterdir()]
    if strange := [name for name in left if not name.isdecimal()]:
        return f"left in checkpoints/: {strange}"
    return None


def _losses(work: pathlib.Path) -> list[tuple[int, float | None, float | None]]:
    lines = (work / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in records]


def prepare(folder: pathlib.Path) -> None:
    """Import everything that a run needs, and start nothing that a fork would lose."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    sys.path.insert(0, str(TESTS))
    import checkpoint_runs  # noqa: F401
    import transformers  # noqa: F401

    import jaxtrain.trainer  # noqa: F401
