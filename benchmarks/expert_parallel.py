"""Whole steps of a mixture on several GPUs: what an axis of experts gains.

    python benchmarks/expert_parallel.py                  # all devices
    python benchmarks/expert_parallel.py --smoke          # tiny shapes, any backend
    python benchmarks/expert_parallel.py --case lora --layers 48 --exchange tokens

A line of JSON for each way to use the devices: `fsdp` (weights gathered, as without
`mesh.expert`) and `expert` with each exchange of models/expert_parallel.py. Random
weights of Qwen3-30B-A3B's shape with fewer layers, packed rows, bfloat16 compute, full
rematerialization: adapters on attention (`lora`), or all weights with AdamW (`full`,
moe_4b's shape). Losses of one case must agree: `loss` says so.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from step_cases import SHAPES

from jaxtrain import lora, sharding
from jaxtrain.kernels.attention import Layout
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.expert_parallel import ExpertSpread
from jaxtrain.objectives import make_objective
from jaxtrain.optimizers import optim
from jaxtrain.step import StepOptions, make_train_step
from jaxtrain.tree import select
from jaxtrain.types import Batch, TrainState

LARGE = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "norm_topk_prob": True, "vocab_size": 151936,
}  # fmt: skip
EXCHANGES = ("fsdp", "weights", "tokens", "copies")
WARMUP, STEPS = 2, 5


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    shape: dict[str, Any]
    lora: bool
    rows: int  # of a device
    length: int = 2048


def cases(smoke: bool) -> list[Case]:
    if smoke:
        tiny = SHAPES["moe_smoke"]
        return [Case("lora", tiny, True, 2, 64), Case("full", tiny, False, 2, 64)]
    return [Case("lora", LARGE, True, 4), Case("full", SHAPES["moe_4b"], False, 2)]


def make_plan(exchange: str) -> sharding.ShardingPlan:
    axis = "fsdp" if exchange == "fsdp" else "expert"
    return sharding.ShardingPlan(sharding.make_mesh({axis: len(jax.devices())}))


def make_decoder(case: Case, exchange: str, plan: sharding.ShardingPlan) -> Decoder:
    spread, rules = None, sharding.ACTIVATION_RULES
    if exchange != "fsdp":
        devices = plan.mesh.shape["expert"]
        spread = ExpertSpread(devices, 2.0, exchange, plan.axes_of)
    config = {"max_position_embeddings": 32768, "rope_theta": 1e6, **case.shape}
    return Decoder(
        ModelConfig.from_hf(config),
        param_dtype="bfloat16" if case.lora else "float32",
        remat="full",
        constrain=plan.constrain,
        map_shards=plan.map_shards,
        experts=spread,
        layout=Layout(
            plan.mesh,
            rows=plan.batch_axes,
            heads=rules["heads"],
            tokens=rules["sequence"],
            vocab=rules["vocab"],
        ),
    )


def make_rows(case: Case, plan: sharding.ShardingPlan) -> Batch:
    """Rows [1 B T] of two documents each, over all devices."""
    rng = np.random.default_rng(0)
    shape = (1, case.rows * plan.batch_shards, case.length)
    place, half = np.arange(case.length, dtype=np.int32), case.length // 2
    batch = Batch(
        tokens=rng.integers(0, case.shape["vocab_size"], shape, np.int32),
        targets=rng.integers(0, case.shape["vocab_size"], shape, np.int32),
        segment_ids=np.broadcast_to(place // half + 1, shape).copy(),
        positions=np.broadcast_to(place % half, shape).copy(),
        loss_mask=np.ones(shape, np.float32),
    )
    return jax.device_put(batch, plan.batch(1))


def make_step(case: Case, exchange: str) -> tuple[Any, TrainState, Batch]:
    plan = make_plan(exchange)
    decoder = make_decoder(case, exchange, plan)
    layouts = plan.parameters(decoder.abstract_params(), decoder.logical_axes())
    params = jax.jit(decoder.init, out_shardings=layouts)(jax.random.key(0))
    trainable, frozen = params, {}
    if case.lora:
        settings = lora.LoraConfig(r=16, alpha=32)
        adapters = lora.init_adapters(jax.random.key(1), params, settings)
        trainable, frozen = lora.trainable_and_frozen(params, adapters, settings)
        shape = lora.make_shape(settings, params)
        decoder = dataclasses.replace(decoder, lora=shape)
        axes = select(decoder.logical_axes(), trainable)
        trainable = jax.device_put(trainable, plan.parameters(trainable, axes))
    optimizer = optim.make_optimizer("adamw", lambda step: 1e-5)
    step = plan.jit(
        make_train_step(
            make_objective("next_token"),
            decoder.token_log_probs,
            optimizer,
            lambda step: jnp.float32(1e-5),
            StepOptions(max_grad_norm=1.0),
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
    return step, state, make_rows(case, plan)


def run_case(case: Case, exchange: str) -> dict[str, Any]:
    step, state, batch = make_step(case, exchange)
    start, times, losses = time.perf_counter(), [], []
    for number in range(WARMUP + STEPS):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        losses.append(float(metrics["loss"].mean()))
        if number >= WARMUP:
            times.append(time.perf_counter() - began)
        else:
            warmup_secs = time.perf_counter() - start
    secs = float(np.median(times))
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "case": case.name,
        "exchange": exchange,
        "tokens_per_sec": round(batch.tokens.size / secs),
        "step_ms": round(secs * 1e3, 1),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "grad_norm": round(float(metrics["grad_norm"].mean()), 4),
        "peak_gib": round(stats.get("peak_bytes_in_use", 0) / 2**30, 1),
        "warmup_secs": round(warmup_secs, 1),
        "layers": case.shape["num_hidden_layers"],
        "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--case", help="lora or full; both by default")
    parser.add_argument("--exchange", choices=EXCHANGES, help="all by default")
    parser.add_argument("--layers", type=int, help="of lora's shape; the 30B has 48")
    options = parser.parse_args()
    for case in cases(options.smoke):
        if options.layers and case.lora:
            shape = case.shape | {"num_hidden_layers": options.layers}
            case = dataclasses.replace(case, shape=shape)
        for exchange in EXCHANGES:
            if options.case not in (None, case.name):
                continue
            if options.exchange not in (None, exchange):
                continue
            if options.exchange:
                print(json.dumps(run_case(case, exchange)), flush=True)
            else:  # in its own process, whose peak of memory is its own
                flags = ["--case", case.name, "--exchange", exchange]
                flags += ["--smoke"] * options.smoke
                flags += ["--layers", str(options.layers)] if options.layers else []
                command = [sys.executable, __file__, *flags]
                done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
                if done.returncode:
                    reason = done.stderr.strip().splitlines()[-1][:300]
                    print(f"{case.name} {exchange}: {reason}", flush=True)


if __name__ == "__main__":
    main()
