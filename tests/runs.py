"""Tiny runs for the tests of the trainer: two layers, width 64, the embedded data."""

import json
import os
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import safetensors.numpy

from jaxtrain.config import default_config
from jaxtrain.run.step_log import StepLog
from jaxtrain.trainer import TrainingOrchestrator

STEPS = 8
# Endings of the names of metrics that the clock and the machine say.
TIMES = ("time", "_per_sec", "_secs", "_share", "_gib", "mfu")


def tiny_config(training_type: str, model: str = "", **training: Any) -> Any:
    """A config of `STEPS` steps in float32 on one device."""
    config = default_config()
    config.training.training_type = training_type
    config.model.name_or_path = model
    if training_type == "from_scratch":
        config.model.architecture.hidden_size = 64
        config.model.architecture.intermediate_size = 96
        config.model.architecture.num_hidden_layers = 2
    config.data.max_train_rows, config.data.max_eval_rows = 48, 12
    config.data.max_length = 64
    defaults = {
        "num_gpus": 1,
        "bf16": False,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_steps": 3,
        "eval_steps": 0,
        "report_to": ("jsonl",),
    }
    for name, value in (defaults | training).items():
        section = config.training
        *path, last = name.split("__")
        for part in path:
            section = section[part]
        setattr(section, last, value)
    if training_type == "lora":
        config.training.lora.lora_dropout = 0.1  # a resumed run must repeat its draws
    return config


def train(config: Any, workdir: pathlib.Path, **datasets: Any) -> dict[str, Any]:
    """Prepare and train; the results."""
    orchestrator = TrainingOrchestrator(config, workdir=workdir)
    orchestrator.prepare()
    return orchestrator.train(**datasets)


def train_pairs(
    rows: list[dict[str, str]], workdir: pathlib.Path, **data: Any
) -> dict[str, Any]:
    """Two DPO steps on eight pairs or rows of them, with these keys of `data` set."""
    config = tiny_config("dpo", max_steps=2, save_steps=0)
    config.training.save_final_model = False
    config.training.gradient_accumulation_steps = 1
    config.training.per_device_train_batch_size = 8
    config.data.max_length = 64
    for name, value in data.items():
        setattr(config.data, name, value)
    return train(config, workdir, train_dataset=rows)


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The log without what the clock says."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.endswith(TIMES)}
        for line in lines
    ]


def weights(workdir: pathlib.Path) -> dict[str, Any]:
    """The tensors of the exported model."""
    return safetensors.numpy.load_file(workdir / "model" / "model.safetensors")


def act_at_log(step: int, act: Callable[[], None]) -> Any:
    """`StepLog.ask` that does something once a record of `step` is due."""
    ask = StepLog.ask

    def ask_and_act(self: StepLog, *, is_last: bool) -> None:
        ask(self, is_last=is_last)
        if self._progress.step == step:
            act()

    return ask_and_act


def interrupt() -> None:
    raise KeyboardInterrupt


def _train_and_die(training_type: str, model: str, workdir: str) -> None:
    """Run as a subprocess: a run that SIGKILLs itself as it logs step 6."""
    write = StepLog.write

    def write_or_die(self: StepLog, ahead: int = 0) -> None:
        if self._is_owed:
            self.take(ahead)
        logged = self._unwritten
        write(self)
        if logged is not None and logged[0] == 6:
            os.kill(os.getpid(), signal.SIGKILL)

    StepLog.write = write_or_die  # type: ignore[method-assign]
    train(tiny_config(training_type, model), pathlib.Path(workdir))


if __name__ == "__main__":
    _train_and_die(*sys.argv[1:])
