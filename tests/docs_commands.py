"""The shell commands of Markdown pages, and how the tests run them: in this process.

A new process for each would spend the tests' time on imports and compilations.
"""

import contextlib
import importlib
import importlib.util
import io
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
from absl import flags
from ml_collections import config_flags

import jaxtrain.main

ROOT = pathlib.Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"<<'(\w+)'")
_OURS = re.compile(r"python -m (jaxtrain[\w.]*)([^\n;&|>]*)")
_OURS = re.compile(r"python -m (jaxtrain[\w.]*)([^\n;&|>]*)")
_MAX_STEPS = re.compile(r"(--config\.training\.max_steps=|\bmax_steps[:=] ?)(\d+)")

# Every training command of a page is run with these flags behind its own, so that the
# two columns of what is run and what is written differ by them alone; `max_steps` is
# divided by ten. A page's command stays what a reader would want to run.
SHORTER = (
    "--config.training.per_device_train_batch_size=2",
    "--config.training.per_device_eval_batch_size=2",
    "--config.training.logging_steps=1",
    "--config.training.eval_on_start=False",
    "--config.data.max_length=64",
    "--config.data.max_train_rows=32",
    "--config.data.max_eval_rows=4",
    "--config.training.generation.num_prompts=2",
    "--config.training.generation.max_new_tokens=4",
)
SHORTER_DPO = (
    "--config.training.dpo.max_length=64",
    "--config.training.dpo.max_prompt_length=32",
)


def blocks(page: pathlib.Path) -> list[str]:
    """The page's ```bash blocks."""
    return _BLOCK.findall(page.read_text("utf-8"))


def commands(block: str) -> Iterator[str]:
    """Commands of a block: lines with their continuations and heredocs, no comments."""
    lines = iter(block.splitlines())
    for line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        command = line
        while command.endswith("\\"):
            command = f"{command[:-1].rstrip()} {next(lines).strip()}"
        if heredoc := _HEREDOC.search(command):
            for inner in lines:
                command += f"\n{inner}"
                if inner == heredoc[1]:
                    break
        yield command


def check_syntax(script: str) -> None:
    """Raise AssertionError where bash cannot read it."""
    checked = subprocess.run(
        ["bash", "-n"], input=script, capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, f"bash cannot read {script!r}: {checked.stderr}"


def shorten(command: str) -> str:
    """The same with a tenth of its steps."""

    def tenth(found: re.Match[str]) -> str:
        return f"{found[1]}{math.ceil(int(found[2]) / 10)}"

    return _MAX_STEPS.sub(tenth, command)


def run(command: str) -> str:
    """Run one command in the current directory; what it printed.

    Raises:
        AssertionError: it failed.
    """
    with on_one_device():
        return _run(shorten(command))


@contextlib.contextmanager
def on_one_device() -> Iterator[None]:
    """Of the eight that conftest.py makes: programs of one compile in half the time."""
    first = jax.devices()[:1]
    with (
        mock.patch.object(jax, "devices", lambda *_: first),
        mock.patch.object(jax, "device_count", lambda *_: 1),
    ):
        yield


def _run(command: str) -> str:
    if command.startswith("python - <<"):
        return _run_script(command.split("\n", 1)[1].rsplit("\n", 1)[0])
    if command.startswith("python -m "):
        _, _, module, *arguments = shlex.split(command, comments=True)
        return _run_module(module, arguments)
    folder = pathlib.Path(sys.executable).parent  # which `python` is
    finished = subprocess.run(
        ["bash", "-ec", command],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"},
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def _run_script(text: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "<page>", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def _run_module(module: str, arguments: list[str]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if module == "jaxtrain.main":
            _train(arguments)
        else:
            name = f"python -m {module}"
            loaded = importlib.import_module(module)
            if hasattr(loaded, "__path__"):  # a package, whose command has its own file
                loaded = importlib.import_module(f"{module}.__main__")
            function = loaded.main
            with_name = module == "jaxtrain.data.inspect"
            code = function([name, *arguments] if with_name else arguments)
            assert not code, f"exit code {code}: {printed.getvalue()}"
    return printed.getvalue()


def _train(arguments: Sequence[str]) -> None:
    parsed = parse_main(arguments)
    shorter = [*SHORTER]
    given = " ".join(arguments)
    if "max_steps" not in given and not 0 < parsed.config.training.max_steps <= 2:
        shorter.append("--config.training.max_steps=2")
    if "eval_steps" not in given:  # one compilation less
        shorter.append("--config.training.eval_steps=0")
    if parsed.config.training.training_type == "dpo":
        shorter += SHORTER_DPO
    parsed = parse_main([*arguments, *shorter])
    with (
        mock.patch.object(jaxtrain.main, "_CONFIG", _flag(parsed.config)),
        mock.patch.object(jaxtrain.main, "_WORKDIR", _flag(parsed.workdir)),
        mock.patch.object(jaxtrain.main, "_MODEL", _flag(parsed.model)),
        # It would take the log away from pytest.
        mock.patch.object(jaxtrain.main, "_set_up_logging"),
        mock.patch.object(sys, "path", ["", *sys.path]),  # as python -m has it
    ):
        jaxtrain.main.main(["jaxtrain.main"])


def parse_main(arguments: Sequence[str]) -> Any:
    """The flags of `jaxtrain.main`, or of `jaxtrain.aot`, as absl reads them.

    Raises:
        flags.Error, AttributeError, KeyError, ValueError: a flag or key is unknown.
    """
    values = flags.FlagValues()
    argv = ["jaxtrain.main", *arguments]
    config_flags.DEFINE_config_file(
        "config", None, flag_values=values, lock_config=True, sys_argv=argv
    )
    for name in ("workdir", "model", "topology"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    rest = values(argv)[1:]
    assert not rest, f"unexpected arguments {rest}"
    return values


def find_unknown_flag(command: str) -> str | None:
    """What `python -m jaxtrain...` in the command would refuse; None if nothing."""
    for module, rest in _OURS.findall(command):
        arguments = shlex.split(rest, comments=True)
        if "from_yaml" in rest:
            continue  # its file is made by the page; running it checks it
        if module in ("jaxtrain.main", "jaxtrain.aot"):
            try:
                assert parse_main(arguments).config.training, "no --config"
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        elif importlib.util.find_spec(module) is None:
            return f"there is no module {module}"
    return None


def _flag(value: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(value=value)
