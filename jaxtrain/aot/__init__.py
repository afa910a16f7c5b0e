"""Compile the real train step for chips that are not there."""

import importlib
import os
from typing import TYPE_CHECKING, Any

# Before jax starts: no chip is here, and nobody is to be asked about one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to quarrel over

if TYPE_CHECKING:
    from jaxtrain.aot.compile import compile_for, describe_devices, search_settings

__all__ = ["compile_for", "describe_devices", "search_settings"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is asked for: the command's help needs no jax."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("jaxtrain.aot.compile"), name)
