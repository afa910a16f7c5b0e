"""Rows times the matrix of their group, with both gradients."""

from jaxtrain.kernels.grouped_matmul.api import IMPLEMENTATIONS, grouped_matmul

__all__ = ["IMPLEMENTATIONS", "grouped_matmul"]
