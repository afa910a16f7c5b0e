"""Local copies of files in a bucket.

Each copy has a folder of its own, named by a hash of the address and of the tags of its
files. So a copy is never stale, no address leads out of the cache, and a copy that
another process reads is never overwritten. The folders may be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from jaxtrain.storage.address import AnyPath, name
from jaxtrain.storage.reading import RemoteFile, list_files

logger = logging.getLogger(__name__)

# Files of weights, of which all but safetensors are not read at all.
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".onnx", ".h5",
    ".msgpack", ".npz", ".zip", ".tar",
)  # fmt: skip
_NOTE = "source.json"
_AT_ONCE = 8  # files that are copied at once
_CHUNK = 64 << 20  # bytes of a file that are held in memory at once
_TOLD = 100 << 20  # copies of more bytes than these are told of


def mirror(
    address: AnyPath,
    root: pathlib.Path,
    *,
    stays: Callable[[RemoteFile], bool] = lambda file: False,
) -> pathlib.Path:
    """Copy a folder or a file to the local disk, under the same name.

    Args:
        root: the folder of all copies.
        stays: true of files that are not copied; `staying` lists them afterwards.

    Raises:
        ValueError: a file's path leads out of the folder.
        OSError: there is nothing at the address, it cannot be read, or the disk is
            too small.
    """
    return mirror_files(address, list_files(address), root, stays=stays)


def mirror_files(
    address: AnyPath,
    files: Mapping[str, RemoteFile],
    root: pathlib.Path,
    *,
    stays: Callable[[RemoteFile], bool] = lambda file: False,
) -> pathlib.Path:
    """As `mirror`, for the given files of a folder, by their paths below it.

    `list_files` returns all files of a folder in this form.
    """
    at = os.fspath(address).rstrip("/")
    remaining = {path: file for path, file in files.items() if stays(file)}
    copied = {path: file for path, file in files.items() if path not in remaining}
    described = {path: [file.size, file.tag] for path, file in sorted(files.items())}
    note = {"address": at, "files": described, "remaining": sorted(remaining)}
    key = json.dumps(note, sort_keys=True).encode()
    entry = root / hashlib.blake2b(key, digest_size=12).hexdigest()
    # The last part of "gs://bucket/.." is none that a folder can have.
    target = entry / (name(at) if name(at) not in (".", "..") else "copy")
    root.mkdir(parents=True, exist_ok=True)
    with _locked(entry.with_suffix(".lock")):
        if _is_whole(target, copied):
            return target
        shutil.rmtree(entry, ignore_errors=True)  # of a disk that lost some of it
        _check_space(at, sum(file.size for file in copied.values()), root)
        aside = pathlib.Path(tempfile.mkdtemp(prefix="new-", dir=root))
        try:
            place = aside / target.name
            if "" not in files:
                place.mkdir()
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                targets = (place / path if path else place for path in copied)
                list(pool.map(_copy, copied.values(), targets))
            (aside / _NOTE).write_text(json.dumps(note), "utf-8")
            os.replace(aside, entry)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
    return target


def mirror_model(address: AnyPath, root: pathlib.Path) -> pathlib.Path:
    """Copy a model's folder without its subfolders and its weights.

    Raises:
        ValueError: the address is that of a file, or as for `mirror`.
        OSError: as for `mirror`.
    """
    listed = list_files(address)
    if "" in listed:
        raise ValueError(
            f"{os.fspath(address)!r} is a file: name the folder that it is in"
        )
    files = {path: file for path, file in listed.items() if "/" not in path}
    return mirror_files(address, files, root, stays=_is_weights)


def _is_weights(file: RemoteFile) -> bool:
    return file.suffix in _WEIGHTS


def origin(folder: AnyPath, root: pathlib.Path) -> str | None:
    """The address that `folder` is a copy of, or None if it is not a copy."""
    note = _read_note(folder, root)
    return None if note is None else str(note["address"])


def staying(folder: AnyPath, root: pathlib.Path) -> dict[str, RemoteFile]:
    """Files that `mirror` left in the bucket when it copied the others to `folder`.

    The keys are paths below the folder. The result is empty if `folder` was not made
    by `mirror`.
    """
    note = _read_note(folder, root)
    if note is None:
        return {}
    return {
        path: RemoteFile(f"{note['address']}/{path}", *note["files"][path])
        for path in note["remaining"]
    }


def _read_note(folder: AnyPath, root: pathlib.Path) -> dict | None:
    """The note that was stored with a copy; None for folders outside `root`."""
    entry = pathlib.Path(folder).parent
    if entry.parent != root or not (entry / _NOTE).is_file():
        return None
    return dict(json.loads((entry / _NOTE).read_text("utf-8")))


def _is_whole(target: pathlib.Path, copied: Mapping[str, RemoteFile]) -> bool:
    places = ((target / path if path else target, f) for path, f in copied.items())
    is_there = (target.parent / _NOTE).is_file()
    return is_there and all(
        place.is_file() and place.stat().st_size == file.size for place, file in places
    )


def _check_space(address: str, size: int, root: pathlib.Path) -> None:
    if size >= _TOLD:
        logger.info("copying %s (%.1f GB) to %s", address, size / 1e9, root)
    free = shutil.disk_usage(root).free
    if size > free:
        raise OSError(
            f"{address}: its {size / 1e9:.1f} GB do not fit onto the disk of {root},"
            f" which has {free / 1e9:.1f} GB left: let JAXTRAIN_CACHE name a folder on"
            " another disk, or stream data (data.streaming = true)"
        )


def _copy(file: RemoteFile, target: pathlib.Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        for start in range(0, file.size, _CHUNK):
            out.write(file.read(start, start + _CHUNK))


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Let one process at a time through; the lock of a killed process is released."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
