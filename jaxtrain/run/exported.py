"""What a run has exported: whole directories, and a note of the weights in them."""

import contextlib
import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain import __version__
from jaxtrain.config import RunConfig
from jaxtrain.run.buffer import local_folder
from jaxtrain.run.durable import flush, flush_tree, write_whole
from jaxtrain.storage import folders
from jaxtrain.storage.address import is_remote
from jaxtrain.storage.errors import retrying

logger = logging.getLogger(__name__)

NAMES = ("model", "best_model", "adapter", "best_adapter")
NOTE = "exported.json"
_PARTIAL, _OLD = ".partial", ".old"
# In a bucket: without one of them nobody takes a folder for a model or an adapter.
_LAST = ("config.json", "adapter_config.json")


def exported(workdir: Any) -> "Exported":
    """The exported directories of a work directory."""
    return BucketExported(workdir) if is_remote(workdir) else Exported(workdir)


class Exported:
    """The exported directories of a work directory. Every process calls it alike."""

    def __init__(self, workdir: Any) -> None:
        self.workdir = workdir
        self._folder = local_folder(workdir)
        self._note = workdir / NOTE
        self._writes = jax.process_index() == 0

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[pathlib.Path]:
        """A directory to write to, which takes the place of `name` when it is whole."""
        partial = self._folder / f"{name}{_PARTIAL}"
        yield partial
        if self._writes:
            self._publish(partial, name)
        _wait_for_all(f"exported {name}")

    def clean(self) -> None:
        """Remove what a killed export left behind."""
        for name in NAMES if self._writes else ():
            for remains in self._clean(name):
                logger.info("removed %s, which a killed export left", remains)

    def forget(self) -> None:
        """Take back the note, as other weights come."""
        if self._writes:
            self._note.unlink(missing_ok=True)

    def note(self, steps: Mapping[str, int], run: RunConfig) -> None:
        """Note that the weights of these steps are exported, each under its name.

        A best model of an earlier end that is no longer the best is removed.
        """
        if not self._writes:
            return
        kept = _directories(steps, run)
        for name in ("best_model", "best_adapter"):
            if name not in kept and self._drop(name):
                logger.info("removed %s/%s, out of date", self.workdir, name)
        text = json.dumps({**_identity(steps, run), "files": self._files(kept)})
        self._write_note(f"{text}\n")

    def is_whole(self, steps: Mapping[str, int], run: RunConfig) -> bool:
        """Whether the weights of these steps are exported by the same settings."""
        if not self._writes:
            found = False
        else:
            wanted = {
                **_identity(steps, run),
                "files": self._files(_directories(steps, run)),
            }
            found = _read(self._note) == wanted
        if jax.process_count() > 1:
            found = bool(multihost_utils.broadcast_one_to_all(np.int32(found)))
        return found

    def _files(self, names: list[str]) -> dict[str, int]:
        """The size of each file, by its path in the work directory."""
        return {
            f"{name}/{path}": size
            for name in names
            for path, size in self._sizes(name).items()
        }

    # What a bucket does otherwise.

    def _publish(self, partial: pathlib.Path, name: str) -> None:
        """Put a whole directory in the place of `name`."""
        final, old = self.workdir / name, self.workdir / f"{name}{_OLD}"
        flush_tree(partial)
        if final.exists():
            final.rename(old)
        partial.rename(final)
        flush(self.workdir)
        _remove(old)

    def _clean(self, name: str) -> list[Any]:
        """Remove what a killed export left of a name; returns what that was."""
        final, old = self.workdir / name, self.workdir / f"{name}{_OLD}"
        if old.exists() and not final.exists():
            old.rename(final)  # killed between two renames
        remains = [old, self.workdir / f"{name}{_PARTIAL}"]
        found = [path for path in remains if path.exists()]
        for path in found:
            _remove(path)
        return found

    def _drop(self, name: str) -> bool:
        """Remove an exported directory; False if there is none."""
        stale = self.workdir / name
        if not stale.is_dir() or stale.is_symlink():
            return False
        _remove(stale)
        return True

    def _sizes(self, name: str) -> dict[str, int]:
        """The size of each file of a directory, by its path in it."""
        folder = self.workdir / name
        return {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def _write_note(self, text: str) -> None:
        write_whole(self._note, text)


class BucketExported(Exported):
    """In a bucket: written on this machine, and uploaded with what makes it count last.

    While an export is replaced, the one before it does not count either.
    """

    def _publish(self, partial: pathlib.Path, name: str) -> None:
        folders.upload(partial, self.workdir / name, last=_LAST)
        _remove(partial)

    def _clean(self, name: str) -> list[Any]:
        found = self._sizes(name)
        if not found or not set(_LAST).isdisjoint(found):
            return []
        folders.remove(self.workdir / name)
        return [self.workdir / name]

    def _drop(self, name: str) -> bool:
        found = self._sizes(name)
        folders.delete(self.workdir / name, [last for last in _LAST if last in found])
        folders.remove(self.workdir / name)
        return bool(found)

    def _sizes(self, name: str) -> dict[str, int]:
        return folders.sizes(self.workdir / name)

    def _write_note(self, text: str) -> None:
        retrying(lambda: self._note.write_text(text), f"writing {self._note}")


def _directories(steps: Mapping[str, int], run: RunConfig) -> list[str]:
    adapters = [name.replace("model", "adapter") for name in steps]
    return [*steps, *(adapters if run.lora is not None else [])]


def _identity(steps: Mapping[str, int], run: RunConfig) -> dict[str, Any]:
    """What an export depends on; of the settings a hash, for they may hold secrets."""
    settings = json.dumps(run.to_dict(), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    return {"steps": dict(steps), "settings": digest, "version": __version__}


def _read(path: Any) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None  # there is none, or it is damaged: what it notes is written anew


def _remove(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
