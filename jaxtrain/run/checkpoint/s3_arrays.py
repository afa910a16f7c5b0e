"""Arrays in s3://, for which Orbax has no driver, through TensorStore.

    <step>/state/<leaf>/zarr.json, c/...     a Zarr array for each leaf

Each process writes its own pieces; a piece is cut into chunks that lie within it, so no
two processes write to one object. Numbers are stored as unsigned integers of the same
bits: Zarr has no name for some of jax's types, and the record has them all.
"""

import asyncio
import dataclasses
import math
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from jaxtrain.run.checkpoint.checksums import Piece
from jaxtrain.storage.address import AnyPath, split

_CHUNK_BYTES = 2**26


class PiecesHandler(ocp.AsyncCheckpointHandler):
    """Writes the pieces that this process has in its memory."""

    async def async_save(
        self, directory: Any, args: "SavePieces"
    ) -> list[ocp.future.Future]:
        """Start to write; returns what is to be waited for."""
        return [
            ocp.future.CommitFutureAwaitingContractedSignals(
                _write(os.fspath(directory), args), name="arrays"
            )
        ]

    def save(self, directory: Any, args: "SavePieces") -> None:
        """`async_save`, waited for."""
        asyncio.run(_write(os.fspath(directory), args))

    def restore(self, directory: Any, args: Any = None) -> Any:
        """Nothing: `read` does it.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("arrays in s3:// are read by s3_arrays.read")


@ocp.args.register_with_handler(PiecesHandler, for_save=True)
@dataclasses.dataclass
class SavePieces(ocp.args.CheckpointArgs):
    """`pieces`: what this process writes. `layouts`: all leaves, by name."""

    pieces: list[Piece] = dataclasses.field(repr=False)
    layouts: Mapping[str, "Layout"]


@ocp.args.register_with_handler(PiecesHandler, for_restore=True)
@dataclasses.dataclass
class RestorePieces(ocp.args.CheckpointArgs):
    """Orbax wants a handler to have these; they are never used."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shape of a leaf, the shape of one shard, and the bytes of one number."""

    shape: tuple[int, ...]
    shard: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, leaf: jax.Array) -> "Layout":
        """The layout of an array."""
        shard = leaf.sharding.shard_shape(leaf.shape)
        return cls(tuple(leaf.shape), tuple(shard), leaf.dtype.itemsize)


def to_write(raw: Mapping[str, jax.Array], pieces: Sequence[Piece]) -> SavePieces:
    """The arguments under which the arrays are saved."""
    layouts = {name: Layout.of(leaf) for name, leaf in raw.items()}
    return SavePieces(list(pieces), layouts)


async def _write(folder: str, args: SavePieces) -> None:
    """Write the pieces; the first process writes the arrays' descriptions too."""
    first, context = jax.process_index() == 0, ts.Context()
    own = args.layouts if first else {piece.name for piece in args.pieces}
    opened = {
        name: ts.open(
            _spec(folder, name, args.layouts[name]),
            context=context,
            open=True,
            create=first,
            # The others need not wait until the first one has described it.
            assume_metadata=not first,
        )
        for name in own
    }
    stores = {name: await store for name, store in opened.items()}
    writes = []
    for name, bounds, data in args.pieces:
        box = tuple(
            slice(start, stop)
            for start, stop in zip(bounds[::2], bounds[1::2], strict=True)
        )
        bits = np.ascontiguousarray(data).view(_unsigned(data.dtype.itemsize))
        writes.append(stores[name][box].write(bits.reshape(data.shape)))
    for write in writes:
        await write
    # The state is donated once it is saved: no view of it may outlive that.
    args.pieces.clear()


def read(
    folder: AnyPath, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The arrays of these names, laid out as `targets` are.

    Raises:
        ValueError: TensorStore cannot read one; says which and why.
    """
    context = ts.Context()
    opening = {
        name: ts.open(_spec(os.fspath(folder), name), context=context, open=True)
        for name in targets
    }
    stores = {name: store.result() for name, store in opening.items()}
    reads: dict[str, dict[str, Any]] = {}
    for name, target in targets.items():
        assert target.sharding is not None
        boxes = target.sharding.addressable_devices_indices_map(target.shape)
        # Replicas of one box are read once.
        distinct = {str(box): box for box in boxes.values()}
        reads[name] = {
            key: stores[name][box or ()].read() for key, box in distinct.items()
        }

    def make(name: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        def box_of(index: Any) -> np.ndarray:
            bits = np.asarray(reads[name][str(index)].result())
            return np.ascontiguousarray(bits).view(target.dtype).reshape(bits.shape)

        return jax.make_array_from_callback(target.shape, target.sharding, box_of)

    return {name: make(name, target) for name, target in targets.items()}


def _spec(folder: str, name: str, layout: Layout | None = None) -> dict[str, Any]:
    bucket, key = split(folder)
    store: dict[str, Any] = {
        "driver": "s3",
        "bucket": bucket,
        "path": f"{key}/{urllib.parse.quote(name, safe='')}/",
    }
    # As botocore reads them for s3fs; TensorStore does not.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL"))
    region = os.environ.get("AWS_REGION", os.environ.get("AWS_DEFAULT_REGION"))
    store |= {"endpoint": endpoint} if endpoint else {}
    store |= {"aws_region": region} if region else {}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else TensorStore misses ~/.aws aloud
        store["aws_credentials"] = {"type": "environment"}
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": store}
    if layout is not None:
        chunk = {"chunk_shape": _chunk(layout)}
        spec["metadata"] = {
            "shape": list(layout.shape),
            "data_type": _unsigned(layout.itemsize),
            "chunk_grid": {"name": "regular", "configuration": chunk},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]
            if layout.itemsize > 1
            else [{"name": "bytes"}],
        }
    return spec


def _unsigned(itemsize: int) -> str:
    return f"uint{8 * itemsize}"


def _chunk(layout: Layout) -> list[int]:
    """A shard's shape, halved along its axes until it is small enough."""
    shape = [max(1, size) for size in layout.shard]
    for axis in range(len(shape)):
        while math.prod(shape) * layout.itemsize > _CHUNK_BYTES:
            if shape[axis] % 2:
                break
            shape[axis] //= 2
    return shape
