"""Where the seconds of a start go, until the train step is to be compiled.

    python benchmarks/whole_run.py make DIR
    python benchmarks/start_parts.py DIR [--task=sft] [--flag=model.scan_layers=true]

It trains in this process as `jaxtrain train` does and prints when each part ends, how
long it took and how many seconds of a core, and then leaves. start_time.py has the
whole of a start, from outside.
"""

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import functools  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import pkgutil  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from typing import Any  # noqa: E402

# What is timed once everything is imported: a module, and names in it.
_PARTS = {
    "trainer": "resolve watch_disks open_workdir",
    "run.compilation_cache": "set_up",
    "run.trial": "check_objective",
    "models.load": "read_source make_plan _describe_weights fingerprint_model",
    "models.hf": "load_params match_weights",
    "models.source": "load_run_tokenizer fit_vocabulary align_special_tokens",
    "data.loading": "load_training_rows prepare_rows",
    "build": "fit_to_model make_feed init_state make_steps announce",
    "build:writers": "make_writers",
    "loop": "restore",
}


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Print when the block has ended, its seconds, and those of all cores."""
    began, used = time.perf_counter(), time.process_time()
    yield
    now = time.perf_counter()
    secs, cores = now - began, time.process_time() - used
    print(f"{now - BEGAN:7.2f} s  {secs:6.2f} s, {cores:6.2f} of cores  {name}")


def time_calls(module: Any, name: str) -> None:
    """Let a function of a module print when it ends."""
    called = getattr(module, name)

    @functools.wraps(called)
    def timed_call(*args: Any, **options: Any) -> Any:
        with timed(name):
            return called(*args, **options)

    setattr(module, name, timed_call)


def leave(*_: Any) -> None:
    """Instead of compiling."""
    with timed("the train step is to be compiled"):
        pass
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--task", choices=["sft", "dpo"], default="sft")
    parser.add_argument("--flag", action="append", default=[], help="a key of ours")
    options = parser.parse_args()
    with timed("import jaxtrain.main"):
        from jaxtrain import main as command
    importing = command.imports.importing

    @contextlib.contextmanager
    def importing_in_parts() -> Iterator[None]:
        with timed("devices and imports"), importing():
            with timed("import jax"):
                from jaxtrain.run import distributed
            time_calls(distributed, "initialize")
            yield
        for module, names in _PARTS.items():
            for name in names.split():
                time_calls(pkgutil.resolve_name(f"jaxtrain.{module}"), name)
        from jaxtrain.run.step_programs import StepPrograms

        StepPrograms.compile = leave

    command.imports.importing = importing_in_parts
    with tempfile.TemporaryDirectory() as workdir:
        command.main(
            [
                options.task,
                f"--workdir={workdir}/out",
                f"--model.name_or_path={options.folder / 'model'}",
                f"--model.tokenizer_name_or_path={options.folder / 'tokenizer'}",
                f"--data.train={options.folder / f'{options.task}.jsonl'}",
                "--data.max_length=1024",
                "--training.per_device_train_batch_size=8",
                "--training.max_steps=120",
                "--training.bf16=true",
                "--training.eval_steps=0",
                "--training.save_steps=0",
                "--training.save_final_model=false",
                *(f"--{flag}" for flag in options.flag),
            ]
        )


if __name__ == "__main__":
    main()
