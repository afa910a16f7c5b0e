"""What a device must hold at the least, by shapes and layouts alone."""

import dataclasses
import math
import os
from typing import Any

import jax
from jax.sharding import Sharding

_UNITS = (("TiB", 2.0**40), ("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes of one device by what they hold, and bytes kept in host memory for it.

    A lower bound: of the activations only the inputs of layers are in it, and nothing
    of what a step or the compiler needs beside.
    """

    device: dict[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes of one device."""
        return sum(self.device.values())

    def describe(self, limit: int | None = None) -> str:
        """`at least 12.1 MiB a device: parameters 4.0, ...`.

        Args:
            limit: bytes that a device has, where it tells.
        """
        unit, size = _unit_of(self.total)
        used = f"{self.total / size:.1f} {unit}"
        if limit is not None:
            limit_unit, limit_size = _unit_of(limit)
            used = used.removesuffix(f" {limit_unit}")
            used += f" of {limit / limit_size:.1f} {limit_unit}"
        parts = ", ".join(
            f"{name} {bytes_ / size:.1f}" for name, bytes_ in self.device.items()
        )
        text = f"at least {used} a device: {parts}"
        if self.host:
            text += f"; {self.host / size:.1f} in host memory"
        return text


def _unit_of(size: float) -> tuple[str, float]:
    """The unit that suits so many bytes, and its bytes."""
    return next((unit for unit in _UNITS if size >= unit[1]), _UNITS[-1])


def in_words(size: float) -> str:
    """`3.2 TiB`."""
    unit, whole = _unit_of(size)
    return f"{size / whole:.1f} {unit}"


def sum_bytes(tree: Any) -> tuple[int, int]:
    """Bytes that one device keeps of a tree of arrays: its own, and in host memory."""
    own = host = 0
    for leaf in jax.tree.leaves(tree):
        size = shard_size(leaf.shape, leaf.sharding) * leaf.dtype.itemsize
        if leaf.sharding.memory_kind == "pinned_host":
            host += size
        else:
            own += size
    return own, host


def memory_limit(device: Any) -> int | None:
    """Bytes that a device has; None where it does not tell.

    Args:
        device: a `jax.Device`. A CPU's are those of the machine.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and device.platform == "cpu":
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return limit


def shard_size(shape: tuple[int, ...], sharding: Sharding) -> int:
    """Elements of an array that one device holds."""
    return math.prod(sharding.shard_shape(shape))
