"""Which devices a collective joins, and what of it passes between hosts."""

import math
import re

import numpy as np

_BY_AXES = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_BY_STRIDES = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def device_groups(rest: str, device_count: int) -> np.ndarray:
    """Devices [groups, members] of a collective, from the text behind its opcode.

    Of a permutation [pairs, (source, target)]. XLA writes groups in three ways: as
    axes of a mesh, as a numbering in strides, and one by one; none means all.

    Raises:
        ValueError: it is written in another way.
    """
    everyone = np.arange(device_count)
    if by_axes := _BY_AXES.search(rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", by_axes[1]))
        names, joined = list(sizes), re.findall(r"'(\w+)'", by_axes[2])
        whole = ":" not in by_axes[2] and "device" not in by_axes[1]
        if whole and math.prod(map(int, sizes.values())) == device_count:
            ids = everyone.reshape([int(size) for size in sizes.values()])
            order = [names.index(name) for name in names if name not in joined]
            order += [names.index(name) for name in joined]
            members = math.prod(int(sizes[name]) for name in joined)
            return ids.transpose(order).reshape(-1, members)
    elif by_strides := _BY_STRIDES.search(rest):
        shape, strides = (_numbers(by_strides[place]) for place in (1, 2))
        ids = np.arange(math.prod(strides)).reshape(strides)
        if by_strides[3]:
            ids = ids.transpose(_numbers(by_strides[3]))
        return ids.reshape(shape)
    elif listed := _LISTED.search(rest) or _PAIRS.search(rest):
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return np.array([_numbers(group) for group in groups] or everyone[None])
    raise ValueError(f"no groups of {device_count} devices in {rest[:300]!r}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def network_share(kind: str, groups: np.ndarray, per_host: int) -> float:
    """Of what a device receives, how much comes over its own host's network at least.

    A host needs what lies with the others once, and its members of the group bring in
    an equal part of that each; of an exchange (all-to-all) each needs its own.

    Args:
        kind: opcode of the collective.
        groups: as `device_groups` gives them. Hosts hold `per_host` devices in order.
    """
    hosts = groups // per_host
    if kind == "collective-permute":
        return float((hosts[:, 0] != hosts[:, 1]).any())
    same = (hosts == hosts[:, :1]).sum(axis=1)  # members on the first one's host
    away = 1 - same / groups.shape[1]
    if kind not in ("all-to-all", "ragged-all-to-all"):
        away = away / same
    return float(away.max())
