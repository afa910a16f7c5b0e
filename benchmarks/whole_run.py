"""Whole runs as a user starts them, ours and TRL's, on the same files.

    python benchmarks/whole_run.py make DIR [--shape=0.5b] [--rows=4000]
    python benchmarks/whole_run.py ours DIR --task=dpo [--flag=data.packing=false ...]
    python benchmarks/whole_run.py trl DIR --task=dpo

`make` writes a model of random weights, a tokenizer of words, and rows whose lengths
are log-normal (sigma 0.8, mean 300 tokens; a third of the shorter side is a pair's
prompt), cut at 1024. Both sides take one epoch, --batch examples a step, in bfloat16
with float32 master weights, and TRL with Liger's kernels. The rate is that of
the steps behind the first tenth, by the clock, reading data and logging included.
`--lora`: both train adapters of rank 16 on all linear layers of a frozen bfloat16 base,
with gradient checkpointing. `--accumulation`: TRL takes a step's examples in so many
parts, where they do not fit into its memory at once. `make --full` cuts or fills every
row to --length. With `--gpus`, `--batch` counts the examples of one GPU: TRL runs under
torchrun and splits its state by FSDP2, and ours is told its mesh by a flag.
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from step_cases import SHAPES

EOS = "</s>"
LORA_RANK, LORA_ALPHA = 16, 32
LORA_FLAGS = (
    "training.lora.enabled=true",
    f"training.lora.r={LORA_RANK}",
    f"training.lora.lora_alpha={LORA_ALPHA}",
    "training.lora.lora_dropout=0.0",
    "training.lora.target_modules=all-linear",
    "training.gradient_checkpointing=true",
)
FLAGS = (
    "training.logging_steps=10",
    "training.bf16=true",
    "training.eval_steps=0",
    "training.save_steps=0",
    "training.save_final_model=false",
)
_FAMILIES = {"qwen2": "Qwen2", "llama": "Llama", "qwen3_moe": "Qwen3Moe"}
# Metrics of a run's log of which the mean behind the first tenth is told.
_MEANS = (
    *("tokens_per_sec", "mfu", "useful_token_share", "data_wait_share"),
    *("step_time_p50_secs", "device_memory_peak_gib"),
)


def make(folder: pathlib.Path, options: argparse.Namespace) -> None:
    """Write `model`, `tokenizer`, `sft.jsonl` and `dpo.jsonl` into a folder."""
    import torch
    import transformers

    sizes = dict(SHAPES[options.shape])
    sizes["num_hidden_layers"] = options.layers or sizes["num_hidden_layers"]
    rows, longest = options.rows, options.length
    config = transformers.Qwen2Config(
        **sizes,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        eos_token_id=sizes["vocab_size"] - 1,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32
        )
    model.save_pretrained(folder / "model")
    make_tokenizer(folder / "tokenizer", sizes["vocab_size"])
    make_rows(folder, sizes["vocab_size"], rows, longest, options.full)


def make_tokenizer(folder: pathlib.Path, vocabulary: int) -> None:
    """Write a tokenizer of words, w0 and so on; the last entry ends texts."""
    import tokenizers
    import transformers

    words = {f"w{i}": i for i in range(vocabulary - 1)}
    words[EOS] = vocabulary - 1
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=EOS))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=EOS, pad_token=EOS
    ).save_pretrained(folder)  # beside a qwen2 it would be read as its own


def make_rows(
    folder: pathlib.Path,
    vocabulary: int,
    rows: int,
    longest: int,
    full: bool,
    tasks: tuple[str, ...] = ("sft", "dpo"),
) -> None:
    """Write TASK.jsonl of each task; `full` rows are as long as the longest."""
    random = np.random.default_rng(0)
    mean = math.log(300) - 0.8**2 / 2

    def draw_lengths() -> np.ndarray:
        if full:
            return np.full(rows, longest)
        drawn = np.exp(random.normal(mean, 0.8, rows)).astype(int)
        return np.clip(drawn, 12, longest - 1)

    def text(length: int) -> str:
        drawn = random.integers(0, vocabulary - 1, length)
        return "".join(f" w{token}" for token in drawn)

    def draw_sft() -> Iterator[dict[str, str]]:
        for length in draw_lengths():
            prompt = length // 3
            yield {"prompt": text(prompt), "completion": text(length - prompt)}

    def draw_dpo() -> Iterator[dict[str, str]]:
        for chosen, rejected in zip(draw_lengths(), draw_lengths(), strict=True):
            prompt = min(chosen, rejected) // 3
            sides = {"chosen": chosen, "rejected": rejected}
            yield {"prompt": text(prompt)} | {
                side: text(length - prompt) for side, length in sides.items()
            }

    draw = {"sft": draw_sft, "dpo": draw_dpo}
    for task in tasks:
        with (folder / f"{task}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in draw[task]())


def run_ours(
    folder: pathlib.Path, options: argparse.Namespace, flags: list[str]
) -> dict[str, Any]:
    """Our command line on these files; `--batch` examples a GPU make a forward pass."""
    task, batch = options.task, options.batch
    workdir = folder / f"out-{task}-{time.time():.0f}-{os.getpid()}"
    given = {flag.partition("=")[0] for flag in flags}
    ours = [f for f in FLAGS if f.partition("=")[0] not in given]
    started = time.time()
    subprocess.run(
        [
            *(sys.executable, "-m", "jaxtrain", "train", task),
            f"--workdir={workdir}",
            f"--model.name_or_path={folder / 'model'}",
            f"--model.tokenizer_name_or_path={folder / 'tokenizer'}",
            f"--data.train={folder / f'{task}.jsonl'}",
            f"--data.max_length={options.length}",
            f"--training.per_device_train_batch_size={batch}",
            *(f"--{flag}" for flag in (*ours, *flags)),
        ],
        check=True,
    )
    with (workdir / "metrics.jsonl").open() as file:
        records = [json.loads(line) for line in file]
    records = [record for record in records if "loss" in record]
    behind = records[len(records) // 10 :]
    steps = behind[-1]["step"] - behind[0]["step"]
    seconds = behind[-1]["time"] - behind[0]["time"]

    def mean(name: str) -> float:
        return float(np.mean([r[name] for r in behind if name in r]))

    return {
        "steps": records[-1]["step"],
        "start_to_first_record_secs": records[0]["time"] - started,
        "examples_per_sec": batch * options.gpus * steps / seconds,
        **{name: mean(name) for name in _MEANS if any(name in r for r in behind)},
        "loss": records[-1]["loss"],
        "workdir": str(workdir),
    }


def _layer_class(model: pathlib.Path) -> str:
    """What transformers calls a layer of this model."""
    kind = json.loads((model / "config.json").read_text())["model_type"]
    return f"{_FAMILIES[kind]}DecoderLayer"


def run_trl(folder: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """TRL's trainer on these files, with its defaults; one process a GPU."""
    started = time.time()
    task, lora = options.task, options.lora
    import datasets
    import torch
    import transformers
    import trl

    ends: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            ends.append(time.time())

    settings: dict[str, Any] = {
        "output_dir": str(folder / "trl"),
        "num_train_epochs": 1,
        "max_steps": options.max_steps,
        "per_device_train_batch_size": options.batch // options.accumulation,
        "gradient_accumulation_steps": options.accumulation,
        "max_length": options.length,
        "bf16": True,
        "gradient_checkpointing": lora or options.checkpointing,
        "use_liger_kernel": True,
        "optim": "adamw_torch_fused",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if options.gpus > 1:
        settings["fsdp"] = "full_shard"
        settings["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [_layer_class(folder / "model")],
        }
    kind = {"sft": "SFT", "dpo": "DPO"}[task]
    load = transformers.AutoModelForCausalLM.from_pretrained
    models: dict[str, Any] = {}
    if lora:
        import peft

        models["model"] = load(folder / "model", dtype=torch.bfloat16)
        models["peft_config"] = peft.LoraConfig(
            r=LORA_RANK,
            lora_alpha=LORA_ALPHA,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    else:
        models["model"] = load(folder / "model", dtype=torch.float32)
    if task == "dpo" and not lora:
        models["ref_model"] = load(folder / "model", dtype=torch.float32)
    trainer = getattr(trl, f"{kind}Trainer")(
        **models,
        args=getattr(trl, f"{kind}Config")(**settings),
        train_dataset=datasets.load_dataset(
            "json", data_files=str(folder / f"{task}.jsonl"), split="train"
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(
            folder / "tokenizer"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    behind = ends[len(ends) // 10 :]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "steps": len(ends),
        "start_to_first_step_secs": ends[0] - started,
        "examples_per_sec": options.batch
        * options.gpus
        * (len(behind) - 1)
        / (behind[-1] - behind[0]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": losses[-1] if losses else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", choices=["make", "ours", "trl"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--shape", default="0.5b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="of the model, else the shape's")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--task", choices=["sft", "dpo"], default="dpo")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--accumulation", type=int, default=1, help="micro-batches a step, TRL's alone"
    )
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--length", type=int, default=1024, help="longest row, tokens")
    parser.add_argument("--full", action="store_true", help="rows of that length")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--flag", action="append", default=[], help="a key of ours")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.side == "make":
        make(options.folder, options)
        return
    if options.side == "ours":
        length = "training.num_train_epochs=1"
        if options.max_steps > 0:
            length = f"training.max_steps={options.max_steps}"
        kind = LORA_FLAGS if options.lora else ()
        saving = ("training.gradient_checkpointing=true",) * options.checkpointing
        flags = [length, *kind, *saving, *options.flag]
        found = run_ours(options.folder, options, flags)
    else:
        found = run_trl(options.folder, options)
        if os.environ.get("RANK", "0") != "0":
            return
    names = ("side", "task", "batch", "gpus", "accumulation", "lora", "flag")
    asked = {name: getattr(options, name) for name in names}
    print(json.dumps(asked | found))


if __name__ == "__main__":
    main()
