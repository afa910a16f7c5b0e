"""Rules of the rows: their format, packing and streaming."""

from dataclasses import replace

from jaxtrain.config.rules.resolution import Resolution


def resolve_data(run: Resolution) -> None:
    """Decide on packing, and refuse what the rows or the objective cannot do."""
    data = run.data
    _check_format(run)
    if data.packing is None:
        run.data = replace(data, packing=run.training_type == "from_scratch")
    elif data.packing and run.is_dpo:
        _check_packed_pairs(run)
    if data.share_prompts:
        _check_shared_prompts(run)
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
            f"training_type {run.training_type!r} trains on {rows}; set 'auto', or"
            " change training_type",
            causes=("training.training_type", "objective"),
        )


def _check_packed_pairs(run: Resolution) -> None:
    """Several pairs a row: only what sums by pair can read them."""
    key, fix = "data.packing", "set it false, or unset that"
    if not (run.row and run.row.packs):
        run.problem(key, f"objective {run.loop.objective!r} takes a pair a row; {fix}")
    if run.dpo.ld_alpha is not None:
        run.problem(key, f"training.dpo.ld_alpha takes a pair a row; {fix}")
    if run.dpo.precompute_ref_log_probs:
        problem = "training.dpo.precompute_ref_log_probs keeps one sum a row"
        run.problem(key, f"{problem}; {fix}")
    if run.curriculum.enabled and run.curriculum.strategy == "length_based":
        problem = f"a length_based curriculum takes a pair a row; {fix}"
        run.problem(key, problem, causes=["curriculum.strategy"])


def _check_shared_prompts(run: Resolution) -> None:
    """Only pairs have a prompt to share."""
    if not run.is_dpo:
        problem = f"training_type {run.training_type!r} has single texts"
    elif run.row and run.row.row_kind == "labeled":
        problem = f"objective {run.loop.objective!r} takes single completions"
    else:
        return
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
            run.notes.append(
                f"{run.origin[key]} is unset: with data.streaming only at the end,"
                " for a stream has no known epoch"
            )
    if run.data.cache:
        run.notes.append(
            "data.cache = True keeps evaluation rows only: data.streaming tokenizes"
            " training rows as they come"
        )
