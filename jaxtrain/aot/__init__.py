"""Compile the real train step for chips that are not there: what it needs, if it fits.

    python -m jaxtrain.aot --config=configs/dpo.py --topology=v5e:4x4 \\
        --config.model.name_or_path=configs/shapes/qwen2.5-3b

`--search` tries mesh shapes, rematerialization and batch sizes in place of the
config's. Needs `jax[tpu]` (it brings libtpu, the compiler) and no TPU, for `h200:8`
jax's CUDA plugin and no GPU; of a model its config.json is enough. Exits with 3 where
the step does not fit.
"""

import os

# Before jax starts: no chip is here, and nobody is to be asked about one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to quarrel over

from jaxtrain.aot.compile import compile_for, describe_devices, search_settings

__all__ = ["compile_for", "describe_devices", "search_settings"]
