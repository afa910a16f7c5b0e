"""The model card of an exported directory: README.md as the Hugging Face hub reads it.

It tells how the weights were made without saying where files lie on this machine: data
sets and base models that are local are named by their last part alone.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import yaml

from jaxtrain import __version__
from jaxtrain.config import RunConfig
from jaxtrain.data.batches.mixture import parse_mixture
from jaxtrain.record.provenance import versions
from jaxtrain.record.safe_text import escape_controls, mask_secrets
from jaxtrain.run import hub

CARD_FILE = "README.md"
_MOST_CHARACTERS = 100_000  # of a base's card, whose header stands at its beginning
_METHODS = {
    "from_scratch": "training from random weights",
    "sft": "supervised fine-tuning",
    "lora": "supervised fine-tuning with adapters",
    "dpo": "direct preference optimization (arXiv:2305.18290)",
}
_EMBEDDED = "the data that come with jaxtrain (King James text, public domain)"
_USE_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
"""
_USE_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, ".")  # this directory, or its name on the hub
"""


def write_card(
    directory: pathlib.Path,
    run: RunConfig,
    step: int,
    base: str | os.PathLike[str] | None,
    *,
    is_adapter: bool,
) -> None:
    """Write README.md for exported weights, over one that the base's directory had.

    Args:
        step: the optimizer step whose weights these are.
        base: the directory that the run's weights were loaded from, whose licence holds
            for what is made of them; None for new weights.
        is_adapter: whether the directory holds a PEFT adapter and not a whole model.
    """
    is_new = base is None or run.training_type == "from_scratch"
    license_of_base = {} if is_new else read_license(pathlib.Path(base or ""))
    text = make_card(run, step, license_of_base, is_adapter=is_adapter)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CARD_FILE).write_text(text, encoding="utf-8")


def read_license(directory: pathlib.Path) -> dict[str, str]:
    """What the card of a base model says of its licence; {} where there is none."""
    try:
        with (directory / CARD_FILE).open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MOST_CHARACTERS)
        header = yaml.safe_load(text.split("---")[1]) if text[:3] == "---" else {}
    except (OSError, IndexError, yaml.YAMLError, RecursionError):
        return {}
    values = header if isinstance(header, dict) else {}
    return {
        key: value
        for key in ("license", "license_name", "license_link")
        if isinstance(value := values.get(key), str) and len(value) < 200
    }


def make_card(
    run: RunConfig, step: int, license_of_base: Mapping[str, str], *, is_adapter: bool
) -> str:
    """The card's text: YAML for the hub between two lines of ---, then Markdown."""
    metadata = {**license_of_base, **_metadata(run, is_adapter=is_adapter)}
    header = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    base = _base(run)
    kind = "A LoRA adapter of" if is_adapter else "A language model from"
    method = _METHODS[run.training_type]
    if run.dpo is not None:
        method = _METHODS["dpo"]
    elif run.training_type != "lora" and run.lora is not None:
        method += " with adapters"
    if run.objective not in ("next_token", "preference"):
        method += f", with the loss {run.objective}"
    use = _USE_ADAPTER.format(base=base) if is_adapter else _USE_MODEL
    lines = [
        f"# {_title(run)}",
        "",
        f"{kind} {base}, made by {method} with jaxtrain {__version__}. These are the"
        f" weights of optimizer step {step}.",
        "",
        "## Use",
        "",
        f"```python\n{use}```",
        "",
        "## Training",
        "",
        *_table("setting", {**_data(run), **_settings(run)}),
        "",
        "### Framework versions",
        "",
        *(f"- {name} {version}" for name, version in versions().items()),
    ]
    return f"---\n{header}---\n\n" + "\n".join(lines) + "\n"


def _metadata(run: RunConfig, *, is_adapter: bool) -> dict[str, Any]:
    """What the hub reads: names of its own only, as it refuses any others."""
    base = None
    if run.training_type != "from_scratch":
        base = hub.base_name(run.model.name_or_path)
    tags = ["jaxtrain", "dpo" if run.dpo is not None else run.training_type]
    if is_adapter:
        tags += ["lora", "transformers"]
        tags += [f"base_model:adapter:{base}"] if base else []
    data = [name for name, _ in _data_sets(run) if hub.base_name(name)]
    found = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "base_model_relation": "finetune" if base and not is_adapter else None,
        "datasets": [name for name in data if not _looks_like_file(name)],
        "tags": sorted({*tags}),
    }
    return {name: value for name, value in found.items() if value}


def _settings(run: RunConfig) -> dict[str, Any]:
    """The settings that make the result, by their keys."""
    optimizer, schedule, loop = run.optimizer, run.schedule, run.loop
    found: dict[str, Any] = {
        "objective": run.objective,
        "learning_rate": optimizer.learning_rate,
        "lr_scheduler_type": schedule.lr_scheduler_type,
        "warmup": f"{schedule.warmup_steps} steps"
        if schedule.warmup_steps
        else f"{schedule.warmup_ratio:g} of all steps",
        "optimizer": optimizer.optimizer,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "per_device_train_batch_size": loop.per_device_train_batch_size,
        "gradient_accumulation_steps": loop.gradient_accumulation_steps,
        "data-parallel devices": run.mesh.row_shards,
        "max_length": run.data.max_length,
        "packing": run.data.packing,
        "compute dtype": run.precision.compute_dtype,
        "seed": loop.seed,
    }
    if loop.max_steps > 0:
        found["max_steps"] = loop.max_steps
    else:
        found["num_train_epochs"] = loop.num_train_epochs
    sections = {
        "lora": (run.lora, ("r", "lora_alpha", "lora_dropout", "target_modules")),
        "dpo": (run.dpo, ("beta", "loss_type", "max_prompt_length")),
    }
    for name, (section, keys) in sections.items():
        if section is not None:
            found |= {f"{name}.{key}": getattr(section, key) for key in keys}
    return found


def _data(run: RunConfig) -> dict[str, Any]:
    named = [
        _short(name) + (f" (weight {weight:g})" if weight is not None else "")
        for name, weight in _data_sets(run)
    ]
    shown = {"training data": ", ".join(named) or _EMBEDDED}
    held_out = [_short(path) for path in run.data.eval_paths.values() if path]
    return shown | ({"evaluation data": ", ".join(held_out)} if held_out else {})


def _data_sets(run: RunConfig) -> list[tuple[str, float | None]]:
    """What `data.train` names, with weights in a mixture."""
    mixture = parse_mixture(run.data.train)
    if mixture is not None:
        return [*mixture]
    return [(str(run.data.train), None)] if run.data.train else []


def _title(run: RunConfig) -> str:
    name = "A new model"
    if run.training_type != "from_scratch":
        name = _base(run)
    return f"{name}, {'dpo' if run.dpo is not None else run.training_type}"


def _base(run: RunConfig) -> str:
    if run.training_type == "from_scratch":
        return "random weights"
    name = run.model.name_or_path
    return _cell(_short(name)) if name else "jaxtrain's small model"


def _short(name: str) -> str:
    """The name on the hub; of a path, an address or anything else the last part."""
    published = hub.base_name(name)
    if published and not _looks_like_file(name):
        return published
    last = re.split(r"[?#]", name)[0].rstrip("/\\")
    return re.split(r"[/\\]", last)[-1] or "data"


def _looks_like_file(name: str) -> bool:
    endings = r"\.(jsonl?|parquet|csv|arrow|array_record(-\d+-of-\d+)?|txt|gz|zst)$"
    return re.search(endings, name) is not None


def _table(head: str, values: Mapping[str, Any]) -> list[str]:
    rows = mask_secrets(values)
    return [
        f"| {head} | value |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in rows.items()),
    ]


def _cell(value: Any) -> str:
    """A value that cannot leave its cell: one line, and no bar or markup of HTML."""
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    text = "none" if value is None else str(value)
    text = escape_controls(" ".join(text.split()))
    return text.replace("|", r"\|").replace("<", "&lt;")
