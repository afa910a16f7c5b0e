"""Checksums of arrays: XXH3 (64 bits) of blocks of each leaf.

A block is a box of indices of the whole leaf, at most `BLOCK_BYTES` large, within one
shard; its hash is that of its elements in row-major order. The shards of one replica
are a partition of the leaf, so its blocks are too: each byte is under one hash. Bytes
in the host's memory are hashed, the ones that Orbax is given to write.

Boxes do not depend on how a leaf lies over devices: under another mesh a block is
assembled from several shards first. A change is missed with a chance of about 2^-64.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
import xxhash
from jax.sharding import NamedSharding, PartitionSpec

BLOCK_BYTES = 2**26
_THREADS = min(4, os.cpu_count() or 1)

# Start and stop of each axis, one after the other: JSON has lists only.
Bounds = tuple[int, ...]


class Piece(NamedTuple):
    """A part of a leaf that is in this process's memory, and where it belongs."""

    name: str
    bounds: Bounds
    data: np.ndarray


def on_host(leaves: Mapping[str, jax.Array]) -> list[Piece]:
    """This process's part of the first replica of each leaf, in the host's memory.

    The copies are those that Orbax takes too: jax keeps one for each shard.
    """
    shards = [
        (name, _bounds(shard.index, leaf.shape), shard.data)
        for name, leaf in leaves.items()
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]
    for _, _, data in shards:
        data.copy_to_host_async()
    return [Piece(name, bounds, np.asarray(data)) for name, bounds, data in shards]


def hash_pieces(pieces: Iterable[Piece]) -> dict[str, list[tuple[Bounds, str]]]:
    """The blocks of these pieces with their hashes, by leaf."""
    found: dict[str, list[tuple[Bounds, str]]] = {}
    for name, bounds, data in pieces:
        hashes = found.setdefault(name, [])
        for rows, block in _blocks(bounds, data):
            hashes.append((rows, _hash(block)))
    return found


def find_damage(
    leaves: Mapping[str, jax.Array], saved: Mapping[str, Sequence[tuple[Bounds, str]]]
) -> str | None:
    """What is wrong with restored leaves; None if they are what was saved.

    Every process calls this; each verifies the blocks that it holds.

    Args:
        leaves: the arrays, under any shardings.
        saved: the blocks of each leaf from all the processes that saved.
    """
    checks: list[tuple[str, np.ndarray, str]] = []
    for name, leaf in leaves.items():
        blocks = saved.get(name, ())
        sizes = [math.prod(stop - start for start, stop in _axes(b)) for b, _ in blocks]
        if sum(sizes) != leaf.size:
            return f"its checksums do not cover {name}"
        checks += [(name, part, hash_) for part, hash_ in _own_parts(leaf, blocks)]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(_hash, (part for _, part, _ in checks))
        for (name, _, expected), found in zip(checks, hashes, strict=True):
            if found != expected:
                return f"the array {name} does not match its checksum"
    return None


def _own_parts(
    leaf: jax.Array, blocks: Sequence[tuple[Bounds, str]]
) -> Iterator[tuple[np.ndarray, str]]:
    """The blocks of a leaf that this process is to verify, with their hashes."""
    boxes: dict[Any, Bounds] = {
        device: _bounds(index, leaf.shape)
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items()
    }
    devices = sorted(boxes, key=lambda device: (device.process_index, device.id))
    local = {shard.device: shard.data for shard in leaf.addressable_shards}
    for bounds, hash_ in blocks:
        holder = next((d for d in devices if _contains(boxes[d], bounds)), None)
        if holder is None:
            yield _assemble(leaf, bounds), hash_
        elif holder in local:
            inside = _within(boxes[holder], bounds)
            yield np.asarray(local[holder])[inside], hash_


def _assemble(leaf: jax.Array, bounds: Bounds) -> np.ndarray:
    """A block that lies over several shards; all processes ask for it at once."""
    if leaf.is_fully_addressable:
        shape = [stop - start for start, stop in _axes(bounds)]
        block = np.empty(shape, leaf.dtype)
        for shard in leaf.addressable_shards:
            box = _bounds(shard.index, leaf.shape)
            shared = _intersection(box, bounds)
            if shared is not None:
                data = np.asarray(shard.data)
                block[_within(bounds, shared)] = data[_within(box, shared)]
        return block
    assert isinstance(leaf.sharding, NamedSharding)
    on_device = leaf.sharding.with_memory_kind("device")
    everywhere = NamedSharding(on_device.mesh, PartitionSpec())
    starts, sizes = zip(
        *((start, stop - start) for start, stop in _axes(bounds)), strict=True
    )
    cut = _cutter(sizes, everywhere)
    gathered = cut(jax.device_put(leaf, on_device), np.array(starts, np.int32))
    return np.asarray(gathered.addressable_shards[0].data)


@functools.lru_cache(maxsize=64)
def _cutter(sizes: tuple[int, ...], everywhere: NamedSharding) -> Any:
    """Compiled once for each size, not for each place."""

    def cut(array: jax.Array, starts: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(array, list(starts), sizes)

    return jax.jit(cut, out_shardings=everywhere)


def _blocks(bounds: Bounds, data: np.ndarray) -> Iterator[tuple[Bounds, np.ndarray]]:
    """Cut a piece into blocks of at most `BLOCK_BYTES`, along its longest axes."""
    if data.nbytes <= BLOCK_BYTES or data.ndim == 0:
        yield bounds, data
        return
    # Cut along the first axis that has any length: the blocks are contiguous then.
    axis = next(i for i, size in enumerate(data.shape) if size > 1)
    row_bytes = data.nbytes // data.shape[axis]
    rows = max(1, BLOCK_BYTES // row_bytes)
    first = bounds[2 * axis]
    for start in range(0, data.shape[axis], rows):
        stop = min(start + rows, data.shape[axis])
        part = data[(slice(None),) * axis + (slice(start, stop),)]
        ends = (first + start, first + stop)
        yield from _blocks((*bounds[: 2 * axis], *ends, *bounds[2 * axis + 2 :]), part)


def _hash(block: np.ndarray) -> str:
    flat = np.ascontiguousarray(block).reshape(-1)
    return xxhash.xxh3_64_hexdigest(flat.view(np.uint8).data)


def _bounds(index: tuple[slice, ...], shape: Sequence[int]) -> Bounds:
    ends = (axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
    return tuple(itertools.chain.from_iterable(ends))


def _axes(bounds: Bounds) -> list[tuple[int, int]]:
    return list(zip(bounds[::2], bounds[1::2], strict=True))


def _contains(outer: Bounds, inner: Bounds) -> bool:
    pairs = zip(_axes(outer), _axes(inner), strict=True)
    return all(a <= c and d <= b for (a, b), (c, d) in pairs)


def _intersection(left: Bounds, right: Bounds) -> Bounds | None:
    """The box that two boxes share; None if they share nothing."""
    pairs = zip(_axes(left), _axes(right), strict=True)
    shared = [(max(a, c), min(b, d)) for (a, b), (c, d) in pairs]
    if any(start >= stop for start, stop in shared):
        return None
    return tuple(itertools.chain.from_iterable(shared))


def _within(outer: Bounds, inner: Bounds) -> tuple[slice, ...]:
    """The place of a box in an array of the elements of another box around it."""
    pairs = zip(_axes(outer), _axes(inner), strict=True)
    return tuple(slice(c - a, d - a) for (a, _), (c, d) in pairs)
