"""Train: `python -m jaxtrain.main --config=configs/dpo.py --workdir=out/dpo`.

The same as `jaxtrain train dpo --workdir=out/dpo`. Any key can be set by a flag, which
wins over the file: `--training.dpo.beta=0.2`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from jaxtrain.cli.command import ConfigParser, Once, default_workdir
from jaxtrain.cli.ending import Interrupted, run_command
from jaxtrain.data import sources
from jaxtrain.record import logs
from jaxtrain.run import collector, interrupts, lock, preflight
from jaxtrain.run.buffer import as_home


def main(arguments: Sequence[str]) -> None:
    """Train as the configuration says.

    Raises:
        ValueError: the flags, the configuration, the model or the data.
        Interrupted: Ctrl-C; says how the run goes on.
    """
    parser = ConfigParser(
        "train",
        "Train a model:\n\n"
        "  jaxtrain train dpo --workdir=out/dpo\n"
        "  jaxtrain train run.yaml --training.learning_rate=5e-4\n\n"
        "The same command again goes on where a stopped run was.",
    )
    parser.add_argument(
        "--workdir",
        action=Once,
        help="folder or address (gs://, s3://) for checkpoints, logs and the exported"
        " model (default: out/ and the configuration's name)",
    )
    options, config, run = parser.read(arguments)
    named = options.workdir or default_workdir(options.config)
    preflight.check_workdir(named)  # as it is written: a Path shortens an address
    workdir = as_home(named)
    lock.refuse_if_held(workdir, may_wait=False)
    preflight.check(preflight.as_begun(run, config, workdir), workdir)
    sources.check_sources(run)
    if not sources.names_evaluation_rows(run):
        sources.check_evaluation_rows(run)
    logs.show_progress()
    interrupts.leave_on_sigterm()
    # Only now: what is wrong with a flag or a path need not wait for jax.
    with collector.importing():
        from jaxtrain.run import distributed

        with distributed.initializing():
            from jaxtrain import trainer
    try:
        orchestrator = trainer.TrainingOrchestrator(config, workdir=workdir)
        orchestrator.prepare()
        interrupts.check()
        rows = orchestrator.prepare_data()
        interrupts.check()
        orchestrator.train(*rows)
    except KeyboardInterrupt as interrupt:
        raise Interrupted(_how_to_go_on(workdir)) from interrupt


def _how_to_go_on(workdir: Any) -> str:
    steps = preflight.saved_steps(workdir / "checkpoints")
    if not steps:
        return "interrupted; no step is saved yet, so the same command starts anew"
    return (
        f"interrupted; step {steps[-1]} is saved in {workdir}: the same command goes on"
        " from there"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
