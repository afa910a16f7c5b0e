"""All of the harness by one command; its figures go into docs/reliability.md.

    python tests/faults/run.py --kinds damage,flips,kills --seed 7 --count 200
                               [--runs NAMES] [--folder DIR]
    python tests/faults/run.py --kinds config,yaml,rows,model,tokenizer,adapter
                               --seed 7 --count 9000
    python tests/faults/run.py --summary DIR [DIR ...]

`damage`: every kind of damage to the newest checkpoint, once. `flips`: `--count` single
bit flips. `kills`: at least `--count` SIGKILLs, of all kinds of runs in turn, or of
those that `--runs` names (kills.py). `disks`: at least `--count` starts on a disk that
is full or fails otherwise, which takes root (disks.py). `config`, `yaml`, `rows`,
`model`, `tokenizer`, `adapter`: `--count` bad inputs of each (fuzz.py). What is done is
noted in `--folder`, so the same command goes on where it was stopped; another seed
draws other cases. Several may run at once, by seeds or folders of their own;
JAX_COMPILATION_CACHE_DIR gives them one cache of compiled programs. `--summary` runs
nothing: it adds up what was noted in some folders, and ends with 1 if anything was not
handled.
"""

import argparse
import collections
import dataclasses
import json
import logging
import os
import pathlib
import resource
import shutil
import sys
from collections.abc import Callable, Iterator

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent.parent))


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


def run_damage(folder: pathlib.Path, notes: Notes, _: argparse.Namespace) -> None:
    """Every kind of damage once."""
    import damage

    done = {case["name"] for case in notes.done}
    cases = (
        (name, change) for name, change in damage.KINDS.items() if name not in done
    )
    _run_restores(folder, notes, cases)


def run_flips(folder: pathlib.Path, notes: Notes, options: argparse.Namespace) -> None:
    """Single bit flips, each by a seed of its own."""
    import damage

    def flip(number: int) -> Callable[..., object]:
        return lambda newest, _: damage.flip_random_bit(newest, number)

    first = options.seed * 1_000_000
    numbers = range(first + len(notes.done), first + options.count)
    _run_restores(folder, notes, ((str(number), flip(number)) for number in numbers))


def _run_restores(
    folder: pathlib.Path,
    notes: Notes,
    cases: Iterator[tuple[str, Callable[..., object]]],
) -> None:
    import damaged_restores as restores

    # What they say is looked at, and not shown.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger().addHandler(logging.NullHandler())
    saved = folder / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    restores.save_all(saved)
    for name, change in cases:
        outcome = restores.try_damage(saved, folder / "work", change)
        notes.add({"name": name, **dataclasses.asdict(outcome)})


def run_kills(folder: pathlib.Path, notes: Notes, options: argparse.Namespace) -> None:
    """Rounds of kills until there are enough."""
    import kills

    names = options.runs.split(",") if options.runs else list(kills.RUNS)
    kills.prepare(options.folder.absolute())
    while sum(case["kills"] for case in notes.done) < options.count:
        number = len(notes.done)
        name = names[number % len(names)]
        played = kills.play(name, number, options.seed, folder)
        handled = played.lost is None
        kind = "as without kills" if handled else "LOST"
        case = {"kind": kind, "handled": handled, **dataclasses.asdict(played)}
        notes.add(case)
        print(json.dumps(case), flush=True)


def run_disks(folder: pathlib.Path, notes: Notes, options: argparse.Namespace) -> None:
    """Rounds on bad disks until enough starts have failed."""
    import disks

    folder.mkdir(parents=True, exist_ok=True)
    disks.prepare(options.folder.absolute())
    while sum(case["failed"] for case in notes.done) < options.count:
        played = disks.play(len(notes.done), options.seed, folder)
        handled = played.lost is None
        case = {"kind": played.fault, "handled": handled, **dataclasses.asdict(played)}
        notes.add(case)
        print(json.dumps(case), flush=True)


def run_inputs(folder: pathlib.Path, notes: Notes, options: argparse.Namespace) -> None:
    """Bad inputs of the kind that the folder is named after.

    An input at which the process ended before is noted as such, and passed over.
    """
    import fuzz

    # What would fill this machine's memory is a failure of one input, not of all.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    name, begun = folder.parent.name, folder / "begun"
    first = options.seed * 1_000_000
    if begun.exists() and int(begun.read_text()) == first + len(notes.done):
        case = {"name": begun.read_text(), "kind": "the process ended"}
        notes.add({**case, "handled": False})
    kind = fuzz.KINDS[name](folder)
    with fuzz.quiet():
        for number in range(first + len(notes.done), first + options.count):
            begun.write_text(str(number))
            outcome = fuzz.run_one(kind, name, number)
            notes.add({"name": str(number), **dataclasses.asdict(outcome)})
    begun.unlink(missing_ok=True)


_EXAMPLES = 3  # of each kind that are printed
_MEMORY = 16 * 2**30  # bytes of address space
FORKING = ("kills", "disks")
INPUTS = ("config", "yaml", "rows", "model", "tokenizer", "adapter")
RUNNERS = {
    "damage": run_damage,
    "flips": run_flips,
    "kills": run_kills,
    "disks": run_disks,
    **dict.fromkeys(INPUTS, run_inputs),
}


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
    fine = [report(name, found[name]) for name in RUNNERS if name in found]
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
    options = parser.parse_args()
    if options.summary:
        return 0 if summarize(options.summary) else 1
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Forks come first: the other parts start jax in this process.
    names = sorted(options.kinds.split(","), key=lambda name: name not in FORKING)
    is_fine = True
    for name in names:
        if name not in RUNNERS:
            parser.error(f"--kinds has {name!r}: choose from {', '.join(RUNNERS)}")
        # A seed has a folder of its own, so that two may run side by side.
        folder = options.folder.absolute() / name / f"seed-{options.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        notes = Notes(folder.with_name(f"{folder.name}.jsonl"))
        RUNNERS[name](folder, notes, options)
        is_fine = report(name, notes.done) and is_fine
    return 0 if is_fine else 1


if __name__ == "__main__":
    sys.exit(main())
