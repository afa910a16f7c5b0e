"""Compile the real train step for chips that are not there."""

import os

# Before jax starts: no chip is here, and nobody is to be asked about one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to quarrel over

from jaxtrain.aot.compile import compile_for, describe_devices, search_settings

__all__ = ["compile_for", "describe_devices", "search_settings"]
