"""The weights of a run, a model or an adapter, to be used and not to be trained.

The functions return a `TrainState` with an empty optimizer state, which evaluation
steps and the export can use. They need no training data.
"""

import dataclasses
import logging
import pathlib

import jax
import jax.numpy as jnp
import optax

from jaxtrain.config import RunConfig
from jaxtrain.models import hf
from jaxtrain.models.load import LoadedModel, load_abstract_model, load_model
from jaxtrain.models.source import read_source
from jaxtrain.models.state import abstract_state, init_state, needs_reference
from jaxtrain.optimizers.ema import averaged, describe_average
from jaxtrain.run.base_weights import warn_of_other_base
from jaxtrain.run.checkpoint import CheckpointManager, CheckpointMismatchError
from jaxtrain.run.preflight import explain_mismatch, saved_steps
from jaxtrain.run.saved_record import read_record
from jaxtrain.sharding import layouts_of
from jaxtrain.tree import overlay, select
from jaxtrain.types import TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A saved step, and the folder of checkpoints that it is in."""

    folder: pathlib.Path
    step: int


def open_checkpoints(run: RunConfig, folder: pathlib.Path) -> CheckpointManager:
    """The checkpoints of a run, which may be training at this moment, for reading."""
    return CheckpointManager(
        folder,
        best_metric=run.loop.best_metric,
        greater_is_better=run.loop.greater_is_better,
        read_only=True,
    )


def load_state(
    run: RunConfig, policy: Checkpoint | pathlib.Path | None = None
) -> tuple[LoadedModel, TrainState]:
    """Load the model of `run` onto its mesh, with the weights of `policy`, if given.

    The model that is returned holds no weights: the state has them. The base is read
    only where the run has adapters or a reference, or where it is the policy.

    Args:
        policy: a checkpoint of this run, or a Hugging Face directory with weights of
            the same shapes. None: what `run.model` and `training.lora.init_from` name.

    Raises:
        ValueError: the model cannot be loaded, or the policy's weights do not fit it.
        FileNotFoundError: there is no such checkpoint.
    """
    # Nothing is trained: no moments are made or read.
    optimizer = optax.identity()
    if policy is None or run.lora is not None or needs_reference(run):
        model = _kept_whole(load_model(run))
        state = init_state(model, run, optimizer)
    else:
        source = read_source(run, needs_weights=False)
        described = _kept_whole(load_abstract_model(run, jax.devices(), source))
        state = abstract_state(described, run, optimizer)
        model = dataclasses.replace(described, weights=None)
    replicated = model.plan.replicated
    state = dataclasses.replace(
        state,
        step=jax.device_put(jnp.int32(0), replicated),
        rng=jax.jit(jax.random.key, out_shardings=replicated)(run.loop.seed),
        loss_scale=None,
        loss_window=None,
    )
    if policy is None:
        return model, state
    # The base's own weights leave the device before the policy's are read.
    state = dataclasses.replace(state, trainable=_describe(state.trainable))
    if isinstance(policy, Checkpoint):
        return model, _restore(run, model, state, policy)
    base = dataclasses.replace(model.decoder, lora=None)
    layouts = layouts_of(state.trainable)
    weights = hf.load_params(policy, base, layouts, dtype=run.model.param_dtype)
    return model, dataclasses.replace(state, trainable=weights)


def _kept_whole(model: LoadedModel) -> LoadedModel:
    """The model with weights that are not updated, and so need not be in parts."""
    plan = dataclasses.replace(model.plan, parted=False)
    return dataclasses.replace(model, plan=plan)


def as_model(model: LoadedModel, state: TrainState) -> LoadedModel:
    """The model with the policy's weights, its adapters beside them."""
    return dataclasses.replace(model, weights=overlay(state.frozen, state.trainable))


def without_reference(run: RunConfig) -> RunConfig:
    """The same run where only the policy is wanted: its reference is not loaded."""
    return dataclasses.replace(run, dpo=None)


def _restore(
    run: RunConfig, model: LoadedModel, state: TrainState, checkpoint: Checkpoint
) -> TrainState:
    """The state as a checkpoint has it, frozen weights of its own included."""
    frozen = state.frozen
    # Only a reference that moved is saved (`loop.Parts.saved`).
    moved = run.dpo is not None and run.dpo.sync_ref_model
    wanted = dataclasses.replace(
        state, frozen=select(frozen, state.trainable) if moved else {}
    )
    if run.optimizer.ema_decay is not None:
        wanted = dataclasses.replace(wanted, opt_state=describe_average(state))
    folder, step = checkpoint.folder, checkpoint.step
    with open_checkpoints(run, folder) as checkpoints:
        try:
            found = checkpoints.restore(wanted, step, partial=True)
        except CheckpointMismatchError as error:
            told = explain_mismatch(run, folder, step, "Leave out --model")
            raise told or error from error
    warn_of_other_base(run, model, state, found.data_states[0] or {})
    restored = dataclasses.replace(averaged(found.state), opt_state=state.opt_state)
    return dataclasses.replace(restored, frozen=overlay(frozen, restored.frozen))


def _describe(tree: dict) -> dict:
    """Shapes, types and layouts of a tree of arrays, which it does not hold."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        tree,
    )


def choose_checkpoint(
    run: RunConfig, folder: pathlib.Path, step: str | None = None
) -> Checkpoint:
    """The checkpoint of a run that `step` names: a number, "best" or "last".

    None: the one whose weights the run exports, or would export, as `model/`.

    Raises:
        ValueError: none of the checkpoints was evaluated, so that none is the best.
        FileNotFoundError: there is no such checkpoint.
    """
    saved = saved_steps(folder)
    if not saved:
        raise FileNotFoundError(f"{folder.parent} has no checkpoint yet")
    if step not in (None, "best", "last"):
        if int(step) not in saved:
            raise FileNotFoundError(
                f"--step={step}: {folder.parent} has no checkpoint of that step; choose"
                f" from {', '.join(map(str, saved))}"
            )
        return Checkpoint(folder, int(step))
    best = None
    if step == "best" or (step is None and run.loop.load_best_model_at_end):
        with open_checkpoints(run, folder) as checkpoints:
            best = checkpoints.best_step()
        if best is None and step == "best":
            raise ValueError(
                f"--step=best: no checkpoint in {folder.parent} has"
                f" {run.loop.best_metric}; let training.save_steps be a multiple of"
                " training.eval_steps"
            )
        if step == "best" and best is not None:
            _tell_of_a_better(folder, saved, best)
    return Checkpoint(folder, saved[-1] if best is None else best)


def _tell_of_a_better(folder: pathlib.Path, saved: list[int], best: int) -> None:
    """Tell if the run's best evaluation was at a step that is no checkpoint."""
    try:
        found = read_record(folder / str(saved[-1]))["data_states"][0]["best"]["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # restoring it says what is wrong
    if found not in saved:
        logger.warning(
            "--step=best: the run was best at step %d, of which there is no checkpoint;"
            " of those that are there step %d is the best",
            *(found, best),
        )
