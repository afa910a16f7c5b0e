"""Rules of row lengths and of the curriculum, which may set them."""

from dataclasses import replace

from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import DEFAULT_MAX_LENGTH, CurriculumSection

_END = "curriculum.end_length"


def resolve_lengths(run: Resolution) -> None:
    """Give all three one length: DPO's own key wins, then data's, then the end."""
    length, own = run.data.max_length, run.dpo.max_length
    if run.is_dpo and own:
        if length not in (None, own):
            run.note_gives_way("data.max_length", "training.dpo.max_length", own)
        length = own
    if not run.curriculum.enabled:
        run.curriculum = CurriculumSection()
    end = run.curriculum.end_length
    length = length or end or DEFAULT_MAX_LENGTH
    run.data = replace(run.data, max_length=length)
    run.dpo = replace(run.dpo, max_length=length)
    run.curriculum = replace(run.curriculum, end_length=end or length)


def check_lengths(run: Resolution) -> None:
    """Refuse lengths that exceed one another or the model's positions."""
    set_by_dpo = run.is_dpo and (
        run.values["training"]["dpo"]["max_length"]
        or run.is_refused("training.dpo.max_length")
    )
    key = "training.dpo.max_length" if set_by_dpo else "data.max_length"
    length, curriculum = run.data.max_length, run.curriculum
    end = curriculum.end_length
    if curriculum.enabled and curriculum.start_length > end:
        text = f"beyond curriculum.end_length = {end}; set it no greater"
        run.problem("curriculum.start_length", text, causes=(_END, key))
    if curriculum.enabled and end > length:
        text = f"beyond {key} = {length}; lower it, or raise {key}"
        run.problem(_END, text, value=end, causes=[key])
    longest = run.model.architecture.max_position_embeddings
    if run.training_type == "from_scratch" and length > longest:
        run.problem(
            key,
            f"beyond model.architecture.max_position_embeddings = {longest}; lower it,"
            " or raise max_position_embeddings",
            value=length,
            causes=(_END, "model.architecture.max_position_embeddings"),
        )


def check_curriculum(run: Resolution) -> None:
    """Refuse a curriculum that has nothing to tell rows apart by."""
    curriculum = run.curriculum
    if not curriculum.enabled:
        return
    by_difficulty = curriculum.strategy == "difficulty_based"
    if curriculum.column and not by_difficulty:
        run.problem(
            "curriculum.column",
            "strategy 'length_based' reads no column; unset it, or set"
            " curriculum.strategy = 'difficulty_based'",
            causes=["curriculum.strategy"],
        )
    knows_nothing = run.training_type == "from_scratch"
    if by_difficulty and not curriculum.column and knows_nothing:
        run.problem(
            "curriculum.strategy",
            "a model that knows nothing finds all rows alike; name a column of numbers"
            " in curriculum.column, or set 'length_based'",
            causes=["curriculum.column"],
        )
