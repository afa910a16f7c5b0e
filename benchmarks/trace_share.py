"""How a profile's time divides on each GPU: computing, communicating, waiting.

    python benchmarks/trace_share.py WORKDIR/profile

Reads the `.xplane.pb` that `training.profile` writes, by jax's own reader. Of each GPU
it takes the kernels of all streams. A moment in which only kernels of NCCL run is a
collective that nothing hides; one in which nothing runs is idle. A collective's kernel
also waits for the other GPUs, so what one GPU does late counts on all the others.
`exposed_by_kind` divides the first of these among kinds of collectives.
"""

import argparse
import collections
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

Span = tuple[float, float]  # begin and end, in nanoseconds
_LONG_GAP = 1e5  # nanoseconds


@dataclasses.dataclass(frozen=True)
class Shares:
    """Of the time from a GPU's first kernel to its last; seconds, and shares of 1.

    `collective`: some collective runs. `exposed`: nothing but collectives runs. `idle`:
    nothing runs. `long_gaps`: the part of it in gaps of more than 0.1 ms, as where a
    step or its rows come late; the rest are short ones between kernels, as where the
    host is slow to launch them. `kernels`: their number. `exposed_by_kind`: the part of
    each kind of collective in `exposed`, such as "AllGather"; where two kinds run at
    once, both.
    """

    secs: float
    collective: float
    exposed: float
    idle: float
    long_gaps: float
    kernels: int
    exposed_by_kind: dict[str, float] = dataclasses.field(default_factory=dict)


def join(spans: Iterable[Span]) -> list[Span]:
    """The same moments as spans that neither touch nor overlap, in order."""
    joined: list[Span] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def length(spans: Iterable[Span]) -> float:
    """How long some of the spans last, overlaps counted once."""
    return sum(end - begin for begin, end in join(spans))


def divide(kernels: Sequence[tuple[str, float, float]]) -> Shares:
    """The shares of a GPU's kernels, each its name, begin and end in nanoseconds.

    Raises:
        ValueError: there are none.
    """
    if not kernels:
        raise ValueError("the trace has no kernel of this GPU: profile a later step")
    collectives = [(a, b) for name, a, b in kernels if is_collective(name)]
    others = [(a, b) for name, a, b in kernels if not is_collective(name)]
    whole = max(b for _, _, b in kernels) - min(a for _, a, _ in kernels)
    spans = join([*collectives, *others])
    busy, computing = length(spans), length(others)
    by_kind = collections.defaultdict(list)
    for name, a, b in kernels:
        if is_collective(name):
            by_kind[kind_of(name)].append((a, b))
    exposed = {
        kind: (length([*own, *others]) - computing) / whole
        for kind, own in by_kind.items()
    }
    gaps = [later[0] - span[1] for span, later in itertools.pairwise(spans)]
    return Shares(
        secs=whole / 1e9,
        collective=length(collectives) / whole,
        exposed=(busy - computing) / whole,
        idle=1 - busy / whole,
        long_gaps=sum(gap for gap in gaps if gap > _LONG_GAP) / whole,
        kernels=len(kernels),
        exposed_by_kind=exposed,
    )


def kind_of(kernel: str) -> str:
    """The kind of collective that a kernel of NCCL's names: "AllGather", "SendRecv"."""
    found = re.search(r"nccl\w*?Kernel_([A-Za-z]+)", kernel)
    return found[1] if found else "other"


def is_collective(kernel: str) -> bool:
    """Whether a kernel is one of NCCL's."""
    return "nccl" in kernel.lower()


def read(folder: pathlib.Path) -> dict[str, Shares]:
    """The shares of each GPU in the newest trace below a folder, by its plane's name.

    Raises:
        ValueError: there is no trace, or none of a GPU.
    """
    import jax

    traces = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise ValueError(f"{folder}: no .xplane.pb below it; set training.profile")
    found = {}
    for plane in jax.profiler.ProfileData.from_file(str(traces[-1])).planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        kernels = [
            (event.name, event.start_ns, event.start_ns + event.duration_ns)
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
        found[plane.name.removeprefix("/device:")] = divide(kernels)
    if not found:
        raise ValueError(f"{traces[-1]}: no GPU is in this trace")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    for name, shares in read(parser.parse_args().folder).items():
        print(json.dumps({"gpu": name} | dataclasses.asdict(shares)))


if __name__ == "__main__":
    main()
