"""XLA's flags for tests, whose programs run for milliseconds and compile for seconds.

Nothing here imports jax, which reads the flags when it starts its devices.
"""

import importlib.metadata

_JAX = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))

QUICK_TO_COMPILE = "--xla_backend_optimization_level=0"  # a third less, without LLVM's
if _JAX < (0, 11):
    # A third of the time: XLA's older emitter of loops, which needs no MLIR passes for
    # each fusion. Later versions have only the newer one, and refuse the flag.
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"


def flags(devices: int = 1) -> str:
    """The value of XLA_FLAGS for a process with so many CPU devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}"
