"""What training costs on 8 to 2048 TPUs: the real step, compiled for chips not there.

    PYTHONPATH=. python benchmarks/scaling.py --out scaling.jsonl [--only 70b_sft]

Qwen2.5-3B, Llama-3.1-8B and -70B, SFT and DPO, on slices of v5p (`CHIPS`), a row of
4096 tokens or a pair of 2048 each to a device: as chips double, so does the batch. Then
`FIXED`: one batch on ever more chips. Then `MIXTURES`: mixtures of experts, all weights
and LoRA, on v5e, v5p and H100s, with and without an axis of experts. Adds a line of
JSON a case to `--out`, leaving out those already there (stop it and start it as you
like), and prints the tables of docs/scaling.md. Needs jax[tpu] and no TPU, for H100s
jax[cuda13] and no GPU (`--only h100`); a case takes a minute or more of one core.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from jaxtrain import aot  # first: it tells jax that no TPU is to be looked for
from jaxtrain.config import default_config

GIB = 2.0**30
SHAPES = pathlib.Path(__file__).resolve().parent.parent / "configs" / "shapes"
MODELS = {
    "3b": "qwen2.5-3b",
    "8b": "llama-3.1-8b",
    "70b": "llama-3.1-70b",
    "qwen3": "qwen3-30b-a3b",
    "gpt-oss": "gpt-oss-20b",
    "glm": "glm-4.5-air",
}
TITLES = {
    "3b": "Qwen2.5-3B",
    "8b": "Llama-3.1-8B",
    "70b": "Llama-3.1-70B",
    "qwen3": "Qwen3-30B-A3B",
    "gpt-oss": "gpt-oss-20b",
    "glm": "GLM-4.5-Air",
}
DENSE = ("3b", "8b", "70b")
LENGTHS = {"sft": 4096, "dpo": 2048, "lora": 4096}
CHIPS = {8: "2x2x2", 32: "2x4x4", 128: "4x4x8", 512: "8x8x8", 2048: "8x16x16"}
V5E_CHIPS = {16: "4x4", 64: "8x8", 256: "16x16"}
# Devices that share one copy of weights and state, by chips: whole axes of their
# torus, so that rings close. More would save little memory; the rest of them is `data`.
FSDP = {8: 8, 32: 32, 128: 32, 512: 64, 2048: 128}


@dataclasses.dataclass(frozen=True)
class Case:
    """One run; `tensor` devices share `rows` rows (or pairs)."""

    model: str
    training: str
    chips: int
    rows: int = 1
    tensor: int = 1
    fsdp: int = 0  # 0: by `FSDP`
    expert: int = 1
    chip: str = "v5p"
    remat: str = "full"

    @property
    def topology(self) -> str:
        shape = {"v5p": CHIPS, "v5e": V5E_CHIPS}.get(self.chip, {}).get(self.chips)
        return f"{self.chip}:{shape or self.chips}"

    @property
    def length(self) -> int:
        """Tokens of a row; a v5e's 16 GiB hold activations of half as many."""
        return LENGTHS[self.training] // (2 if self.chip == "v5e" else 1)

    @property
    def name(self) -> str:
        layout = f"_{self.chip}" * (self.chip != "v5p")
        layout += f"_expert{self.expert}" * (self.expert > 1)
        layout += f"_tensor{self.tensor}" * (self.tensor > 1)
        layout += f"_rows{self.rows}" * (self.rows > 1)
        layout += f"_{self.remat}" * (self.remat != "full")
        return f"{self.model}_{self.training}_{self.chips}{layout}"

    @property
    def config(self) -> Any:
        config = default_config()
        config.model.name_or_path = str(SHAPES / MODELS[self.model])
        config.model.scan_layers = True  # for GPUs too: one layer is compiled, not all
        config.data.max_length = self.length
        training = config.training
        training.training_type = self.training
        training.gradient_checkpointing = True
        training.remat_policy = self.remat
        training.deepspeed.zero_stage = 3
        training.per_device_train_batch_size = self.rows
        training.gradient_accumulation_steps = 1
        fsdp = self.fsdp or FSDP[self.chips]
        config.mesh.fsdp, config.mesh.tensor = fsdp, self.tensor
        config.mesh.expert = self.expert
        config.mesh.data = self.chips // fsdp // self.tensor // self.expert
        return config


GROWING = [
    Case(model, training, chips)
    for chips in (8, 2048, 128, 512, 32)  # the ends first
    for training in ("sft", "dpo")
    for model in DENSE
]
# 512 rows of 4096 tokens, 2.1 M tokens a step, whatever the chips.
FIXED = [
    Case("70b", "sft", 128, rows=4),
    Case("70b", "sft", 512),
    Case("70b", "sft", 2048, rows=2, tensor=8, fsdp=16),
]
# Devices that a mixture needs, by model, training and chip.
_NEEDED = {
    ("gpt-oss", "lora"): {"v5e": 16, "v5p": 8, "h100": 8},
    ("gpt-oss", "sft"): {"v5e": 64, "v5p": 8, "h100": 8},
    ("qwen3", "lora"): {"v5e": 16, "v5p": 8, "h100": 8},
    ("qwen3", "sft"): {"v5e": 64, "v5p": 8, "h100": 8},
    ("glm", "lora"): {"v5e": 64, "v5p": 8, "h100": 8},
    ("glm", "sft"): {"v5e": 256, "v5p": 32, "h100": 32},
}
# Devices that share out the experts; over GPUs those of one host.
_EXPERT = {"v5e": 16, "v5p": 8, "h100": 8}


def make_mixtures() -> list[Case]:
    """Each mixture on each chip, by fsdp alone and with an axis of experts.

    Memory and links of an H100 are slower beside its products than a TPU's: so the 30B
    has cases of more rows there, and with less computed again under LoRA.
    """
    cases = []
    for (model, training), needed in _NEEDED.items():
        for chip, count in needed.items():
            for expert in (1, _EXPERT[chip]):
                layout = {"fsdp": count // expert, "expert": expert, "chip": chip}
                case = Case(model, training, count, **layout)
                cases.append(case)
            if (model, chip) == ("qwen3", "h100"):
                remat = "minimal" if training == "lora" else "full"
                cases.append(dataclasses.replace(case, rows=2, remat=remat))
    return cases


MIXTURES = make_mixtures()


def measure(case: Case) -> dict[str, Any]:
    """Compile one case; what the tables need of it."""
    start = time.perf_counter()
    topology = case.topology
    report = aot.compile_for(case.config, aot.describe_devices(topology), topology)
    compiler = "jax-cuda13-plugin" if case.chip == "h100" else "libtpu"
    return {
        "case": case.name,
        "versions": {of: importlib.metadata.version(of) for of in ("jax", compiler)},
        "wall_secs": round(time.perf_counter() - start, 1),
        "compile_secs": round(report.compile_secs, 1),
        "mesh": dict(report.run.mesh.sizes),
        "tokens": report.tokens,
        "fits": report.fits,
        "refusal": report.refusal,
        "device_gib": report.device_bytes / GIB,
        "hbm_share": report.device_bytes / report.chip.memory_bytes,
        "argument_gib": report.argument_bytes / GIB,
        "temporary_gib": report.temporary_bytes / GIB,
        "secs": report.secs,
        "tokens_per_sec": report.tokens / report.step_secs if report.fits else 0.0,
        "mfu": report.mfu if report.fits else 0.0,
        "collectives": dict(report.cost.collectives),
        "kernels": report.cost.kernels,
    }


def needed_gib(line: dict[str, Any]) -> float:
    """Of one device; where the compiler refused, what it says that it would take."""
    said = re.search(r"([\d.]+)G\) exceeds", line["refusal"] or "")
    return float(said[1]) if said else line["device_gib"]


def format_rows(cases: Sequence[Case], found: dict[str, Any]) -> Iterable[str]:
    """A Markdown table of those of the cases that were compiled."""
    yield (
        "| run | chips | mesh | rows a step | of HBM | compute, memory, links (s) |"
        " bound on rows/s | on MFU |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    for case in cases:
        if (line := found.get(case.name)) is None:
            continue
        sizes = line["mesh"].items()
        mesh = " x ".join(f"{axis} {size}" for axis, size in sizes if size > 1)
        sides = 2 if case.training == "dpo" else 1
        rows = line["tokens"] // case.length // sides
        training = {"lora": "LoRA"}.get(case.training, case.training.upper())
        chips = f"{case.chips} {case.chip}" if case in MIXTURES else f"{case.chips}"
        head = f"| {TITLES[case.model]} {training} | {chips} | {mesh} | {rows} |"
        if not line["fits"]:
            yield f"{head} {needed_gib(line):.0f} GiB: does not fit | | | |"
            continue
        secs = ", ".join(f"{secs:.3f}" for secs in line["secs"].values())
        rate = line["tokens_per_sec"] * rows / line["tokens"]
        yield (
            f"{head} {line['hbm_share']:.0%} | {secs} | {rate:,.1f} |"
            f" {line['mfu']:.0%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--print", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    found = {}
    if arguments.out.exists():
        lines = arguments.out.read_text("utf-8").splitlines()
        found = {line["case"]: line for line in map(json.loads, lines)}
    for case in dict.fromkeys(GROWING + FIXED + MIXTURES):
        if arguments.print or case.name in found or arguments.only not in case.name:
            continue
        found[case.name] = measure(case)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found[case.name]) + "\n")
    in_order = sorted(
        GROWING, key=lambda case: (list(MODELS).index(case.model), case.chips)
    )
    for training in ("sft", "dpo"):
        cases = [case for case in in_order if case.training == training]
        print("\n".join(format_rows(cases, found)), end="\n\n")
    print("\n".join(format_rows(FIXED, found)), end="\n\n")
    print("\n".join(format_rows(MIXTURES, found)))


if __name__ == "__main__":
    main()
