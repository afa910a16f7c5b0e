"""Layers' products in eight bits: which kernels, and what can be trained so.

The projections of attention and of the MLP, and no others: not the embedding, the head,
norms or adapters. A trained kernel is quantized once a step, before the loop over
micro-batches, and in evaluation before the layers run; the codes go with it as a
`Weight`. Where a kernel is frozen, the base beside adapters or DPO's reference, its
codes are all that is kept.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxtrain.kernels.attention.cudnn import compute_capability
from jaxtrain.kernels.fp8 import Weight, quantize_kernel
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layer_kinds import kinds_of
from jaxtrain.models.stacks import LAYERS
from jaxtrain.tree import flatten, nest, overlay
from jaxtrain.types import Params

_KEY = "training.fp8 = True"
_LEAST_CAPABILITY = 8.9  # tensor cores of Ada and Hopper, and what came after them
_TPUS = ("TPU7x",)  # the matrix units of those before compute in bfloat16
_SIZE = 16  # of each side of a product; others would be filled up each time


def in_fp8(kernel: Float[Array, "L I O"], master: Float[Array, "L I O"]) -> Weight:
    """Kernels of layers, quantized; their gradient goes to `master`."""
    return quantize_kernel(jax.lax.stop_gradient(kernel))._replace(master=master)


def cast_master(weight: Weight, dtype: str) -> Weight:
    """The same, with the type that a trained kernel's gradient is summed up in."""
    if weight.master is None:
        return weight
    return weight._replace(master=weight.master.astype(dtype))


def quantize_once(params: Params) -> Callable[[Params], Params]:
    """Quantize the layers' kernels among weights that train, as a step begins.

    Left to where layers read them, they would be quantized in each micro-batch: XLA
    does not move it out of the loop.

    Returns:
        A function that puts the codes beside the same kernels, in a tree as `params`.
    """
    layers = flatten(params.get(LAYERS, {}))
    codes = {
        path: quantize_kernel(kernel)
        for path, kernel in layers.items()
        if path[-1] == "kernel"
    }

    def with_codes(params: Params) -> Params:
        kernels = flatten(params.get(LAYERS, {}))
        weights = {
            path: weight._replace(master=kernels[path])
            for path, weight in codes.items()
        }
        return overlay(params, {LAYERS: nest(weights)}) if weights else params

    return with_codes


def freeze_kernels(params: Params, others: Params) -> Params:
    """`others` with the layers' kernels of `params` as codes, which get no gradient."""

    def freeze(path: Any, leaf: Array, other: Array) -> Any:
        return quantize_kernel(leaf) if path[-1].key == "kernel" else other

    trees = (params[LAYERS], others[LAYERS])
    return {**others, LAYERS: jax.tree_util.tree_map_with_path(freeze, *trees)}


def frozen_layouts(layouts: Params) -> Params:
    """Where what `freeze_kernels` makes is kept: codes as the kernels, units whole."""

    def layout(path: Any, leaf: Any) -> Any:
        units: Any = NamedSharding(leaf.mesh, PartitionSpec())
        return Weight(None, leaf, units) if path[-1].key == "kernel" else leaf

    layers = jax.tree_util.tree_map_with_path(layout, layouts[LAYERS])
    return {**layouts, LAYERS: layers}


def check(config: ModelConfig, device: jax.Device) -> None:
    """Refuse a model, or a device, that cannot train in eight bits.

    Raises:
        ValueError: it says why.
    """
    _check_device(device)
    _check_model(config)


def _check_device(device: jax.Device) -> None:
    """CPUs compute the same, slowly; of others, those that have such products."""
    if device.platform == "cpu" or device.device_kind in _TPUS:
        return
    found = f"{_KEY}: this device is a {device.device_kind}"
    if device.platform != "gpu":
        raise ValueError(
            f"{found}, which does not multiply in eight bits; unset it, or train on an"
            f" NVIDIA GPU of compute capability {_LEAST_CAPABILITY} or later, or on"
            f" {_TPUS[0]}"
        )
    capability = compute_capability(device)
    if capability is None or capability < _LEAST_CAPABILITY:
        has = "no compute capability" if capability is None else f"{capability}"
        raise ValueError(
            f"{found} of compute capability {has}, and tensor cores multiply in eight"
            f" bits from {_LEAST_CAPABILITY} on (L4, RTX 40, H100, H200, B200); unset"
            " it to compute in bfloat16"
        )


def _check_model(config: ModelConfig) -> None:
    """All products of its layers must be such as are made in eight bits."""
    others = {kind.mixer for kind in kinds_of(config)} - {"attention"}
    why = None
    if config.num_experts:
        why = "its experts are multiplied in groups, which is not done in eight bits"
    elif others:
        why = f"its layers of {', '.join(sorted(others))} are not done in eight bits"
    widths = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads x head_dim": config.num_attention_heads * config.head_dim,
        "num_key_value_heads x head_dim": config.num_key_value_heads * config.head_dim,
    }
    if uneven := [f"{name} = {size}" for name, size in widths.items() if size % _SIZE]:
        why = f"tensor cores need multiples of {_SIZE}, and {uneven[0]}"
    if why is not None:
        raise ValueError(f"{_KEY}: this is a {config.model_type}, and {why}; unset it")
