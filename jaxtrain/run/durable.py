"""Files that are whole on the disk, even if the power fails; imports none of ours."""

import os
import pathlib


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


def write_whole(path: pathlib.Path, text: str) -> None:
    """Write a file aside, flush it, rename it, and flush the name."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)
    flush(path.parent)
