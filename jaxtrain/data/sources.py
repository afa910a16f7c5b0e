"""What a run's data are at a glance, before jax or `datasets` is imported."""

import pathlib

from jaxtrain.config import RunConfig, eval_sets
from jaxtrain.data.batches.mixture import parse_mixture
from jaxtrain.data.rows.columns import make_column_map
from jaxtrain.data.rows.folders import (
    first_rows,
    is_saved,
    looks_local,
    split_aliases,
    split_files,
)
from jaxtrain.data.rows.formats import detect_for
from jaxtrain.data.rows.jinja import is_template_file, read_template
from jaxtrain.data.rows.own_format import format_rows
from jaxtrain.data.rows.remote import first_remote_rows
from jaxtrain.storage.address import is_remote
from jaxtrain.storage.checks import check_readable


def check_sources(run: RunConfig) -> None:
    """Look at the start of every file or folder that the run names, buckets' too.

    At the chat template too, if the run has one, and whether a model, a tokenizer and
    an adapter in a bucket are there.

    Raises:
        ValueError: there is none, it holds no row, or not of the kind that is needed;
            names the key.
    """
    _check_addresses(run)
    data = run.data
    template = data.chat_template  # a word may name one of the tokenizer's
    if template is not None and not template.replace("-", "_").isidentifier():
        read_template(template)
    column_map = make_column_map(data.column_map)
    parts = parse_mixture(data.train) or ((str(data.train), 1.0),)
    named = [("data.train", name, data.train_split) for name, _ in parts]
    evaluates = run.loop.eval_steps != 0 or run.loop.eval_on_start
    if evaluates:
        split = data.eval_split or "eval"
        named += [
            (eval_sets.key_of(name), held_out, split)
            for name, held_out in data.eval_paths.items()
        ]
    if evaluates and not data.eval:
        _check_eval_split(run)
    kinds: set[str] = set()
    for key, name, split in named:
        check_readable(name, key)
        path = pathlib.Path(name).expanduser()
        if not name:
            continue  # embedded
        if not (path.exists() or looks_local(name)):
            kinds.add("unknown")  # of the hub
            continue
        if key == "data.train" and "," in name and not path.exists():
            raise ValueError(
                f"data.train = {name!r}: there is no such file; give each of several"
                " data sets a weight, as in a.jsonl:0.7,b.jsonl:0.3"
            )
        try:
            if is_remote(name):
                rows = first_remote_rows(name, split)
            else:
                rows = first_rows(path, split)
            if rows and data.format_row:
                rows = format_rows(rows, data.format_row, run.loop.function_kwargs)
            if rows:
                found = detect_for(
                    run.objective_row.row_kind,
                    rows,
                    kind=data.format,
                    text_column=data.text_column,
                    column_map=column_map,
                )
            kinds.add(found.kind if rows else "unknown")
        except (ValueError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{key} = {name!r}: {reason}") from error
    if data.text_column != "text" and kinds and not kinds & {"text", "unknown"}:
        raise ValueError(
            f"data.text_column = {data.text_column!r} has no effect, because the format"
            f" of the rows is {' and '.join(sorted(kinds))}; remove it, or name a"
            " column of the data and set data.format = 'text'"
        )


def _check_eval_split(run: RunConfig) -> None:
    """Refuse `data.eval_split` where it would be the rows that are trained on.

    It may name their split, or that of a local file or folder that is taken whole.
    """
    train, split, trained = run.data.train, run.data.eval_split, run.data.train_split
    if not (split and isinstance(train, str) and train):
        return
    path = pathlib.Path(train).expanduser()
    same = split == trained
    # Of others, `datasets` or the bucket tells of splits.
    if not same and not is_remote(train) and path.exists() and not is_saved(path):
        try:
            same = path.is_file() or (
                split_files(path, split) == split_files(path, trained)
            )
        except ValueError as error:
            raise ValueError(f"data.eval_split = {split!r}: {error}") from error
    if same:
        why = f"data.train = {train!r} has no splits"
        if split in split_aliases(trained) or trained in split_aliases(split):
            why = f"data.train_split = {trained!r} trains on that split"
        raise ValueError(
            f"data.eval_split = {split!r}: {why}, so the training rows themselves would"
            " be evaluated; name another split, or set data.eval to other rows"
        )


def _check_addresses(run: RunConfig) -> None:
    """Refuse an address of a bucket that cannot be read; names the key."""
    lora, template = run.lora, run.data.chat_template or ""
    named = {
        "model.name_or_path": run.model.name_or_path,
        "model.tokenizer_name_or_path": run.model.tokenizer_name_or_path,
        "training.lora.init_from": lora.init_from if lora is not None else "",
        # Where it is no file, it is the template itself.
        "data.chat_template": template if is_template_file(template) else "",
    }
    for key, name in named.items():
        if name:
            check_readable(name, key)


def check_evaluation_rows(run: RunConfig) -> None:
    """Refuse what needs evaluations, for a run that has no rows for them.

    Raises:
        ValueError: names the first such key.
    """
    wanted = {
        "early_stopping_patience": run.loop.early_stopping_patience,
        "load_best_model_at_end": run.loop.load_best_model_at_end,
        "generation.enabled": run.generation.enabled,
    }
    for key, value in wanted.items():
        if value:
            raise ValueError(
                f"training.{key} = {value!r}: there are no evaluation rows; set"
                f" data.eval, or unset {key}"
            )


def names_evaluation_rows(run: RunConfig) -> bool:
    """Whether the configuration says what to evaluate on."""
    return bool(run.data.eval or run.data.eval_split or not run.data.train)
