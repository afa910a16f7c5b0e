"""Rules of row lengths and of the curriculum, which may set them."""

from dataclasses import replace

from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import (
    DEFAULT_MAX_LENGTH,
    CurriculumSection,
    DataSection,
    DpoSection,
    ModelSection,
)

_END = "curriculum.end_length"


def resolve_lengths(
    data: DataSection, dpo: DpoSection, curriculum: CurriculumSection, found: Resolution
) -> tuple[DataSection, DpoSection, CurriculumSection]:
    """Give all three one length: DPO's own key wins, then data's, then the end."""
    length = data.max_length
    if found.training_type == "dpo" and dpo.max_length:
        if length not in (None, dpo.max_length):
            found.notes.append(
                f"data.max_length = {length} gives way to"
                f" training.dpo.max_length = {dpo.max_length}"
            )
        length = dpo.max_length
    if not curriculum.enabled:
        curriculum = CurriculumSection()
    length = length or curriculum.end_length or DEFAULT_MAX_LENGTH
    return (
        replace(data, max_length=length),
        replace(dpo, max_length=length),
        replace(curriculum, end_length=curriculum.end_length or length),
    )


def check_lengths(
    data: DataSection,
    curriculum: CurriculumSection,
    model: ModelSection,
    found: Resolution,
) -> None:
    """Refuse lengths that exceed one another or the model's positions."""
    set_by_dpo = found.training_type == "dpo" and (
        found.values["training"]["dpo"]["max_length"]
        or found.is_refused("training.dpo.max_length")
    )
    key = "training.dpo.max_length" if set_by_dpo else "data.max_length"
    length, end = data.max_length, curriculum.end_length
    if curriculum.enabled and curriculum.start_length > end:
        found.add(
            "curriculum.start_length",
            f"beyond curriculum.end_length = {end}",
            "set it no greater",
            causes=(_END, key),
        )
    if curriculum.enabled and end > length:
        found.add(
            _END,
            f"beyond {key} = {length}",
            f"lower it, or raise {key}",
            value=end,
            causes=[key],
        )
    longest = model.architecture.max_position_embeddings
    if found.training_type == "from_scratch" and length > longest:
        found.add(
            key,
            f"beyond model.architecture.max_position_embeddings = {longest}",
            "lower it, or raise max_position_embeddings",
            value=length,
            causes=(_END, "model.architecture.max_position_embeddings"),
        )


def check_curriculum(curriculum: CurriculumSection, found: Resolution) -> None:
    """Refuse a curriculum that has nothing to tell rows apart by."""
    if not curriculum.enabled:
        return
    by_difficulty = curriculum.strategy == "difficulty_based"
    if curriculum.column and not by_difficulty:
        found.add(
            "curriculum.column",
            "strategy 'length_based' reads no column",
            "unset it, or set curriculum.strategy = 'difficulty_based'",
            causes=["curriculum.strategy"],
        )
    knows_nothing = found.training_type == "from_scratch"
    if by_difficulty and not curriculum.column and knows_nothing:
        found.add(
            "curriculum.strategy",
            "a model that knows nothing finds all rows alike",
            "name a column of numbers in curriculum.column, or set 'length_based'",
            causes=["curriculum.column"],
        )
