"""The gated delta rule over packed rows, and the short convolution before it."""

from jaxtrain.kernels.delta_rule.api import IMPLEMENTATIONS, delta_rule
from jaxtrain.kernels.delta_rule.convolution import (
    causal_convolution,
    continue_convolution,
)

__all__ = [
    "IMPLEMENTATIONS",
    "causal_convolution",
    "continue_convolution",
    "delta_rule",
]
