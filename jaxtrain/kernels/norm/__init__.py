"""A residual sum and its RMSNorm in one pass each way."""

from jaxtrain.kernels.norm.api import add_and_norm, choose_tiles

__all__ = ["add_and_norm", "choose_tiles"]
