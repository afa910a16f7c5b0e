"""Rules of the rows: their format, packing and streaming."""

from dataclasses import replace

from jaxtrain.config.rules.dpo import check_packed_pairs, check_shared_prompts
from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import (
    CurriculumSection,
    DataSection,
    DpoSection,
    LoopSection,
)
from jaxtrain.objectives.options import ObjectiveRow


def resolve_data(
    data: DataSection,
    dpo: DpoSection,
    loop: LoopSection,
    curriculum: CurriculumSection,
    row: ObjectiveRow | None,
    found: Resolution,
) -> DataSection:
    """Decide on packing, and refuse what the rows or the objective cannot do."""
    is_dpo = found.training_type == "dpo"
    _check_format(data, row, found)
    if data.packing is None:
        data = replace(data, packing=found.training_type == "from_scratch")
    elif data.packing and is_dpo:
        check_packed_pairs(loop.objective, row, dpo, curriculum, found)
    if data.share_prompts:
        check_shared_prompts(loop.objective, row, found)
    if data.streaming:
        _check_streaming(dpo, loop, curriculum, found)
        _note_streaming(data, loop, found)
    has_turns = not is_dpo and data.format not in ("text", "prompt_completion")
    if data.assistant_only_loss and not has_turns:
        found.add(
            "data.assistant_only_loss",
            "only messages have assistant turns",
            "set it false, or train messages with sft or lora",
        )
    if data.completion_only_loss and data.format == "text":
        found.add(
            "data.completion_only_loss",
            "plain text has no completion",
            "set it false, or data.format = 'prompt_completion'",
        )
    return data


def _check_format(
    data: DataSection, row: ObjectiveRow | None, found: Resolution
) -> None:
    allowed, rows = {"auto", "text", "prompt_completion", "messages"}, "single texts"
    if found.training_type == "dpo":
        allowed, rows = {"auto", "preference"}, "preference rows"
        if row and row.row_kind == "labeled":
            allowed.add("labeled")
    if data.format not in allowed:
        found.add(
            "data.format",
            f"training_type {found.training_type!r} trains on {rows}",
            "set 'auto', or change training_type",
            causes=("training.training_type", "objective"),
        )


def _check_streaming(
    dpo: DpoSection, loop: LoopSection, curriculum: CurriculumSection, found: Resolution
) -> None:
    """Refuse what needs all rows, or their number, before training."""
    if loop.max_steps == -1:
        found.add(
            "data.streaming",
            "the length of a stream is not known, and the schedule needs the number of"
            " steps (num_train_epochs is not read)",
            f"set {found.origin['max_steps']}",
            causes=["max_steps"],
        )
    if curriculum.enabled:
        found.add(
            "curriculum.enabled",
            "a curriculum chooses among all rows, which a stream never holds",
            "set it false, or data.streaming = false",
        )
    if found.training_type == "dpo" and dpo.precompute_ref_log_probs:
        found.add(
            "training.dpo.precompute_ref_log_probs",
            "it scores all rows before training, which a stream never holds",
            "set it false, or data.streaming = false",
            value=True,
        )
    if loop.early_stopping_patience and loop.eval_steps is None:
        found.add(
            "eval_steps",
            "a stream has no known epoch after which to evaluate, and"
            " early_stopping_patience is set",
            "set a number of steps",
        )


def _note_streaming(data: DataSection, loop: LoopSection, found: Resolution) -> None:
    for key in ("eval_steps", "save_steps"):
        if getattr(loop, key) is None:
            found.notes.append(
                f"{found.origin[key]} is unset: with data.streaming only at the end,"
                " for a stream has no known epoch"
            )
    if data.cache:
        found.notes.append(
            "data.cache = True keeps evaluation rows only: data.streaming tokenizes"
            " training rows as they come"
        )
