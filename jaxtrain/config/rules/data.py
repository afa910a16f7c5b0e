"""Rules of the rows: their length, curriculum, format, packing and streaming."""

import math
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

from jaxtrain.config import eval_sets
from jaxtrain.config.notes import Note
from jaxtrain.config.rules.resolution import Resolution
from jaxtrain.config.sections import DEFAULT_MAX_LENGTH, CurriculumSection
from jaxtrain.record.safe_text import shown

_END = "curriculum.end_length"
_MOST_TOKENS = 2**36  # of a step on a device; a token takes 20 bytes of the host


def resolve_lengths(run: Resolution) -> None:
    """Give rows one length: DPO's own key wins, then data's, then the curriculum's."""
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
    sizes = run.model.architecture
    longest = sizes.max_position_embeddings
    # How far a named model's positions reach, and how far any stretch, is known with
    # the model; it is checked there.
    model = run.model
    is_known_later = model.name_or_path or model.rope_scaling or sizes.rope_scaling
    if run.training_type == "from_scratch" and length > longest and not is_known_later:
        run.problem(
            key,
            f"beyond model.architecture.max_position_embeddings = {longest}; lower it,"
            " or raise max_position_embeddings",
            value=length,
            causes=(_END, "model.architecture.max_position_embeddings"),
        )


def check_tokens(run: Resolution) -> None:
    """Refuse a step whose rows no host could hold: a digit too many somewhere."""
    loop, length = run.loop, run.data.max_length
    sizes = {
        name: getattr(loop, name)
        for name in ("gradient_accumulation_steps", "per_device_train_batch_size")
    }
    if math.prod(sizes.values()) * length > _MOST_TOKENS:
        smaller, larger = sorted(sizes, key=lambda name: sizes[name])
        run.problem(
            larger,
            f"with {smaller} = {sizes[smaller]} and max_length = {length} the rows of a"
            " step do not fit a host's memory; set less",
            causes=(smaller, "data.max_length"),
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


def resolve_data(run: Resolution) -> None:
    """Decide on packing, and refuse what the rows or the objective cannot do."""
    data = run.data
    _check_format(run)
    if data.packing is None:
        run.data = data = replace(data, packing=_default_packing(run))
    elif (other := _packing_instead(run)) is not None:
        packing, why = other
        why = f"becomes {packing!r}, and batch sizes count examples: {why}"
        run.notes.append(Note("remark", "data.packing", data.packing, why))
        run.data = data = replace(data, packing=packing)
    if data.share_prompts:
        _check_shared_prompts(run)
    elif data.share_prompts is None:
        shares = data.packing == "batch" and _why_no_pairs(run) is None
        run.data = data = replace(data, share_prompts=shares)
    _check_noise(run)
    if data.streaming:
        _check_streaming(run)
        _note_streaming(run)
    has_turns = not run.is_dpo and data.format not in ("text", "prompt_completion")
    if data.assistant_only_loss and not has_turns:
        run.problem(
            "data.assistant_only_loss",
            "only messages have assistant turns; set it false, or train messages with"
            " sft or lora",
        )
    chosen = {
        "train_on_turns": data.train_on_turns != "all",
        "train_on_thinking": not data.train_on_thinking,
        "preserve_thinking": data.preserve_thinking,
    }
    for key in (key for key, is_set in chosen.items() if is_set):
        if not data.assistant_only_loss:
            run.problem(
                f"data.{key}",
                "it chooses among what the assistant wrote; set"
                " data.assistant_only_loss, or unset it",
            )
    if data.completion_only_loss and data.format == "text":
        run.problem(
            "data.completion_only_loss",
            "plain text has no completion; set it false, or data.format ="
            " 'prompt_completion'",
        )


def _check_format(run: Resolution) -> None:
    allowed, rows = {"auto", "text", "prompt_completion", "messages"}, "single texts"
    if run.is_dpo:
        allowed, rows = {"auto", "preference"}, "preference rows"
        if run.row and run.row.row_kind == "labeled":
            allowed.add("labeled")
    if run.data.format not in allowed:
        run.problem(
            "data.format",
            f"training_type {shown(run.training_type)} trains on {rows}; set 'auto', or"
            " change training_type",
            causes=("training.training_type", "objective"),
        )


def _check_noise(run: Resolution) -> None:
    """NEFTune's noise goes by the length of an example, so each needs a row."""
    if run.loop.neftune_noise_alpha is None:
        return
    if run.data.packing:
        run.problem(
            "neftune_noise_alpha",
            f"data.packing = {run.data.packing!r} puts several examples into a row, and"
            " the noise goes by the length of one; set data.packing = false",
            causes=["data.packing"],
        )
    if run.is_dpo:
        run.problem(
            "neftune_noise_alpha",
            "noise on the policy alone would enter its rewards, which compare it with"
            " the reference; unset it, or train with training_type sft or lora",
            causes=["training.training_type"],
        )


def _default_packing(run: Resolution) -> bool | Literal["batch"]:
    if run.loop.neftune_noise_alpha is not None:
        return False
    if run.training_type == "from_scratch":
        return True
    if ":" in run.loop.objective or run.loop.use_auxiliary_loss:
        why = (
            "(unset): every example has a padded row, for a loss of your own may take"
            " a row for an example; 'batch' is faster where it does not"
        )
        run.notes.append(Note("remark", "data.packing", None, why))
        return False
    return "batch"


def _packing_instead(run: Resolution) -> tuple[bool | Literal["batch"], str] | None:
    """What acts in place of a packing that this run cannot have, and why; else None."""
    packing = run.data.packing
    if not packing or not run.is_dpo:
        return None
    if not (run.row and run.row.packs):
        return False, f"objective {run.loop.objective!r} takes a pair a row"
    if packing == "batch":
        return None
    # Packed ahead of training: what needs to know which pairs share a row.
    if run.row.row_kind == "labeled":
        return "batch", "completions are packed by micro-batch only"
    if run.dpo.precompute_ref_log_probs:
        return "batch", "training.dpo.precompute_ref_log_probs keeps one sum a row"
    if run.curriculum.enabled and run.curriculum.strategy == "length_based":
        return "batch", "a length_based curriculum takes a pair a row"
    return None


def _why_no_pairs(run: Resolution) -> str | None:
    """Why this run's rows have no prompt that two completions share."""
    if not run.is_dpo:
        return f"training_type {shown(run.training_type)} has single texts"
    if run.row and run.row.row_kind == "labeled":
        return f"objective {shown(run.loop.objective)} takes single completions"
    return None


def _check_shared_prompts(run: Resolution) -> None:
    """Only pairs have a prompt to share."""
    if (problem := _why_no_pairs(run)) is not None:
        text = f"{problem}, not pairs; set it false"
        run.problem("data.share_prompts", text, causes=["training.training_type"])


def _check_streaming(run: Resolution) -> None:
    """Refuse what needs all rows, or their number, before training."""
    fix = "set it false, or data.streaming = false"
    if run.loop.max_steps == -1:
        run.problem(
            "data.streaming",
            "the length of a stream is not known, and the schedule needs the number of"
            f" steps (num_train_epochs is not read); set {run.origin['max_steps']}",
            causes=["max_steps"],
        )
    if run.curriculum.enabled:
        problem = "a curriculum chooses among all rows, which a stream never holds"
        run.problem("curriculum.enabled", f"{problem}; {fix}")
    if run.is_dpo and run.dpo.precompute_ref_log_probs:
        problem = "it scores all rows before training, which a stream never holds"
        key = "training.dpo.precompute_ref_log_probs"
        run.problem(key, f"{problem}; {fix}", value=True)
    if run.loop.early_stopping_patience and run.loop.eval_steps is None:
        run.problem(
            "eval_steps",
            "a stream has no known epoch after which to evaluate, and"
            " early_stopping_patience is set; set a number of steps",
        )


def _note_streaming(run: Resolution) -> None:
    for key in ("eval_steps", "save_steps"):
        if getattr(run.loop, key) is None:
            why = (
                "(unset): with data.streaming only at the end, for a stream has no"
                " known epoch"
            )
            run.notes.append(Note("remark", run.origin[key], None, why))
    if run.data.cache:
        why = (
            "keeps evaluation rows only: data.streaming tokenizes training rows as they"
            " come"
        )
        run.notes.append(Note("remark", "data.cache", True, why))


def note_splits(run: Resolution) -> None:
    """A split is one of a data set; a file is taken whole."""
    train, held_out = run.data.train, run.data.eval
    named = {"data.train_split": train, "data.eval_split": held_out or train}
    for key, source in named.items():
        if not run.is_set(key):
            continue
        other = "data.train" if key == "data.train_split" else "data.eval"
        if not source:
            run.note(key, f"{other} is unset", f"set {other} too, or remove the flag")
        elif (key == "data.train_split" or held_out) and all(
            _is_file(each) for each in eval_sets.by_name(source).values()
        ):
            why = f"{other} = {shown(source)} is a file, which is taken whole"
            run.note(key, why, f"remove the flag, or change {other}")


def note_hub_keys(run: Resolution) -> None:
    """A revision, and code of its own, are a hub repository's."""
    model = run.model
    tokenizer = model.tokenizer_name_or_path or model.name_or_path
    from_hub = {_is_from_hub(model.name_or_path), _is_from_hub(tokenizer)}
    for key in ("model.revision", "model.trust_remote_code"):
        if run.is_set(key) and not (
            True in from_hub if key == "model.revision" else tokenizer
        ):
            where = f"model.name_or_path = {shown(model.name_or_path)}"
            why = f"{where} is no repository of the hub"
            run.note(key, why, "remove the flag, or change model.name_or_path")


def _is_from_hub(name: str) -> bool:
    if not name or "://" in name:
        return False
    return not Path(name).expanduser().is_dir()


def _is_file(source: object) -> bool:
    if not isinstance(source, str):
        return False
    if "://" in source:  # told by its name: no rule asks the network
        return bool(PurePosixPath(source).suffix)
    return Path(source).expanduser().is_file()
