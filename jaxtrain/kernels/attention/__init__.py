"""Attention over packed rows: one call, several implementations."""

from jaxtrain.kernels.attention.api import (
    IMPLEMENTATIONS,
    attention,
    plan_attention,
    skips_blocks,
)
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.kernels.attention.schedule import Schedule

__all__ = [
    "IMPLEMENTATIONS",
    "Layout",
    "Schedule",
    "attention",
    "plan_attention",
    "skips_blocks",
]
