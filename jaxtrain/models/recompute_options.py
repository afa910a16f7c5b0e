"""What a run's decoder computes again in the backward pass."""

from typing import Any

import numpy as np

from jaxtrain.config import RunConfig
from jaxtrain.models.config import ModelConfig
from jaxtrain.sharding import ShardingPlan

# Of the memory of trained weights, what "full" may keep of the last layers. Gradients,
# which come later, take half of it (float32 weights, computing in bfloat16).
_KEPT_SHARE = 0.75


def remat_options(
    run: RunConfig, config: ModelConfig, plan: ShardingPlan
) -> dict[str, Any]:
    """The options of `Decoder` that say so.

    Adapters' gradients are small, so that nothing is kept in their place; nor where
    memory is so short that the optimizer's state is on the host.
    """
    # Of all devices' weights, some of which are copies.
    is_short = run.lora is not None or plan.offload_optimizer
    copies = plan.mesh.shape["data"] if plan.zero_stage >= 3 else plan.mesh.size
    dtype = run.model.param_dtype
    return {
        "remat": run.precision.remat,
        "remat_layers": run.precision.remat_layers,
        "kept_bytes": 0 if is_short else copies * room_for_layers(config, dtype),
        "reshards": run.precision.reshard_after_forward,
    }


def room_for_layers(config: ModelConfig, param_dtype: str) -> int:
    """Bytes that the last layers may keep beside trained weights of this type."""
    size = np.dtype(param_dtype).itemsize
    return int(_KEPT_SHARE * config.num_params() * size)
