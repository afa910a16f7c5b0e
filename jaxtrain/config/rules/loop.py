"""Rules of the loop: its length, evaluation, checkpoints and generated texts."""

import unicodedata
from collections.abc import Mapping
from dataclasses import replace

from jaxtrain.config import eval_sets
from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import TEXT_METRIC_SCORES, GenerationSection
from jaxtrain.record.safe_text import shown

_NEVER_EVALUATES = (
    "eval_steps = 0 never evaluates; set eval_steps, or unset it to evaluate after each"
    " epoch"
)


# Unicode's categories: control characters, halves of surrogates, line ends.
_CONTROLS = ("Cc", "Cs", "Zl", "Zp")
_OF_EVALUATION = (
    "per_device_eval_batch_size",
    "metric_for_best_model",
    "greater_is_better",
)
_OF_HELD_OUT_ROWS = ("data.eval_split", "data.max_eval_rows")
_SCHEDULE = (
    "eval_steps",
    "eval_on_start",
    "early_stopping_patience",
    "load_best_model_at_end",
    "generation.enabled",
    "generation.metrics",
)


def resolve_loop(run: Resolution) -> None:
    """Settle the metric's direction and the trackers; check evaluations and saves."""
    _resolve_evaluation_sets(run)
    _check_run_name(run)
    loop = run.loop
    if loop.max_steps != -1 and loop.max_steps < 1:
        run.problem(
            "max_steps",
            "neither -1 nor positive; set -1 to count epochs, or the number of"
            " optimizer steps",
        )
    if loop.max_steps > 0 and "num_train_epochs" not in run.unset:
        epochs, steps = run.origin["num_train_epochs"], run.origin["max_steps"]
        run.note_gives_way(epochs, steps, loop.max_steps)
    if loop.greater_is_better is None:
        is_loss = loop.metric_for_best_model.endswith(("loss", "perplexity", "kl"))
        run.loop = replace(run.loop, greater_is_better=not is_loss)
    if "none" in loop.report_to:
        if len(loop.report_to) > 1:
            text = "'none' stands beside other trackers; remove one or the other"
            run.problem("report_to", text)
        run.loop = replace(run.loop, report_to=())
    for key in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(loop, key) and loop.eval_steps == 0:
            run.problem(key, _NEVER_EVALUATES)
    if loop.load_best_model_at_end:
        _check_checkpoints_are_evaluated(run)


def check_own_parts(run: Resolution) -> None:
    """Refuse arguments for a part of the user's own that no key names."""
    named = {
        *run.loop.callbacks,
        *run.loop.row_metrics,
        run.optimizer.optimizer,
        run.schedule.lr_scheduler_type,
        run.data.format_row,
    }
    for name, arguments in (run.loop.function_kwargs or {}).items():
        if name not in named:
            run.problem(
                "function_kwargs",
                f"no key names {name!r}; name it in training.callbacks, row_metrics,"
                " optimizer, lr_scheduler_type or data.format_row, or remove it",
            )
        elif not isinstance(arguments, Mapping):
            text = f"{name!r} has no mapping of keyword arguments to values; write one"
            run.problem("function_kwargs", text)
    if run.loop.row_metrics and run.is_dpo:
        run.problem(
            "row_metrics",
            "the rows of dpo are pairs, whose log-probs its own metrics compare"
            " (logps/chosen, rewards/margins); unset it, or give training.objective a"
            " function that returns other metrics",
            causes=["training.training_type"],
        )
    if run.loop.row_metrics and run.loop.eval_steps == 0 and not run.loop.eval_on_start:
        run.problem("row_metrics", _NEVER_EVALUATES, causes=["eval_steps"])
    if run.data.format_row and run.data.streaming:
        run.problem(
            "data.format_row",
            "rows of a stream are read by name and place in their files; write the"
            " formatted rows to a file first, or set data.streaming = false",
            causes=["data.streaming"],
        )


def check_z_loss(run: Resolution) -> None:
    """Refuse the z-loss where the loss is no sum over tokens."""
    if run.loop.z_loss_weight is None:
        return
    if run.is_dpo:
        run.problem(
            "z_loss_weight",
            "it is a sum over tokens, and the losses of dpo are sums over pairs; unset"
            " it, or train with training_type sft, lora or from_scratch",
            causes=["training.training_type"],
        )
    elif ":" in run.loop.objective:
        run.problem(
            "z_loss_weight",
            f"objective {run.loop.objective!r} may weigh tokens as it likes, so what to"
            " divide by is not known; unset it, or set objective = 'auto'",
            causes=["objective"],
        )


def check_router_bias(run: Resolution) -> None:
    """Refuse to move routers' biases beside adapters: they are the frozen base's."""
    if run.loop.router_bias_update_rate and run.has_adapters:
        run.problem(
            "router_bias_update_rate",
            "adapters leave the base as it is, and their files have no place for its"
            " biases; unset it, or train all weights",
            causes=["training.lora.enabled", "training.training_type"],
        )


def _check_run_name(run: Resolution) -> None:
    """Refuse a name that would lead out of `out/`, or that steers a terminal."""
    name = run.loop.run_name or ""
    parts = name.replace("\\", "/").split("/")
    if any(unicodedata.category(each) in _CONTROLS for each in name):
        run.problem("run_name", "it holds control characters; write plain text")
    elif parts[0] == "" != name or {".", "..", "~"} & {*parts}:
        run.problem(
            "run_name",
            "a run of this name would be kept outside of out/; give a name, and the"
            " place as the work directory",
        )


def _resolve_evaluation_sets(run: Resolution) -> None:
    """Check the names of several sets, and choose one's metric to rank by."""
    sets = run.data.eval
    if isinstance(sets, str):
        return
    if (problem := eval_sets.find_problem(sets)) is not None:
        run.problem("data.eval", problem)
        return
    for name, path in sets.items():
        if not isinstance(path, str) or not path.strip():
            where = f"{shown(name)} names no rows; give a file, a folder or a hub name"
            run.problem("data.eval", where)
            return
    loop = run.loop
    try:
        best = eval_sets.choose_metric(
            loop.best_metric, list(sets), decides=loop.ranks_by_metric
        )
    except ValueError as error:
        run.problem("metric_for_best_model", str(error), causes=["data.eval"])
    else:
        if best != loop.best_metric:
            run.loop = replace(loop, metric_for_best_model=best)


def _check_checkpoints_are_evaluated(run: Resolution) -> None:
    evals, saves = run.loop.eval_steps, run.loop.save_steps
    fix = "set save_steps to a multiple of eval_steps"
    if saves == 0:
        run.problem("save_steps", f"load_best_model_at_end needs checkpoints; {fix}")
    elif evals != saves and not (evals and saves and saves % evals == 0):
        run.problem(
            "save_steps",
            "load_best_model_at_end needs each checkpoint evaluated, and eval_steps ="
            f" {evals}; {fix}, or leave both unset",
            causes=["eval_steps"],
        )


def note_without_evaluation(run: Resolution) -> None:
    """Keys of evaluations that there are not, or not by a command with these flags.

    A Python program may bring evaluation rows that no key names, so only flags, which
    come with a command, are judged by the keys of the data.
    """
    loop, data = run.loop, run.data
    if loop.eval_steps == 0 and not loop.eval_on_start:
        why, fix = "eval_steps is 0 and eval_on_start is false", "set eval_steps too"
        keys = [*_OF_EVALUATION, "data.eval", *_OF_HELD_OUT_ROWS]
    elif data.train and not data.eval and data.eval_split is None:
        why = "there are no evaluation rows, as data.train is set and data.eval is not"
        fix = "set data.eval too"
        keys = [*_OF_EVALUATION, *_SCHEDULE, "data.max_eval_rows"]
        keys = [key for key in keys if run.origin.get(key, key) in run.flags]
    else:
        return
    for name in keys:
        key = run.origin.get(name, name)
        is_off = name in _SCHEDULE and not run.general[name]
        is_off |= name == "per_device_eval_batch_size" and _passes_before_training(run)
        if run.is_set(key) and not is_off:
            run.note(key, why, f"{fix}, or remove the flag")


def _passes_before_training(run: Resolution) -> bool:
    """Whether rows are scored before training, in evaluation's batches."""
    by_difficulty = run.curriculum.strategy == "difficulty_based"
    scores_reference = run.is_dpo and run.dpo.precompute_ref_log_probs
    return scores_reference or (bool(run.curriculum.enabled) and by_difficulty)


def resolve_generation(run: Resolution) -> None:
    """Decide whether texts are generated, and check the metrics on them."""
    enabled = run.generation.enabled
    if enabled is None:
        enabled = bool(run.generation.metrics)
    given = run.generation if enabled else GenerationSection()
    run.generation = replace(given, enabled=enabled)
    if enabled and run.loop.eval_steps == 0 and not run.loop.eval_on_start:
        key, causes = "generation.enabled", ["eval_on_start"]
        run.problem(key, _NEVER_EVALUATES, value=True, causes=causes)
    for name in run.generation.metrics:
        if name not in TEXT_METRIC_SCORES and ":" not in name:
            run.problem(
                "generation.metrics",
                f"{shown(name)} is no metric; choose from"
                f" {', '.join(TEXT_METRIC_SCORES)},"
                " or write a function of your own as module:function",
            )
    if "bertscore" in run.generation.metrics and not run.generation.bertscore_model:
        run.problem(
            "generation.metrics",
            "bertscore needs an encoder; set generation.bertscore_model to a local"
            " Hugging Face directory",
            causes=["generation.bertscore_model"],
        )
    elif (
        run.generation.bertscore_model
        and enabled
        and ("bertscore" not in run.generation.metrics)
    ):
        key = run.origin["generation.bertscore_model"]
        why = "generation.metrics does not name bertscore"
        run.note(key, why, "add it to training.generation.metrics")
    _check_best_metric_is_generated(run)


def _check_best_metric_is_generated(run: Resolution) -> None:
    metrics = run.generation.metrics
    best = eval_sets.plain_name(run.loop.best_metric, run.data.eval_paths)
    if any(":" in metric for metric in metrics):
        return  # a function of the user's own may give a score of any name
    for name, scores in TEXT_METRIC_SCORES.items():
        if best in scores and name not in metrics:
            run.problem(
                "metric_for_best_model",
                f"generation.metrics = {metrics} does not compute it; add {shown(name)}"
                " to generation.metrics",
                causes=("generation.metrics", "generation.enabled"),
            )


def check_profile(run: Resolution) -> None:
    """Check the traced steps against each other and the length, where it is known."""
    profile, last_step = run.profile, run.loop.max_steps
    if not profile.enabled:
        for key, usual in (("stop_step", None), ("processes", (0,))):
            if getattr(profile, key) != usual:
                text = "nothing is traced without a first step; set profile.start_step"
                run.problem(f"profile.{key}", text, causes=["profile.start_step"])
        return
    if not profile.steps:
        run.problem(
            "profile.stop_step",
            f"it lies before profile.start_step = {profile.start_step}; set it to"
            f" {profile.start_step} or more, or unset it",
            causes=["profile.start_step"],
        )
    elif last_step > 0 and (found := profile.find_problem(last_step)):
        key, text = found
        run.problem(f"profile.{key}", text, causes=["max_steps"])
    if not profile.processes:
        text = "no process would trace; set [0] for the first"
        run.problem("profile.processes", text)
