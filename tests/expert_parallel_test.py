"""Steps with experts spread over devices: the numbers of one device."""

import dataclasses
import functools
import types
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrain import sharding
from jaxtrain.config import default_config, resolve
from jaxtrain.lora import LoraConfig, init_adapters, resolve_targets
from jaxtrain.models import Decoder, LoraShape, ModelConfig
from jaxtrain.models.expert_parallel import ExpertSpread
from jaxtrain.models.mixture_options import spread_experts
from jaxtrain.tree import select
from jaxtrain.types import Batch, PairBatch
from tests.moe_test import SIZES, assert_same_step, make_state, make_step
from tests.runs import records, tiny_config, train

ROWS, T, EXPERTS = 8, 16, 8
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8},
    "gpt_oss": {
        "num_local_experts": EXPERTS,
        "head_dim": 8,
        "sliding_window": 5,
        "swiglu_limit": 0.9,
    },
}


def make_batch(seed: int, steps: int) -> Batch:
    """Packed rows [A B T]: two documents each, and padding behind them."""
    rng = np.random.default_rng(seed)
    shape = (steps, ROWS, T)
    first = rng.integers(3, 9, shape[:2])[..., None]
    end = rng.integers(11, T + 1, shape[:2])[..., None]
    at = np.broadcast_to(np.arange(T), shape)
    segments = np.where(at < first, 1, 2) * (at < end)
    tokens = rng.integers(1, 96, shape) * (segments > 0)
    ends = (at == first - 1) | (at >= end - 1)
    return Batch(
        tokens=tokens.astype(np.int32),
        targets=np.roll(tokens, -1, axis=-1).astype(np.int32),
        segment_ids=segments.astype(np.int32),
        positions=np.where(segments == 2, at - first, at).astype(np.int32),
        loss_mask=(~ends).astype(np.float32),
    )


@functools.cache
def make_model(family: str) -> tuple[Decoder, Any]:
    """A decoder, and weights so large that all of them matter."""
    config = ModelConfig.from_hf({"model_type": family, **SIZES, **FAMILIES[family]})
    decoder = Decoder(config, compute_dtype="float32", remat="full")
    params = decoder.init(jax.random.key(0))
    return decoder, jax.tree.map(lambda x: 5 * x if (x != 1).any() else x, params)


def run_step(family: str, kind: str, plan: Any, exchange: str = "", room: float = 2.0):
    """One step of SFT in two micro-batches, or of DPO with adapters."""
    decoder, params = make_model(family)
    options: dict[str, Any] = {}
    batch: Any = make_batch(0, 2 if kind == "sft" else 1)
    trainable, frozen, objective = params, {}, "next_token"
    if kind == "lora dpo":
        lora = LoraConfig(r=4, alpha=8)
        targets = frozenset(resolve_targets(lora, params))
        decoder = dataclasses.replace(decoder, lora=LoraShape(4, 2.0, 0.0, targets))
        adapters = init_adapters(jax.random.key(1), params, lora)
        trainable, frozen = jax.tree.map(lambda x: x + 0.05, adapters), params
        objective, options = "preference", {"with_reference": True}
        batch = PairBatch(batch, make_batch(1, 1))
    if plan is None:
        step = jax.jit(make_step(decoder, objective, **options))
        return step(make_state(trainable, frozen), batch)
    decoder = dataclasses.replace(
        decoder,
        constrain=plan.constrain,
        map_shards=plan.map_shards,
        experts=ExpertSpread(plan.mesh.shape["expert"], room, exchange, plan.axes_of),
    )
    axes = decoder.logical_axes()
    trainable, frozen = (
        jax.device_put(tree, plan.parameters(tree, select(axes, tree)))
        for tree in (trainable, frozen)
    )
    step = jax.jit(make_step(decoder, objective, **options))
    return step(make_state(trainable, frozen), jax.device_put(batch, plan.batch(1)))


@functools.cache
def on_one_device(family: str, kind: str) -> Any:
    return run_step(family, kind, None)


CASES = {
    "copies": ("qwen3_moe", "sft", {"data": 2, "fsdp": 2, "expert": 2}, 3, 1.1),
    "tokens": ("qwen3_moe", "sft", {"expert": 4, "context": 2}, 3, 2.0),
    "auto": ("qwen3_moe", "sft", {"fsdp": 2, "expert": 2, "tensor": 2}, 3, 2.0),
    "auto ": ("gpt_oss", "sft", {"data": 2, "expert": 4}, 0, 2.0),
    "weights": ("gpt_oss", "sft", {"expert": 2, "context": 2, "fsdp": 2}, 3, 2.0),
    "tokens ": ("gpt_oss", "lora dpo", {"data": 2, "expert": 4}, 0, 1.5),
    "copies ": ("qwen3_moe", "lora dpo", {"expert": 8}, 3, 8.0),
}


@pytest.mark.parametrize(
    "case",
    ["copies", *(pytest.param(c, marks=pytest.mark.on_request) for c in [*CASES][1:])],
)
def test_loss_and_next_weights_are_those_of_one_device(case):
    family, kind, sizes, stage, room = CASES[case]
    mesh = sharding.make_mesh(sizes)
    plan = sharding.ShardingPlan(mesh, zero_stage=stage)
    decoder, _ = make_model(family)
    layouts = plan.parameters(decoder.abstract_params(), decoder.logical_axes())
    spec = layouts["layers"]["mlp"]["experts"]["gate_proj"].spec
    assert "expert" in jax.tree.leaves(spec[1])
    meshed = run_step(family, kind, plan, case.strip(), room)
    assert_same_step(meshed, on_one_device(family, kind))


@pytest.mark.parametrize(
    ("devices", "experts", "words"),
    [(2, 0, "a qwen2 has no experts"), (8, 12, "12 experts .* nearest size is 4")],
)
def test_experts_that_cannot_be_shared_out_are_refused(devices, experts, words):
    plan = sharding.ShardingPlan(
        sharding.make_mesh({"expert": devices}, jax.devices()[:devices])
    )
    config: Any = types.SimpleNamespace(num_experts=experts, model_type="qwen2")
    with pytest.raises(ValueError, match=f"mesh.expert = {devices}: .*{words}"):
        spread_experts(resolve(default_config()), config, plan)


@pytest.mark.on_request
def test_a_run_with_an_axis_of_experts_logs_what_one_device_does(tmp_path):
    """From scratch, with evaluations and generated texts, and weights split too."""
    logs = []
    for sizes in ({}, {"data": 2, "expert": 4}):
        shards = 8 if sizes else 1
        config = tiny_config(
            "from_scratch", num_gpus=shards, per_device_train_batch_size=8 // shards,
            per_device_eval_batch_size=8 // shards, gradient_accumulation_steps=1,
            optimizer="sgd", learning_rate=1.0, max_steps=2, eval_steps=2, save_steps=0,
            save_final_model=False, deepspeed__zero_stage=3 if sizes else 0,
            router_z_loss_coef=0.1,
        )  # fmt: skip
        with config.unlocked():
            config.model.architecture.update(
                model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2,
                moe_intermediate_size=32, router_aux_loss_coef=0.5,
            )  # fmt: skip
            config.training.generation.enabled = True
        for axis, size in sizes.items():
            config.mesh[axis] = size
        train(config, tmp_path / str(shards))
        logs.append(records(tmp_path / str(shards)))
    for one, many in zip(*logs, strict=True):
        assert one.keys() == many.keys()
        for name in {*one} & {"loss", "grad_norm", "router_load", "eval_loss"}:
            assert many[name] == pytest.approx(one[name], rel=1e-4), name
