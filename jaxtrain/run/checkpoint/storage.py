"""How a checkpoint's files are written and read through Orbax."""

import asyncio
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.path import atomicity

from jaxtrain.run.buffer import beside
from jaxtrain.run.checkpoint import checksums
from jaxtrain.run.durable import flush, flush_tree
from jaxtrain.run.ledger import LEDGER, note_saved
from jaxtrain.run.saved_record import checksum_file, seal
from jaxtrain.storage.address import as_path, is_remote
from jaxtrain.storage.errors import retrying

# Chunks of a large leaf are read and written by several cores at once.
_CHUNK_BYTES = 2**24
_LEAST_ROW_BYTES = 2**20


def make_array_handler() -> ocp.PyTreeCheckpointHandler:
    """What reads and writes the arrays of a state.

    Uncompressed: zstd makes weights and moments smaller by a tenth and took most of
    the time of both. The first replica alone is written, so that the bytes that are
    hashed are the very bytes that are written.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    return ocp.PyTreeCheckpointHandler(
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, arrays)
        ),
    )


def to_write(raw: Mapping[str, jax.Array]) -> ocp.args.PyTreeSave:
    """The arguments under which the arrays are saved."""
    chunks = {name: _cut(leaf) for name, leaf in raw.items()}
    return ocp.args.PyTreeSave(dict(raw), save_args=chunks)


def _cut(leaf: jax.Array) -> ocp.SaveArgs:
    """How a leaf is cut into chunks: along its first axis, so that each is one run of
    memory. Orbax's own choice, the longest axis, has every row copied by itself.
    """
    shape = leaf.sharding.shard_shape(leaf.shape)
    size = math.prod(shape) * leaf.dtype.itemsize
    if size <= _CHUNK_BYTES:
        return ocp.SaveArgs()
    row = size // shape[0]
    if row >= _LEAST_ROW_BYTES:
        whole_rows = max(row, _CHUNK_BYTES)
        return ocp.SaveArgs(chunk_byte_size=whole_rows, shard_axes=(0,))
    if shape[0] == max(shape):
        return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
    return ocp.SaveArgs()


def read_arrays(
    folder: pathlib.Path, targets: Mapping[str, jax.ShapeDtypeStruct], *, partial: bool
) -> dict[str, jax.Array]:
    """The arrays of a checkpoint's `state`, laid out as `targets` are.

    No process waits for another here, so that one can fail alone.
    """
    wanted = dict(targets)
    arguments = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=partial,
    )
    handler = make_array_handler()
    try:
        return handler.restore(epath.Path(folder), args=arguments)
    finally:
        handler.close()


class ChecksumHandler(ocp.AsyncCheckpointHandler):
    """Writes each process's checksums beside the arrays, before the save is committed.

    They are computed in Orbax's background thread while the arrays are written.
    """

    async def async_save(
        self, directory: Any, args: "SaveChecksums"
    ) -> list[ocp.future.Future]:
        """Start to hash and to write; returns what is to be waited for."""
        return [
            ocp.future.CommitFutureAwaitingContractedSignals(
                _write_checksums(directory, args), name="checksums"
            )
        ]

    def save(self, directory: Any, args: "SaveChecksums") -> None:
        """`async_save`, waited for."""

        async def save() -> None:
            for future in await self.async_save(directory, args):
                future.result()

        asyncio.run(save())

    def restore(self, directory: Any, args: Any = None) -> Any:
        """Nothing: `run.saved_record` reads them.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("checksums are read by run.saved_record")


@ocp.args.register_with_handler(ChecksumHandler, for_save=True)
@dataclasses.dataclass
class SaveChecksums(ocp.args.CheckpointArgs):
    """`pieces`: what this process writes. `values`: hashes of what is no array."""

    pieces: list[checksums.Piece] = dataclasses.field(repr=False)
    values: Mapping[str, str]


@ocp.args.register_with_handler(ChecksumHandler, for_restore=True)
@dataclasses.dataclass
class RestoreChecksums(ocp.args.CheckpointArgs):
    """Orbax wants a handler to have these; they are never used."""


async def _write_checksums(directory: Any, args: SaveChecksums) -> None:
    body = {**args.values, "blocks": checksums.hash_pieces(args.pieces)}
    # The state is donated once it is saved: no view of it may outlive that.
    args.pieces.clear()
    path = as_path(os.fspath(directory)) / checksum_file(jax.process_index())
    text = seal(body)
    if is_remote(path):
        retrying(lambda: path.write_text(text), f"writing {path}")
    else:
        path.write_text(text, encoding="utf-8")
        flush(path)


class SyncedRename(atomicity.AtomicRenameTemporaryPath):
    """Orbax's atomic rename, after all that is renamed has reached the disk.

    Without it a power cut can leave the new name with empty files under it.
    """

    async def finalize(self) -> None:
        """Flush the files and folders, rename, and flush the name."""
        temporary = pathlib.Path(os.fspath(self.get()))
        final = pathlib.Path(os.fspath(self.get_final()))
        await asyncio.to_thread(flush_tree, temporary)
        await super().finalize()
        flush(final.parent)


def commit_marker(
    before: Callable[[], None] | None,
) -> type[atomicity.CommitFileTemporaryPath]:
    """Orbax's way without renames: an object that is written last makes a step.

    Args:
        before: called when all else of a step is written.
    """

    class Commit(atomicity.CommitFileTemporaryPath):
        async def finalize(self) -> None:
            """Do what comes before, and write the marker."""
            folder = self.get_final()
            is_step = folder.name.isdecimal()
            if before is not None and is_step:
                await asyncio.to_thread(before)
            await super().finalize()
            if is_step:  # so that it is known here even if the bucket is lost
                ledger = beside(folder.parent, LEDGER)
                ledger.parent.mkdir(parents=True, exist_ok=True)
                note_saved(ledger, int(folder.name))

    return Commit
