"""`jaxtrain eval`: the loss and all metrics of a model or a run on data."""

import argparse
import dataclasses
import json
import logging
import pathlib
import tempfile
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from jaxtrain.cli.command import file_argument
from jaxtrain.cli.source import (
    COMPUTING,
    Source,
    SourceParser,
    check_acting,
    configure,
    prepare_devices,
    take_adapter,
)
from jaxtrain.config import RunConfig, resolve
from jaxtrain.config.eval_sets import by_name
from jaxtrain.config.flags import Flag, override
from jaxtrain.objectives.options import PreferenceOptions

if TYPE_CHECKING:
    from jaxtrain.build import Loss
    from jaxtrain.data.batches.dataset import PreparedDataset
    from jaxtrain.models.load import LoadedModel
    from jaxtrain.types import TrainState

_EXAMPLES = """\
Evaluate a run, a model or an adapter on data, without training:

  jaxtrain eval out/dpo                      at its last step, on its own data
  jaxtrain eval out/dpo --step=20 --data=test.jsonl
  jaxtrain eval Qwen/Qwen2.5-0.5B --data=test.jsonl --metrics=rouge

A run is evaluated as it was in training: the same numbers as its log has. A model is
evaluated with the defaults, or with --config, by the kind of the rows."""

_ACTING = (
    *COMPUTING,
    "data",
    "training.generation",
    "training.objective",
    "training.objective_kwargs",
    "training.per_device_eval_batch_size",
    "training.router_aux_loss_coef",
    "training.seed",
    "training.training_type",
    *(
        f"training.dpo.{field.name}"
        for field in dataclasses.fields(PreferenceOptions)
        if field.name != "precompute_ref_log_probs"
    ),
    "training.dpo.max_length",
    "training.dpo.max_prompt_length",
)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is evaluated.

    `policy`: where the weights are, as `run.weights.load_state` takes it, with the run
    that it is given. `run`: the run whose objective and data count. `shown`: the
    weights, in words. `step`: of a checkpoint.
    """

    run: RunConfig
    loaded: RunConfig
    policy: Any
    shown: str
    step: int | None = None


def main(arguments: Sequence[str]) -> None:
    """Print the metrics, and write them where `--output` says.

    Raises:
        ValueError: a flag, the source, the data or the model is not valid.
    """
    parser = SourceParser("eval", _EXAMPLES)
    add = parser.add_argument
    add(
        "--data",
        help="rows to evaluate on: a file, a folder or a hub name; or several sets by"
        " name, '{helpful: a.jsonl, safe: b.jsonl}'",
    )
    add("--metrics", help="of generated texts: exact_match, bleu, rouge, bertscore")
    add("--reference", metavar="MODEL", help="what preferences are measured against")
    add("--config", help="settings for a model or an adapter; a run has its own")
    add("--output", type=file_argument, help="a JSON file for the results")
    options, source, flags = parser.read(arguments)
    if options.reference and source.kind != "model":
        parser.error(f"--reference={options.reference}: a {source.kind} has its own")
    if options.config and source.kind == "run":
        parser.error(f"--config={options.config}: a run has its own; set keys by flags")
    for key, value in (
        ("data.eval", options.data),
        ("training.generation.metrics", options.metrics),
    ):
        if value is not None:
            flags.append(Flag(key, value))
    prepare_devices()
    task = make_task(source, options, flags)
    results = evaluate(task)
    _show(results, options.output)


def make_task(
    source: Source, options: argparse.Namespace, flags: Sequence[Flag]
) -> Task:
    """Settle the configuration, and which weights are evaluated by it.

    Raises:
        ValueError: a flag or the configuration is not valid, or there is no such
            checkpoint.
    """
    config = configure(source, config=options.config, base=options.model, flags=flags)
    if source.kind == "run":
        return _task_of_run(source, config, options.step, flags)
    keys = _override(config, flags)
    if options.config is None and "training.training_type" not in keys:
        _take_kind_of_rows(config)
    config.training.dpo.precompute_ref_log_probs = False  # the step can score it
    _prefer_no_reference(config, keys, source, options.reference)
    _leave_training_out(config)
    if source.kind == "adapter":
        run = _resolve(config, keys)
        return Task(run, _base_as_reference(run), None, source.name)
    return _task_of_model(source, config, keys, options.reference)


def _task_of_model(
    source: Source, config: ConfigDict, keys: Collection[str], reference: str | None
) -> Task:
    from jaxtrain.models.hf import resolve_model_path

    policy = None
    if reference is not None or config.training.training_type == "from_scratch":
        policy = resolve_model_path(source.name, revision=config.model.revision)
    if reference is not None:
        config.model.name_or_path = reference
    run = _resolve(config, keys)
    return Task(run, run, policy, source.name)


def _task_of_run(
    source: Source, config: ConfigDict, step: str | None, flags: Sequence[Flag]
) -> Task:
    from jaxtrain.models.hf import resolve_model_path
    from jaxtrain.run.preflight import saved_steps
    from jaxtrain.run.weights import choose_checkpoint

    if config.training.use_auxiliary_loss:
        logging.getLogger(__name__).warning(
            "training.use_auxiliary_loss: the loss that the run added is in its own"
            " code and is left out here"
        )
    if step is not None or saved_steps(source.checkpoints):
        point = choose_checkpoint(source.run(), source.checkpoints, step)
        _leave_training_out(config)
        run = _resolve(config, _override(config, flags))
        shown = f"{source.name}, step {point.step}"
        return Task(run, run, point, shown, point.step)
    if source.exported is None:
        raise ValueError(
            f"{source.name}: this run has saved neither a checkpoint nor a model yet"
        )
    _leave_training_out(config)
    adapter = source.path / "adapter"
    if source.run().lora is None:
        run = _resolve(config, _override(config, flags))
        policy = resolve_model_path(str(source.exported))
        return Task(run, run, policy, str(source.exported))
    if config.training.lora.init_from and source.run().dpo is not None:
        raise ValueError(
            f"{source.name}: its reference is the adapter that it began with, which"
            " only checkpoints go with; it has none"
        )
    take_adapter(config, adapter)
    run = _resolve(config, _override(config, flags))
    return Task(run, _base_as_reference(run), None, str(adapter))


def evaluate(task: Task) -> dict[str, Any]:
    """Load weights and rows, and return metrics, named `eval_*` as in training.

    Raises:
        ValueError: the model cannot be loaded, or there are no valid rows.
    """
    import optax

    from jaxtrain import build
    from jaxtrain.data import loading
    from jaxtrain.evaluation.sets import add_scores, evaluate_sets
    from jaxtrain.run.fitting import make_feed
    from jaxtrain.run.weights import load_state
    from jaxtrain.sharding import layouts_of

    run = task.run
    objective = build.make_objective(run)  # an unknown one needs no model to be told
    rows = loading.load_evaluation_rows(run)
    if rows is None:
        raise ValueError("the configuration names no data to evaluate on: give --data")
    data = None
    if run.dpo is not None and run.dpo.precompute_ref_log_probs:
        data = _score_reference(task, rows, build.Loss(objective))
    model, state = load_state(task.loaded, task.policy)
    if data is None:
        data = _prepare(run, rows, model)
    model = _for_rows(model, run, data.values())
    scored = build.bind_loss(run, model, build.Loss(objective))
    # Of the two steps the one that trains is never compiled.
    _, eval_step = build.make_steps(
        run,
        model.plan,
        scored,
        optax.constant_schedule(0.0),
        optax.identity(),
        layouts_of(state),
    )
    feed = make_feed(run, model)
    metrics = evaluate_sets(
        eval_step,
        state,
        {name: map(feed.place, feed.eval_batches(each)) for name, each in data.items()},
        with_perplexity=run.objective == "next_token",
        added_losses=scored.added,
    )
    counts = {name: len(each) for name, each in data.items()}
    results: dict[str, Any] = {"weights": task.shown, "rows": counts.get("", counts)}
    cut = {name: each.stats.truncated for name, each in data.items()}
    if any(cut.values()):
        results["truncated"] = cut.get("", cut)
        results["max_length"] = run.data.max_length
    results["data"] = _name_data(run)
    if task.step is not None:
        results["step"] = task.step
    if run.generation.enabled or run.loop.row_metrics:
        scores, results["samples"] = _generate(run, model, state, data)
        add_scores(metrics, scores)
    return results | {"metrics": metrics}


def _prepare(
    run: RunConfig, rows: Any, model: "LoadedModel"
) -> dict[str, "PreparedDataset"]:
    from jaxtrain.data import loading
    from jaxtrain.run.fitting import fit

    data = loading.prepare_evaluation_rows(
        rows,
        lambda each: loading.prepare_rows(
            run, each, model.tokenizer, model.config.vocab_size
        ),
    )
    return {name: fit(each, model.decoder) for name, each in data.items()}


def _for_rows(
    model: "LoadedModel", run: RunConfig, sets: Iterable["PreparedDataset"]
) -> "LoadedModel":
    """The model for rows of several documents or of one, as in training."""
    packed = bool(run.data.packing) or any(data.packed for data in sets)
    return dataclasses.replace(
        model, decoder=dataclasses.replace(model.decoder, packed=packed)
    )


def _generate(
    run: RunConfig,
    model: "LoadedModel",
    state: "TrainState",
    sets: dict[str, "PreparedDataset"],
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores and samples of texts that the policy generates."""
    from jaxtrain.run.sampler import make_sampler
    from jaxtrain.tree import overlay

    sampler = make_sampler(run, model, sets)
    return sampler(model.on_device(overlay(state.frozen, state.trainable)))


def _score_reference(
    task: Task, rows: Any, loss: "Loss"
) -> dict[str, "PreparedDataset"]:
    """Add the reference's log-prob sums to the rows, if the run precomputed them.

    The reference is the model that the run began with; it then leaves the device.

    Raises:
        ValueError: there are several processes, which may share no folder for the sums.
    """
    import jax

    from jaxtrain import build
    from jaxtrain.passes.reference import ReferenceScorer, describe
    from jaxtrain.run.fitting import make_feed
    from jaxtrain.run.weights import load_state

    if jax.process_count() > 1:
        raise ValueError(
            f"{task.shown}: the run kept its reference's log-probabilities"
            " (training.dpo.precompute_ref_log_probs); evaluate it in one process"
        )
    model, state = load_state(task.loaded)
    sets = _prepare(task.run, rows, model)
    model = _for_rows(model, task.run, sets.values())
    scored = {}
    with tempfile.TemporaryDirectory() as folder:
        scorer = ReferenceScorer(
            build.bind_loss(task.run, model, loss).score,
            model.on_device(state.frozen or state.trainable),
            make_feed(task.run, model),
            pathlib.Path(folder),
            describe(model),
        )
        for name, data in sets.items():
            sums = scorer.attach(data, f"eval_{name}").reference_logps or {}
            # Out of a file that is about to be deleted.
            held = {side: np.array(values) for side, values in sums.items()}
            scored[name] = data.with_reference_logps(held["chosen"], held["rejected"])
    return scored


def _name_data(run: RunConfig) -> str | dict[str, str]:
    if run.data.eval or not run.data.train:
        return run.data.eval or "the data that come with jaxtrain"
    return f"{run.data.train}, split {run.data.eval_split}"


def _take_kind_of_rows(config: ConfigDict) -> None:
    from jaxtrain.data import loading

    rows = loading.load_evaluation_rows(resolve(config))
    for first in list(by_name(rows).values())[:1]:
        loading.take_kind_of(first, config)


def _prefer_no_reference(
    config: ConfigDict, keys: Collection[str], source: Source, reference: str | None
) -> None:
    """Drop the reference of a whole model unless one is given: it would be itself.

    Raises:
        ValueError: the objective needs a reference, or one is given but not used.
    """
    run = resolve(config)
    dpo = run.dpo
    compares = dpo is not None and run.objective_row.has_reference
    if reference is not None and not compares:
        raise ValueError(
            f"--reference={reference}: objective {run.objective!r} does not use a"
            " reference; remove the flag"
        )
    if source.kind != "model" or reference is not None:
        return
    if dpo is None or not compares:
        return
    if not isinstance(run.objective_options, PreferenceOptions):
        raise ValueError(
            f"objective {run.objective!r} needs a reference: name one with"
            " --reference=MODEL"
        )
    if "training.dpo.reference_free" not in keys and not dpo.reference_free:
        config.training.dpo.reference_free = True
        logging.getLogger(__name__).warning(
            "no --reference is named: rewards are of the model's own log-probabilities"
            " (training.dpo.reference_free = True)"
        )


def _leave_training_out(config: ConfigDict) -> None:
    """Unset keys that only training reads but that would restrict an evaluation."""
    training = config.training
    training.curriculum.enabled = False
    training.use_auxiliary_loss = False
    training.load_best_model_at_end = False
    training.early_stopping_patience = None
    training.metric_for_best_model = "eval_loss"
    training.eval_on_start = True  # texts are generated where there are evaluations


def _base_as_reference(run: RunConfig) -> RunConfig:
    """The run to load an adapter by: its base stays frozen, and is the reference."""
    from jaxtrain.run.weights import without_reference

    return without_reference(run)


def _override(config: ConfigDict, flags: Sequence[Flag]) -> frozenset[str]:
    before = config.training.training_type
    keys = override(config, flags)
    if config.training.training_type != before and "data.share_prompts" not in keys:
        with config.unlocked():
            config.data.share_prompts = None  # the run's own type had settled it
    check_acting(keys, _ACTING, "an evaluation")
    return keys


def _resolve(config: ConfigDict, keys: Collection[str]) -> RunConfig:
    import jax

    return resolve(config, device_count=jax.device_count(), flags=keys)


def _show(results: dict[str, Any], output: pathlib.Path | None) -> None:
    import jax

    if jax.process_index() != 0:
        return
    metrics = results["metrics"]
    rows, data = by_name(results["rows"]), by_name(results["data"])
    told = (
        f"{count} rows of {data[name]}" + (f" ({name})" if name else "")
        for name, count in rows.items()
    )
    print(f"{results['weights']}: {', '.join(told)}")
    if cut := sum(by_name(results.get("truncated")).values()):
        longest = results["max_length"]
        print(f"  {cut} rows are cut to {longest} tokens; --data.max_length sets more")
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"  {name:{width}}  {value:.6g}")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(f"{json.dumps(results, indent=2)}\n", "utf-8")
