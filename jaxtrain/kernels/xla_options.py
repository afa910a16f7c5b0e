"""What XLA is told about programs for a kind of device (benchmarks/RESULTS.md)."""

import functools
import logging
import os
import re
from typing import Any, Literal

import jax

Options = dict[str, str | bool]
Sums = Literal["adapters", "weights"]  # whose gradients
logger = logging.getLogger(__name__)

_TRITON_PRODUCTS = "xla_gpu_enable_triton_gemm"
_PASSES_OFF = "xla_disable_hlo_passes"
_UNROLLED: Options = {
    # It would compile and time many kernels of Triton's for each product of each layer:
    # 198 s for 36 unrolled layers of a 3B with LoRA, which then run 3% slower than with
    # cuBLAS alone, compiled in 27 s. In a scan Triton's kernels save a copy of each
    # layer's weights, so there they stay.
    _TRITON_PRODUCTS: False,
    # They cast the weights of all layers at once, and all copies live until the end.
    _PASSES_OFF: "slice-sinker,convert-mover",
}
# Triton's products convert codes first; and products of one tensor, joined, are bf16.
FP8: Options = {_TRITON_PRODUCTS: False, "xla_gpu_dot_merger_threshold_mb": "0"}
# Where GPUs exchange gradients of adapters alone, and keys and values of long rows,
# there is little to hide. A schedule that tries to keeps what gradients are computed
# of, and takes two to ten times the memory.
_UNHIDDEN: Options = {"xla_gpu_enable_latency_hiding_scheduler": False}
# Where GPUs add up gradients of all weights, products beside a sum slow down about as
# much as it takes, so few large sums are better than many of 30 MB; and one of many
# arrays is not worth copying them into one and out again.
_LARGE_SUMS: Options = {
    "xla_gpu_all_reduce_combine_threshold_bytes": "125000000",
    "xla_gpu_reduce_scatter_combine_threshold_bytes": "125000000",
    _PASSES_OFF: f"{_UNROLLED[_PASSES_OFF]},all-reduce-contiguous",
}
# Kernels are else chosen by timing them, which is another choice each time, and cuDNN's
# attention adds up gradients in no certain order.
_DETERMINISTIC: Options = {"xla_gpu_deterministic_ops": True}
# Without a device there is nothing to time, but each fusion would still be compiled by
# every way that there is: 34 s in place of 19 for a DPO step of 36 unrolled layers.
_ABSENT: Options = {"xla_gpu_experimental_enable_fusion_autotuner": False}


def for_gpus(
    *, unrolled: bool, sums: Sums | None, fp8: bool, deterministic: bool
) -> Options | None:
    """Options of programs for GPUs.

    Args:
        sums: whose gradients are added up over GPUs that each have all weights.
    """
    own: Options = {}
    if fp8:
        own = FP8
    elif unrolled:
        of_sums = {None: {}, "adapters": _UNHIDDEN, "weights": _LARGE_SUMS}
        own = _UNROLLED | of_sums[sums]
    return _acting(own | (_DETERMINISTIC if deterministic else {}))


def for_absent_gpus() -> Options | None:
    """Options, beside those of `for_gpus`, where no GPU is there to time kernels on."""
    return _acting(_ABSENT)


def for_tpus(*, gathers: bool) -> Options | None:
    """Options of programs for TPUs.

    Where they gather weights, XLA would cut a product with them into one for each part,
    adding all of the result up in device memory each time: at 32 chips eight times the
    traffic of gathering the weights first (docs/scaling.md). Under tensor parallelism,
    which that is for, it is left alone.
    """
    if not gathers:
        return None
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def _acting(options: Options) -> Options | None:
    """Those that this XLA knows and that `XLA_FLAGS`, which win, do not name."""
    said = os.environ.get("XLA_FLAGS", "")
    own = tuple(option for option in options.items() if option[0] not in said)
    return dict(_known(own)) if own else None


@functools.cache
def _known(options: tuple[tuple[str, str | bool], ...]) -> Any:
    """The options that this XLA has, whose platform need not be that of the devices.

    A version without one compiles as it comes.
    """
    try:
        jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        missing = re.search("No such compile option: '(.*?)'", str(error))
        if missing is None:
            raise
        logger.warning("jax %s has no %s: left out", jax.__version__, missing[1])
        return _known(tuple(o for o in options if o[0] != missing[1]))
    return options
