"""Rules of objectives, their options and `training.dpo`."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from jaxtrain import schema
from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import DpoSection
from jaxtrain.objectives.options import (
    PAIR_LOSSES,
    ObjectiveRow,
    PreferenceOptions,
    make_options,
    unknown_objective,
)
from jaxtrain.record.safe_text import shown

_DPO, _KWARGS = "training.dpo.", "training.objective_kwargs."


def resolve_options(run: Resolution) -> None:
    """Check the objective's options, from `training.dpo` and `objective_kwargs`.

    An option that `training.dpo` has ends up there, whichever way it was given, so
    that whatever reads it there sees what the loss sees.
    """
    row, objective = run.row, run.loop.objective
    if row is None or _is_on_pairs(row) != run.is_dpo:
        return  # check_objective says why
    own_kwargs = ":" in objective  # those of a function of the user's own
    kwargs = {} if own_kwargs else dict(run.loop.objective_kwargs or {})
    given = _set_in_dpo(run.dpo, row.keys_of_dpo)
    # An option with two values, one in each place, has none.
    again = {key: kwargs[key] for key in given.keys() & kwargs.keys()}
    merged, wrong = schema.merge(schema.schema_of(row.options), again)
    twice = {key for key in again if key not in wrong and merged[key] != given[key]}
    for key in sorted(twice):
        run.problem(
            _KWARGS + key,
            f"{_DPO}{key} = {shown(given[key])} names the same option; set one of the"
            " two",
            value=kwargs[key],
        )
    refused = {key for key in row.keys_of_dpo if run.is_refused(_DPO + key)}
    chosen = {k: v for k, v in (given | kwargs).items() if k not in twice}
    options, problems = make_options(row.options, chosen, refused | twice)
    for key, line in problems:
        in_dpo = key in row.keys_of_dpo and key not in kwargs
        run.problems.append(f"{_DPO if in_dpo else _KWARGS}{line}")
    values = vars(options)
    if objective == "kto" and values["precompute_ref_log_probs"]:
        run.problem(
            _KWARGS + "precompute_ref_log_probs",
            "objective 'kto' has no pass that computes them; unset it",
            value=True,
        )
    run.dpo = replace(run.dpo, **{key: values[key] for key in row.keys_of_dpo})
    if not own_kwargs:
        beside = values.keys() - set(row.keys_of_dpo)
        rest = {key: values[key] for key in kwargs if key in beside}
        run.loop = replace(run.loop, objective_kwargs=rest or None)


def _is_on_pairs(row: ObjectiveRow) -> bool:
    return row.row_kind != "next_token"


def _set_in_dpo(dpo: DpoSection, keys: Iterable[str]) -> dict[str, Any]:
    values, usual = vars(dpo), vars(DpoSection())
    return {key: values[key] for key in keys if values[key] != usual[key]}


def check_objective(run: Resolution) -> None:
    """The objective fits the training type, and nothing set for DPO is ignored."""
    row, name = run.row, run.loop.objective
    if row is None:
        run.problem("objective", unknown_objective(name, "auto"))
        return
    if _is_on_pairs(row) != run.is_dpo:
        wanted = "sft" if run.is_dpo else "dpo"
        run.problem(
            "objective",
            f"training_type is {shown(run.training_type)}; set training_type ="
            f" {shown(wanted)}, or objective = 'auto'",
            causes=["training.training_type"],
        )
        return
    if not run.is_dpo:
        return
    read = {*row.keys_of_dpo, "max_length"}
    if row.row_kind == "preference":
        read.add("max_prompt_length")
    if row.has_reference:
        read |= {"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"}
    ignored = [key for key in vars(run.dpo) if key not in read]
    flagged = {
        key: value
        for key, value in vars(run.dpo).items()
        if key in ignored and _DPO + key in run.flags and value is not None
    }
    for key, value in (_set_in_dpo(run.dpo, ignored) | flagged).items():
        run.problem(
            _DPO + key,
            f"objective {shown(name)} does not read it; set it null, or give what the"
            " objective reads in training.objective_kwargs",
            value=value,
            causes=["objective"],
        )


def check_dpo(run: Resolution) -> None:
    """What `training.dpo` says of the data and of the reference model."""
    dpo = run.dpo
    if not run.is_dpo or (run.row and run.row.options is not PreferenceOptions):
        return
    if dpo.max_prompt_length and dpo.max_prompt_length >= dpo.max_length:
        run.problem(
            "training.dpo.max_prompt_length",
            f"leaves no room for a completion in max_length = {dpo.max_length};"
            " lower it, raise max_length, or unset it",
            causes=("training.dpo.max_length", "data.max_length"),
        )
    keys = (key for loss in PAIR_LOSSES.values() for key in loss.reads)
    for key in dict.fromkeys(keys):
        readers = [name for name, row in PAIR_LOSSES.items() if key in row.reads]
        is_default = getattr(dpo, key) == getattr(PreferenceOptions, key)
        is_idle = is_default and not {*readers} & {*dpo.loss_type}
        if is_idle and _DPO + key in run.flags:  # else the options refuse it
            why = f"loss_type {[*dpo.loss_type]} does not read it"
            fix = f"add one of {', '.join(readers)} to training.dpo.loss_type"
            run.note(_DPO + key, why, fix)
    if dpo.sync_ref_model and dpo.reference_free:
        text = "reference_free is true: no reference; set it false"
        run.problem("training.dpo.sync_ref_model", text)
    if dpo.sync_ref_model and dpo.precompute_ref_log_probs:
        run.problem(
            "training.dpo.sync_ref_model",
            "precomputed log-probs are of a fixed reference; set it false, or"
            " precompute_ref_log_probs = false",
        )
