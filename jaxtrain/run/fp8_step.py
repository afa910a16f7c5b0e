"""`training.fp8`: no train step that multiplies in more bits than it says.

For GPUs XLA makes products in eight bits of a pattern that it has to find. Where it
does not, it computes in more bits and says nothing. So every program of the train step
is read once it is compiled, before it runs. For TPUs a product of codes is written as
such, and is found as one of eight-bit operands; there jaxtrain.aot reads it, too.
"""

import collections
import dataclasses
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxtrain.config import RunConfig
from jaxtrain.kernels.fp8 import FORWARD, OF_INPUT, OF_KERNEL, SCOPE
from jaxtrain.models.load import LoadedModel
from jaxtrain.run.mosaic_programs import compile_program
from jaxtrain.run.step_programs import OwnPrograms

_IN_FP8 = "__cublas$lt$matmul$f8"
# A product in a program's text: a library's, or one left to the compiler's own kernels.
_PRODUCT = re.compile(
    r' (?:custom-call\(.*custom_call_target="(?P<target>[^"]*)"'
    r"|(?:dot|convolution)\((?P<operands>[^)]*)\))"
)
# What is defined in a line, and its type; names are those of one computation.
_DEFINITION = re.compile(r"^\s+(?:ROOT )?(?P<name>%[\w.\-]+) = (?P<type>\w+)\[")
_NAME = re.compile(rf'op_name="[^"]*\b{SCOPE}/(?P<module>[^/"]+)/(?P<pass>[^/"]+)/')
_WORDS = {
    FORWARD: "its forward product",
    OF_INPUT: "its input's gradient",
    OF_KERNEL: "its kernel's gradient",
}


@dataclasses.dataclass(frozen=True)
class Expected:
    """The products that a step's program must have, of each of these modules.

    The others are how many of each pass there are at least, in all layers together.
    """

    modules: frozenset[str]
    forward: int
    of_input: int
    of_kernel: int

    def __iter__(self) -> Iterator[tuple[str, str, int]]:
        """Module, pass and number."""
        counts = {
            FORWARD: self.forward,
            OF_INPUT: self.of_input,
            OF_KERNEL: self.of_kernel,
        }
        for module in sorted(self.modules):
            for which, count in counts.items():
                yield module, which, count


def check_step(run: RunConfig, model: LoadedModel, step: Any) -> Any:
    """The jitted step; under training.fp8 one that reads its programs first.

    On a CPU the same is computed in more bits, which is no secret.
    """
    if not run.precision.fp8 or model.plan.platform == "cpu":
        return step
    return CheckedStep(step, expected_of(run, model))


def expected_of(run: RunConfig, model: LoadedModel) -> Expected:
    """What a run's step must have in eight bits.

    The first layer's inputs may have no gradient: beside adapters, or where learning
    rates of 0 leave out what is before it. Frozen kernels have none.
    """
    unrolled, layers = model.plan.unrolled, model.config.num_hidden_layers
    modules = model.decoder.linear_kernels()
    if run.optimizer.lr_multipliers:
        return Expected(modules, layers if unrolled else 1, 0, 0)
    frozen = run.lora is not None
    if not unrolled:
        return Expected(modules, 1, int(layers > 1 or not frozen), int(not frozen))
    return Expected(modules, layers, layers - frozen, 0 if frozen else layers)


def check_products(text: str, expected: Expected) -> None:
    """Refuse a compiled program that has not all products in eight bits.

    Args:
        text: the program as XLA prints it.

    Raises:
        ValueError: it names the first that is missing or computed in more bits.
    """
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    types: dict[str, str] = {}
    for line in text.splitlines():
        if defined := _DEFINITION.match(line):
            types[defined["name"]] = defined["type"]
        product, name = _PRODUCT.search(line), _NAME.search(line)
        if product is None or name is None:
            continue
        operands = re.findall(r"%[\w.\-]+", product["operands"] or "")
        of_codes = bool(operands) and all(
            types.get(operand, "").startswith("f8") for operand in operands
        )
        if product["target"] != _IN_FP8 and not of_codes:
            raise _refusal(name["module"], name["pass"], "is computed in more bits")
        found[name["module"], name["pass"]] += 1
    for module, which, count in expected:
        if found[module, which] < count:
            seen = f"is found {found[module, which]} times in place of {count}"
            raise _refusal(module, which, seen)


def _refusal(module: str, which: str, what: str) -> ValueError:
    return ValueError(
        f"training.fp8 = True: of {module} {_WORDS.get(which, which)} {what}, in the"
        f" program that XLA compiled (jax {jax.__version__}); unset it, and report this"
        " with the versions of jax and of the driver"
    )


class CheckedStep(OwnPrograms):
    """A jitted train step whose programs are read before they first run."""

    def __init__(self, step: Any, expected: Expected) -> None:
        super().__init__()
        self._step, self._expected = step, expected

    def lower_by(self, lower: Callable[..., Any], state: Any, batch: Any) -> Any:
        """Lower the step; `compile()` of what is returned checks as well."""
        lowered = lower(self._step, state, batch)

        def compile_and_check() -> Any:
            program = compile_program(lowered)
            check_products(program.as_text(), self._expected)
            return program

        return types.SimpleNamespace(compile=compile_and_check)
