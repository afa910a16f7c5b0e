"""Steps that fit the devices' memory, by the compiler's account before they run.

`remat_policy: auto` computes as little again as fits. What the last layers keep by
default is left out where it would not fit.
"""

import dataclasses
import functools
import logging
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.config.sections import REMATS, UNROLLED_REMATS
from jaxtrain.models.load import LoadedModel
from jaxtrain.models.recompute import layers_that_fit, leaves_layers
from jaxtrain.record.memory import in_words, memory_limit
from jaxtrain.run.mosaic_programs import compile_program
from jaxtrain.run.out_of_memory import is_out_of_memory
from jaxtrain.run.step_programs import OwnPrograms, shape_of

logger = logging.getLogger(__name__)

# Of the memory that is free, what a program may take: allocations leave gaps.
_USABLE = 0.97


class _Compiled(NamedTuple):
    """The program of a policy, the bytes that it needs, and those that are free."""

    program: Any
    needed: float
    free: float

    @property
    def room(self) -> float:
        """The bytes that it may take."""
        return _USABLE * self.free

    @property
    def fits(self) -> bool:
        return self.needed <= self.room


class Choice(NamedTuple):
    """A policy, of how many layers (-1: all), its step, and whether it fits."""

    remat: str
    layers: int
    step: Any
    fits: bool

    def __str__(self) -> str:
        of = f" of the first {self.layers} layers" if self.layers >= 0 else ""
        return f"{self.remat!r}{of}"


def choose_policy(
    compile_by: Callable[..., Any], layers: int | None = None, first: int = 0
) -> list[Choice]:
    """Compile by one policy after the other until a step fits; the last is the choice.

    Processes agree: one that has less memory decides for all.

    Args:
        compile_by: compiles the step of a policy, and of so many `layers` where not of
            all. What it returns has the bytes that are `needed` of a device, the `room`
            that there is, and whether it `fits`.
        layers: how many layers there are, if they are unrolled: between the last two
            policies as few of them as must be are computed again.
        first: the place of the first policy to try.
    """
    policies = REMATS if layers is None else UNROLLED_REMATS
    if layers is not None:
        first = min(first, len(policies) - 2)  # two to lie between
    choices: list[Choice] = []
    for remat in policies[first:]:
        step = compile_by(remat)
        choices.append(Choice(remat, -1, step, not _most(not step.fits)))
        if choices[-1].fits:
            break
    if layers is None or remat != policies[-1] or not choices[-1].fits:
        return choices
    needs = (choices[-2].step.needed, step.needed)
    count = _most(layers_that_fit(layers, *needs, step.room))
    if count < layers:
        some = Choice(remat, count, step := compile_by(remat, layers=count), step.fits)
        choices += [some] if not _most(not some.fits) else []
    return choices


class FittedStep(OwnPrograms):
    """A train step that is compiled by the fastest policy that fits, for each shape."""

    def __init__(
        self, make_step: Callable[..., Any], device: Any, layers: int | None = None
    ) -> None:
        """Compile nothing yet.

        Args:
            make_step: the jitted step by one of `REMATS`, and of how many layers.
            device: a `jax.Device` whose memory it has to fit.
            layers: how many layers there are, if they are unrolled.
        """
        super().__init__()
        self._make_step, self._device, self._layers = make_step, device, layers
        self._policies = REMATS if layers is None else UNROLLED_REMATS
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
        def compile_by(remat: str, **of: int) -> _Compiled:
            lowered = lower(self._make_step(remat, **of), state, batch)
            return self._compile(lowered, is_last=remat == REMATS[-1] and not of)

        size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(batch))
        largest, policy = self._tried
        # What a smaller batch could not keep, this one cannot either.
        *others, choice = choose_policy(
            compile_by, self._layers, policy if size >= largest else 0
        )
        self._tried = max(self._tried, (size, self._policies.index(choice.remat)))
        taken = choice.step
        told = f"training.remat_policy = auto took {choice}: {_words(taken.needed)} of"
        told += f" {_words(taken.free)} a device by the compiler's account"
        refused = [
            f"{other.remat} would take {_words(other.step.needed)}"
            for other in others
            if not other.fits
        ]
        logger.info("%s", "; ".join([told, *refused]))
        if not choice.fits:
            logger.warning("no policy fits the device; this one needs least")
        return taken.program

    def _compile(self, lowered: Any, *, is_last: bool) -> "_Compiled":
        limit = memory_limit(self._device)
        free = math.inf if limit is None else float(limit)
        program, needed = _compile(lowered, is_last=is_last)
        if program is None:
            return _Compiled(None, needed, free)
        arguments = program.memory_analysis().argument_size_in_bytes
        used = (self._device.memory_stats() or {}).get("bytes_in_use", 0)
        # What lies there beside the step's own arguments stays there.
        return _Compiled(program, needed, free - max(0, used - arguments))


class SparingStep(OwnPrograms):
    """A train step, or where that would not fit the device another that needs less.

    The device's own memory decides, so that processes on the same devices agree.
    """

    def __init__(self, step: Any, make_other: Callable[[], Any], device: Any) -> None:
        """Compile nothing yet; `make_other` makes the jitted step that needs less."""
        super().__init__()
        self._step, self._device = step, device
        self._make_other = functools.cache(make_other)

    def lower_by(self, lower: Callable[..., Any], state: Any, batch: Any) -> Any:
        """Lower the step; `compile()` of what is returned compares and may go back."""
        lowered = lower(self._step, state, batch)

        def compile_() -> Any:
            room = _USABLE * (memory_limit(self._device) or math.inf)
            program, needed = _compile(lowered)
            if needed <= room:
                return program
            told = "training.remat_layers: all layers compute again, for with what the"
            told += " last ones keep the step would take %s of %s a device"
            logger.info(told, _words(needed), _words(room / _USABLE))
            return compile_program(lower(self._make_other(), state, batch))

        return types.SimpleNamespace(compile=compile_)


def _compile(lowered: Any, *, is_last: bool = False) -> tuple[Any, float]:
    """A program, and what it takes of a device, its arguments included.

    None and infinity where the compiler runs out of memory, unless it `is_last`.
    """
    try:
        program = compile_program(lowered)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error) or is_last:
            raise
        return None, math.inf
    memory = program.memory_analysis()
    return program, float(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def fit_step(
    model: LoadedModel, train_step: Any, make_step: Callable[[LoadedModel], Any]
) -> Any:
    """A model's train step, so that it fits its devices where something may be chosen.

    Args:
        train_step: the step of this model as it is.
        make_step: the jitted step of a model.
    """

    def by_policy(remat: str, layers: int = -1) -> Any:
        decoder = dataclasses.replace(model.decoder, remat=remat, remat_layers=layers)
        return make_step(dataclasses.replace(model, decoder=decoder))

    device = model.plan.mesh.local_devices[0]
    if model.decoder.remat == "auto":
        layers = model.config.num_hidden_layers if model.plan.unrolled else None
        return FittedStep(by_policy, device, layers)
    if leaves_layers(model.decoder):
        return SparingStep(train_step, lambda: by_policy("full"), device)
    return train_step


def _most(number: int) -> int:
    """The largest of all processes' numbers; a collective call."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def _words(size: float) -> str:
    return in_words(size) if math.isfinite(size) else "more than there is"
