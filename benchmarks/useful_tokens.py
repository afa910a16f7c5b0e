"""Which share of the computed tokens is useful, as the log of whole runs counts it.

    python benchmarks/useful_tokens.py --blocks [--rows=50000] [--steps=60]

Rows have log-normal lengths (sigma 0.8, mean 300 tokens; a third of a pair's shorter
side is its prompt), cut at 1024 and at 2048, 8 examples a device. The model has one
layer of width 8, for only the layout of the rows counts: the share is metrics.jsonl's
`useful_token_share` over the steps of a run by the command line. CPU devices stand in
for others. The attention of a CPU computes the whole mask, as that of cuDNN does; with
`--blocks`, rows are laid out as for kernels that leave out blocks (Hopper, TPUs).
"""

import argparse
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

EOS, WORDS = "</s>", 64
_START = (
    "from jaxtrain.models.transformer import Decoder;"
    "from jaxtrain.cli import main;"
    "Decoder.skips_blocks = lambda self, length: {blocks};"
    "main()"
)


def make(folder: pathlib.Path, rows: int) -> None:
    """Write `model`, `sft.jsonl` and `dpo.jsonl` into a folder."""
    import tokenizers
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=WORDS - 1,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(
        folder / "model"
    )
    words = {f"w{i}": i for i in range(WORDS - 1)} | {EOS: WORDS - 1}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=EOS))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=EOS, pad_token=EOS
    ).save_pretrained(folder / "tokenizer")
    random = np.random.default_rng(0)

    def draw_lengths() -> np.ndarray:
        drawn = random.normal(math.log(300) - 0.8**2 / 2, 0.8, rows)
        return np.maximum(np.exp(drawn).astype(int), 12)

    def text(length: int) -> str:
        return " w1" * length

    with (folder / "sft.jsonl").open("w") as file:
        for length in draw_lengths():
            row = {"prompt": text(length // 3), "completion": text(length * 2 // 3)}
            print(json.dumps(row), file=file)
    with (folder / "dpo.jsonl").open("w") as file:
        for chosen, rejected in zip(draw_lengths(), draw_lengths(), strict=True):
            prompt = min(chosen, rejected) // 3
            sides = {"chosen": chosen - prompt, "rejected": rejected - prompt}
            row = {"prompt": text(prompt)}
            row |= {side: text(length) for side, length in sides.items()}
            print(json.dumps(row), file=file)


def measure(
    folder: pathlib.Path, task: str, longest: int, devices: int, *flags: str
) -> float:
    """The share over a run of these flags, the steps that compile left out."""
    steps = next(f for f in flags if f.startswith("training.max_steps="))
    blocks = "blocks" in flags
    workdir = pathlib.Path(tempfile.mkdtemp(dir=folder))
    given = [flag for flag in flags if flag != "blocks"]
    subprocess.run(
        [
            *(sys.executable, "-c", _START.format(blocks=blocks), "train", task),
            f"--workdir={workdir}",
            f"--model.name_or_path={folder / 'model'}",
            f"--model.tokenizer_name_or_path={folder / 'tokenizer'}",
            f"--data.train={folder / f'{task}.jsonl'}",
            f"--data.max_length={longest}",
            "--training.per_device_train_batch_size=8",
            f"--training.logging_steps={steps.partition('=')[2]}",
            "--training.bf16=false",
            "--training.save_steps=0",
            "--training.save_final_model=false",
            *(f"--{flag}" for flag in given),
        ],
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "HF_HUB_OFFLINE": "1",
            "JAXTRAIN_CACHE": str(folder / "cache"),
        },
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (line,) = (workdir / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(line)["useful_token_share"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--devices", default="1,8")
    parser.add_argument("--tasks", default="sft,dpo")
    parser.add_argument("--lengths", default="1024,2048")
    parser.add_argument("--blocks", action="store_true")
    parser.add_argument("--flag", action="append", default=[], help="of every run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        make(folder, options.rows)
        flags = [f"training.max_steps={options.steps}", *options.flag]
        flags += ["blocks"] * options.blocks
        for devices in map(int, options.devices.split(",")):
            for task in options.tasks.split(","):
                for longest in map(int, options.lengths.split(",")):
                    share = measure(folder, task, longest, devices, *flags)
                    told = f"{devices} devices, {task} {longest}: {share:.3f}"
                    print(told, flush=True)


if __name__ == "__main__":
    main()
