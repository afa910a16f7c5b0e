"""What a checkpoint does not hold of its model: is it what it was made with?

Under LoRA and DPO the frozen base is loaded again when a run is resumed. Adapters fit
the base that they were trained beside and no other, and so do a reference's rewards.
Whole training needs its base no more, so that naming another would do nothing. But what
config.json says about weights of the same shapes, as the epsilon of norms, acts on all.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

from jaxtrain.config import RunConfig
from jaxtrain.lora.peft_config import adapter_folder
from jaxtrain.lora.peft_tensors import WEIGHTS_FILE
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.fingerprint import fingerprint_files
from jaxtrain.models.load import LoadedModel
from jaxtrain.record.safe_text import shown
from jaxtrain.tree import dotted
from jaxtrain.types import TrainState

logger = logging.getLogger(__name__)

# Of a model's config these do not act on what it computes.
_INERT = {
    "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
    "max_position_embeddings", "output_router_logits", "router_aux_loss_coef",
}  # fmt: skip
_ROPES = ("rope.", "local_rope.")


def identify_base(run: RunConfig, model: LoadedModel) -> str | None:
    """The fingerprint of what a run starts from; None if that is not read from files.

    The adapter that a DPO run starts from is a part of its reference.
    """
    if model.fingerprint is None:
        return None
    if run.dpo is None or run.lora is None or not run.lora.init_from:
        return model.fingerprint
    adapter = adapter_folder(run.lora.init_from) / WEIGHTS_FILE
    return f"{model.fingerprint}+{fingerprint_files([adapter])}"


def describe_model(config: ModelConfig) -> dict[str, Any]:
    """What acts on a model's results beside its weights, by dotted names, for JSON."""
    fields = dotted(dataclasses.asdict(config))
    return json.loads(
        json.dumps({name: x for name, x in fields.items() if name not in _INERT})
    )


def find_changes(
    saved: Mapping[str, Any] | None, model: LoadedModel, *, stretched: bool = False
) -> str:
    """How a model differs from a checkpoint's record of it; empty if it does not.

    Args:
        saved: what `describe_model` gave, perhaps in a version of other fields; None:
            in one without this record.
        stretched: whether the run asks for another rope than it did, by its own key.
    """
    present = describe_model(model.config)
    return ", ".join(
        f"{name} {shown(then, 60)} -> {shown(present[name], 60)}"
        for name, then in (saved or {}).items()
        if name in present and present[name] != then
        if not (stretched and name.startswith(_ROPES))
    )


def check_model(
    saved: Mapping[str, Any] | None, model: LoadedModel, *, stretched: bool
) -> None:
    """Refuse a model whose weights would act otherwise than where its run began.

    Raises:
        ValueError: names what differs; see `find_changes`.
    """
    if changes := find_changes(saved, model, stretched=stretched):
        where = model.directory
        raise ValueError(
            "cannot resume: this run began with another"
            f" {f'config.json in {where}' if where else 'model.architecture'}:"
            f" {changes}. Put it back, or start in a fresh workdir"
        )


def check_base(saved: str | None, present: str | None, directory: str | None) -> None:
    """Compare the base weights of a checkpoint with the ones that were loaded.

    Args:
        saved: the checkpoint's fingerprint; None from older versions, only logged.
        present: the fingerprint of what was loaded; None if there is nothing to check.
        directory: where the weights were loaded from, for messages.

    Raises:
        ValueError: the fingerprints differ.
    """
    if present is None or saved == present:
        return
    if saved is None:
        logger.info(
            "the checkpoint is of an older version, which took no fingerprint of the"
            " weights: whether %s has still the same weights is not checked",
            directory,
        )
        return
    raise ValueError(
        "cannot resume: the weights that this run began with had the fingerprint"
        f" {saved}, and those of {directory} have {present}. Adapters, a reference and"
        " a checkpoint belong to the weights that they began with: put these back, or"
        " their name in model.name_or_path, or start in a fresh workdir"
    )


def warn_of_other_base(
    run: RunConfig,
    model: LoadedModel,
    state: TrainState,
    recorded: Mapping[str, Any],
) -> None:
    """Warn if a checkpoint that is not trained further was trained on another base.

    Unlike in training this is not an error: the base may be stored in another type.

    Args:
        recorded: what the checkpoint has of the model, nothing in older versions.
    """
    if changes := find_changes(recorded.get("model"), model):
        logger.warning("%s is not the model of the run: %s", model.directory, changes)
    present, saved = identify_base(run, model), recorded.get("base_weights")
    if saved is not None and run.dpo is None:
        saved = saved.partition("+")[0]  # the adapter is the reference's alone
    if state.frozen and None not in (saved, present) and saved != present:
        logger.warning(
            "%s holds other weights (fingerprint %s) than the run was trained beside"
            " (%s): its adapters or its reference may not fit them; name the right"
            " ones by --model",
            *(model.directory, present, saved),
        )
