"""The end of a run: Hugging Face directories of the last and of the best weights."""

import dataclasses
import logging
import pathlib
from typing import Any

import jax

from jaxtrain import lora, tree
from jaxtrain.config import RunConfig
from jaxtrain.models import bucket, hf_composite
from jaxtrain.models.hf_save import save_in_wrapper, save_pretrained
from jaxtrain.models.load import LoadedModel, lora_config
from jaxtrain.models.special_tokens import save_tokenizer
from jaxtrain.optimizers.ema import averaged, only_average
from jaxtrain.run import exported as exports
from jaxtrain.run import hub
from jaxtrain.run.checkpoint import CheckpointManager
from jaxtrain.run.model_card import write_card
from jaxtrain.types import TrainState

logger = logging.getLogger(__name__)


def prepare(workdir: Any, *, trains: bool) -> None:
    """Remove what a killed export left, as a run starts.

    Args:
        trains: whether weights will change, so that what was exported is not theirs.
    """
    exported = exports.exported(workdir)
    exported.clean()
    if trains:
        exported.forget()


def export_models(
    workdir: Any,
    model: LoadedModel,
    run: RunConfig,
    state: TrainState,
    checkpoints: CheckpointManager,
) -> dict[str, Any]:
    """Write `model/`, under LoRA `adapter/` too, and `best_model/` if it is another.

    With `load_best_model_at_end`, `model/` is the best. A directory appears under its
    name when it is whole. What an earlier start exported of the same weights by the
    same settings is left as it is. With `push_to_hub`, the adapter or else `model/` is
    uploaded. Every process calls this.

    Returns:
        `model_path` and `best_model_path`, equal where the last weights are the best;
        under LoRA `adapter_path` and `best_adapter_path`; and `model_step` and
        `best_model_step`, whose weights these are.
    """
    last, best = int(state.step), checkpoints.best_step()
    if best is None:
        best = last
    loads_best = best != last and run.loop.load_best_model_at_end
    steps = {"model": best if loads_best else last}
    if best != steps["model"]:
        steps["best_model"] = best
    exported = exports.exported(workdir)
    if exported.is_whole(steps, run):
        logger.info("the export of step %d is complete and stays as it is", last)
    else:
        exported.forget()
        for name, step in steps.items():
            if step != int(state.step):
                state = _restore_weights(state, checkpoints, step)
            _export_whole(exported, name, model, run, averaged(state))
        exported.note(steps, run)
    paths: dict[str, Any] = {}
    for name in ("model", "best_model"):
        there = name if name in steps else "model"
        paths[f"{name}_path"] = str(workdir / there)
        if run.lora is not None:
            adapter = str(workdir / _adapter_of(there))
            paths[f"{name}_path".replace("model", "adapter")] = adapter
    if run.loop.push_to_hub and jax.process_index() == 0:
        hub.push(hub.find_export(workdir), run.loop.push_to_hub)
    return paths | {"model_step": steps["model"], "best_model_step": best}


def _export_whole(
    exported: exports.Exported,
    name: str,
    model: LoadedModel,
    run: RunConfig,
    state: TrainState,
) -> None:
    """One directory that transformers loads, adapters merged.

    The adapter alone, in PEFT's format, goes beside it: `model/` and `adapter/`.
    """
    if run.lora is not None:
        adapter = _adapter_of(name)
        with exported.whole(adapter) as directory:
            _write_adapter(directory, model, run, state)
        logger.info("adapter saved to %s", exported.workdir / adapter)
    with exported.whole(name) as directory:
        _write_merged(directory, model, run, state)
    logger.info("model saved to %s", exported.workdir / name)


def export_merged(
    directory: pathlib.Path, model: LoadedModel, run: RunConfig, state: TrainState
) -> str:
    """One directory that transformers loads, adapters merged; returns its path."""
    _write_merged(directory, model, run, state)
    logger.info("model saved to %s", directory)
    return str(directory)


def _write_merged(
    directory: pathlib.Path, model: LoadedModel, run: RunConfig, state: TrainState
) -> None:
    params, config = state.trainable, model.config
    is_wrapped = hf_composite.is_wrapped(model.directory)
    if run.lora is not None:
        # The frozen tree may hold adapters: a DPO reference's, or the first ones.
        leaves = tree.flatten(state.frozen).items()
        base = tree.nest(
            {path: x for path, x in leaves if not path[-1].startswith("lora_")}
        )
        params = lora.merge_into_base(
            base, state.trainable, lora_config(run, model.config)
        )
        if config.tie_word_embeddings and "lm_head" in params:
            config = dataclasses.replace(config, tie_word_embeddings=False)
            logger.warning(
                "an adapter of embed_tokens or lm_head made two matrices of one: the"
                " merged model has tie_word_embeddings = False"
            )
    source, dtype = model.directory, run.model.export_dtype
    scratch = run.training_type == "from_scratch"
    if not is_wrapped or source is None or scratch or run.model.export_text_only:
        save_pretrained(directory, config, params, dtype=dtype)
    else:
        save_in_wrapper(directory, source, config, params, dtype=dtype)
    if jax.process_index() == 0:
        model.generation.save(directory)
        # As it was used: with the chat template of this run, if that was another.
        save_tokenizer(model.tokenizer, directory)
        write_card(directory, run, int(state.step), model.directory, is_adapter=False)


def export_adapter(
    directory: pathlib.Path, model: LoadedModel, run: RunConfig, state: TrainState
) -> str:
    """One directory that PEFT loads beside the base; returns its path.

    Raises:
        ValueError: the run trains no adapter.
    """
    _write_adapter(directory, model, run, state)
    logger.info("adapter saved to %s", directory)
    return str(directory)


def _write_adapter(
    directory: pathlib.Path, model: LoadedModel, run: RunConfig, state: TrainState
) -> None:
    settings, base = lora_config(run, model.config), model.directory
    lora.save_adapter(
        directory,
        state.trainable,
        settings,
        # A hub model's folder is this machine's cache, which PEFT need not find.
        base and (hub.base_name(base) or bucket.shown(base)),
        tied_embeddings=model.config.tie_word_embeddings,
        initial=state.frozen if settings.changes_base else None,
        in_wrapper=hf_composite.is_wrapped(model.directory),
    )
    if jax.process_index() == 0:
        write_card(directory, run, int(state.step), model.directory, is_adapter=True)


def _adapter_of(name: str) -> str:
    """The directory of the adapter of an exported model, by that of the model."""
    return name.replace("model", "adapter")


def _restore_weights(
    state: TrainState, checkpoints: CheckpointManager, step: int
) -> TrainState:
    """The same state with `trainable` of an earlier step."""
    wanted = dataclasses.replace(
        state, opt_state=only_average(state), frozen={}, loss_scale=None
    )
    restored = checkpoints.restore(wanted, step, partial=True).state
    return dataclasses.replace(
        state, trainable=restored.trainable, opt_state=restored.opt_state
    )
