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

from jaxtrain.storage.address import AnyPath, filesystem, join, split
from jaxtrain.storage.errors import retrying


def sizes(address: AnyPath) -> dict[str, int]:
    """The size in bytes of each object below an address, by its path from there."""
    at = "/".join(split(address))

    def look() -> dict[str, Any]:
        return filesystem(address).find(at, detail=True)

    found = retrying(look, f"listing {os.fspath(address)}")
    return {
        path[len(at) :].strip("/"): info["size"]
        for path, info in sorted(found.items())
        if info["type"] == "file" and not path.endswith("/")
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


def upload_file(file: pathlib.Path, address: AnyPath) -> None:
    """Upload a file whole; readers see all of it or what was there before."""
    files = filesystem(address)
    retrying(
        lambda: files.put_file(str(file), "/".join(split(address))),
        f"writing {os.fspath(address)}",
    )


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
