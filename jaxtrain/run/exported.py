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
from jaxtrain.run.durable import flush, flush_tree, write_whole

logger = logging.getLogger(__name__)

_NAMES = ("model", "best_model", "adapter", "best_adapter")
_PARTIAL, _OLD = ".partial", ".old"


class Exported:
    """The exported directories of a work directory. Every process calls it alike."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self.workdir = workdir
        self._note = workdir / "exported.json"
        self._writes = jax.process_index() == 0

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[pathlib.Path]:
        """A directory to write to, which takes the place of `name` when it is whole."""
        final = self.workdir / name
        partial, old = (self.workdir / f"{name}{end}" for end in (_PARTIAL, _OLD))
        yield partial
        if self._writes:
            flush_tree(partial)
            if final.exists():
                final.rename(old)
            partial.rename(final)
            flush(self.workdir)
            _remove(old)
        _wait_for_all(f"exported {name}")

    def clean(self) -> None:
        """Remove what a killed export left behind."""
        for name in _NAMES if self._writes else ():
            final, old = self.workdir / name, self.workdir / f"{name}{_OLD}"
            if old.exists() and not final.exists():
                old.rename(final)  # killed between two renames
            for remains in (old, self.workdir / f"{name}{_PARTIAL}"):
                if remains.exists():
                    _remove(remains)
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
            stale = self.workdir / name
            if name not in kept and stale.is_dir() and not stale.is_symlink():
                logger.info("removed %s, an export that is out of date", stale)
                _remove(stale)
        text = json.dumps({**_identity(steps, run), "files": self._files(kept)})
        write_whole(self._note, f"{text}\n")

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
            path.relative_to(self.workdir).as_posix(): path.stat().st_size
            for name in names
            for path in sorted((self.workdir / name).rglob("*"))
            if path.is_file()
        }


def _directories(steps: Mapping[str, int], run: RunConfig) -> list[str]:
    adapters = [name.replace("model", "adapter") for name in steps]
    return [*steps, *(adapters if run.lora is not None else [])]


def _identity(steps: Mapping[str, int], run: RunConfig) -> dict[str, Any]:
    """What an export depends on; of the settings a hash, for they may hold secrets."""
    settings = json.dumps(run.to_dict(), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    return {"steps": dict(steps), "settings": digest, "version": __version__}


def _read(path: pathlib.Path) -> Any:
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
