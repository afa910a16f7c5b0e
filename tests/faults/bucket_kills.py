"""SIGKILL runs in a bucket at single requests, and look whether they end as without.

    python tests/faults/bucket_kills.py --scheme gs --seed 1 --count 100
                                        [--processes 2] [--at TEXT] [--folder DIR]

A round is one work directory: a few starts, each killed as one of its requests reaches
the bucket, before or after it is done; and one that runs to its end. The number of the
request is drawn, so kills fall into everything that a run sends: the lock, arrays,
markers, deletions, records, exports. The weights that are exported must be bit by bit
those of a run that was never killed, each step must stand in metrics.jsonl once, with
the same loss, and nothing half may be left.

With `--processes` the run is one of several processes, which are killed together. With
`--at` only requests whose address or head holds the text count: "checkpoints",
"metrics", or "model/" for exports.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import threading
import time
import traceback
import urllib.parse
from typing import NamedTuple

TESTS = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
import buckets  # noqa: E402
import pool  # noqa: E402
import xla_flags  # noqa: E402

TYPES = ("sft", "lora", "from_scratch", "dpo")
STEPS = 6
KILLS_IN_A_ROUND = 4
LONGEST_START_SECS = 300.0


@dataclasses.dataclass(frozen=True)
class Round:
    """What became of one work directory.

    `kills`: the requests at which starts were killed. `lost`: what differs from the
    run without kills, or how a start failed; None if nothing.
    """

    number: int
    scheme: str
    training_type: str
    processes: int
    kills: list[str]
    lost: str | None


class Kill(NamedTuple):
    """At which request of a start; whether the bucket still does what it asks."""

    request: int
    is_done: bool


class Harness:
    """Starts of runs in one bucket, whose requests pass through here."""

    def __init__(
        self, scheme: str, folder: pathlib.Path, processes: int = 1, at: str = ""
    ) -> None:
        self.scheme, self.folder, self.processes = scheme, folder, processes
        self.at = at
        self.target = buckets.endpoint_of(scheme)
        self._expected: dict[str, tuple[str, int]] = {}
        self._turn = threading.Lock()
        self._children: list[int] = []
        self._kill: Kill | None = None
        self._seen, self._killed_at = 0, ""
        self.proxy = buckets.Proxy(self.target, lambda *_: None)
        self.proxy.forward = self._forward

    def play(self, number: int, seed: int) -> Round:
        """One round; all its moments are drawn by `seed` and `number`."""
        kind = TYPES[number % len(TYPES)]
        expected, requests = self._reference(kind)
        draws = random.Random(f"{seed} {number}")
        work, told, code = f"killed-{seed}-{number}", [], -signal.SIGKILL
        while code == -signal.SIGKILL and len(told) < KILLS_IN_A_ROUND:
            at = Kill(draws.randint(1, requests), draws.random() < 0.5)
            code = self.start(kind, work, at)
            if code == -signal.SIGKILL:
                told.append(self._killed_at)
        if code == -signal.SIGKILL:
            code = self.start(kind, work)
        lost = self._log(work) if code else self._difference(expected, work)
        return Round(number, self.scheme, kind, self.processes, told, lost)

    def _reference(self, kind: str) -> tuple[str, int]:
        """The work directory of a run that nothing interrupts; its requests."""
        if kind not in self._expected:
            work = f"reference-{kind}-{os.getpid()}"
            if code := self.start(kind, work):
                raise RuntimeError(f"exit code {code}: {self._log(work)}")
            self._expected[kind] = (work, self._seen)
        return self._expected[kind]

    def start(self, kind: str, work: str, kill: Kill | None = None) -> int:
        """Train in processes of their own; the exit code, negative for a signal."""
        self._kill, self._seen, self._killed_at = kill, 0, ""
        # As on another machine, which has nothing but the bucket.
        shutil.rmtree(self.folder / "cache", ignore_errors=True)
        port = buckets.free_port()
        with self._turn:
            self._children = []
            for rank in range(self.processes):
                child = os.fork()
                if not child:
                    self._train(kind, work, rank, port)
                self._children.append(child)
        until, codes = time.monotonic() + LONGEST_START_SECS, []
        for child in self._children:
            while not (ended := os.waitpid(child, os.WNOHANG))[0]:
                time.sleep(0.005)
                if time.monotonic() > until:
                    os.kill(child, signal.SIGABRT)
            codes.append(os.waitstatus_to_exitcode(ended[1]))
        if self._killed_at:
            return -signal.SIGKILL
        return next((code for code in codes if code), 0)

    def _forward(self, target, handler, body):
        """Pass a request on, or end the run at it."""
        # Some uploads name their object in the body.
        head = urllib.parse.unquote(handler.path) + (body or b"")[:500].decode("latin1")
        counts = self.at in head
        with self._turn:
            self._seen += counts
            kill = self._kill
            is_last = counts and kill is not None and self._seen == kill.request
            if is_last:
                self._killed_at = f"{handler.command} {_short(handler.path)}"
                if not kill.is_done:
                    self._end()
                    raise ConnectionAbortedError
            if self._killed_at and not is_last:
                raise ConnectionAbortedError
        reply = buckets.Proxy.forward(target, handler, body)
        if is_last:
            self._end()
        return reply

    def _end(self) -> None:
        for child in self._children:
            os.kill(child, signal.SIGKILL)

    def _train(self, kind: str, work: str, rank: int, port: int) -> None:
        """In the child: train to the end, and leave by a code; never returns."""
        pool.die_with_parent()
        code = 1
        try:
            with (self.folder / f"{work}.log").open("w" if not rank else "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ["JAXTRAIN_CACHE"] = str(self.folder / "cache" / str(rank))
            import checkpoint_runs
            import jax

            if self.processes > 1:
                jax.config.update("jax_cpu_collectives_implementation", "gloo")
                jax.distributed.initialize(f"localhost:{port}", self.processes, rank)
            config = checkpoint_runs.make_config(kind)
            config.training.max_steps = STEPS
            config.training.save_steps = 1
            config.training.save_total_limit = 2
            config.training.eval_steps = 3
            if self.processes > 1:
                config.training.num_gpus = self.processes
                config.training.gradient_accumulation_steps = 1
            with buckets.serve(self.scheme, self.proxy.url) as address:
                checkpoint_runs.train(config, f"{address}/{work}")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _log(self, work: str) -> str:
        log = self.folder / f"{work}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        return " | ".join(lines[-3:])[-400:]

    def _difference(self, reference: str, work: str) -> str | None:
        """What a killed run ended with that the other did not; None if nothing."""
        expected, found = self._files(reference), self._files(work)
        for name, content in expected.items():
            if name.endswith(".safetensors") and found.get(name) != content:
                return f"{name} differs"
        if _losses(expected) != _losses(found):
            return "metrics.jsonl differs"
        # A start that was killed has a file of events more.
        kept = [
            {
                name
                for name in files
                if "/events" not in name and not name.startswith("checkpoints/")
            }
            for files in (expected, found)
        ]
        if kept[0] != kept[1]:
            return f"left or missing: {sorted(kept[0] ^ kept[1])[:5]}"
        steps = {"/".join(n.split("/")[:2]) for n in found if n.startswith("checkp")}
        half = [step for step in steps if f"{step}/commit_success.txt" not in found]
        return f"half a checkpoint is left: {half}" if half else None

    def _files(self, work: str) -> dict[str, bytes]:
        """The contents at a work directory, read past the libraries that are tested.

        Of checkpoints the names alone.
        """
        names = buckets.list_objects(self.scheme, f"{work}/")
        return {
            name.removeprefix(f"{work}/"): b""
            if "/checkpoints/" in name
            else buckets.read_object(self.scheme, name)
            for name in names
        }


def _short(path: str) -> str:
    return path.partition("?uploadType")[0][-100:]


def _losses(files: dict[str, bytes]) -> list[tuple]:
    records = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
    return [(r["step"], r.get("loss"), r.get("eval_loss")) for r in records]


def prepare(folder: pathlib.Path) -> None:
    """Import everything that a run needs, and start nothing that a fork would lose."""
    import kills

    kills.prepare(folder)
    os.environ["XLA_FLAGS"] = xla_flags.flags()
    buckets.set_up()
    import gcsfs  # noqa: F401
    import s3fs  # noqa: F401


def main() -> None:
    """Play rounds until there are enough kills; each is printed as a line of JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--scheme", choices=("gs", "s3"), default="gs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100, help="of kills")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--at", default="", help="text of the requests to kill at")
    parser.add_argument("--folder", type=pathlib.Path, default="/tmp/bucket_kills")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    prepare(options.folder)
    settings = (options.scheme, options.folder, options.processes, options.at)
    harness = Harness(*settings)
    kills = lost = number = 0
    while kills < options.count:
        played = harness.play(number, options.seed)
        kills, number = kills + len(played.kills), number + 1
        lost += played.lost is not None
        print(json.dumps(dataclasses.asdict(played)), flush=True)
    print(
        f"{kills} kills in {number} rounds of seed {options.seed}: {lost} not handled"
    )
    os._exit(lost > 0)


if __name__ == "__main__":
    main()
