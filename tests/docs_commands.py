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
from collections.abc import Iterator, Sequence
from unittest import mock

import jax

from jaxtrain.cli import COMMANDS
from jaxtrain.cli.command import ConfigParser
from jaxtrain.cli.ending import run_command

ROOT = pathlib.Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
_HEREDOC = re.compile(r"<<'(\w+)'")
_OURS = re.compile(r"python -m (jaxtrain[\w.]*)([^\n;&|>]*)")
_COMMAND = re.compile(r"(?:^|[\s/(])jaxtrain ([\w-]+)([^\n;&|>]*)")
_MAX_STEPS = re.compile(r"(--(?:config\.)?training\.max_steps=|\bmax_steps[:=] ?)(\d+)")

# Every training command of a page is run with these flags behind its own, so that the
# two columns of what is run and what is written differ by them alone; `max_steps` is
# divided by ten. A page's command stays what a reader would want to run.
SHORTER = (
    "--training.per_device_train_batch_size=2",
    "--training.logging_steps=1",
    "--training.eval_on_start=False",
    "--data.max_train_rows=32",
)
SHORTER_EVALUATION = (
    "--training.per_device_eval_batch_size=2",
    "--data.max_eval_rows=4",
)
SHORTER_GENERATION = (
    "--training.generation.num_prompts=2",
    "--training.generation.max_new_tokens=4",
)
SHORTER_DPO = (
    "--training.dpo.max_length=64",
    "--training.dpo.max_prompt_length=32",
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
    if ours := _our_command(command):
        return _run_module(*ours)
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


def _our_command(command: str) -> tuple[str, list[str]] | None:
    """The module and the arguments of `jaxtrain ...` or `python -m jaxtrain...`."""
    if re.search(r"[;&|>\n]", command):
        return None
    words = shlex.split(command, comments=True)
    if words[0].endswith("jaxtrain") and words[1] in COMMANDS:
        return COMMANDS[words[1]][0], words[2:]
    if words[:2] == ["python", "-m"] and words[2].startswith("jaxtrain"):
        return words[2], words[3:]
    return None


def _run_script(text: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(text, "<page>", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def _run_module(module: str, arguments: list[str]) -> str:
    loaded = importlib.import_module(module)
    if hasattr(loaded, "__path__"):  # a package, whose command has its own file
        loaded = importlib.import_module(f"{module}.__main__")
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        mock.patch.object(sys, "path", ["", *sys.path]),  # as python -m has it
    ):
        is_training = module == "jaxtrain.main"
        given = [*arguments, *shorter(arguments)] if is_training else arguments
        code = run_command(loaded.main, given)
        assert not code, f"exit code {code}: {printed.getvalue()}"
    return printed.getvalue()


def shorter(arguments: Sequence[str]) -> list[str]:
    """The flags that a training command of a page is run with, behind its own."""
    _, config, _ = training_parser().read(arguments)
    given = " ".join(arguments)
    flags = [*SHORTER]
    if "max_steps" not in given and not 0 < config.training.max_steps <= 2:
        flags.append("--training.max_steps=2")
    if "eval_steps" not in given and "data.eval" not in given:
        flags.append("--training.eval_steps=0")  # one compilation less
    else:
        flags += SHORTER_EVALUATION
    if config.training.generation.enabled or config.training.generation.metrics:
        flags += SHORTER_GENERATION
    if config.training.training_type == "dpo":
        flags += SHORTER_DPO
    else:
        flags.append("--data.max_length=64")
    # A flag that is given twice is refused.
    return [flag for flag in flags if flag.partition("=")[0].strip("-") not in given]


def training_parser() -> ConfigParser:
    """A parser that knows the flags of every command that takes a configuration."""
    parser = ConfigParser("train", "")
    for name in ("workdir", "topology"):
        parser.add_argument(f"--{name}")
    return parser


def find_unknown_flag(command: str) -> str | None:
    """What a `jaxtrain` command in the command would refuse; None if nothing."""
    found = [*_OURS.findall(command)]
    for name, rest in _COMMAND.findall(command):
        if name not in COMMANDS:
            return f"there is no command {name}"
        found.append((COMMANDS[name][0], rest))
    for module, rest in found:
        arguments = shlex.split(rest, comments=True)
        if ".yaml" in rest:
            continue  # its file is made by the page; running it checks it
        if module in ("jaxtrain.main", "jaxtrain.aot", "jaxtrain.aot.__main__"):
            try:
                training_parser().read(arguments)
            except (ValueError, OSError) as error:
                return str(error)
        elif importlib.util.find_spec(module) is None:
            return f"there is no module {module}"
    return None
