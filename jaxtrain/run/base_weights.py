"""Weights that a checkpoint does not hold: are they the ones that it was made with?

Under LoRA and DPO the frozen base is loaded again when a run is resumed. Adapters fit
the base that they were trained beside and no other, and so do a reference's rewards.
Whole training needs its base no more, so that naming another would do nothing.
"""

import logging

from jaxtrain.config import RunConfig
from jaxtrain.lora.peft_config import adapter_folder
from jaxtrain.lora.peft_tensors import WEIGHTS_FILE
from jaxtrain.models.fingerprint import fingerprint_files
from jaxtrain.models.load import LoadedModel
from jaxtrain.types import TrainState

logger = logging.getLogger(__name__)


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
    run: RunConfig, model: LoadedModel, state: TrainState, saved: str | None
) -> None:
    """Warn if a checkpoint that is not trained further was trained on another base.

    Unlike in training this is not an error: the base may be stored in another type.

    Args:
        saved: the fingerprint in the checkpoint; None in those of older versions.
    """
    present = identify_base(run, model)
    if saved is not None and run.dpo is None:
        saved = saved.partition("+")[0]  # the adapter is the reference's alone
    if state.frozen and None not in (saved, present) and saved != present:
        logger.warning(
            "%s holds other weights (fingerprint %s) than the run was trained beside"
            " (%s): its adapters or its reference may not fit them; name the right"
            " ones by --model",
            *(model.directory, present, saved),
        )
