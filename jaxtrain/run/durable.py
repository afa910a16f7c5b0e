"""Files that are whole on the disk, even if the power fails; imports none of ours."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


def flush(path: pathlib.Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk.

    Some network file systems refuse this for folders, which is no error.

    Raises:
        OSError: a file cannot be flushed.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():
            raise


def flush_tree(folder: pathlib.Path) -> None:
    """`flush` every file and folder in a folder, and it.

    Raises:
        OSError: a file cannot be flushed.
    """
    for at, _, files in os.walk(folder):
        for name in files:
            flush(pathlib.Path(at, name))
        flush(pathlib.Path(at))


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Let an error of writing say which file it was: of a full disk it does not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file, a text as UTF-8, aside, flush it, rename it, and flush the name."""
    partial = path.with_name(f"{path.name}.partial")
    with naming(partial):
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(partial)
    partial.replace(path)
    flush(path.parent)
