"""`remat_policy: auto`: recompute as little as the devices' memory allows."""

import dataclasses
import logging
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.config.sections import REMATS
from jaxtrain.models.load import LoadedModel
from jaxtrain.record.memory import in_words, memory_limit
from jaxtrain.run.out_of_memory import is_out_of_memory
from jaxtrain.run.step_programs import OwnPrograms, shape_of

logger = logging.getLogger(__name__)

# Of the memory that is free, what a program may take: allocations leave gaps.
_USABLE = 0.97


class FittedStep(OwnPrograms):
    """A train step that is compiled by the fastest policy that fits, for each shape.

    Processes agree: one that has less memory decides for all.
    """

    def __init__(self, make_step: Callable[[str], Any], device: Any) -> None:
        """Compile nothing yet.

        Args:
            make_step: the jitted step by one of `REMATS`.
            device: a `jax.Device` whose memory it has to fit.
        """
        super().__init__()
        self._make_step, self._device = make_step, device
        self._tried = (0, 0)  # the largest batch so far, and the policy it took

    def lower_by(self, lower: Callable[..., Any], state: Any, batch: Any) -> Any:
        """Choose for a batch of this shape; `compile()` of what is returned gives it.

        `lower(step, state, batch)` lowers the step of a policy.
        """
        shape = shape_of(batch)
        if shape not in self._programs:
            self._programs[shape] = self._choose(lower, state, batch)
        program = self._programs[shape]
        return types.SimpleNamespace(compile=lambda: program)

    def _choose(self, lower: Callable[..., Any], state: Any, batch: Any) -> Any:
        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(batch))
        largest, policy = self._tried
        # What a smaller batch could not keep, this one cannot either.
        first = policy if size >= largest else 0
        refused = []
        for index, remat in enumerate(REMATS[first:], first):
            lowered = lower(self._make_step(remat), state, batch)
            program, needed, free = self._compile(remat, lowered)
            fits = needed <= _USABLE * free
            if not (_all_agree(fits) or remat == REMATS[-1]):
                refused.append(f"{remat} would take {_words(needed)}")
                continue
            self._tried = max(self._tried, (size, index))
            told = f"training.remat_policy = auto took {remat!r}: {_words(needed)} of"
            told += f" {_words(free)} a device by the compiler's account"
            told += "".join(f"; {line}" for line in refused)
            logger.info("%s", told)
            if not fits:
                logger.warning("no policy fits the device; this one needs least")
            break
        return program

    def _compile(self, remat: str, lowered: Any) -> tuple[Any, float, float]:
        """The program of a policy, the bytes that it needs, and those that are free."""
        limit = memory_limit(self._device)
        free = math.inf if limit is None else float(limit)
        try:
            program = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error) or remat == REMATS[-1]:
                raise
            return None, math.inf, free
        memory = program.memory_analysis()
        arguments = memory.argument_size_in_bytes
        used = (self._device.memory_stats() or {}).get("bytes_in_use", 0)
        needed = (
            arguments
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
            + memory.generated_code_size_in_bytes
        )
        # What lies there beside the step's own arguments stays there.
        return program, float(needed), free - max(0, used - arguments)


def fit_step(model: LoadedModel, make_step: Callable[[LoadedModel], Any]) -> FittedStep:
    """The train step of a model by the fastest policy that fits its devices.

    Args:
        make_step: the jitted step of a model.
    """

    def by_policy(remat: str) -> Any:
        decoder = dataclasses.replace(model.decoder, remat=remat)
        return make_step(dataclasses.replace(model, decoder=decoder))

    return FittedStep(by_policy, model.plan.mesh.local_devices[0])


def _all_agree(fits: bool) -> bool:
    """Whether it fits every process's devices; a collective call."""
    if jax.process_count() == 1:
        return fits
    return bool(np.min(multihost_utils.process_allgather(np.int32(fits))))


def _words(size: float) -> str:
    return in_words(size) if math.isfinite(size) else "more than there is"
