"""Matrix products in eight bits."""

from jaxtrain.kernels.fp8.api import (
    FORWARD,
    INPUT,
    OF_INPUT,
    OF_KERNEL,
    RESIDUALS,
    SCOPE,
    Shared,
    Site,
    Weight,
    project,
    quantize_kernel,
    share,
)

__all__ = [
    "FORWARD",
    "INPUT",
    "OF_INPUT",
    "OF_KERNEL",
    "RESIDUALS",
    "SCOPE",
    "Shared",
    "Site",
    "Weight",
    "project",
    "quantize_kernel",
    "share",
]
