"""What a checkpoint says of itself in JSON: its record, metrics and checksums.

    <step>/record/metadata              layout, config, data position, metrics, versions
    <step>/checksums/process_<i>.json   of the record and the arrays
    <step>/metrics/metrics              where versions before these kept the metrics

Nothing here imports jax, so that a command can read a record before it waits for that.
"""

import dataclasses
import errno
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import xxhash

from jaxtrain import __version__
from jaxtrain.storage import errors
from jaxtrain.storage.address import is_remote

# Raised if a checkpoint's files change so that earlier versions cannot read them.
FORMAT = 1
RECORD, METRICS, CHECKSUMS = "record/metadata", "metrics/metrics", "checksums"
COMMIT_FILE = "commit_success.txt"  # Orbax's name, of what makes a step in a bucket
# Of `is_unreadable`.
_UNREADABLE = (
    errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE,
    errno.ETIMEDOUT, errno.EINTR, errno.EAGAIN, errno.EBUSY,
)  # fmt: skip


class DamagedCheckpointError(ValueError):
    """A checkpoint is not what was saved. `reason` says which part of it, and how."""

    def __init__(self, checkpoint: pathlib.Path, reason: str) -> None:
        """`checkpoint`: the step's folder."""
        super().__init__(
            f"the checkpoint {checkpoint} is damaged: {reason}. Name an earlier step,"
            " or put the checkpoint back from a copy"
        )
        self.reason = reason


class CheckpointVersionError(ValueError):
    """Another version of jaxtrain must read this checkpoint."""


@dataclasses.dataclass(frozen=True)
class Checksums:
    """The checksums of one checkpoint, as all the processes of then took them.

    `blocks`: of each leaf, the hash of each block of it (`checkpoint.checksums`).
    """

    blocks: Mapping[str, list[tuple[tuple[int, ...], str]]]


def digest(value: Any) -> str:
    """XXH3 (64 bits) of a JSON value; the order of keys does not count."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_64_hexdigest(text.encode())


def seal(body: Mapping[str, Any]) -> str:
    """JSON text of `body` with a checksum of its own."""
    return json.dumps({"checksum": digest(body), "body": body})


def read_record(checkpoint: pathlib.Path) -> dict[str, Any]:
    """The record of a step's folder.

    Raises:
        DamagedCheckpointError: it is missing, is no JSON, or is not what was saved.
        CheckpointVersionError: another version of jaxtrain must read it.
        OSError: it cannot be read here and now.
    """
    record = _read_json(checkpoint, RECORD)
    if not isinstance(record, dict) or not {"format", "layout"} <= record.keys():
        raise DamagedCheckpointError(checkpoint, f"{RECORD} is no checkpoint's record")
    if str(record.get("step")) != checkpoint.name:
        raise DamagedCheckpointError(checkpoint, f"{RECORD} is that of another step")
    count = record.get("checksums", 0)
    if count or (checkpoint / CHECKSUMS).exists():
        first = _read_sealed(checkpoint, 0)
        _compare(checkpoint, RECORD, first.get("record"), record)
    _check_format(checkpoint, record)
    return record


def read_metrics(
    checkpoint: pathlib.Path, record: Mapping[str, Any]
) -> dict[str, float]:
    """The metrics saved with a step, whose record is given; empty if there were none.

    Raises:
        DamagedCheckpointError, OSError: as of `read_record`.
    """
    metrics = record.get("metrics", {})
    if "metrics" not in record and (checkpoint / METRICS).exists():
        metrics = _read_json(checkpoint, METRICS)
    if not isinstance(metrics, dict):
        raise DamagedCheckpointError(checkpoint, "its metrics are no numbers")
    return metrics


def read_checksums(
    checkpoint: pathlib.Path, record: Mapping[str, Any]
) -> Checksums | None:
    """The checksums of the arrays; None if an earlier version saved them without any.

    Raises:
        DamagedCheckpointError, OSError: as of `read_record`.
    """
    count = record.get("checksums", 0)
    if not count:
        return None
    blocks: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    for index in range(count):
        for name, found in _read_sealed(checkpoint, index)["blocks"].items():
            blocks.setdefault(name, []).extend(
                (tuple(at), hash_) for at, hash_ in found
            )
    return Checksums(blocks)


def is_unreadable(error: Exception) -> bool:
    """Whether a file may be whole, but cannot be read here and now."""
    if isinstance(error, OSError) and error.errno in _UNREADABLE:
        return True
    tests = (errors.is_network, errors.is_forbidden, errors.is_login)
    return any(test(error) for test in tests)


def is_committed(checkpoint: Any) -> bool:
    """Whether a step's folder counts; on a disk its name alone says so."""
    return not is_remote(checkpoint) or bool((checkpoint / COMMIT_FILE).exists())


def checksum_file(process_index: int) -> str:
    """The name of a process's file of checksums."""
    return f"process_{process_index}.json"


def _read_sealed(checkpoint: pathlib.Path, process_index: int) -> dict[str, Any]:
    """What `seal` wrote for a process."""
    name = f"{CHECKSUMS}/{checksum_file(process_index)}"
    sealed = _read_json(checkpoint, name)
    if not isinstance(sealed, dict) or not isinstance(sealed.get("body"), dict):
        raise DamagedCheckpointError(checkpoint, f"{name} holds no checksums")
    _compare(checkpoint, name, sealed.get("checksum"), sealed["body"])
    return sealed["body"]


def _read_json(checkpoint: pathlib.Path, name: str) -> Any:
    try:
        return json.loads((checkpoint / name).read_text("utf-8"))
    except OSError as error:
        if is_unreadable(error):
            raise
        raise DamagedCheckpointError(
            checkpoint, f"{name} cannot be read ({error.strerror or error})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(
            checkpoint, f"{name} is not valid JSON ({error})"
        ) from error


def _compare(
    checkpoint: pathlib.Path, name: str, expected: str | None, value: Any
) -> None:
    if digest(value) != expected:
        raise DamagedCheckpointError(checkpoint, f"{name} does not match its checksum")


def _check_format(checkpoint: pathlib.Path, record: Mapping[str, Any]) -> None:
    """Refuse what another version must read, and say which.

    Raises:
        CheckpointVersionError: it must.
    """
    if record["format"] == FORMAT:
        return
    version = record.get("jaxtrain")
    named = "the version of jaxtrain that saved it"
    if version is not None:
        named = f"jaxtrain {version}, which saved it: pip install jaxtrain=={version}"
    raise CheckpointVersionError(
        f"{checkpoint} has checkpoint format {record['format']}; this is jaxtrain"
        f" {__version__}, which reads format {FORMAT}. Resume the run with {named}"
    )
