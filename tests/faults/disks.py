"""A disk that is full, has no inodes left, cannot be written to, or does not answer.

A round is one work directory on a file system of its own, which is too small at first
and is made larger after each start. Every start but the last must end with one line
that names the fault; the last must end as a run on a good disk. Mounting takes root:
`can_mount` tells.
"""

import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

import kills

FAULTS = ("size", "inodes", "read-only", "hangs")
RUNS = ("caches", "export")
_ENOUGH = {"size": "64m", "nr_inodes": "100000"}
_STARTS = 3  # on a disk with a fault, at most, in a round
_STEP_TIMEOUT_SECS = 4.0


@dataclasses.dataclass(frozen=True)
class Round:
    """What became of one disk; `told` has the message of each start that failed."""

    number: int
    fault: str
    run: str
    failed: int
    told: list[str]
    lost: str | None


def can_mount(folder: pathlib.Path) -> str | None:
    """None where small file systems can be made here, or why they cannot."""
    try:
        with _disk(folder / "trial", size="1m"):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no tmpfs can be mounted here: {error}"


def play(
    number: int, seed: int, folder: pathlib.Path, faults: Sequence[str] = FAULTS
) -> Round:
    """One round: fault and kind of run by its number, the sizes by `seed` too."""
    fault = faults[number % len(faults)]
    run = RUNS[number // len(faults) % len(RUNS)]
    reference = kills.reference(run, folder.parent)
    draws = random.Random(f"{seed} {number}")
    told: list[str] = []
    with _disk(folder / "disk", **_ENOUGH) as disk:
        work = disk  # its log lies beside it, where there is room
        for limit in _limits(fault, reference, draws):
            code, log = _start_with(fault, limit, run, work)
            if code == 0:
                break
            told += [line for line in log if line.startswith("error: ")][:1]
            if wrong := _judge(fault, code, log):
                (folder / f"failed-{number}.log").write_text("\n".join(log))
                return Round(number, fault, run, len(told), told, wrong)
        _remount(disk, **_ENOUGH)
        code = kills.start(run, work)
        lost = kills.describe(code, work) if code else kills.difference(reference, work)
    return Round(number, fault, run, len(told), told, lost)


def _limits(fault: str, reference: pathlib.Path, draws: random.Random) -> list[str]:
    """Mount options of the starts, from too little for anything to nearly enough."""
    files = list(reference.rglob("*"))
    if fault == "size":
        pages = sum(-(-path.lstat().st_size // 4096) for path in files)
        drawn = sorted(draws.randrange(1, pages) for _ in range(_STARTS))
        return [f"size={4 * count}k" for count in drawn]
    if fault == "inodes":
        drawn = sorted(draws.randrange(2, len(files)) for _ in range(_STARTS))
        return [f"nr_inodes={count}" for count in drawn]
    if fault == "read-only":
        return ["ro"]
    # The flushes that still end, from each of three moments on.
    return [
        f"start {draws.randrange(0, 4)}",
        f"save {draws.randrange(20, 200)}",
        f"export {draws.randrange(0, 4)}",
    ]


def _start_with(
    fault: str, limit: str, run: str, work: pathlib.Path
) -> tuple[int, list[str]]:
    if fault == "hangs":
        event, after = limit.split()
        hang = kills.Hang(event, int(after), _STEP_TIMEOUT_SECS)
        code = kills.start(run, work, hang=hang)
    else:
        _mount_options(work, limit)
        try:
            code = kills.start(run, work)
        finally:
            if fault == "read-only":
                _mount_options(work, "rw")
    log = kills.log_of(work, 0).read_text(errors="replace").splitlines()
    return code, log


def _judge(fault: str, code: int, log: list[str]) -> str | None:
    """What is wrong with how a start ended that could not go on; None if nothing."""
    errors = [line for line in log if line.startswith("error: ")]
    text = "\n".join(log)
    signs = {
        "size": "the disk is full",
        "inodes": "the disk is full",
        "read-only": "cannot be written to",
        "hangs": "training.step_timeout_secs",
    }
    last = f"exit code {code}: {' | '.join(log[-4:])[-600:]}"
    if code != (2 if fault == "read-only" else 1):
        return f"another exit code than expected; {last}"
    if len(errors) != 1 or signs[fault] not in errors[0]:
        return f"not one line that says what to do; {last}"
    if "Traceback" in text:
        return f"a traceback; {last}"
    return None


@contextlib.contextmanager
def _disk(folder: pathlib.Path, **options: str) -> Iterator[pathlib.Path]:
    """A file system in memory for the time of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.path.ismount(folder):  # of a harness that was killed
        subprocess.run(["umount", "-l", folder], check=True)
    shown = ",".join(f"{name}={value}" for name, value in options.items())
    command = ["mount", "-t", "tmpfs", "-o", shown, "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
        shutil.rmtree(folder, ignore_errors=True)


def _remount(disk: pathlib.Path, **options: str) -> None:
    _mount_options(disk, ",".join(f"{k}={v}" for k, v in options.items()))


def _mount_options(disk: pathlib.Path, options: str) -> None:
    command = ["mount", "-o", f"remount,{options}", str(disk)]
    subprocess.run(command, check=True, capture_output=True)


def prepare(folder: pathlib.Path) -> None:
    """As for kills.

    Raises:
        SystemExit: no file system can be mounted here.
    """
    if reason := can_mount(folder):
        sys.exit(reason)
    kills.prepare(folder)
