"""What a run's decoder computes again in the backward pass."""

from typing import Any

import numpy as np

from jaxtrain.config import RunConfig
from jaxtrain.models.config import ModelConfig
from jaxtrain.sharding import ShardingPlan

# Of the memory of trained weights, what "full" may keep of the last layers. Gradients,
# which come later, take half of it (float32 weights, computing in bfloat16).
_KEPT_SHARE = 0.75
# The same of each copy of the weights where devices have parts of them, by all devices
# that share it: on two devices each keeps as much as one alone would.
_KEPT_SHARE_OF_PARTS = 1.5


def remat_options(
    run: RunConfig, config: ModelConfig, plan: ShardingPlan
) -> dict[str, Any]:
    """The options of `Decoder` that say so.

    Adapters' gradients are small, so that nothing is kept in their place; nor where
    memory is so short that the optimizer's state is on the host.
    """
    is_short = run.lora is not None or plan.offload_optimizer
    shared = (run.model.param_dtype, plan.copies, plan.mesh.size)
    return {
        "remat": run.precision.remat,
        "remat_layers": run.precision.remat_layers,
        "kept_bytes": 0 if is_short else room_for_layers(config, *shared),
        "reshards": run.precision.reshard_after_forward,
    }


def room_for_layers(config: ModelConfig, dtype: str, copies: int, devices: int) -> int:
    """Bytes that last layers may keep on devices with so many copies of all weights."""
    share = _KEPT_SHARE if copies == devices else _KEPT_SHARE_OF_PARTS
    return int(share * copies * config.num_params() * np.dtype(dtype).itemsize)
