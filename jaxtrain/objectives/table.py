"""Training objectives: next token, the table of all objectives, and how to get one.

An objective is a pure function of token log-probs. It takes the policy and the
reference as closures (`LogProbsFn`) and a batch, and returns the loss and the metrics
as `WeightedSum`s. It never sees the vocabulary axis, a parameter or the mesh.

To add one: write the function, give it a row in `OBJECTIVES`, test it. One of your own
needs no edit here: see `load_objective`.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxtrain.objectives.kto import KTO_LOSSES, LabeledBatch, kto
from jaxtrain.objectives.preference import (
    CPO_LOSSES,
    as_names,
    count_tokens,
    cpo,
    masked_sum,
    orpo,
    preference,
    real_rows,
    simpo,
)
from jaxtrain.objectives.preference_losses import (
    F_DIVERGENCE_LOSSES,
    F_DIVERGENCES,
    LABEL_SMOOTHING_LOSSES,
    PAIR_LOSSES,
    SORTING_LOSSES,
)
from jaxtrain.types import (
    Batch,
    LogProbsFn,
    Metrics,
    Objective,
    PairBatch,
    WeightedSum,
)


def next_token(
    policy: LogProbsFn, reference: LogProbsFn | None, batch: Batch
) -> tuple[WeightedSum, Metrics]:
    """Mean negative log-likelihood of the targets: -sum m log p / sum m, m the mask.

    Sums and counts leave here undivided, so the mean is over all tokens of the global
    batch, whatever the accumulation or the mesh. Perplexity is exp of it.
    """
    del reference
    scored, mask = policy(batch), batch.loss_mask
    metrics = {
        "mean_token_accuracy": masked_sum(scored.correct, mask),
        "entropy": masked_sum(scored.entropy, mask),
        "num_tokens": count_tokens(real_rows(batch), batch),
    }
    return masked_sum(-scored.logps, mask), metrics


# --- the table --------------------------------------------------------------------

Hyperparameters = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """A row of the table: the function, its batch type, how it is checked.

    `function(policy, reference, batch, *, <hyperparameters>)`. `check` raises
    ValueError on hyperparameters that cannot work; it gets all, defaults included.
    `has_reference`: compares with a reference model, unless a hyperparameter says not.
    """

    function: Callable[..., tuple[WeightedSum, Metrics]]
    batch_type: type
    check: Callable[[Hyperparameters], None]
    has_reference: bool


def _refuse(key: str, value: Any, fix: str) -> None:
    raise ValueError(f"{key}={value!r}: {fix}")


def _did_you_mean(value: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), list(known), n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def _check_name(key: str, value: Any, known: Iterable[str]) -> None:
    known = tuple(known)
    if value not in known:
        fix = f"{_did_you_mean(value, known)}use one of {', '.join(known)}"
        _refuse(key, value, fix)


def _check_number(
    options: Hyperparameters,
    key: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    value = options[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(key, value, "must be a number")
    bounds = (
        ("above", above, lambda bound: value > bound),
        ("at least", at_least, lambda bound: value >= bound),
        ("below", below, lambda bound: value < bound),
        ("at most", at_most, lambda bound: value <= bound),
    )
    for words, bound, holds in bounds:
        if bound is not None and not holds(bound):
            _refuse(key, value, f"must be {words} {bound}")


def _check_nothing(options: Hyperparameters) -> None:
    del options


def _check_preference(options: Hyperparameters) -> None:
    names = as_names(options["loss_type"])
    if not names:
        _refuse("loss_type", options["loss_type"], "name at least one loss")
    for name in names:
        _check_name("loss_type", name, PAIR_LOSSES)
    if len(set(names)) < len(names):
        _refuse("loss_type", list(names), "a loss stands twice; add up its weights")
    weights = options["loss_weights"]
    if weights is not None and len(weights) != len(names):
        fix = f"{len(names)} losses need {len(names)} weights, one for each of "
        _refuse("loss_weights", list(weights), fix + ", ".join(names))
    _check_number(options, "beta", above=0)
    _check_number(options, "discopop_tau", above=0)
    _check_smoothing(options, names)
    _check_f_divergence(options, names)
    if options["use_weighting"] and SORTING_LOSSES & set(names):
        fix = "aot and aot_unpaired sort the pairs away from their weights; drop either"
        _refuse("use_weighting", True, fix)
    if options["ld_alpha"] is not None:
        _check_number(options, "ld_alpha", at_least=0, at_most=1)
    if options["precompute_ref_log_probs"]:
        _check_precomputed(options)


def _check_smoothing(options: Hyperparameters, names: tuple[str, ...]) -> None:
    smoothing = options["label_smoothing"]
    _check_number(options, "label_smoothing", at_least=0, at_most=1)
    if smoothing and not LABEL_SMOOTHING_LOSSES & set(names):
        fix = (
            f"acts on {', '.join(sorted(LABEL_SMOOTHING_LOSSES))} only, as in TRL; set "
            "it to 0, or conservative_smoothing for the sigmoid loss"
        )
        _refuse("label_smoothing", smoothing, fix)
    if "robust" in names and smoothing >= 0.5:
        _refuse("label_smoothing", smoothing, "must be below 0.5 for the robust loss")
    if "exo_pair" in names and not 0 < smoothing < 1:
        fix = "must be above 0 and below 1 for exo_pair; its paper uses 1e-3"
        _refuse("label_smoothing", smoothing, fix)
    _check_number(options, "conservative_smoothing", at_least=0, below=0.5)
    if options["conservative_smoothing"] and "sigmoid" not in names:
        fix = f"acts on the sigmoid loss only, not on {', '.join(names)}; set it to 0"
        _refuse("conservative_smoothing", options["conservative_smoothing"], fix)


def _check_f_divergence(options: Hyperparameters, names: tuple[str, ...]) -> None:
    kind = options["f_divergence_type"]
    _check_name("f_divergence_type", kind, F_DIVERGENCES)
    _check_number(options, "f_alpha_divergence_coef")
    excluded = [name for name in names if name not in F_DIVERGENCE_LOSSES]
    if kind != "reverse_kl" and excluded:
        fix = (
            f"{', '.join(excluded)} has no f-divergence form; use reverse_kl, or a "
            f"loss_type of {', '.join(sorted(F_DIVERGENCE_LOSSES))}"
        )
        _refuse("f_divergence_type", kind, fix)


def _check_precomputed(options: Hyperparameters) -> None:
    if options["reference_free"]:
        fix = "nothing to precompute with reference_free; set one of them to False"
        _refuse("precompute_ref_log_probs", True, fix)
    if options["ld_alpha"] is not None:
        fix = (
            f"ld_alpha={options['ld_alpha']} weighs the reference's log-prob of each "
            "token, and only their sums are precomputed; set one of the two aside"
        )
        _refuse("precompute_ref_log_probs", True, fix)


def _check_orpo(options: Hyperparameters) -> None:
    _check_number(options, "beta", at_least=0)


def _check_simpo(options: Hyperparameters) -> None:
    _check_number(options, "beta", above=0)
    _check_number(options, "label_smoothing", at_least=0, below=0.5)
    for key in ("cpo_alpha", "simpo_gamma"):
        _check_number(options, key, at_least=0)
    _check_number(options, "alpha")


def _check_cpo(options: Hyperparameters) -> None:
    _check_name("loss_type", options["loss_type"], CPO_LOSSES)
    _check_simpo(options)
    if options["label_smoothing"] and options["loss_type"] in ("hinge", "ipo"):
        fix = f"acts on sigmoid and simpo, not on {options['loss_type']}; set it to 0"
        _refuse("label_smoothing", options["label_smoothing"], fix)


def _check_kto(options: Hyperparameters) -> None:
    _check_name("loss_type", options["loss_type"], KTO_LOSSES)
    _check_number(options, "beta", above=0)
    for key in ("desirable_weight", "undesirable_weight"):
        _check_number(options, key, at_least=0)


OBJECTIVES: dict[str, ObjectiveSpec] = {
    "next_token": ObjectiveSpec(next_token, Batch, _check_nothing, False),
    "preference": ObjectiveSpec(preference, PairBatch, _check_preference, True),
    "orpo": ObjectiveSpec(orpo, PairBatch, _check_orpo, False),
    "cpo": ObjectiveSpec(cpo, PairBatch, _check_cpo, False),
    "simpo": ObjectiveSpec(simpo, PairBatch, _check_simpo, False),
    "kto": ObjectiveSpec(kto, LabeledBatch, _check_kto, True),
}


def make_objective(name: str, **hyperparameters: Any) -> Objective:
    """Bind hyperparameters to the objective `name` of `OBJECTIVES`, checked first.

    `name` may also be `module:function`, see `load_objective`; its hyperparameters are
    bound unchecked.

    Raises:
        ValueError: an unknown name, an unknown hyperparameter, or values that cannot
            work, alone or together.
    """
    if ":" in name:
        return functools.partial(load_objective(name), **hyperparameters)
    _check_name("objective", name, OBJECTIVES)
    spec = OBJECTIVES[name]
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(spec.function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for key, value in hyperparameters.items():
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            fix = f"{_did_you_mean(key, defaults)}{name} takes: {known}"
            _refuse(key, value, fix)
    settings = defaults | hyperparameters
    spec.check(settings)
    return functools.partial(spec.function, **settings)


def needs_reference(name: str, **hyperparameters: Any) -> bool:
    """Whether the objective calls a reference model under these hyperparameters."""
    _check_name("objective", name, OBJECTIVES)
    return OBJECTIVES[name].has_reference and not (
        hyperparameters.get("reference_free")
        or hyperparameters.get("precompute_ref_log_probs")
    )


def load_objective(path: str) -> Callable[..., tuple[WeightedSum, Metrics]]:
    """Import an objective of your own from `module:function`.

    The module must be importable: installed, or in the working directory or on
    PYTHONPATH. The function has the signature of `next_token` and is traced by jax, so
    it must be pure; its keyword arguments are its hyperparameters. For example, in
    `my_losses.py`:

        def focal(policy, reference, batch, *, gamma=2.0):
            logps = policy(batch).logps
            losses = -((1 - jnp.exp(logps)) ** gamma) * logps * batch.loss_mask
            return WeightedSum(losses.sum(), batch.loss_mask.sum()), {}

    and `make_objective("my_losses:focal", gamma=1.0)`.

    Raises:
        ValueError: no such module or function, or it is not callable.
    """
    module_name, _, function_name = path.partition(":")
    if not module_name or not function_name:
        _refuse("objective", path, "write it as module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"objective={path!r}: {error}; install it, or put its folder on PYTHONPATH"
        ) from error
    function: Any = getattr(module, function_name, None)
    if function is None:
        public = [attribute for attribute in vars(module) if attribute[0] != "_"]
        hint = _did_you_mean(function_name, public)
        _refuse("objective", path, f"{hint}{module_name} has no {function_name}")
    if not callable(function):
        _refuse("objective", path, f"{function_name} is not a function")
    return function
