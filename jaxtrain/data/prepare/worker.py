"""A process that makes chunks for another one, told so through a pipe.

What it makes goes to files in a folder that both know, and the rest of it through the
pipe, so that whoever reads the pipe late does not keep it waiting.
"""

import dataclasses
import multiprocessing.connection
import pathlib
import signal
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxtrain.data.prepare.chunks import Chunk, make_chunk, take_rows
from jaxtrain.data.prepare.sequences import Sequences

_NOTHING = np.zeros(0)


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows `first` to `stop` - 1 of a data set; `rows`: these, unless known by then."""

    first: int
    stop: int
    rows: list[Mapping[str, Any]] | None


def main(descriptor: int) -> None:
    """Make chunks until the other end of the pipe is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the other process decides
    link = multiprocessing.connection.Connection(descriptor)
    try:
        try:
            recipe, rows, folder = link.recv()
        except EOFError:
            return
        except Exception as error:  # such as a class that is only known over there
            link.send(_portable(error))
            return
        link.send(None)
        while True:
            task: Task = link.recv()
            try:
                taken = task.rows
                if taken is None:
                    taken = take_rows(rows, task.first, task.stop)
                made = make_chunk(taken, task.first, recipe)
                link.send(_store_chunk(folder, task, made))
            except (BrokenPipeError, ConnectionResetError):
                raise
            except Exception as error:
                link.send(_portable(error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _portable(error: Exception) -> Exception:
    """An error that any process can read, whichever library raised it."""
    if type(error) is ValueError:
        return ValueError(str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror)
    return RuntimeError(f"{type(error).__name__}: {error}")


def _store_chunk(folder: str, task: Task, chunk: Chunk) -> Chunk:
    """The chunk without its tokens and masks, which are put in files."""
    for side, found in chunk.sides.items():
        for name in ("tokens", "trained"):
            np.save(_path(folder, task, side, name), getattr(found, name))
    sides = {
        side: Sequences(_NOTHING, _NOTHING, found.lengths)
        for side, found in chunk.sides.items()
    }
    return dataclasses.replace(chunk, sides=sides)


def load_chunk(folder: str, task: Task, stored: Chunk) -> Chunk:
    """The chunk that a worker stored; its files are removed."""
    sides = {}
    for side, found in stored.sides.items():
        arrays = {}
        for name in ("tokens", "trained"):
            path = _path(folder, task, side, name)
            arrays[name] = np.load(path)
            path.unlink()
        sides[side] = dataclasses.replace(found, **arrays)
    return dataclasses.replace(stored, sides=sides)


def _path(folder: str, task: Task, side: str, name: str) -> pathlib.Path:
    return pathlib.Path(folder, f"{task.first}.{side}.{name}.npy")
