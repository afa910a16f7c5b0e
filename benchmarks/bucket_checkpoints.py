"""The loop's stall for a checkpoint in a bucket beside one on a disk.

    python benchmarks/bucket_checkpoints.py [--gb 1] [--repeats 3] [--folder DIR]

The state is that of `checkpoints.py`. The buckets are emulators in processes of their
own on this machine, so that what is sent costs a network's software and not its length.
"Stall" is what `save` takes before the next step may start, "behind it" what goes on
while the loop trains. Every repeat runs each place once, one after the other.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import uuid

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import jax
from checkpoints import make_state

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import buckets  # noqa: E402

from jaxtrain.run.checkpoint import CheckpointManager  # noqa: E402
from jaxtrain.storage import folders  # noqa: E402
from jaxtrain.storage.address import as_path, is_remote  # noqa: E402


def save(state: dict[str, jax.Array], home: str) -> tuple[float, float]:
    """Seconds of the stall, and of what goes on behind the loop."""
    with CheckpointManager(as_path(home) / "checkpoints") as manager:
        started = time.perf_counter()
        manager.save(1, state)
        stalled = time.perf_counter()
        manager.wait()
        ended = time.perf_counter()
    if is_remote(home):
        folders.remove(home)
    return stalled - started, ended - stalled


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.0, help="GiB of state")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, help="a disk to write to")
    options = parser.parse_args()
    state = make_state(options.gb)
    size = sum(leaf.nbytes for leaf in state.values())
    print(f"{size / 2**30:.2f} GiB, {len(state)} leaves, {os.cpu_count()} cores")
    servers = []
    for scheme in ("gs", "s3"):
        server = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "buckets.py", scheme],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        buckets._SERVERS[scheme] = server.stdout.readline().strip()
        servers.append(server)
    found: dict[str, list[tuple[float, float]]] = {"disk": [], "gs": [], "s3": []}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found["disk"].append(save(state, folder))
        for scheme in ("gs", "s3"):
            with buckets.serve(scheme) as address:
                home = f"{address}/{uuid.uuid4().hex}"
                found[scheme].append(save(state, home))
        print({place: times[-1] for place, times in found.items()}, flush=True)
    for place, times in found.items():
        stalls, behind = zip(*times, strict=True)
        told = f"{statistics.median(stalls):6.2f} s   least {min(stalls):6.2f} s"
        print(f"{place:5} stall {told}   behind it {statistics.median(behind):6.2f} s")
    print("load average", *os.getloadavg())
    for server in servers:
        server.communicate("")


if __name__ == "__main__":
    main()
