"""The gated delta rule over packed rows: one call, several implementations."""

from jaxtrain.kernels.delta_rule.api import IMPLEMENTATIONS, delta_rule

__all__ = ["IMPLEMENTATIONS", "delta_rule"]
