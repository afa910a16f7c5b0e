"""The first train state of a run, as arrays or as shapes and layouts alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain import lora, sharding
from jaxtrain.config import RunConfig
from jaxtrain.models import parted, reference
from jaxtrain.models.load import LoadedModel, lora_config
from jaxtrain.optimizers import optim
from jaxtrain.record.diagnostics import init_loss_window
from jaxtrain.tree import overlay, select
from jaxtrain.types import Params, TrainState


def needs_reference(run: RunConfig) -> bool:
    """Whether the step scores batches by the frozen model too."""
    if run.dpo is None or not run.objective_row.has_reference:
        return False
    return not (run.dpo.reference_free or run.dpo.precompute_ref_log_probs)


def init_state(
    model: LoadedModel, run: RunConfig, optimizer: optax.GradientTransformation
) -> TrainState:
    """Make the first train state. The model's weights move into it.

    Raises:
        ValueError: an earlier training has taken the weights.
    """
    plan = model.plan
    # The weights are donated or moved: no name may hold them longer than needed.
    trainable, frozen = _split(run, model, model.take_weights(), abstract=False)
    parameters, moments = _layouts(model, optimizer, trainable)
    trainable = jax.device_put(trainable, parameters)
    if _keeps_first_adapters(run, model):
        frozen = overlay(frozen, jax.device_put(trainable, parameters, may_alias=False))
    # Made where it is kept: moments in host memory may not fit the device at once.
    opt_state = jax.jit(optimizer.init, out_shardings=moments)(
        jax.device_put(trainable, sharding.on_device(parameters))
    )
    # Jitted, because device_put refuses keys where a device is another process's.
    rest = jax.jit(functools.partial(_rest, run), out_shardings=plan.replicated)()
    return TrainState(trainable=trainable, frozen=frozen, opt_state=opt_state, **rest)


def abstract_state(
    model: LoadedModel, run: RunConfig, optimizer: optax.GradientTransformation
) -> TrainState:
    """Describe `init_state` of a `load_abstract_model`: no array is made."""
    split = functools.partial(_split, run, model, abstract=True)
    trainable, frozen = jax.eval_shape(split, model.params)
    if frozen:
        in_fp8 = run.lora is None and run.precision.fp8  # else as it was loaded
        frozen = _laid_out(frozen, reference.layouts_of(model.params, in_fp8))
    parameters, moments = _layouts(model, optimizer, trainable)
    opt_state = _laid_out(jax.eval_shape(optimizer.init, trainable), moments)
    trainable = _laid_out(trainable, parameters)
    if _keeps_first_adapters(run, model):
        frozen = overlay(frozen, trainable)
    rest = jax.eval_shape(functools.partial(_rest, run))
    rest = jax.tree.map(lambda leaf: leaf.update(sharding=model.plan.replicated), rest)
    return TrainState(trainable=trainable, frozen=frozen, opt_state=opt_state, **rest)


def _layouts(
    model: LoadedModel, optimizer: optax.GradientTransformation, trainable: Params
) -> tuple[Any, Any]:
    """Where the trainable parameters and the optimizer's state are kept."""
    plan, axes = model.plan, model.decoder.logical_axes()
    parameters, moments = parted.lay_out(plan, trainable, select(axes, trainable))
    moments = optim.state_shardings(optimizer, trainable, moments, plan.replicated)
    return parameters, plan.store_optimizer(moments)


def _laid_out(tree: Any, layouts: Any) -> Any:
    return jax.tree.map(
        lambda leaf, layout: leaf.update(sharding=layout), tree, layouts
    )


def _rest(run: RunConfig) -> dict[str, Any]:
    """The parts of the first state that no parameter gives a shape."""
    window = None
    if run.loop.spike_threshold is not None:
        window = init_loss_window(run.loop.spike_window)
    return {
        "step": jnp.int32(0),
        "rng": jax.random.key(run.loop.seed),
        "loss_scale": optim.init_loss_scale() if run.precision.fp16 else None,
        "loss_window": window,
    }


def _split(
    run: RunConfig, model: LoadedModel, params: Params, *, abstract: bool
) -> tuple[Params, Params]:
    """What trains at first and what is frozen: the base, or the reference's copy.

    Where only shapes are traced, `abstract`, adapters are new: no file is read.
    """
    if run.lora is None:
        if not needs_reference(run):
            return params, {}
        in_fp8, dtype = run.precision.fp8, run.precision.compute_dtype
        copy = functools.partial(reference.copy_weights, dtype=dtype, in_fp8=in_fp8)
        layouts = None if abstract else reference.layouts_of(params, in_fp8)
        return params, jax.jit(copy, out_shardings=layouts)(params)
    settings = lora_config(run, model.config)
    if run.lora.init_from and not abstract:
        adapters, _ = lora.load_adapter(run.lora.init_from, params)
    else:
        # A stream of its own: the seed's key itself made the base's random weights.
        key = jax.random.fold_in(jax.random.key(run.loop.seed), 1)
        adapters = lora.init_adapters(key, params, settings)
    return lora.trainable_and_frozen(params, adapters, settings)


def _keeps_first_adapters(run: RunConfig, model: LoadedModel) -> bool:
    """Whether the frozen tree holds the first adapters beside the base.

    The DPO reference is then not the base alone: it will move, or started elsewhere.
    Without DPO, what the base lost at the start is needed to save an adapter.
    """
    if run.lora is None:
        return False
    if lora_config(run, model.config).changes_base:
        return True
    return run.dpo is not None and (run.dpo.sync_ref_model or bool(run.lora.init_from))
