"""Rows times the matrix of their group, with both gradients."""

from jaxtrain.kernels.grouped_matmul.api import (
    IMPLEMENTATIONS,
    choose_implementation,
    grouped_matmul,
    grouped_matmuls,
)

__all__ = [
    "IMPLEMENTATIONS",
    "choose_implementation",
    "grouped_matmul",
    "grouped_matmuls",
]
