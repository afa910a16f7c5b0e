"""Programs whose kernels of Mosaic's for GPUs compile beside the rest of them.

XLA compiles such kernels one after another, a second each, after its passes over a
program that may have 36 layers. It keeps them for the process by a hash of their text.
So each is compiled by itself, as a call with the same text, while the passes run, and
is there when XLA comes to it (benchmarks/RESULTS.md). Where that fails nothing is
lost: XLA compiles the kernel as it would have.

Processes of one run share the timing of kernels, and each may wait for the others' part
of any program. As they need not all begin with a kernel here, they leave this out.
"""

import logging
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.mlir import ir

logger = logging.getLogger(__name__)

CALLS = ("mosaic_gpu", "mosaic_gpu_v2")  # what jax calls them, by its version
_HASH = "kernel_hash"
_DTYPES = {
    "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64",
    "f8E4M3FN": "float8_e4m3fn", "f8E5M2": "float8_e5m2", "i1": "bool", "i8": "int8",
    "i32": "int32", "i64": "int64", "ui8": "uint8", "ui32": "uint32",
}  # fmt: skip
# A program that is in jax's cache is there by then, and its kernels are in it.
_PATIENCE_SECS = 2.0


class _Kernel(NamedTuple):
    """A call: what it is called, what it is told, what it reads and what it writes."""

    call: str
    attributes: dict[str, Any]
    inputs: list[jax.ShapeDtypeStruct]
    outputs: list[jax.ShapeDtypeStruct]

    def lower(self) -> Any:
        """A program of this call alone, for a device of this process."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

        def call(*inputs: jax.Array) -> Any:
            return jax.ffi.ffi_call(self.call, self.outputs)(*inputs, **self.attributes)

        program = jax.jit(call, in_shardings=device, out_shardings=device)
        return program.trace(*self.inputs).lower(lowering_platforms=("cuda",))


def compile_program(lowered: Any) -> Any:
    """`lowered.compile()`, in less time where it has kernels of Mosaic's for GPUs.

    Args:
        lowered: a `jax.stages.Lowered`, or what has its `compile` alone.

    Raises:
        jax.errors.JaxRuntimeError: as `compile` does.
    """
    ended = threading.Event()
    is_program = hasattr(lowered, "compiler_ir") and jax.process_count() == 1
    kernels = _find_kernels(lowered) if is_program else []
    if kernels:  # in no daemon: the process must not end while XLA compiles
        threading.Thread(target=_compile_all, args=(kernels, ended)).start()
    try:
        return lowered.compile()
    finally:
        ended.set()


def _compile_all(kernels: list[_Kernel], ended: threading.Event) -> None:
    """Compile the kernels until their program, which has them too, is compiled."""
    if ended.wait(_PATIENCE_SECS):
        return
    for kernel in kernels:
        if ended.is_set():
            return
        try:
            kernel.lower().compile()
        except Exception as error:  # of jax and XLA, in a thread that nobody waits for
            logger.debug("a kernel was not compiled beside its program: %s", error)
            return


def _find_kernels(lowered: Any) -> list[_Kernel]:
    """The kernels in a program, each once; none of those that cannot be told."""
    found: dict[bytes, _Kernel] = {}
    for operation in _walk(lowered.compiler_ir("stablehlo").operation):
        if operation.name != "stablehlo.custom_call":
            continue
        call = ir.StringAttr(operation.attributes["call_target_name"]).value
        if call not in CALLS:
            continue
        try:
            kernel = _read(call, operation)
            found.setdefault(kernel.attributes[_HASH], kernel)
        except (KeyError, ValueError) as error:
            logger.debug("a kernel is left to its program: %s", error)
    return list(found.values())


def _walk(operation: Any) -> Iterator[Any]:
    """All operations within one."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _walk(inner.operation)


def _read(call: str, operation: Any) -> _Kernel:
    told = ir.DictAttr(operation.attributes["mhlo.backend_config"])
    entries = [told[place] for place in range(len(told))]
    return _Kernel(
        call,
        {entry.name: _value(entry.attr) for entry in entries},
        [_shape(value.type) for value in operation.operands],
        [_shape(value.type) for value in operation.results],
    )


def _value(attribute: Any) -> bytes | bool:
    """Raises ValueError for what is neither text nor a truth value."""
    if isinstance(attribute, ir.StringAttr):
        return attribute.value_bytes
    if isinstance(attribute, ir.BoolAttr):
        return bool(attribute.value)
    raise ValueError(f"an attribute {type(attribute).__name__}")


def _shape(mlir_type: Any) -> jax.ShapeDtypeStruct:
    ranked = ir.RankedTensorType(mlir_type)
    return jax.ShapeDtypeStruct(tuple(ranked.shape), _DTYPES[str(ranked.element_type)])
