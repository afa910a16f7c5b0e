"""What train_step.py and trl_step.py time: one set of cases, each in its own process.

Neither jax nor torch is imported here.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

VOCAB = 151936
SHAPES = {
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": VOCAB,
    },
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": VOCAB,
    },
    "8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "tie_word_embeddings": False,
    },
    # 3.7 billion parameters, of which a token reads 0.9.
    "moe_4b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 32, "num_experts_per_tok": 4,
        "moe_intermediate_size": 1024, "norm_topk_prob": True, "vocab_size": VOCAB,
    },
    "smoke": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    },
    "moe_smoke": {
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "norm_topk_prob": True, "vocab_size": 512,
    },
}  # fmt: skip
WARMUP = 3  # steps before the timed ones


@dataclasses.dataclass(frozen=True)
class Case:
    """A step on `rows` rows, or pairs, of `length` tokens a side, none of them padding.

    A prompt, of pairs alone, counts in the length and not in the loss. `remat`: every
    layer is computed again in the backward pass (gradient checkpointing).
    `quantization`: of the frozen kernels under adapters. `param_dtype` and `moments`:
    how weights that train, and AdamW's moments of them, are kept.
    """

    shape: str
    lora: bool = False
    remat: bool = False
    rows: int = 8
    length: int = 2048
    prompt: int = 0
    quantization: str | None = None
    param_dtype: str = "float32"
    moments: str = "float32"

    @property
    def pairs(self) -> bool:
        return self.prompt > 0

    @property
    def mixture(self) -> bool:
        return "num_experts" in SHAPES[self.shape]

    @property
    def unit(self) -> str:
        return "pairs/s" if self.pairs else "tokens/s"

    @property
    def amount(self) -> int:
        """Tokens, or pairs, a step."""
        return self.rows if self.pairs else self.rows * self.length


PAIRS: Any = {"length": 1024, "prompt": 512}
CASES = {
    "sft_0.5b": Case("0.5b"),
    "sft_3b": Case("3b"),
    "sft_3b_remat": Case("3b", remat=True),
    "lora_3b": Case("3b", lora=True),
    "lora_3b_remat": Case("3b", lora=True, remat=True),
    "dpo_0.5b": Case("0.5b", **PAIRS),
    "dpo_3b": Case("3b", remat=True, **PAIRS),
    "dpo_lora_3b": Case("3b", lora=True, remat=True, **PAIRS),
    "sft_moe_4b": Case("moe_4b", remat=True, rows=4),
    # As trl_step.py --dtype bfloat16 has it.
    "sft_moe_4b_bf16": Case(
        "moe_4b", remat=True, rows=4, param_dtype="bfloat16", moments="bfloat16"
    ),
    # Ours alone: trl_step.py has no bitsandbytes.
    "lora_3b_nf4": Case("3b", lora=True, quantization="nf4"),
    "lora_3b_int8": Case("3b", lora=True, quantization="int8"),
    "sft_3b_short": Case("3b", rows=4),
    "lora_8b": Case("8b", lora=True),
    "lora_8b_remat": Case("8b", lora=True, remat=True),
    "sft_8b": Case("8b", remat=True, rows=4, param_dtype="bfloat16", moments="int8"),
}


def get_case(name: str, smoke: bool) -> Case:
    """The case of that name, its sizes cut down where a CPU shall do."""
    case = CASES[name]
    if not smoke:
        return case
    prompt = 16 if case.pairs else 0
    shape = "moe_smoke" if case.mixture else "smoke"
    return dataclasses.replace(case, shape=shape, rows=2, length=32, prompt=prompt)


def make_parser(about: str | None, *, attention: str) -> argparse.ArgumentParser:
    """What both scripts take; `attention` is the default."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--attention", default=attention)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--in_process", action="store_true", help="no process a case")
    return parser


def run_cases(
    script: str,
    options: argparse.Namespace,
    run_case: Callable[[str, argparse.Namespace], dict[str, Any]],
) -> None:
    """A line of each case, or its error: the other cases shall still run.

    Each runs in a process of its own, so that it has a peak of memory of its own.
    """
    for name in options.cases.split(","):
        if options.in_process:
            try:
                line = run_case(name, options)
            except Exception as error:
                traceback.print_exc()
                line = {"case": name, "error": f"{type(error).__name__}: {error}"[:300]}
            print(json.dumps(line), flush=True)
            continue
        own = ["--in_process", "--cases", name]
        command = [sys.executable, script, *sys.argv[1:], *own]
        code = subprocess.run(command, check=False).returncode
        if code:
            line = {"case": name, "error": f"the process ended with {code}"}
            print(json.dumps(line), flush=True)
