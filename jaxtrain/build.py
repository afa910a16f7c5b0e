"""The page to read first: how a configuration, a model and rows become a run.

    config -> RunConfig        jaxtrain.config.resolve
    model  -> LoadedModel      jaxtrain.models.load
    rows   -> prepared data    jaxtrain.data.loading
    all three -> Parts         `build`, below: what the loop needs, made in order
    Parts -> results           `run_to_end`, below: restore, loop, export

From scratch, SFT, LoRA and DPO differ only in what each of these lines makes of the
configuration: which objective, which tree trains, whether a reference is scored.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxtrain import loop, objectives, sharding, step
from jaxtrain.config import RunConfig
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.load import LoadedModel
from jaxtrain.models.mixture_options import router_loss_coefficient, with_router_report
from jaxtrain.models.parted import preparation
from jaxtrain.models.state import init_state, needs_reference
from jaxtrain.models.transformer import for_reference
from jaxtrain.models.z_loss import with_z_loss
from jaxtrain.objectives.added import AddedLoss, with_added_loss, with_router_loss
from jaxtrain.objectives.options import ObjectiveRow
from jaxtrain.optimizers.configured import make_optimizer
from jaxtrain.optimizers.ema import averaged, averaged_policy
from jaxtrain.optimizers.multipliers import without_frozen
from jaxtrain.optimizers.offload import offload
from jaxtrain.passes import difficulty
from jaxtrain.passes.reference import ReferenceScorer, describe
from jaxtrain.record import diagnostics, summary, writers
from jaxtrain.record.start import announce
from jaxtrain.record.throughput import ThroughputMeter, peak_flops
from jaxtrain.run import export
from jaxtrain.run.checkpoint import CheckpointManager
from jaxtrain.run.feed import Prepared
from jaxtrain.run.fitted_step import fit_step
from jaxtrain.run.fitting import fit_to_model, make_feed
from jaxtrain.run.fp8_step import check_step
from jaxtrain.run.ledger import LEDGER
from jaxtrain.run.preemption import Preempted
from jaxtrain.run.profile import check_profile
from jaxtrain.run.sampler import make_sampler
from jaxtrain.run.workdir import WorkDirectory
from jaxtrain.types import Objective, TrainState


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a run minimizes: an objective, and a loss of one's own with its weight."""

    objective: Objective
    auxiliary: tuple[AddedLoss, float] | None = None


@dataclasses.dataclass(frozen=True)
class Scored:
    """A loss as the step takes it.

    `objective`: the loss and its metrics, everything added. `score`: how the decoder
    scores tokens for it, `reference` how frozen weights do. `added`: the weights of
    what was added, by metric.
    """

    objective: Objective
    score: step.ScoreFn
    reference: step.ScoreFn
    added: dict[str, float]


def build(
    run: RunConfig,
    model: LoadedModel,
    rows: tuple[Prepared, dict[str, PreparedDataset]],
    loss: Loss,
    workdir: pathlib.Path,
) -> loop.Parts:
    """Make the parts of a run. The weights of `model` move into the train state.

    Args:
        rows: to train on, and to evaluate on by the names of the sets.
        workdir: where passes before training keep what they computed.

    Raises:
        ValueError: the model cannot do with these rows what the run asks for.
    """
    train_data, eval_data = fit_to_model(rows, model.decoder)
    packed = any(data.packed for data in (train_data, *eval_data.values()))
    model = model.for_training(packed=packed or run.data.packing == "batch")
    scored = bind_loss(run, model, loss)
    feed = make_feed(run, model)

    # Curricula by difficulty: the model as it is now orders the rows. New adapters add
    # nothing yet, so the base alone tells.
    if difficulty.is_wanted(run.curriculum, train_data):
        assert isinstance(train_data, PreparedDataset)
        train_data = difficulty.measure(
            train_data, scored.score, model.on_device(model.params), feed, workdir
        )
    batches = feed.train_batches(train_data)
    check_profile(run.profile, batches.num_steps)

    # The state. From here on the weights are its own, and the model holds none.
    schedule, optimizer = make_optimizer(run, batches.num_steps)
    state = init_state(model, run, optimizer)
    layouts = sharding.layouts_of(state)

    # The reference's log-probs, where they are computed before training.
    if run.dpo is not None and run.dpo.precompute_ref_log_probs:
        assert isinstance(train_data, PreparedDataset)  # the config's rules see to it
        # Nothing has trained yet, so without adapters the policy is the reference.
        start = model.on_device(state.frozen or state.trainable)
        scorer = ReferenceScorer(
            scored.score, start, feed, workdir / "reference", describe(model)
        )
        train_data = scorer.attach(train_data, "train")
        batches = feed.train_batches(train_data)
        eval_data = {
            name: scorer.attach(data, f"eval_{name}" if name else "eval")
            for name, data in eval_data.items()
        }

    # The steps, which compile on their first call, and what the loop does beside them.
    def steps_of(model: LoadedModel) -> tuple[step.TrainStep, step.EvalStep]:
        own = bind_loss(run, model, loss)
        steps = make_steps(run, model.plan, own, schedule, optimizer, layouts)
        return check_step(run, model, steps[0]), steps[1]

    train_step, eval_step = steps_of(model)
    train_step = fit_step(model, train_step, lambda model: steps_of(model)[0])
    epoch_steps, epochs_done = feed.epochs(train_data, batches)
    return loop.Parts(
        run=run,
        model=model,
        state=state,
        train_step=train_step,
        eval_step=eval_step,
        feed=feed,
        train_data=train_data,
        train_batches=batches,
        eval_data=eval_data,
        steps_per_epoch=epoch_steps,
        epochs_done=epochs_done,
        meter=_make_meter(run, model, train_data.row_length),
        sync_reference=_make_reference_sync(run, layouts),
        sampler=_make_sampler(run, model, eval_data),
        added_losses=scored.added,
    )


def run_to_end(parts: loop.Parts, work: WorkDirectory) -> dict[str, Any]:
    """Train from the newest checkpoint in `work.home` to the end, and export.

    Returns:
        The results of the loop, with `model_path` and `best_model_path`.
    """
    run, workdir = parts.run, work.home
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            CheckpointManager(
                workdir / "checkpoints",
                save_total_limit=run.loop.save_total_limit,
                best_metric=run.loop.best_metric,
                greater_is_better=run.loop.greater_is_better,
                ledger=workdir / LEDGER,
                before_commit=work.save_records,
            )
        )
        # Rebound, so that a first state that is not trained on can be freed.
        parts, progress = loop.restore(parts, checkpoints)
        export.prepare(workdir, trains=not progress.is_over(parts.total_steps))
        writer = stack.enter_context(
            writers.make_writers(
                run.loop.report_to,
                work.folder,
                run.loop.run_name or workdir.name,
                announce(parts, progress, workdir),
                resume_step=progress.step or None,
                total_steps=parts.total_steps,
                process_index=jax.process_index(),
            )
        )
        running = loop.Loop(parts, progress, checkpoints, writer)
        try:
            results = running.run_to_end()
        except Preempted as left:
            summary.log_summary(left.results, workdir)
            raise
        if run.loop.save_final_model:
            results |= export.export_models(
                workdir, parts.model, run, running.state, checkpoints
            )
    summary.log_summary(results, workdir)
    return results


def bind_loss(run: RunConfig, model: LoadedModel, loss: Loss) -> Scored:
    """Add to a loss what a mixture of experts adds, and say how tokens are scored."""
    objective, added = loss.objective, {}
    if loss.auxiliary is not None:
        objective = with_added_loss(objective, *loss.auxiliary)
        added["aux_loss"] = loss.auxiliary[1]
    if router := router_loss_coefficient(run, model.config):
        objective = with_router_loss(objective, router)
        added["router_aux_loss" if added else "aux_loss"] = router
    score: step.ScoreFn = functools.partial(
        model.decoder.token_log_probs,
        with_collision=run.dpo is not None and run.dpo.use_weighting,
        with_router_loss=router > 0,
        # What is added may weigh log-probs otherwise, and so may a loss of one's own.
        with_total=loss.auxiliary is None
        and getattr(loss.objective, "func", None) is objectives.next_token,
    )
    score = without_frozen(score, run.optimizer.lr_multipliers)
    objective, score = with_router_report(objective, score, run, model.config, added)
    if weight := run.loop.z_loss_weight:
        added["z_loss"] = weight
    reference = for_reference(model.decoder).token_log_probs
    return Scored(*with_z_loss(objective, score, weight), reference, added)


def make_objective(run: RunConfig) -> Objective:
    """Make the loss and its metrics that the configuration names."""
    options = run.objective_options
    kwargs = (run.loop.objective_kwargs or {}) if options is None else vars(options)
    return objectives.make_objective(run.objective, **kwargs)


def make_steps(
    run: RunConfig,
    plan: sharding.ShardingPlan,
    scored: Scored,
    schedule: Callable[[Any], jax.Array],
    optimizer: optax.GradientTransformation,
    layouts: TrainState,
) -> tuple[step.TrainStep, step.EvalStep]:
    """Jit the train and the evaluation step over the mesh, with a donated state.

    Args:
        layouts: where each leaf of the state is kept, as a tree of shardings.
    """
    options = step.StepOptions(
        max_grad_norm=run.optimizer.max_grad_norm,
        with_reference=needs_reference(run),
        score_reference=scored.reference,
        with_dropout=run.loop.neftune_noise_alpha is not None
        or (run.lora is not None and run.lora.lora_dropout > 0),
        skip_nonfinite=run.loop.on_nonfinite == "skip",
        spike_threshold=run.loop.spike_threshold,
        skip_spikes=run.loop.on_spike == "skip",
        group_of=(
            diagnostics.parameter_group if run.loop.log_grad_norm_by_group else None
        ),
        is_micro_batch_mean=functools.partial(_is_micro_batch_mean, run.objective_row),
        prepare=preparation(run, plan, layouts.trainable),
        unrolled=plan.unrolled,
    )
    options = offload(options, plan, optimizer, layouts)
    train_step = step.make_train_step(
        scored.objective, scored.score, optimizer, schedule, options
    )
    if run.optimizer.ema_decay is not None:
        options = dataclasses.replace(options, fetch=averaged)  # nothing is offloaded
    eval_step = step.make_eval_step(scored.objective, scored.score, options)
    return (
        plan.jit(
            train_step,
            in_shardings=(layouts, plan.batch(1)),
            out_shardings=(layouts, plan.replicated),
            donate_argnums=0,
        ),
        plan.jit(
            eval_step,
            in_shardings=(layouts, plan.batch()),
            out_shardings=plan.replicated,
        ),
    )


def flops_per_token(run: RunConfig, config: ModelConfig, row_length: int) -> float:
    """FLOPs that a token needs, recomputation not counted.

    A full step is three forward passes' worth: forward, and backward for inputs and
    for weights. Frozen weights under LoRA spare the last; a reference adds a forward.
    """
    passes = 3 if run.lora is None else 2
    return config.flops_per_token(row_length) / 3 * (passes + needs_reference(run))


def _is_micro_batch_mean(row: ObjectiveRow, name: str) -> bool:
    """TRL's averages: a preference loss is the mean of its micro-batches' means.

    The next-token loss is a mean over all tokens of the step, and only these two
    metrics beside it are means of means.
    """
    return row.micro_batch_means or name in ("entropy", "mean_token_accuracy")


def _make_reference_sync(
    run: RunConfig, layouts: TrainState
) -> Callable[[TrainState], TrainState] | None:
    """TR-DPO's update of the reference, jitted; None where it stays as it is."""
    if run.dpo is None or not run.dpo.sync_ref_model:
        return None
    sync = step.make_reference_sync(run.dpo.ref_model_mixup_alpha)
    return jax.jit(sync, out_shardings=layouts, donate_argnums=0)


def _make_sampler(
    run: RunConfig, model: LoadedModel, sets: dict[str, PreparedDataset]
) -> Callable[[TrainState], tuple[dict[str, float], dict[str, str]]] | None:
    """What generates held-out texts under the policy; None if nothing asks for it."""
    if not sets or not (run.generation.enabled or run.loop.row_metrics):
        return None
    sampler = make_sampler(run, model, sets)
    return lambda state: sampler(model.on_device(averaged_policy(state)))


def _make_meter(run: RunConfig, model: LoadedModel, row_length: int) -> ThroughputMeter:
    devices = list(model.plan.mesh.devices.flat)
    return ThroughputMeter(
        flops_per_token=flops_per_token(run, model.config, row_length),
        device_count=len(devices),
        peak_flops_per_device=peak_flops(devices[0].device_kind),
    )
