"""Rules of objectives, their options and `training.dpo`."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from jaxtrain import schema
from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import CurriculumSection, DpoSection, LoopSection
from jaxtrain.objectives.options import ObjectiveRow, make_options, unknown_objective

_KWARGS = "training.objective_kwargs."


def resolve_options(
    loop: LoopSection, dpo: DpoSection, row: ObjectiveRow | None, found: Resolution
) -> tuple[LoopSection, DpoSection]:
    """Check the objective's options, from `training.dpo` and `objective_kwargs`.

    An option that `training.dpo` has ends up there, whichever way it was given, so
    that whatever reads it there sees what the loss sees.
    """
    if row is None or _is_on_pairs(row) != (found.training_type == "dpo"):
        return loop, dpo  # check_objective says why
    own_kwargs = ":" in loop.objective  # those of a function of the user's own
    kwargs = {} if own_kwargs else dict(loop.objective_kwargs or {})
    given = _set_in_dpo(dpo, row.keys_of_dpo)
    twice = _refuse_conflicts(row, given, kwargs, found)
    refused = {k for k in row.keys_of_dpo if found.is_refused(f"training.dpo.{k}")}
    chosen = {k: v for k, v in (given | kwargs).items() if k not in twice}
    options, problems = make_options(row.options, chosen, refused | twice)
    for key, line in problems:
        in_dpo = key in row.keys_of_dpo and key not in kwargs
        found.problems.append(f"{'training.dpo.' if in_dpo else _KWARGS}{line}")
    values = vars(options)
    if loop.objective == "kto" and values["precompute_ref_log_probs"]:
        found.add(
            _KWARGS + "precompute_ref_log_probs",
            "objective 'kto' has no pass that computes them",
            "unset it",
            value=True,
        )
    dpo = replace(dpo, **{key: values[key] for key in row.keys_of_dpo})
    if not own_kwargs:
        beside = values.keys() & kwargs.keys() - set(row.keys_of_dpo)
        rest = {key: values[key] for key in kwargs if key in beside}
        loop = replace(loop, objective_kwargs=rest or None)
    return loop, dpo


def _is_on_pairs(row: ObjectiveRow) -> bool:
    return row.row_kind != "next_token"


def _set_in_dpo(dpo: DpoSection, keys: Iterable[str]) -> dict[str, Any]:
    usual = {field.name: field.default for field in fields(DpoSection)}
    values = vars(dpo)
    return {key: values[key] for key in keys if values[key] != usual[key]}


def _refuse_conflicts(
    row: ObjectiveRow,
    given: Mapping[str, Any],
    kwargs: Mapping[str, Any],
    found: Resolution,
) -> set[str]:
    """The options that have two values, one in each place."""
    again = {key: kwargs[key] for key in given.keys() & kwargs.keys()}
    values, wrong = schema.merge(schema.schema_of(row.options), again)
    twice = {key for key in again if key not in wrong and values[key] != given[key]}
    for key in sorted(twice):
        found.add(
            _KWARGS + key,
            f"training.dpo.{key} = {given[key]!r} names the same option",
            "set one of the two",
            value=kwargs[key],
        )
    return twice


def check_objective(
    name: str, row: ObjectiveRow | None, dpo: DpoSection, found: Resolution
) -> None:
    """The objective fits the training type, and nothing set for DPO is ignored."""
    if row is None:
        unknown = unknown_objective(name, "auto")
        found.add(unknown.key, unknown.problem, unknown.fix)
        return
    on_pairs = _is_on_pairs(row)
    if on_pairs != (found.training_type == "dpo"):
        wanted = "dpo" if on_pairs else "sft"
        found.add(
            "objective",
            f"training_type is {found.training_type!r}",
            f"set training_type = {wanted!r}, or objective = 'auto'",
            causes=["training.training_type"],
        )
        return
    if not on_pairs:
        return
    read = {*row.keys_of_dpo, "max_length"}
    if row.row_kind == "preference":
        read.add("max_prompt_length")
    if row.has_reference:
        read |= {"sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"}
    ignored = [field.name for field in fields(DpoSection) if field.name not in read]
    for key, value in _set_in_dpo(dpo, ignored).items():
        found.add(
            f"training.dpo.{key}",
            f"objective {name!r} does not read it",
            "unset it, or give what the objective reads in training.objective_kwargs",
            value=value,
            causes=["objective"],
        )


def check_shared_prompts(
    objective: str, row: ObjectiveRow | None, found: Resolution
) -> None:
    """Only pairs have a prompt to share."""
    problem = None
    if found.training_type != "dpo":
        problem = f"training_type {found.training_type!r} has single texts, not pairs"
    elif row and row.row_kind == "labeled":
        problem = f"objective {objective!r} takes single completions, not pairs"
    if problem:
        causes = ["training.training_type"]
        found.add("data.share_prompts", problem, "set it false", causes=causes)


def check_packed_pairs(
    objective: str,
    row: ObjectiveRow | None,
    dpo: DpoSection,
    curriculum: CurriculumSection,
    found: Resolution,
) -> None:
    """Several pairs a row: only what sums by pair can read them."""
    fix = "set it false, or unset that"
    if not (row and row.packs):
        found.add("data.packing", f"objective {objective!r} takes a pair a row", fix)
    if dpo.ld_alpha is not None:
        found.add("data.packing", "training.dpo.ld_alpha takes a pair a row", fix)
    if dpo.precompute_ref_log_probs:
        problem = "training.dpo.precompute_ref_log_probs keeps one sum a row"
        found.add("data.packing", problem, fix)
    if curriculum.enabled and curriculum.strategy == "length_based":
        problem = "a length_based curriculum takes a pair a row"
        found.add("data.packing", problem, fix, causes=["curriculum.strategy"])


def check_dpo(dpo: DpoSection, found: Resolution) -> None:
    """What `training.dpo` says of the data and of the reference model."""
    if dpo.max_prompt_length and dpo.max_prompt_length >= dpo.max_length:
        found.add(
            "training.dpo.max_prompt_length",
            f"leaves no room for a completion in max_length = {dpo.max_length}",
            "lower it, raise max_length, or unset it",
            causes=("training.dpo.max_length", "data.max_length"),
        )
    if dpo.sync_ref_model and dpo.reference_free:
        found.add(
            "training.dpo.sync_ref_model",
            "reference_free is true: no reference",
            "set it false",
        )
    if dpo.sync_ref_model and dpo.precompute_ref_log_probs:
        found.add(
            "training.dpo.sync_ref_model",
            "precomputed log-probs are of a fixed reference",
            "set it false, or precompute_ref_log_probs = false",
        )
