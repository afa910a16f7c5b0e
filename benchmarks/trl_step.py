"""The peer's side of train_step.py: the same cases in TRL's own trainers.

    python benchmarks/trl_step.py [--cases sft_0.5b,dpo_0.5b,...] | tee trl.jsonl
    python benchmarks/train_step.py --peer trl.jsonl
    python benchmarks/trl_step.py --smoke --no_liger  # tiny shapes, on a CPU

SFTTrainer and DPOTrainer with bfloat16 autocast, float32 master weights (with LoRA a
bfloat16 base), fused AdamW and Liger's layer kernels. TRL 1.16 turns Liger's fused loss
off, for its own head that never holds all logits. A mixture's experts are transformers'
grouped products (`--experts grouped_mm`) or Liger's fused ones (`--experts liger`);
these products do not follow autocast, so with float32 weights they are float32 ones,
and `--dtype bfloat16` measures TRL with weights and moments in bfloat16 as well.

A step is timed between two callbacks, the device idle at both: reading data is not in
it. Random weights and tokens; every call of the model is checked to be of the intended
size. One line of JSON a case, each in its own process, for Liger changes transformers'
classes for good.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import statistics
import tempfile
import time
from typing import Any

import datasets
import numpy as np
import peft
import tokenizers
import torch
import transformers
import trl
from step_cases import SHAPES, WARMUP, Case, get_case, make_parser, run_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "liger-kernel")
EOS = "</s>"


class StepTimer(transformers.TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.secs: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = self.now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.secs.append(self.now() - self.start)

    def now(self) -> float:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def make_model(case: Case, dtype: torch.dtype, attention: str) -> Any:
    """Random weights, made on the device."""
    if case.quantization:
        raise ValueError("no peer of this case: see train_step.py")
    config = transformers.AutoConfig.for_model(
        **{
            "model_type": "qwen2",
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": True,
            **SHAPES[case.shape],
        }
    )
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    if case.mixture:
        # Liger puts its own experts in the place of those of the default path.
        model.set_experts_implementation("grouped_mm")
    return model


def make_tokenizer(vocab: int) -> Any:
    """Word `w7` is token 7; the last token ends a text."""
    words = {f"w{i}": i for i in range(vocab - 1)} | {EOS: vocab - 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=EOS))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=EOS, pad_token=EOS
    )


def make_data(case: Case, steps: int) -> datasets.Dataset:
    """Fresh rows for each step; TRL itself adds the last token of a pair's sides."""
    rng = np.random.default_rng(0)
    vocab = SHAPES[case.shape]["vocab_size"] - 1

    def draw(length: int) -> np.ndarray:
        return rng.integers(0, vocab, (case.rows * steps, length))

    def write(length: int) -> list[str]:
        return ["".join(f"w{token} " for token in row) for row in draw(length)]

    if not case.pairs:
        return load_columns({"input_ids": draw(case.length).tolist()})
    response = case.length - case.prompt - 1
    return load_columns(
        {
            "prompt": write(case.prompt),
            "chosen": write(response),
            "rejected": write(response),
        }
    )


def load_columns(columns: dict[str, list]) -> datasets.Dataset:
    """A dataset of these columns, read from a file.

    To name one in memory, datasets pickles its table, which newer pyarrows refuse.
    """
    folder = pathlib.Path(tempfile.mkdtemp())
    rows = [
        json.dumps(dict(zip(columns, row, strict=True)))
        for row in zip(*columns.values(), strict=True)
    ]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return datasets.load_dataset(
        "json",
        data_files=str(folder / "rows.jsonl"),
        split="train",
        cache_dir=str(folder / "cache"),
    )


def make_trainer(case: Case, options: argparse.Namespace, timer: StepTimer) -> Any:
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": WARMUP + options.steps,
        "per_device_train_batch_size": case.rows,
        "max_length": case.length,
        "bf16": True,
        "use_cpu": DEVICE == "cpu",
        "gradient_checkpointing": case.remat,
        "use_liger_kernel": not options.no_liger,
        # Its "swiglu" is all of a mixture's experts.
        "liger_kernel_config": {"swiglu": options.experts == "liger"}
        if case.mixture
        else None,
        "optim": "adamw_torch_fused",
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    dtype = torch.bfloat16 if case.lora else getattr(torch, options.dtype)
    model = make_model(case, dtype, options.attention)
    shared = {
        "model": model,
        "train_dataset": make_data(case, settings["max_steps"]),
        "processing_class": make_tokenizer(SHAPES[case.shape]["vocab_size"]),
        "peft_config": lora if case.lora else None,
        "callbacks": [timer],
    }
    if not case.pairs:
        return trl.SFTTrainer(args=trl.SFTConfig(**settings), **shared)
    reference = None  # with LoRA the model without its adapters
    if not case.lora:
        kept = getattr(torch, options.reference_dtype)
        reference = make_model(case, kept, options.attention)
        reference.load_state_dict(model.state_dict())
        reference.eval().requires_grad_(False)
    arguments = trl.DPOConfig(**settings)
    return trl.DPOTrainer(args=arguments, ref_model=reference, **shared)


def check_batch(case: Case, trainer: Any) -> None:
    """No padding, and the loss over the tokens that ours counts."""
    rows = [trainer.train_dataset[i] for i in range(case.rows)]
    batch = trainer.data_collator(rows)
    sides = 1 + case.pairs
    assert batch["input_ids"].shape == (case.rows * sides, case.length)
    assert not case.pairs or bool(batch["attention_mask"].all())
    counted = batch["completion_mask"] if case.pairs else batch["labels"] != -100
    assert counted.sum() == case.rows * sides * (case.length - case.prompt)


def find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    case = get_case(name, options.smoke)
    timer = StepTimer()
    trainer = make_trainer(case, options, timer)
    check_batch(case, trainer)
    calls: list[tuple[int, ...]] = []  # shapes of the tokens that models were given
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            model.get_input_embeddings().register_forward_hook(
                lambda _, inputs, __: calls.append(tuple(inputs[0].shape))
            )
    trainer.remove_callback(transformers.PrinterCallback)  # only our line is printed
    result = trainer.train()
    sides = 1 + case.pairs  # and as many forward passes: the reference's too
    shape = (case.rows * sides, case.length)
    assert calls == [shape] * sides * len(timer.secs), calls
    secs = statistics.median(timer.secs[WARMUP:])
    memory = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    return {
        "case": name,
        "unit": case.unit,
        "rate": round(case.amount / secs, 1),
        "step_ms": round(secs * 1e3, 2),
        "peak_gib": round(memory / 2**30, 1),
        "loss": round(result.training_loss, 4),
        "warmup_secs": round(sum(timer.secs[:WARMUP]), 1),
        "step_ms_all": [round(x * 1e3, 1) for x in timer.secs],
        "attention": trainer.model.config._attn_implementation,
        "liger": not options.no_liger,
        "experts": options.experts if case.mixture else None,
        "dtype": str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        "reference_dtype": options.reference_dtype,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "versions": {package: find_version(package) for package in PACKAGES},
    }


def main() -> None:
    parser = make_parser(__doc__, attention="sdpa")
    parser.add_argument("--no_liger", action="store_true")
    parser.add_argument(
        "--experts", choices=("grouped_mm", "liger"), default="grouped_mm"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of weights and moments where all weights are trained",
    )
    parser.add_argument(
        "--reference_dtype",
        default="bfloat16",
        help="of DPO's frozen copy; left to itself TRL takes the policy's, float32",
    )
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    run_cases(__file__, parser.parse_args(), run_case)


if __name__ == "__main__":
    main()
