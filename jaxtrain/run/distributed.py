"""Join the other processes of a run, as the launcher's environment tells of them.

By hand or by a scheduler: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.
Slurm (`srun`), TPU pods on GKE, Open MPI up to 4: jax reads the launcher's variables.
Open MPI 5: rank and size are the launcher's, JAX_COORDINATOR_ADDRESS is to be set.
TPU pods by ssh: JAXTRAIN_DISTRIBUTED=1, and jax asks the metadata server.

A process that never comes, or dies, is an error for all the others and not a hang:
JAXTRAIN_INIT_TIMEOUT_SECS (300) and JAXTRAIN_HEARTBEAT_TIMEOUT_SECS (100) say how soon.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, MutableMapping

import jax

logger = logging.getLogger(__name__)

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_COUNT = "JAX_NUM_PROCESSES"
_INDEX = "JAX_PROCESS_ID"
_PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


@dataclasses.dataclass(frozen=True)
class Launch:
    """How several processes were started. None: jax finds that out by itself."""

    launcher: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def detect(environ: Mapping[str, str]) -> Launch | None:
    """The launch that the environment tells of; None for a process on its own.

    Raises:
        ValueError: the environment says it in part only, or not in numbers.
    """
    if _COUNT in environ or _INDEX in environ:
        names = (_ADDRESS, _COUNT, _INDEX)
        if missing := [name for name in names if not environ.get(name)]:
            raise ValueError(
                f"{' and '.join(missing)} missing from the environment: set"
                f" {_ADDRESS}=HOST:PORT of process 0, {_COUNT} and {_INDEX} in every"
                " process, or none of them"
            )
        count, index = _number(environ, _COUNT), _number(environ, _INDEX)
        if not index < count:
            raise ValueError(
                f"{_INDEX} = {index} must be below {_COUNT} = {count}: number the"
                " processes from 0"
            )
        return Launch("environment", environ[_ADDRESS], count, index)
    if "OMPI_COMM_WORLD_SIZE" in environ:
        if "OMPI_MCA_orte_hnp_uri" in environ:
            return Launch("Open MPI")
        # Open MPI 5 names no host; alone, a process needs none.
        count = _number(environ, "OMPI_COMM_WORLD_SIZE")
        if count == 1:
            return None
        if not environ.get(_ADDRESS):
            raise ValueError(
                f"Open MPI 5 tells no process where the first one runs: mpirun -x"
                f" {_ADDRESS}=HOST:PORT, HOST being the first in the host file"
            )
        index = _number(environ, "OMPI_COMM_WORLD_RANK")
        return Launch("Open MPI", environ[_ADDRESS], count, index)
    if "SLURM_STEP_NODELIST" in environ:
        return Launch("Slurm")
    if len(environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        return Launch("GKE")
    if "MEGASCALE_COORDINATOR_ADDRESS" in environ:
        return Launch("TPU slices")
    if environ.get("JAXTRAIN_DISTRIBUTED", "0") != "0":
        return Launch("TPU pod")
    if environ.get(_ADDRESS):
        raise ValueError(f"{_ADDRESS} is set: set {_COUNT} and {_INDEX} too")
    return None


def allow_pinned_memory(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let a GPU's process pin nine tenths of the host's memory; before jax is used.

    XLA's own limit is 64 GB, less than AdamW's moments of a 7B model. A limit that the
    environment names is left alone.
    """
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        environ.setdefault(_PINNED_LIMIT, str(max(64, int(0.9 * size / 2**30))))


def initialize(environ: MutableMapping[str, str] = os.environ) -> None:
    """Join the run's other processes, if there are any; once, before jax is used.

    Raises:
        ValueError: see `detect`.
        RuntimeError: the others did not come in time.
    """
    allow_pinned_memory(environ)
    launch = detect(environ)
    if launch is None or jax.distributed.is_initialized():
        count_devices()  # one that is not there is the first thing to tell
        return
    timeout = _number(environ, "JAXTRAIN_INIT_TIMEOUT_SECS", "300")
    heartbeat = _number(environ, "JAXTRAIN_HEARTBEAT_TIMEOUT_SECS", "100")
    if environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator_address=launch.coordinator_address,
            num_processes=launch.num_processes,
            process_id=launch.process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=heartbeat,
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"{launch.launcher}: the run's processes did not find each other within"
            f" {timeout} s ({_ADDRESS} = {launch.coordinator_address}). Check whether"
            " all were started, and whether a firewall lets them reach that port, or"
            f" set JAXTRAIN_INIT_TIMEOUT_SECS to wait longer. jax: {error}"
        ) from error
    logger.info(
        "%s: process %d of %d, %d of %d devices here",
        launch.launcher,
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )


@contextlib.contextmanager
def initializing(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """`initialize` while the block runs, which is to import modules.

    Opening a GPU takes seconds that are not Python's, and so does its first array, for
    which it reserves its memory. A run of several processes is joined before the block,
    since modules must not open devices before that.

    Raises:
        ValueError, RuntimeError: see `initialize`, behind the block.
    """
    if detect(environ) is not None:
        initialize(environ)
        yield
        return
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        initialized = beside.submit(_open_devices, environ)
        yield
        initialized.result()


def _open_devices(environ: MutableMapping[str, str]) -> None:
    """`initialize`, and a first array on the first device: others may be left alone."""
    initialize(environ)
    # Whoever needs the memory says best that there is none.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.block_until_ready(jax.device_put(0.0, jax.local_devices()[0]))


def count_devices() -> int:
    """The devices of all processes.

    Raises:
        ValueError: JAX_PLATFORMS, or what is installed, names a platform that is not
            here.
    """
    try:
        return jax.device_count()
    except (RuntimeError, AssertionError) as error:  # jax asserts that one is found
        named = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).strip() or "jax finds none").splitlines()[0]
        raise ValueError(
            f"JAX_PLATFORMS = {named!r}: no such device can be used here"
            f" ({reason.partition(' (set')[0]}); unset it to take what there is, set"
            " cpu, or install jax for the device (such as pip install 'jaxtrain[cuda]')"
        ) from error


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    text = environ.get(name, default)
    if not text.isdecimal():
        raise ValueError(f"{name} = {text!r} is not a number: set 0 or more")
    return int(text)
