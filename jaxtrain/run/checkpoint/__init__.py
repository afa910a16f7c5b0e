"""Checkpoints: train state, data position, config and metrics, through Orbax.

A step's directory appears under its final name by one atomic rename, after all of it
is written and flushed to the disk, and leaves by one atomic rename before any of it is
deleted. So a process killed at any moment leaves only whole checkpoints. On disk:
arrays as Orbax's Zarr, everything else as JSON; never pickle. Checksums of all that
is saved are verified when it is read.
"""

from jaxtrain.run.checkpoint.leaves import CheckpointMismatchError
from jaxtrain.run.checkpoint.manager import CheckpointManager, Restored
from jaxtrain.run.checkpoint.recovery import restore_newest
from jaxtrain.run.saved_record import DamagedCheckpointError

__all__ = [
    "CheckpointManager",
    "CheckpointMismatchError",
    "DamagedCheckpointError",
    "Restored",
    "restore_newest",
]
