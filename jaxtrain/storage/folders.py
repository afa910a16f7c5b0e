"""Folders in a bucket, which are nothing but the names of objects that share a prefix.

Nothing here is atomic. So the callers name the object that makes a folder count: it
is written last and deleted first.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from jaxtrain.storage.address import AnyPath, filesystem, join, scheme_of, split
from jaxtrain.storage.errors import retrying

_AT_ONCE_BYTES = 2**26


def files_below(address: AnyPath) -> dict[str, dict[str, Any]]:
    """What fsspec says of each object below an address, by its path from there.

    `full_name` is added, its address.
    """
    return _by_path(address, "find")


def files_at(address: AnyPath) -> dict[str, dict[str, Any]]:
    """The same of the objects right at an address, without those of folders in it."""
    return _by_path(address, "ls")


def refuse_escape(address: AnyPath, path: str) -> None:
    """Refuse an object whose copy would not lie in the copy of its folder.

    Raises:
        ValueError: names the object, and what to do.
    """
    if {"..", "."} & {*path.split("/")} or "\\" in path or "//" in path:
        raise ValueError(
            f"{os.fspath(address)} holds {path!r}, a path that leads out of the"
            " folder: remove that file"
        )


def sizes(address: AnyPath) -> dict[str, int]:
    """The size in bytes of each object below an address, by its path from there."""
    return {path: info["size"] for path, info in files_below(address).items()}


def _by_path(address: AnyPath, how: str) -> dict[str, dict[str, Any]]:
    at, scheme = "/".join(split(address)).rstrip("/"), scheme_of(address)

    def look() -> dict[str, dict[str, Any]]:
        try:
            found = getattr(filesystem(address), how)(at, detail=True)
        except FileNotFoundError:
            return {}
        listed = found.values() if isinstance(found, dict) else found
        return {info["name"]: info for info in listed}

    return {
        path[len(at) :].strip("/"): {**info, "full_name": f"{scheme}://{path}"}
        for path, info in sorted(retrying(look, f"listing {address}").items())
        # Folders that other programs put there are objects of no bytes.
        if info["type"] == "file" and not path.endswith("/")
        if path == at or path.startswith(f"{at}/")
    }


def upload(folder: pathlib.Path, address: AnyPath, last: Sequence[str] = ()) -> None:
    """Make what is below `address` the files of a local folder.

    Objects of other names are deleted.

    Args:
        last: names of files without which the folder does not count. They are deleted
            before anything changes, and uploaded when all the others are there.
    """
    names = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    }
    there = set(sizes(address))
    delete(address, [name for name in last if name in there])
    delete(address, there - names - set(last))
    for name in sorted(names, key=lambda name: (name in last, name)):
        upload_file(folder / name, join(address, name))


def upload_file(
    file: pathlib.Path, address: AnyPath, limit_secs: float | None = None
) -> None:
    """Upload a file whole; readers see all of it or what was there before.

    Args:
        limit_secs: for how long it is tried again (`errors.retrying`).
    """
    files, target = filesystem(address), "/".join(split(address))

    def put() -> None:
        if file.stat().st_size > _AT_ONCE_BYTES:
            files.put_file(str(file), target)
        else:  # as it is at one moment, for it may grow
            files.pipe_file(target, file.read_bytes())

    retrying(put, f"writing {os.fspath(address)}", limit_secs)


def delete(address: AnyPath, names: Iterable[str]) -> None:
    """Delete objects by their paths below an address; one that is gone is no error."""
    files = filesystem(address)
    at = "/".join(split(address))
    for name in sorted(names):

        def remove(path: str = f"{at}/{name}") -> None:
            with contextlib.suppress(FileNotFoundError):
                files.rm_file(path)

        retrying(remove, f"deleting {join(address, name)}")


def remove(address: AnyPath, first: str | None = None) -> None:
    """Delete everything below an address, `first` before the rest."""
    if first is not None:
        delete(address, [first])
    delete(address, sizes(address))


def move(source: AnyPath, target: AnyPath, marker: str) -> None:
    """Move a folder by copies within the bucket; killed at any moment, one counts.

    Args:
        marker: the object that makes a folder count: copied last and deleted first.
    """
    files = filesystem(source)
    origin, goal = "/".join(split(source)), "/".join(split(target))
    names = sizes(source)
    for name in sorted(names, key=lambda name: (name == marker, name)):
        copy = functools.partial(files.cp_file, f"{origin}/{name}", f"{goal}/{name}")
        retrying(copy, f"copying {join(source, name)}")
    remove(source, first=marker)
