"""How layers that are not alike are stacked, and what the stacks are called.

Where all layers have the same weights, `params["layers"]` is one stack, its arrays'
axis 0 counting layers. Where they differ, the sequence of their kinds is cut into
segments, each a pattern of kinds that repeats, and every place in a pattern has a stack
of its own. A stack's name says which layers it holds, so a tree tells by itself which
layer a slice belongs to: "2to8by3" are layers 2, 5 and 8, "4to7" are 4, 5, 6 and 7, and
"15" is layer 15 alone. A segment is then scanned over its stacks as they are: none is
cut or copied.

Names are paths in checkpoints, so `plan_segments` must give the same for the same kinds
forever.
"""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Path = tuple[str, ...]
LAYERS = "layers"
# Longer patterns than any model has are not looked for.
_LONGEST_PATTERN = 32
_NAME = re.compile(r"(\d+)(?:to(\d+)(?:by(\d+))?)?")


class Segment(NamedTuple):
    """Layers `first` to `first + period * repeats - 1`: a pattern, so often."""

    first: int
    period: int
    repeats: int

    @property
    def stacks(self) -> tuple[range, ...]:
        """The numbers of the layers at each place of the pattern."""
        end = self.first + self.period * self.repeats
        places = range(self.first, self.first + self.period)
        return tuple(range(place, end, self.period) for place in places)


def plan_segments(kinds: Sequence[Hashable]) -> tuple[Segment, ...]:
    """Cut the kinds of all layers, in order, into segments.

    The fewest layers in patterns are compiled; among such cuts the fewest segments, and
    then the shortest patterns at the front, win.
    """
    count = len(kinds)
    # From each layer on: layers compiled, segments, and the first of these.
    best: list[tuple[int, int, Segment]] = []
    # By period: how many layers from here on equal the one a period behind them.
    alike = [0] * (_LONGEST_PATTERN + 1)
    costs = {count: (0, 0)}
    for first in reversed(range(count)):
        choices = []
        for period in range(1, min(_LONGEST_PATTERN, count - first) + 1):
            behind = first + period
            is_alike = behind < count and kinds[first] == kinds[behind]
            alike[period] = alike[period] + 1 if is_alike else 0
            segment = Segment(first, period, 1 + alike[period] // period)
            compiled, number = costs[first + period * segment.repeats]
            choices.append((compiled + period, number + 1, segment))
        chosen = min(choices, key=lambda choice: choice[:2])
        best.append(chosen)
        costs[first] = chosen[:2]
    best.reverse()
    segments: list[Segment] = []
    first = 0
    while first < count:
        segments.append(best[first][2])
        first += segments[-1].period * segments[-1].repeats
    return tuple(segments)


def stack_name(layers: range) -> str:
    """What a stack of these layers is called."""
    if len(layers) == 1:
        return str(layers[0])
    step = f"by{layers.step}" if layers.step > 1 else ""
    return f"{layers[0]}to{layers[-1]}{step}"


def layers_of(name: str) -> range | None:
    """The layers of the stack of this name; None if it is no stack's name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    first, last, step = match.groups()
    return range(int(first), int(last or first) + 1, int(step or 1))


def split_path(path: Path) -> tuple[Path, Path]:
    """Where the stack of a path begins, () outside of the layers, and the path below.

    ("layers", "mlp", "up_proj") -> ("layers",), ("mlp", "up_proj")
    ("layers", "2to8by3", "mlp") -> ("layers", "2to8by3"), ("mlp",)
    """
    if not path or path[0] != LAYERS:
        return (), path
    named = len(path) > 1 and layers_of(path[1]) is not None
    cut = 2 if named else 1
    return path[:cut], path[cut:]


def layer_numbers(root: Path, count: int) -> range:
    """The layers of the stack at `root`, which holds `count` of them."""
    named = layers_of(root[1]) if len(root) > 1 else None
    return range(count) if named is None else named


def iterate_stacks(params: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Every stack of a tree that has layers: where it begins, and what it holds."""
    layers = params.get(LAYERS, {})
    if any(layers_of(name) is None for name in layers):
        yield (LAYERS,), layers
        return
    for name, stack in layers.items():
        yield (LAYERS, name), stack
