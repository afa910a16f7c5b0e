"""Resume from the newest checkpoint that is sound."""

import logging
from collections.abc import Callable
from typing import Any

import jax

from jaxtrain.run.checkpoint.leaves import CheckpointMismatchError
from jaxtrain.run.checkpoint.manager import CheckpointManager, Restored
from jaxtrain.run.saved_record import DamagedCheckpointError

logger = logging.getLogger(__name__)


def restore_newest(
    checkpoints: CheckpointManager,
    state: Any,
    explain: Callable[[int], ValueError | None] = lambda _: None,
) -> Restored:
    """Read the newest sound checkpoint in place of `state`, which is freed.

    Damaged ones that are newer are set aside, with one warning. Every process calls
    this, and all restore the same step.

    Args:
        state: a tree of `jax.Array`s. They are deleted before any array is read, so
            that no device has to hold both; the caller must not use them again.
        explain: the error of a step with other leaves, where more is known than these.

    Raises:
        FileNotFoundError: there is no checkpoint.
        DamagedCheckpointError: none is sound; nothing was set aside.
        CheckpointMismatchError, ValueError: as of `CheckpointManager.restore`.
    """
    wanted = _take_shapes(state)
    damaged = {
        step: DamagedCheckpointError(
            checkpoints.directory / str(step), "there is no folder of that name"
        )
        for step in checkpoints.strays()
    }
    for step in reversed(checkpoints.all_steps()):
        try:
            restored = checkpoints.restore(wanted, step)
        except DamagedCheckpointError as error:
            damaged[step] = error
            continue
        except CheckpointMismatchError as error:
            raise explain(step) or error from None
        _set_aside(checkpoints, damaged, step)
        return restored
    if not damaged:
        raise FileNotFoundError(f"no checkpoint in {checkpoints.directory}")
    raise _none_is_sound(checkpoints, damaged)


def _set_aside(
    checkpoints: CheckpointManager,
    damaged: dict[int, DamagedCheckpointError],
    sound: int,
) -> None:
    if not damaged:
        return
    told = []
    for step, error in damaged.items():
        kept = checkpoints.set_aside(step)
        told.append(f"step {step} ({error.reason}), kept as {kept}")
    logger.warning(
        "DAMAGED CHECKPOINT: %s. Training goes on from step %d, the newest intact one",
        *("; ".join(told), sound),
    )


def _none_is_sound(
    checkpoints: CheckpointManager, damaged: dict[int, DamagedCheckpointError]
) -> DamagedCheckpointError:
    """The error of a run that has nothing to go on from. It never starts from zero."""
    told = "; ".join(f"step {step}: {each.reason}" for step, each in damaged.items())
    error = DamagedCheckpointError(checkpoints.directory, told)
    error.args = (
        f"no checkpoint in {checkpoints.directory} is sound: {told}. Put one back from"
        " a copy, or begin anew in another workdir",
    )
    return error


def _take_shapes(state: Any) -> Any:
    """Shapes, types and layouts of a tree of arrays, which are deleted."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        state,
    )
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()
    return shapes
