"""All processes of a run judge a checkpoint alike, whichever of them saw the damage."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

from jaxtrain.run.checkpoint.values import gather
from jaxtrain.run.saved_record import (
    CheckpointVersionError,
    DamagedCheckpointError,
    is_unreadable,
)

# What TensorStore and XLA say where not the file is to blame but this machine.
_NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "Permission denied")
_LONGEST_REASON = 300


@contextlib.contextmanager
def all_agree(checkpoint: pathlib.Path) -> Iterator[None]:
    """Read a part of a checkpoint in the body; every process calls this.

    Raises:
        DamagedCheckpointError: in every process, where any could not read its part or
            found it damaged.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = _as_damage(checkpoint, raised)
    reasons = gather(None if error is None else error.reason)
    reason = next((each for each in reasons if each is not None), None)
    if reason is not None:
        raise DamagedCheckpointError(checkpoint, reason) from error


def _as_damage(checkpoint: pathlib.Path, error: Exception) -> DamagedCheckpointError:
    """What a reader's error says of the checkpoint, in one line.

    Raises:
        Exception: the error itself, where it says nothing of the files.
    """
    if isinstance(error, DamagedCheckpointError):
        return error
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.partition(". See full TensorStore details")[0]
    if isinstance(error, LookupError | TypeError | AttributeError):
        text = f"its metadata are not Orbax's: {type(error).__name__} {text}"
    of_the_machine = isinstance(error, MemoryError | jax.errors.JaxRuntimeError)
    of_the_machine |= any(sign in text for sign in _NOT_DAMAGE)
    of_the_machine |= is_unreadable(error)
    if of_the_machine or isinstance(error, CheckpointVersionError):
        raise error
    reason = f"its arrays cannot be read ({text:.{_LONGEST_REASON}})"
    return DamagedCheckpointError(checkpoint, reason)
