"""Rules of the loop: its length, evaluation, checkpoints and generated texts."""

from dataclasses import replace

from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import TEXT_METRIC_SCORES, GenerationSection, LoopSection

_SET_EVAL_STEPS = "set eval_steps, or unset it to evaluate after each epoch"


def resolve_loop(loop: LoopSection, found: Resolution) -> LoopSection:
    """Settle the metric's direction and the trackers; check evaluations and saves."""
    if loop.max_steps != -1 and loop.max_steps < 1:
        found.add(
            "max_steps",
            "neither -1 nor positive",
            "set -1 to count epochs, or the number of optimizer steps",
        )
    if loop.greater_is_better is None:
        is_loss = loop.metric_for_best_model.endswith(("loss", "perplexity", "kl"))
        loop = replace(loop, greater_is_better=not is_loss)
    if "none" in loop.report_to:
        if len(loop.report_to) > 1:
            found.add(
                "report_to",
                "'none' stands beside other trackers",
                "remove one or the other",
            )
        loop = replace(loop, report_to=())
    for key in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(loop, key) and loop.eval_steps == 0:
            found.add(key, "eval_steps = 0 never evaluates", _SET_EVAL_STEPS)
    if loop.load_best_model_at_end:
        _check_checkpoints_are_evaluated(loop, found)
    return loop


def _check_checkpoints_are_evaluated(loop: LoopSection, found: Resolution) -> None:
    evals, saves = loop.eval_steps, loop.save_steps
    if saves == 0:
        found.add(
            "save_steps",
            "load_best_model_at_end needs checkpoints",
            "set save_steps to a multiple of eval_steps",
        )
    elif evals != saves and not (evals and saves and saves % evals == 0):
        found.add(
            "save_steps",
            f"load_best_model_at_end needs each checkpoint evaluated, and eval_steps ="
            f" {evals}",
            "set save_steps to a multiple of eval_steps, or leave both unset",
            causes=["eval_steps"],
        )


def resolve_generation(
    generation: GenerationSection, loop: LoopSection, found: Resolution
) -> GenerationSection:
    """Decide whether texts are generated, and check the metrics on them."""
    enabled = generation.enabled
    if enabled is None:
        enabled = bool(generation.metrics)
    generation = replace(
        generation if enabled else GenerationSection(), enabled=enabled
    )
    if enabled and loop.eval_steps == 0 and not loop.eval_on_start:
        found.add(
            "generation.enabled",
            "eval_steps = 0 never evaluates",
            _SET_EVAL_STEPS,
            value=True,
            causes=["eval_on_start"],
        )
    for name in generation.metrics:
        if name not in TEXT_METRIC_SCORES and ":" not in name:
            found.add(
                "generation.metrics",
                f"{name!r} is no metric",
                f"choose from {', '.join(TEXT_METRIC_SCORES)}, or write a function of"
                " your own as module:function",
            )
    if "bertscore" in generation.metrics and not generation.bertscore_model:
        found.add(
            "generation.metrics",
            "bertscore needs an encoder",
            "set generation.bertscore_model to a local Hugging Face directory",
            causes=["generation.bertscore_model"],
        )
    _check_best_metric_is_generated(generation, loop, found)
    return generation


def _check_best_metric_is_generated(
    generation: GenerationSection, loop: LoopSection, found: Resolution
) -> None:
    metrics, best = generation.metrics, loop.metric_for_best_model
    if any(":" in metric for metric in metrics):
        return  # a function of the user's own may give a score of any name
    for name, scores in TEXT_METRIC_SCORES.items():
        if best.removeprefix("eval_") in scores and name not in metrics:
            found.add(
                "metric_for_best_model",
                f"generation.metrics = {metrics} does not compute it",
                f"add {name!r} to generation.metrics",
                causes=("generation.metrics", "generation.enabled"),
            )
