"""Compiled programs on disk, so that a run that was compiled before need not compile.

jax finds an entry by a hash of the program, the compiler's version and options, and the
devices, and it removes the least recently used ones beyond the size limit. All of that
happens under a lock on the folder, so runs may share it. What jax leaves to us:

- Entries have machine code for the CPU that compiled them. Every kind of CPU gets a
  folder of its own, for a home directory that several machines share.
- A process that dies while it writes leaves half an entry, which is never replaced and,
  before jax 0.12, keeps others from being removed. `_sweep` deletes it.
- A folder that cannot be used is found out once, before the first program: one warning
  instead of one for each program.
- Of a run's processes only the first writes entries. Where the others do not see its
  folder they would compile what it has not, and on GPUs wait for its share of the
  autotuning for ever. So several processes use the cache only if all see one folder.
"""

import hashlib
import logging
import os
import pathlib
import platform
import secrets
import shutil
from typing import Any

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from jaxtrain.config.folders import cache_folder
from jaxtrain.config.sections import CompilationCacheSection

logger = logging.getLogger(__name__)

# A program that took this many seconds to compile is kept (jax: 1). On two CPU cores a
# run of configs/dpo.py with one step takes 12.3 s of CPU time without a cache, 7.3 with
# the programs of 1 s and more kept, 7.1 from 0.1 s on, and no less with all of them.
MIN_COMPILE_SECS = 0.1
_MIN_COMPILE_KEY = "jax_persistent_cache_min_compile_time_secs"
# Free space below which the disk counts as full; also what is written to try it.
_LEAST_FREE_BYTES = 64 * 2**20
_TRIAL_BYTES = 2**20
_LOCK_TIMEOUT_SECS = 10
# jax's names: an entry, when it was last used, and the lock on all of them.
_ENTRY, _LAST_USED, _LOCK = "-cache", "-atime", ".lockfile"

_in_use: str | None = None  # the folder that `set_up` gave to jax


def set_up(section: CompilationCacheSection) -> pathlib.Path | None:
    """Let jax keep compiled programs as the configuration says; None where it can't.

    It never raises because of the folder: a cache is not worth a run. A folder that the
    user gave to jax, by JAX_COMPILATION_CACHE_DIR or jax.config, is left alone with
    its settings, unless `section.dir` names another. In a run of several processes all
    of them must call this.

    Returns:
        The folder that jax uses from here on, None for none.
    """
    if not _of_jax("jax_enable_compilation_cache"):
        return None
    present = _of_jax("jax_compilation_cache_dir")
    if present != _in_use and (section.dir is None or not section.enabled):
        return None if present is None else pathlib.Path(present)
    if not section.enabled:
        return _use(None)
    folder = _folder(section)
    if str(folder) == _in_use:
        return folder
    problem = _problem_of(folder)
    if jax.process_count() > 1:
        problem = _problem_of_any(folder, problem)
    if problem is not None:
        logger.warning(
            "compiled programs are not saved: training.compilation_cache.dir ="
            " %s %s; name another folder, or set training.compilation_cache.enabled ="
            " false",
            folder,
            problem,
        )
        return _use(None)
    jax.config.update("jax_compilation_cache_max_size", int(section.max_gib * 2**30))
    if _MIN_COMPILE_KEY.upper() not in os.environ:
        jax.config.update(_MIN_COMPILE_KEY, MIN_COMPILE_SECS)
    return _use(folder)


def folder_in_use() -> pathlib.Path | None:
    """The folder that `set_up` gave to jax; None where it is off, or the user's own."""
    return None if _in_use is None else pathlib.Path(_in_use)


def _of_jax(name: str) -> Any:
    """A setting of jax's, whose types do not list them."""
    return getattr(jax.config, name)


def _use(folder: pathlib.Path | None) -> pathlib.Path | None:
    """Point jax at the folder. It has to forget one that it has opened before."""
    global _in_use
    name = None if folder is None else str(folder)
    if _of_jax("jax_compilation_cache_dir") != name:
        jax.config.update("jax_compilation_cache_dir", name)
        compilation_cache.reset_cache()
    _in_use = name
    return folder


def _folder(section: CompilationCacheSection) -> pathlib.Path:
    root = (
        cache_folder() / "compiled"
        if section.dir is None
        else pathlib.Path(section.dir).expanduser()
    )
    return root.absolute() / host_cpu()


def host_cpu(description: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
    """A name for this kind of CPU: the same for two only if they know the same code.

    Where the system does not tell a CPU's features, every machine is a kind of its own.
    """
    telling = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    try:
        cpuinfo = description.read_text()
    except OSError:
        cpuinfo = ""
    lines = {line for line in cpuinfo.splitlines() if line.startswith(telling)}
    facts = sorted(lines) or [platform.processor(), platform.node()]
    digest = hashlib.blake2b("\n".join(facts).encode(), digest_size=6).hexdigest()
    return f"{platform.machine()}-{digest}"


def _problem_of(folder: pathlib.Path) -> str | None:
    """Why the folder cannot be used, None if it can; makes it and sweeps it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < _LEAST_FREE_BYTES:
            return f"has {free / 2**20:.0f} MiB of free space"
        with filelock.FileLock(folder / _LOCK, timeout=_LOCK_TIMEOUT_SECS):
            _sweep(folder)
            _try_to_write(folder)
    # filelock: NotImplementedError on file systems without locks.
    except (OSError, NotImplementedError) as error:
        return f"cannot be used ({error})"
    return None


def _sweep(folder: pathlib.Path) -> None:
    """Delete unfinished entries: jax writes when an entry was used after the entry."""
    for entry in folder.glob(f"*{_ENTRY}"):
        if not entry.with_name(entry.name.removesuffix(_ENTRY) + _LAST_USED).exists():
            logger.info("%s is unfinished: deleted", entry)
            entry.unlink()


def _try_to_write(folder: pathlib.Path) -> None:
    """Write a file and delete it: quotas show in no other way."""
    trial = folder / f".trial-{secrets.token_hex(8)}"
    try:
        trial.write_bytes(bytes(_TRIAL_BYTES))
    finally:
        trial.unlink(missing_ok=True)


def _problem_of_any(folder: pathlib.Path, problem: str | None) -> str | None:
    """What keeps any of the run's processes from the folder of the first one.

    Process 0 leaves a file there whose name only this run knows; all look for it.
    """
    token = int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))))
    mark = folder / f".run-{token:08x}"
    is_first = jax.process_index() == 0
    if is_first and problem is None:
        mark.touch()
    multihost_utils.sync_global_devices("compilation cache: marked")
    sees = problem is None and mark.exists()
    all_see = np.all(multihost_utils.process_allgather(np.bool_(sees)))
    if is_first:
        mark.unlink(missing_ok=True)
    if all_see:
        return None
    return problem or "is not one that all processes of this run share"
