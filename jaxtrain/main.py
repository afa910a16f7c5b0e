"""Command line: `python -m jaxtrain.main --config=configs/dpo.py --workdir=out/dpo`.

Any key can be overridden: `--config.training.dpo.beta=0.2`.
"""

import logging
import sys

from absl import app, flags
from ml_collections import config_flags

logger = logging.getLogger("jaxtrain.main")  # run as __main__

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file, e.g. configs/dpo.py.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, logs and the exported model."
)
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "A local Hugging Face directory or a hub name; sets config.model.name_or_path.",
)


def main(argv: list[str]) -> None:
    """Train as the configuration says; exit with 2 and the reason if it can't."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    # Imported here so that --help and usage errors need not wait for jax.
    from jaxtrain import trainer
    from jaxtrain.data.stream.batches import BadRowsError
    from jaxtrain.run import distributed

    _set_up_logging()
    distributed.initialize()
    config = _CONFIG.value
    if _MODEL.value is not None:
        config.model.name_or_path = _MODEL.value
    try:
        orchestrator = trainer.TrainingOrchestrator(config, workdir=_WORKDIR.value)
        orchestrator.prepare()
        train_data, eval_data = orchestrator.prepare_data()
    except ValueError as error:
        logger.error("%s", error)
        sys.exit(2)
    try:
        orchestrator.train(train_data, eval_data)
    except BadRowsError as error:  # of a stream, whose rows are checked as they come
        logger.error("%s", error)
        sys.exit(2)


def _set_up_logging() -> None:
    """Our own lines at INFO; of the libraries', warnings only."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(levelname).1s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,  # absl has put its own handler there
    )
    logging.getLogger("absl").setLevel(logging.WARNING)
    logging.getLogger("jaxtrain").setLevel(logging.INFO)


def run() -> None:
    """Entry point of the `jaxtrain` command."""
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)


if __name__ == "__main__":
    run()
