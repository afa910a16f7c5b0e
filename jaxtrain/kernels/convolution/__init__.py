"""Short causal convolutions over packed rows."""

from jaxtrain.kernels.convolution.api import causal_convolution, continue_convolution

__all__ = ["causal_convolution", "continue_convolution"]
