"""Descriptions of TPUs that are not attached, for ahead-of-time compilation.

A topology is a string such as "v5e:4x4". libtpu describes shapes that nobody builds
too, and aborts when it compiles for some, so the shape is checked first.
"""

import math
import re
from typing import Any

from jax.experimental import topologies

# The largest slice of each generation, a pod (cloud.google.com/tpu/docs).
PODS = {
    "v4": (16, 16, 16),
    "v5e": (16, 16),
    "v5p": (16, 20, 28),
    "v6e": (16, 16),
    "tpu7x": (16, 24, 24),
}


def describe_tpus(topology: str, num_slices: int = 1) -> list[Any]:
    """Return the devices of `num_slices` slices of a topology such as "v5e:4x4".

    Raises:
        ValueError: no such slice is built, or libtpu refuses it or is not installed.
    """
    name, _, shape = topology.partition(":")
    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if _count_chips(name, shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # by default a host has four
    if name == "v4":
        options["chip_config_name"] = "megacore"  # a device of two cores, as in a run
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, **options
        )
    except Exception as error:  # libtpu raises several kinds
        said, _, _ = str(error).strip().partition("\n")
        raise ValueError(
            f"topology = {topology!r}: {said}. Name it as v5e:4x4 or v5p:2x2x1, with"
            " jax[tpu] installed"
        ) from error
    return list(description.devices)


def _count_chips(name: str, shape: str) -> int:
    """Chips of a slice; a ValueError where no such slice is built."""
    pod = PODS[name]
    sides = re.sub("_(un)?twisted$", "", shape).split("x")
    place = f"topology = '{name}:{shape}': "
    if len(sides) != len(pod) or not all(re.fullmatch(r"[1-9]\d*", s) for s in sides):
        example = "4x4" if len(pod) == 2 else "2x2x1"
        raise ValueError(f"{place}name {len(pod)} sides in chips, as {name}:{example}")
    chips = math.prod(map(int, sides))
    # Of three sides one may be longer than the pod's: switches join its cubes anew.
    is_long = len(pod) == 2 and max(map(int, sides)) > max(pod)
    if is_long or chips > math.prod(pod):
        largest = "x".join(map(str, pod))
        raise ValueError(f"{place}a pod has {largest}; take several by num_slices")
    return chips
