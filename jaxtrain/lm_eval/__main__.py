"""The command `python -m jaxtrain.lm_eval`: flags, the evaluation, its tables."""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from jaxtrain.cli.command import Parser, file_argument
from jaxtrain.cli.ending import run_command
from jaxtrain.cli.source import find
from jaxtrain.lm_eval.model import DTYPES, JaxtrainLM
from jaxtrain.run import distributed


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The harness's results of the tasks that the command line names.

    Raises:
        ValueError: no such model or task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = arguments.tasks.split(",")
    tasks = TaskManager(include_path=arguments.include_path, include_defaults=False)
    if not set(names) <= set(tasks.all_subtasks):
        # Listing the harness's own thousands takes seconds.
        tasks = TaskManager(include_path=arguments.include_path)
    if missing := [name for name in names if not tasks.match_tasks([name])]:
        raise ValueError(
            f"--tasks: {', '.join(missing)} unknown; --include_path=DIR adds the task"
            " files of a folder"
        )
    model = JaxtrainLM(
        model_of(arguments.model),
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        dtype=arguments.dtype,
        fsdp=arguments.fsdp,
        tensor=arguments.tensor,
        seed=arguments.seed,
    )
    results = simple_evaluate(
        model,
        tasks=tasks.match_tasks(names),
        num_fewshot=arguments.num_fewshot,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        task_manager=tasks,
        log_samples=arguments.log_samples,
    )
    assert results is not None  # it is None on other ranks of the harness's own
    return results


def model_of(name: str) -> str:
    """The model that a name stands for: of a run, what it exported.

    Raises:
        ValueError: it is an adapter, or a run that has exported nothing.
    """
    source = find(name) if name else None
    if source is None or source.kind == "model":
        return name
    if source.exported is None:
        whole = "jaxtrain export writes a whole model of a run's checkpoint"
        raise ValueError(f"--model={name}: a {source.kind} without a model; {whole}")
    return str(source.exported)


def main(arguments: Sequence[str]) -> None:
    """Evaluate and show the tables.

    Raises:
        ValueError: no such model or task.
    """
    parser = Parser("lm-eval", "Evaluate a model with the lm-evaluation-harness.")
    add = parser.add_argument
    add(
        "--model",
        default="",
        help="directory, hub name or run; default: the embedded one",
    )
    add("--tasks", required=True, help="names, separated by commas")
    add("--include_path", help="a folder of task files (YAML) of your own")
    add("--batch_size", type=int, default=8, help="rows at once, over all devices")
    add("--max_length", type=int, help="tokens; default: the model's")
    add("--num_fewshot", type=int, help="examples before each question")
    add("--limit", type=float, help="the first so many documents, or share below 1")
    add("--dtype", choices=DTYPES, default="auto", help="auto: as config.json says")
    add("--fsdp", type=int, default=1, help="devices that share the weights")
    add("--tensor", type=int, default=1, help="devices that split each layer")
    add("--seed", type=int, default=0, help="of tasks that sample")
    add("--apply_chat_template", action="store_true", help="ask as in a chat")
    add("--log_samples", action="store_true", help="each answer into --output too")
    add("--output", type=file_argument, help="a JSON file for the results")
    options = parser.parse(arguments)
    distributed.initialize()
    results = evaluate(options)
    if jax.process_index() == 0:
        _show(results, options.output)


def _show(results: dict[str, Any], output: pathlib.Path | None) -> None:
    from lm_eval.utils import handle_non_serializable, make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2, default=handle_non_serializable)
        output.write_text(f"{text}\n", "utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main))
