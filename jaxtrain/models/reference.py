"""The frozen copy of a model that DPO compares its policy with."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import sharding
from jaxtrain.models import fp8
from jaxtrain.types import Params


def copy_weights(params: Params, dtype: str, in_fp8: bool) -> Params:
    """Copies of the weights as the forward pass reads them: they give its own numbers.

    Matrices are only ever read in the compute dtype, so they are kept in it, or in
    eight bits where their products are; norms and sinks are read in float32 and kept
    whole.
    """

    def copy(path: Any, leaf: jax.Array) -> jax.Array:
        name = path[-1].key
        is_matrix = name not in ("scale", "sinks") and not name.endswith("bias")
        # jnp.array copies; a mere cast to the same dtype would share the buffer, which
        # the train step donates.
        return jnp.array(leaf, dtype=dtype if is_matrix else leaf.dtype)

    copied = jax.tree_util.tree_map_with_path(copy, params)
    return fp8.freeze_kernels(params, copied) if in_fp8 else copied


def layouts_of(params: Params, in_fp8: bool) -> Params:
    """Where each of the copies is kept: as the weights that it is a copy of."""
    layouts = sharding.layouts_of(params)
    return fp8.frozen_layouts(layouts) if in_fp8 else layouts
