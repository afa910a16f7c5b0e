"""The end of a run in a few lines: what came out, where it is, what to do next."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jax

logger = logging.getLogger(__name__)

# A line of the log has the time before it, and 100 columns in all.
_COLUMNS = 88
_ENDINGS = {
    "finished": "finished at",
    "stopped early": "stopped early at",
    "preempted": "stopped by SIGTERM and saved at",
    "nothing left": "trained before, up to",
}


def log_summary(results: Mapping[str, Any], workdir: Any) -> None:
    """Log what `describe` says, line by line, in the first process."""
    if jax.process_index() == 0:
        for line in describe(results, workdir):
            logger.info("%s", line)


def describe(results: Mapping[str, Any], workdir: Any) -> list[str]:
    """At most ten lines about a run that has ended.

    Args:
        results: of the loop, with the paths of the export if there was one.
        workdir: of the run, as the user gave it.
    """
    lines = [_headline(results)]
    if results["best_metric"] is not None:
        name, value = results["best_metric_name"], results["best_metric"]
        best = f"best {name}: {value:.4g} at step {results['best_step']}, in"
        lines += _fill(best, [_where_best_is(results, workdir)])
    names = ("model_path", "adapter_path", "best_model_path", "best_adapter_path")
    # The last model is the best one's path too, where it is the best.
    exported = dict.fromkeys(results[name] for name in names if name in results)
    if exported:
        lines += _fill("exported:", list(exported))
    if results["skipped_steps"]:
        lines.append(f"skipped steps: {results['skipped_steps']}; the log names each")
    return lines + _fill("next:", _next_steps(results, workdir))


def format_duration(secs: float) -> str:
    """`4.2 s`, `12 min 4 s`, `2 h 3 min`, `1 d 2 h`."""
    if secs < 60:
        return f"{secs:.1f} s"
    for unit, size, smaller, rest in (
        ("d", 86_400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if secs >= size:
            return f"{secs // size:.0f} {unit} {secs % size // rest:.0f} {smaller}"
    raise AssertionError("a minute is the last unit")


def format_count(number: float) -> str:
    """`812`, `18.2k`, `1.31M`, `2.5G`: three digits."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * scale:
            return f"{float(f'{number / scale:.3g}'):g}{unit}"
    return f"{number:.3g}"


def _headline(results: Mapping[str, Any]) -> str:
    # The time is of this start, in which nothing was trained.
    trained = results["ending"] != "nothing left"
    facts = [format_duration(results["wall_secs"])] if trained else []
    if results["num_tokens"]:
        facts.append(f"{format_count(results['num_tokens'])} tokens")
    if results["median_tokens_per_sec"] is not None:
        rate = format_count(results["median_tokens_per_sec"])
        facts.append(f"median {rate} tokens/s")
    step, total = results["global_step"], results["total_steps"]
    told = f"{_ENDINGS[results['ending']]} step {step} of {total}"
    return ": ".join([told, *filter(None, [", ".join(facts)])])


def _where_best_is(results: Mapping[str, Any], workdir: Any) -> str:
    """The directory with the best weights, or why there is none."""
    best = results["best_step"]
    for name in ("model", "best_model"):
        if results.get(f"{name}_step") == best:
            return str(results[f"{name}_path"])
    if best in results["saved_steps"]:
        return str(workdir / "checkpoints" / str(best))
    if best == 0:
        return "no checkpoint: it is the model before training"
    return "no checkpoint; let save_steps divide eval_steps"


def _next_steps(results: Mapping[str, Any], workdir: Any) -> list[str]:
    run = shlex.quote(str(workdir))
    if results["ending"] == "preempted":
        return ["start the same command again; it goes on from here"]
    if "model_path" in results:
        return [f"jaxtrain generate {run}", f"jaxtrain report {run}"]
    steps, best = results["saved_steps"], results["best_step"]
    if not steps:
        return [f"jaxtrain report {run}"]
    step = best if best in steps else max(steps)
    return [f"jaxtrain export {run} --step={step}", f"jaxtrain report {run}"]


def _fill(label: str, items: Sequence[str]) -> list[str]:
    """The items after their label, in one line if they fit, else each in its own."""
    line = f"{label} {', '.join(items)}"
    if len(line) <= _COLUMNS:
        return [line]
    return [label, *(f"  {item}" for item in items)]
