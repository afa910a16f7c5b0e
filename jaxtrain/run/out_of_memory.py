"""What a run says and keeps where a device has no memory left."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator

import jax

from jaxtrain.config import RunConfig
from jaxtrain.config.sections import WITH_MOMENTS
from jaxtrain.models.state import needs_reference
from jaxtrain.record.memory import in_words, memory_limit

logger = logging.getLogger(__name__)


class DeviceMemoryError(jax.errors.JaxRuntimeError):
    """A device has no memory left; the message says what would need less."""


@contextlib.contextmanager
def explained(run: RunConfig, folder: pathlib.Path) -> Iterator[None]:
    """Say what to change, and keep a profile of device memory, where it runs out.

    Args:
        folder: gets `memory.prof`, which pprof reads, from each process.

    Raises:
        DeviceMemoryError: in place of jax's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        lines = [_describe(error), *(f"  try {line}" for line in advise(run))]
        profile = _save_profile(folder)
        if profile is not None:
            lines.append(f"what was in its memory then: {profile} (go tool pprof)")
        raise DeviceMemoryError("\n".join(lines)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of jax says that memory is exhausted."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def _describe(error: BaseException) -> str:
    """The first line: what the device has, and what jax says."""
    device = jax.local_devices()[0]
    limit = memory_limit(device)
    has = f" of its {in_words(limit)}" if limit is not None else ""
    first = str(error).strip().splitlines()[0]
    return f"the device has no memory left{has} ({first:.200})"


def _save_profile(folder: pathlib.Path) -> pathlib.Path | None:
    """Write which arrays lie on the devices; None where that fails."""
    index = jax.process_index()
    path = folder / (f"memory_process_{index}.prof" if index else "memory.prof")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        jax.profiler.save_device_memory_profile(str(path))
    except Exception as error:  # the message matters more than the profile
        logger.warning("no profile of device memory could be written: %s", error)
        return None
    return path


def _has_wide_moments(run: RunConfig) -> bool:
    settings = run.optimizer
    return WITH_MOMENTS.holds(settings.optimizer) and settings.moment_dtype != "int8"


def advise(run: RunConfig) -> list[str]:
    """What would make a step smaller, the cheapest first; only what is left to do."""
    advice = []
    if not run.precision.gradient_checkpointing:
        advice.append("training.gradient_checkpointing = True")
    elif run.precision.remat_policy not in ("full", "offload", "auto"):
        advice.append("training.remat_policy = 'full'")
    elif run.precision.remat == "full" and run.precision.remat_layers != -1:
        advice.append("training.remat_layers = -1 (compute all layers again)")
    if run.mesh.fsdp == 1 and run.mesh.data > 1:
        advice.append("training.deepspeed.zero_stage = 3 (splits weights over devices)")
    rows = run.loop.per_device_train_batch_size
    if rows > 1:
        advice.append(
            f"training.per_device_train_batch_size = {rows // 2},"
            " gradient_accumulation_steps doubled: the same update"
        )
    if needs_reference(run) and run.lora is None:
        advice.append("training.dpo.precompute_ref_log_probs = True (no second model)")
    if run.lora is None:
        advice.append("training.lora.enabled = True (no optimizer state of the base)")
    if run.precision.remat == "full":
        advice.append("training.remat_policy = 'offload' (layers' inputs: pinned host)")
    if run.lora is None and _has_wide_moments(run):
        advice.append("training.moment_dtype = 'int8' (a quarter of their bytes)")
    if not run.devices.deepspeed.offload_optimizer:
        advice.append("training.deepspeed.offload_optimizer = True (pinned host)")
    advice.append("mesh.tensor = 2 or more, within a host")
    return advice
