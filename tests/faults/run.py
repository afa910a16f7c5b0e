"""All of the harness by one command; its figures go into docs/reliability.md.

    python tests/faults/run.py --kinds damage,flips,kills --seed 7 --count 200
                               [--runs NAMES] [--folder DIR]
                               [--processes N] [--minutes M]
    python tests/faults/run.py --kinds config,yaml,rows,model,tokenizer,adapter
                               --seed 7 --count 9000
    python tests/faults/run.py --summary DIR [DIR ...]

`damage`: every kind of damage to the newest checkpoint, once. `flips`: `--count` single
bit flips. `kills`: at least `--count` SIGKILLs, of all kinds of runs in turn, or of
those that `--runs` names (kills.py). `disks`: at least `--count` starts on a disk that
is full or fails otherwise, of all faults or of those that `--runs` names, which takes
root (disks.py). `config`, `yaml`, `rows`, `model`, `tokenizer`, `adapter`: `--count`
bad inputs of each (fuzz.py).

`--processes` worker processes do the cases of a kind side by side (pool.py). A case
depends on its number and the seed alone, and not on who does it. What is done is noted
in `--folder`, so the same command goes on where it was stopped; with `--minutes` it
begins no case after that time, and stops by itself. Another seed draws other cases.
`--summary` runs nothing: it adds up what was noted in some folders, and ends with 1 if
anything was not handled.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import logging
import math
import os
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable

import pool  # the folder of this script is on the path

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))


class Notes:
    """Cases that are done, one JSON line each, so that a run can be gone on with."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        text = path.read_text() if path.exists() else ""
        whole, _, torn = text.rpartition("\n")
        if torn:  # the harness itself was killed
            os.truncate(path, len(text.encode()) - len(torn.encode()))
        self.done = [json.loads(line) for line in whole.splitlines()]

    def add(self, case: dict) -> None:
        """Note a case that is done."""
        self.done.append(case)
        with self.path.open("a") as file:
            file.write(json.dumps(case) + "\n")


class Part:
    """Cases of one kind: which there are, and how one is done."""

    limit_secs = 3600.0  # of one case

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        self.kind, self.options = kind, options

    def prepare(self) -> None:
        """Import, before the workers are forked, what all of them need."""

    def names(self) -> Iterable[str]:
        """What the cases are called, in order."""
        first = self.options.seed * 1_000_000
        return map(str, range(first, first + self.options.count))

    def is_enough(self, done: list[dict], running: int) -> bool:
        """Whether no other case need begin, for a part that counts more than cases."""
        return False

    def make_work(self, folder: pathlib.Path) -> Callable[[str], dict]:
        """In a worker, whose folder is its own: what does the case of a name."""
        raise NotImplementedError


class Flips(Part):
    """Single bit flips, each by a seed of its own."""

    def prepare(self) -> None:
        import damage  # noqa: F401
        import damaged_restores  # noqa: F401

    def make_work(self, folder: pathlib.Path) -> Callable[[str], dict]:
        import damaged_restores as restores

        # What they say is looked at, and not shown.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        logging.getLogger().handlers = [logging.NullHandler()]
        saved = folder / "saved"
        shutil.rmtree(saved, ignore_errors=True)
        restores.save_all(saved)

        def work(name: str) -> dict:
            change = self.change_of(name)
            outcome = restores.try_damage(saved, folder / "work", change)
            return {"name": name, **dataclasses.asdict(outcome)}

        return work

    def change_of(self, name: str) -> Callable[..., object]:
        import damage

        return lambda newest, _: damage.flip_random_bit(newest, int(name))


class Damage(Flips):
    """Every kind of damage once."""

    def names(self) -> Iterable[str]:
        import damage

        return damage.KINDS

    def change_of(self, name: str) -> Callable[..., object]:
        import damage

        return damage.KINDS[name]


class Kills(Part):
    """Rounds of kills until there are enough."""

    def prepare(self) -> None:
        import kills

        kills.prepare(self.options.folder.absolute())

    def names(self) -> Iterable[str]:
        return map(str, itertools.count())

    def is_enough(self, done: list[dict], running: int) -> bool:
        import kills

        counted = sum(case.get("kills", 0) for case in done)
        return counted + running * kills.KILLS_IN_A_ROUND >= self.options.count

    def make_work(self, folder: pathlib.Path) -> Callable[[str], dict]:
        import kills

        runs = self.options.runs.split(",") if self.options.runs else list(kills.RUNS)

        def work(name: str) -> dict:
            run = runs[int(name) % len(runs)]
            played = kills.play(run, int(name), self.options.seed, folder)
            handled = played.lost is None
            kind = "as without kills" if handled else "LOST"
            return {"kind": kind, "handled": handled, **dataclasses.asdict(played)}

        return work


class Disks(Kills):
    """Rounds on bad disks until enough starts have failed."""

    def prepare(self) -> None:
        import disks

        disks.prepare(self.options.folder.absolute())

    def is_enough(self, done: list[dict], running: int) -> bool:
        counted = sum(case.get("failed", 0) for case in done)
        return counted + running >= self.options.count

    def make_work(self, folder: pathlib.Path) -> Callable[[str], dict]:
        import disks

        faults = self.options.runs.split(",") if self.options.runs else disks.FAULTS

        def work(name: str) -> dict:
            played = disks.play(int(name), self.options.seed, folder, faults)
            handled = played.lost is None
            case = {"kind": played.fault, "handled": handled}
            return {**case, **dataclasses.asdict(played)}

        return work


class Inputs(Part):
    """Bad inputs of the kind that the part is named after."""

    limit_secs = 240.0  # an input that no signal stops

    def prepare(self) -> None:
        import fuzz

        fuzz.prepare()

    def make_work(self, folder: pathlib.Path) -> Callable[[str], dict]:
        import fuzz

        # What would fill this machine's memory is a failure of one input, not of all.
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        kind = fuzz.KINDS[self.kind](folder)

        def work(name: str) -> dict:
            with fuzz.quiet():
                outcome = fuzz.run_one(kind, self.kind, int(name))
            return {"name": name, **dataclasses.asdict(outcome)}

        return work


_EXAMPLES = 3  # of each kind that are printed
_MEMORY = 16 * 2**30  # bytes of address space
INPUTS = ("config", "yaml", "rows", "model", "tokenizer", "adapter")
PARTS: dict[str, type[Part]] = {
    "damage": Damage,
    "flips": Flips,
    "kills": Kills,
    "disks": Disks,
    **dict.fromkeys(INPUTS, Inputs),
}


def run_part(part: Part, until: float) -> list[dict]:
    """Do what is not done yet of a part; all its cases.

    Args:
        until: the moment of `time.monotonic` after which no case begins.
    """
    options = part.options
    # A seed has a folder of its own, so that two may run side by side.
    folder = options.folder.absolute() / part.kind / f"seed-{options.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    notes = Notes(folder.with_name(f"{folder.name}.jsonl"))
    done = {_name_of(case) for case in notes.done}
    to_do = (name for name in part.names() if name not in done)
    running: set[str] = set()

    def next_name() -> str | None:
        if time.monotonic() > until or part.is_enough(notes.done, len(running)):
            return None
        if (name := next(to_do, None)) is not None:
            running.add(name)
        return name

    def make_work(number: int) -> Callable[[str], dict]:
        own = folder / f"worker-{number}"
        own.mkdir(exist_ok=True)
        return part.make_work(own)

    part.prepare()
    cases = pool.run_all(next_name, make_work, options.processes, part.limit_secs)
    for case in cases:
        notes.add(case)
        running.discard(_name_of(case))
        if "run" in case:
            print(json.dumps(case), flush=True)
    return notes.done


def _name_of(case: dict) -> str:
    return str(case.get("name", case.get("number")))


def report(name: str, cases: list[dict]) -> bool:
    """Print the figures of one part; whether all was handled."""
    kinds = collections.Counter(case["kind"] for case in cases)
    failed = [case for case in cases if not case["handled"]]
    counted = sum(case.get("kills", case.get("failed", 1)) for case in cases)
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(f"{name}: {counted} cases, {len(failed)} not handled ({shown})")
    for by in ("run", "events"):
        if parts := _count_kills(cases, by):
            told = ", ".join(f"{count} {part}" for part, count in parts.most_common())
            print(f"  by {by}: {told}")
    examples: collections.Counter[str] = collections.Counter()
    for case in failed:
        examples[case["kind"]] += 1
        if examples[case["kind"]] <= _EXAMPLES:
            print(f"  {json.dumps(case)}")
    return not failed


def _count_kills(cases: list[dict], by: str) -> collections.Counter[str]:
    """Kills by the kind of run, or by where they fell; nothing for other cases."""
    counts: collections.Counter[str] = collections.Counter()
    for case in cases:
        if by == "events":
            counts.update(case.get("events", {}))
        elif by in case and "kills" in case:
            counts[case[by]] += case["kills"]
    return counts


def summarize(folders: list[pathlib.Path]) -> bool:
    """Print the figures of all that was noted in some folders; whether all is well."""
    found: dict[str, list[dict]] = {}
    for path in sorted({path for at in folders for path in at.glob("*/seed-*.jsonl")}):
        lines = path.read_text().splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        found.setdefault(path.parent.name, []).extend(whole)
    if not found:
        print(f"nothing is noted in {', '.join(map(str, folders))}", file=sys.stderr)
    fine = [report(name, found[name]) for name in PARTS if name in found]
    inputs = [case for name in INPUTS for case in found.get(name, [])]
    if inputs:
        raw = sum(not case["handled"] for case in inputs)
        print(f"bad inputs of all kinds: {len(inputs)}, {raw} raw")
    return bool(found) and all(fine)


def main() -> int:
    """The exit status: 1 if anything was not handled."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kinds", default="damage,flips")
    parser.add_argument("--runs", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--folder", type=pathlib.Path, default="/tmp/jaxtrain-faults")
    parser.add_argument("--summary", type=pathlib.Path, nargs="+", metavar="DIR")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf)
    options = parser.parse_args()
    if options.summary:
        return 0 if summarize(options.summary) else 1
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    until = time.monotonic() + 60 * options.minutes
    is_fine = True
    for kind in options.kinds.split(","):
        if kind not in PARTS:
            parser.error(f"--kinds has {kind!r}: choose from {', '.join(PARTS)}")
        cases = run_part(PARTS[kind](kind, options), until)
        is_fine = report(kind, cases) and is_fine
    if time.monotonic() > until:
        print("the time is over: the same command goes on")
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
