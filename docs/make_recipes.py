"""Write docs/recipes.md and the memory in each recipe, from what was compiled for it.

python docs/make_recipes.py
python docs/make_recipes.py --compile [RECIPE ...]

With `--compile`, the train step of each recipe, or of those that are named, is compiled
for its machine first, at the sizes of the published config.json in configs/shapes. That
takes about a minute each and needs jax 0.12, libtpu and jax's CUDA plugin, but no
accelerator. What it found is kept in docs/recipes.json.
"""

import hashlib
import json
import pathlib
import re
import sys
from typing import Any

import yaml

from jaxtrain.config.shipped import read_recipe, shipped_configs
from jaxtrain.config.yaml_loader import YamlLoader

DOCS = pathlib.Path(__file__).resolve().parent
OUTPUT, FOUND = DOCS / "recipes.md", DOCS / "recipes.json"
SHAPES = DOCS.parent / "configs" / "shapes"
TOPOLOGIES = {
    "GPU of 24 GB": "rtx4090:1",
    "GPU of 40 GB": "a100-40:1",
    "GPU of 80 GB": "h100:1",
    "TPU v5e-8": "v5e:2x4",
    "TPU v6e-8": "v6e:2x4",
}
# What no byte of a step depends on.
IRRELEVANT = (
    "learning_rate", "lr_scheduler_type", "warmup_ratio", "num_train_epochs",
    "per_device_eval_batch_size", "save_total_limit",
)  # fmt: skip
HEADER = """# Recipes

A recipe is a configuration for a published model on one machine. It is used by name:

```bash
jaxtrain train qwen3-4b-dpo-lora --data.train=pairs.jsonl
```

`jaxtrain recipes` lists them, and `jaxtrain recipes qwen3-4b-dpo-lora > mine.yaml`
gives you one to change. Any key of it can be set by a flag, such as
`--training.learning_rate=5e-6`. Another model of about the same size is
`--model=owner/name`; it then needs about the same memory.

The model comes from the hub when the run starts, or from a directory that you name with
`--model`. Llama and Gemma are gated: accept the licence on the model's page and log in
with `hf auth login`. Recipes with QLoRA need `pip install 'jaxtrain[qlora]'`.

The memory is the peak of one device. It comes from compiling the train step ahead of
time for the machine, as `jaxtrain aot` does with `--topology` and with
`--model=configs/shapes/...`. "State" is the weights, the optimizer's state and a batch.
An RTX 4090 stands for a GPU of 24 GB and an A100 for one of 40 GB. jax takes three
quarters of a GPU's memory when it starts, so a recipe that needs more sets
`XLA_PYTHON_CLIENT_MEM_FRACTION` in its command.

| recipe | what it does | machine | rows a device | state | peak |
|---|---|---|---|---|---|
"""
FOOTER = """
This page is made of the recipes in `configs/recipes` and of
[recipes.json](recipes.json) by `python docs/make_recipes.py`.
"""


def recipes() -> dict[str, pathlib.Path]:
    """The files of all recipes by name."""
    return {k: path for k, path in shipped_configs().items() if path.suffix == ".yaml"}


def shape_of(name: str) -> pathlib.Path:
    """The directory with the published config.json of a recipe's model."""
    (found,) = (each for each in SHAPES.iterdir() if name.startswith(f"{each.name}-"))
    return found


def fingerprint(path: pathlib.Path) -> str:
    """A hash of everything in a recipe that its memory may depend on."""
    content = yaml.load(path.read_text("utf-8"), YamlLoader)
    training = content["training"]
    content["training"] = {k: training[k] for k in training if k not in IRRELEVANT}
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def compile_recipe(name: str) -> dict[str, Any]:
    """Compile the step of a recipe for its machine; GiB of one device."""
    from jaxtrain.aot import compile_for, describe_devices
    from jaxtrain.config import load_config

    config, path = load_config(name), recipes()[name]
    config.model.name_or_path = str(shape_of(name))
    topology = TOPOLOGIES[read_recipe(path).machine]
    report = compile_for(config, describe_devices(topology), topology)
    if not report.fits:
        raise SystemExit(f"{name} does not fit: {report.refusal or report}")
    gib = 2.0**30
    return {
        "fingerprint": fingerprint(path),
        "topology": topology,
        "state_gib": round(report.argument_bytes / gib, 2),
        "peak_gib": round(report.device_bytes / gib, 2),
        "memory_gib": report.chip.memory_bytes / gib,
        "tokens": report.tokens,
    }


def memory_line(found: dict[str, Any]) -> str:
    """The comment of a recipe that says how much memory it needs."""
    share = f"{found['peak_gib']:.1f} GiB of {found['memory_gib']:g}"
    return f"# Memory: {share} on each device, by `jaxtrain aot`."


def render(found: dict[str, dict[str, Any]]) -> str:
    """The whole page."""
    rows = []
    for name, path in recipes().items():
        recipe, step = read_recipe(path), found[name]
        training = yaml.load(path.read_text("utf-8"), YamlLoader)["training"]
        counts = [
            training["per_device_train_batch_size"],
            training.get("gradient_accumulation_steps", 1),
        ]
        rows.append(
            f"| `{name}` | {recipe.model}, {recipe.method} | {recipe.machine}"
            f" | {counts[0]} x {counts[1]} | {step['state_gib']:.1f} GiB"
            f" | {step['peak_gib']:.1f} of {step['memory_gib']:g} GiB |\n"
        )
    return HEADER + "".join(rows) + FOOTER


def main(arguments: list[str]) -> None:
    """Compile what is asked for, and write the page and the recipes' comments."""
    found = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {}
    if arguments[:1] == ["--compile"]:
        for name in arguments[1:] or recipes():
            found[name] = compile_recipe(name)
            print(name, found[name], flush=True)
            kept = {each: found[each] for each in recipes() if each in found}
            FOUND.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    for name, path in recipes().items():
        text = re.sub("(?m)^# Memory: .*$", memory_line(found[name]), path.read_text())
        path.write_text(text, encoding="utf-8")
    OUTPUT.write_text(render(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
