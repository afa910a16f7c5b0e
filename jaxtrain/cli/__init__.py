"""The command `jaxtrain`, and `python -m jaxtrain`: `COMMANDS` is what it can do."""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

import jaxtrain
from jaxtrain.cli.ending import run_command

# Name -> its module, whose `main(arguments)` runs it, and what it does. A module may
# have a function of the name `<command>_main` instead.
COMMANDS = {
    "train": ("jaxtrain.main", "train a model as a configuration says"),
    "eval": ("jaxtrain.cli.evaluate", "evaluate a model or a run on data"),
    "generate": ("jaxtrain.cli.generate", "continue prompts"),
    "chat": ("jaxtrain.cli.chat", "talk with a model or a run"),
    "export": ("jaxtrain.cli.export", "write a checkpoint as a Hugging Face model"),
    "push": ("jaxtrain.cli.push", "upload an export to the Hugging Face hub"),
    "lm-eval": ("jaxtrain.lm_eval.__main__", "run tasks of lm-evaluation-harness"),
    "inspect": ("jaxtrain.data.inspect", "look at data before training on it"),
    "report": ("jaxtrain.report.__main__", "write one HTML page of one or more runs"),
    "aot": ("jaxtrain.aot.__main__", "compile for chips that are not there"),
    "recipes": ("jaxtrain.cli.configs", "list the recipes for published models"),
    "configs": ("jaxtrain.cli.configs", "list the configurations that come along"),
}


# What elsewhere is a command -> what it is here.
_INSTEAD = {
    **{name: f"write `jaxtrain train {name}`" for name in ("sft", "dpo", "lora")},
    "finetune": "write `jaxtrain train`",
    "resume": "the `jaxtrain train` that began the run resumes it",
    "merge": "a run's model/ is merged, and `jaxtrain export` merges a checkpoint",
    "convert": "write `jaxtrain export`",
    "quantize": "training.lora.quantization quantizes a frozen base; exports are whole",
    "test": "write `jaxtrain eval`",
    "infer": "write `jaxtrain generate`",
    "predict": "write `jaxtrain generate`",
    "serve": "exports load in vLLM and transformers; `jaxtrain chat` is for one person",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; return its exit code."""
    return run_command(_dispatch, arguments)


def _dispatch(arguments: list[str]) -> int | None:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"jaxtrain {jaxtrain.__version__}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else "see jaxtrain --help"
        hint = _INSTEAD.get(name, hint)
        raise ValueError(
            f"jaxtrain has no command {name!r}; {hint} (there are"
            f" {', '.join(COMMANDS)})"
        )
    # As `python -m` has it: functions of one's own are found in the folder one is in.
    if not {"", os.getcwd()} & {*sys.path}:
        sys.path.append(os.getcwd())
    module = importlib.import_module(COMMANDS[name][0])
    command = getattr(module, f"{name}_main", None) or module.main
    return command(rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "Train language models in JAX.",
            "",
            "  jaxtrain train dpo --workdir=out/dpo",
            "",
            *lines,
            "",
            "jaxtrain COMMAND --help says more; --debug shows an error's traceback.",
        ]
    )
