"""Tokens and pairs a second of whole train steps, and peak memory.

    python benchmarks/train_step.py [--cases sft_0.5b,dpo_0.5b,...] [--steps 10]

Each case is the step that `jaxtrain.trainer` runs: bfloat16 compute, float32 master
weights, AdamW, on random weights of Qwen2.5's shapes and rows without padding. The
peers' figures beside it, of TRL 1.16 with Liger on one H200, are those of the design.
`dpo_0.5b_shared` and its like hold each prompt once (data.share_prompts).
One line of JSON a case; where a case fails, its error.
"""

import argparse
import dataclasses
import functools
import json
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import lora, optim
from jaxtrain.models import Decoder, LoraShape, ModelConfig
from jaxtrain.objectives import make_objective
from jaxtrain.schedules import make_schedule
from jaxtrain.step import make_train_step
from jaxtrain.throughput import peak_flops
from jaxtrain.types import Batch, PairBatch, TrainState, share_prompts

SHAPES = {
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2,
    },
    "3b": {
        "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2,
    },
}  # fmt: skip
# name: (shape, objective, LoRA, remat, rows, length, the peer's rate a second)
CASES: dict[str, tuple[str, str, bool, str, int, int, float]] = {
    "sft_0.5b": ("0.5b", "next_token", False, "none", 8, 2048, 86900),
    "sft_3b": ("3b", "next_token", False, "none", 8, 2048, 24600),
    "sft_3b_remat": ("3b", "next_token", False, "full", 8, 2048, 20300),
    "lora_3b": ("3b", "next_token", True, "none", 8, 2048, 32800),
    "lora_3b_remat": ("3b", "next_token", True, "full", 8, 2048, 25200),
    "dpo_0.5b": ("0.5b", "preference", False, "none", 8, 1024, 25.9),
    "dpo_3b": ("3b", "preference", False, "full", 8, 1024, 8.1),
    "dpo_lora_3b": ("3b", "preference", True, "full", 8, 1024, 9.1),
}

PROMPT = 512  # tokens of each pair's
SHARED = "_shared"  # behind a case of pairs: their prompts are computed once


def model_config(shape: str) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            **SHAPES[shape],
        }
    )


def make_rows(
    rows: int, length: int, prompt: int, seed: int, document: int | None = None
) -> Batch:
    """Rows [1, B, T] of documents of one length; the prompt is not counted."""
    rng = np.random.default_rng(seed)
    shape = (1, rows, length)
    mask = np.ones(shape, np.float32)
    mask[..., :prompt] = 0
    place = np.arange(length, dtype=np.int32)
    document = length if document is None else document
    positions = np.broadcast_to(place % document, shape)
    segments = np.broadcast_to(place // document + 1, shape)
    return Batch(
        tokens=rng.integers(0, 151936, shape, np.int32),
        targets=rng.integers(0, 151936, shape, np.int32),
        segment_ids=segments.copy(),
        positions=positions.copy(),
        loss_mask=mask,
    )


def make_shared_rows(rows: int, length: int) -> Batch:
    """The same pairs of `length` a side, in rows that hold the prompt once."""
    response = length - PROMPT
    apart = make_rows(rows, PROMPT + 2 * response, PROMPT, 0)
    segments = np.repeat([1, 2, 3], [PROMPT, response, response])
    place = np.arange(PROMPT + 2 * response)
    positions = np.where(segments == 3, place - response, place)
    prompts = np.where(segments > 1, 1, 0)
    ids = [
        np.broadcast_to(values, apart.tokens.shape).astype(np.int32)
        for values in (segments, positions, prompts)
    ]
    return dataclasses.replace(
        apart, segment_ids=ids[0], positions=ids[1], prompt_ids=ids[2]
    )


def run_case(
    name: str, steps: int, attention: str, chunk: int, document: int | None
) -> dict[str, Any]:
    """Time `steps` steps after three to warm up."""
    shared = name.endswith(SHARED)
    case = CASES[name.removesuffix(SHARED)]
    shape, objective_name, with_lora, remat, rows, length, peer = case
    config = model_config(shape)
    pairs = objective_name == "preference"
    settings = lora.LoraConfig(
        r=16, alpha=32, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")
    )
    decoder = Decoder(
        config,
        compute_dtype="bfloat16",
        param_dtype="bfloat16" if with_lora else "float32",
        remat=remat,
        attention=attention,
        loss_chunk=chunk,
        packed=document is not None,
    )
    params = jax.jit(decoder.init)(jax.random.key(0))
    frozen: Any = {}
    if with_lora:
        targets = lora.resolve_targets(settings, params)
        adapters = lora.init_adapters(jax.random.key(1), params, settings)
        trainable, frozen = lora.trainable_and_frozen(params, adapters, settings)
        lora_shape = LoraShape(16, settings.scaling, 0.0, frozenset(targets))
        scorer = dataclasses.replace(decoder, lora=lora_shape)
    else:
        trainable, scorer = params, decoder
        if pairs:
            frozen = jax.jit(
                lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
            )(params)
    schedule = make_schedule("constant", learning_rate=1e-5, total_steps=1000)
    optimizer = optim.make_optimizer("adamw", schedule)
    step = jax.jit(
        make_train_step(
            make_objective(objective_name),
            scorer.token_log_probs,
            optimizer,
            schedule,
            max_grad_norm=1.0,
            with_reference=pairs,
        ),
        donate_argnums=0,
    )
    state = TrainState(
        step=jnp.int32(0),
        trainable=trainable,
        frozen=frozen,
        opt_state=jax.jit(optimizer.init)(trainable),
        rng=jax.random.key(2),
    )
    del params, trainable, frozen
    batch: Any = make_rows(rows, length, 0, 0, document)
    if pairs:
        batch = PairBatch(
            make_rows(rows, length, PROMPT, 0), make_rows(rows, length, PROMPT, 1)
        )
    if pairs and shared:
        batch = share_prompts(make_shared_rows(rows, length))
    batch = jax.device_put(batch)
    start = time.perf_counter()
    for _ in range(3):
        state, metrics = step(state, batch)
    loss = float(metrics["loss"].mean())
    warmup_secs = time.perf_counter() - start
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    secs = float(np.median(times))
    device = jax.devices()[0]
    rate = (rows if pairs else rows * length) / secs
    forwards = (2 if with_lora else 3) + pairs
    tokens = batch.shared.tokens.size if shared else rows * length * (1 + pairs)
    flops = config.flops_per_token(length) / 3 * forwards * tokens
    peak = peak_flops(device.device_kind)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    return {
        "case": name,
        "unit": "pairs/s" if pairs else "tokens/s",
        "rate": round(rate, 1),
        "peer": peer,
        "ratio": round(rate / peer, 3),
        "step_ms": round(secs * 1e3, 2),
        "mfu": round(flops / secs / peak, 3) if peak else None,
        "peak_gib": round(memory, 1),
        "loss": round(loss, 4),
        "warmup_secs": round(warmup_secs, 1),
        "attention": attention,
        "chunk": chunk,
        "document": document,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument(
        "--document", type=int, help="next-token rows of packed documents this long"
    )
    arguments = parser.parse_args()
    run = functools.partial(
        run_case,
        steps=arguments.steps,
        attention=arguments.attention,
        chunk=arguments.chunk,
        document=arguments.document,
    )
    device = jax.devices()[0].device_kind
    print(json.dumps({"device": device, "jax": jax.__version__}), flush=True)
    for name in arguments.cases.split(","):
        try:
            print(json.dumps(run(name)), flush=True)
        except Exception as error:  # the other cases shall still run
            traceback.print_exc(limit=3)
            print(json.dumps({"case": name, "error": str(error)[:300]}), flush=True)


if __name__ == "__main__":
    main()
