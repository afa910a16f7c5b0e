"""Damage a checkpoint of a small state, restore the newest sound one, and judge that.

The state is small, and nothing is compiled: a case takes a tenth of a second.
"""

import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.run.checkpoint import (
    CheckpointManager,
    DamagedCheckpointError,
    restore_newest,
)

STEPS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a damaged checkpoint, and whether that is as promised.

    `kind`: "older step", "same bits", "stopped", or what went wrong.
    """

    kind: str
    handled: bool
    message: str = ""


def make_state(step: int) -> dict[str, jax.Array]:
    """A state of all the types that we save, other at each step."""
    rng = np.random.default_rng(step)
    return {
        "step": jnp.int32(step),
        "kernel": jnp.asarray(rng.standard_normal((3, 64, 32), np.float32)),
        "moment": jnp.asarray(rng.standard_normal((64, 32)), jnp.bfloat16),
        "scale": jnp.asarray(rng.standard_normal(7, np.float32)),
        "codes": jnp.asarray(rng.integers(0, 255, 50), jnp.uint8),
        "rng": jax.random.key(step),
    }


def _record_of(step: int) -> dict:
    return {
        "data_state": {"position": step * 10},
        "config": {"training": {"seed": step}},
        "metrics": {"loss": 1.0 / step},
    }


def save_all(folder: pathlib.Path) -> None:
    """Save `STEPS` in `folder`."""
    with CheckpointManager(folder, best_metric="loss") as manager:
        for step in STEPS:
            manager.save(step, make_state(step), **_record_of(step))


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("jaxtrain"):
            self.messages.append(record.getMessage())


def try_damage(
    saved: pathlib.Path, work: pathlib.Path, damage: Callable[..., object]
) -> Outcome:
    """Copy `saved` to `work`, damage its newest step there, restore, and judge."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(saved, work)
    damage(work / str(STEPS[-1]), work / str(STEPS[-2]))
    warnings = _Warnings()
    logging.getLogger().addHandler(warnings)
    try:
        with CheckpointManager(work, best_metric="loss") as manager:
            manager.best_step()
            restored = restore_newest(manager, make_state(0))
    except DamagedCheckpointError as error:
        return Outcome("stopped", "\n" not in str(error), str(error))
    except Exception as error:
        return Outcome(f"raw {type(error).__name__}", False, str(error)[:500])
    finally:
        logging.getLogger().removeHandler(warnings)
    if not _is_as_saved(restored):
        return Outcome("OTHER BITS", False, f"step {restored.step}")
    told = [text for text in warnings.messages if "DAMAGED" in text]
    if restored.step == STEPS[-1]:
        return Outcome("same bits", not told)
    if restored.step != STEPS[-2]:
        return Outcome("too old a step", False, str(restored.step))
    kept = list(work.glob(f"damaged-{STEPS[-1]}"))
    is_kept = bool(kept) or any(p.is_symlink() for p in work.glob("damaged-*"))
    return Outcome("older step", len(told) == 1 and is_kept, "; ".join(told))


def _is_as_saved(restored) -> bool:
    expected = make_state(restored.step)
    record = _record_of(restored.step)
    same = all(
        _bits(restored.state[name]) == _bits(leaf) for name, leaf in expected.items()
    )
    found = {
        "data_state": restored.data_state,
        "config": restored.config,
        "metrics": restored.metrics,
    }
    return same and found == record


def _bits(leaf: jax.Array) -> bytes:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()
