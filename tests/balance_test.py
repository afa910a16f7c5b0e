"""Balancing experts by biases: against the paper's rule, on meshes, and resumed."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import step
from jaxtrain.config import default_config, resolve
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.balance import send_excess
from jaxtrain.models.hf import save_pretrained
from jaxtrain.models.mixture_options import balances_experts
from jaxtrain.objectives import make_objective
from jaxtrain.optimizers import optim
from jaxtrain.optimizers.balance import with_balancing
from jaxtrain.record.diagnostics import sum_squares_by_group
from jaxtrain.tree import flatten
from jaxtrain.types import BALANCING_BIAS, Batch, PairBatch, TrainState
from tests.moe_test import SIZES, make_batch
from tests.runs import records, tiny_config, train, weights
from tests.tiny_bases import chat_tokenizer, write_base

RATE, EXPERTS = 0.03, 8
ROUTED = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "head_dim": 8,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}


def biases(params: Any) -> dict[tuple[str, ...], np.ndarray]:
    """The biases of all layers in `params`, by their paths."""
    flat = flatten(params)
    return {k: np.asarray(flat[k]) for k in flat if k[-1] == BALANCING_BIAS}


# --- one step -------------------------------------------------------------------------


def test_a_bias_gets_the_excess_and_weights_their_own_gradient():
    rng = np.random.default_rng(0)
    weights, chosen = rng.normal(size=(1, 9, 2)), rng.integers(0, 5, (9, 2))
    counts = np.bincount(chosen.reshape(-1), minlength=5)

    def total(weights, bias):
        sent = send_excess(weights, bias, jnp.asarray(counts, jnp.float32))
        return (sent**2).sum() / 7

    arguments = jnp.asarray(weights, jnp.float32), jnp.zeros(5)
    of_weights, of_bias = jax.grad(total, (0, 1))(*arguments)
    np.testing.assert_array_equal(of_bias, [5 * count - 18 for count in counts])
    np.testing.assert_allclose(of_weights, 2 * weights / 7, rtol=1e-6)


def test_neither_the_norm_nor_the_optimizer_sees_the_excess():
    params = {"layers": {"gate": {BALANCING_BIAS: jnp.ones((2, 3)), "w": jnp.ones(2)}}}
    excess = jnp.asarray([[8.0, -1e-6, 0.0], [0.0, 0.0, 3e7]])
    grads = {"layers": {"gate": {BALANCING_BIAS: excess, "w": jnp.asarray([3.0, 4.0])}}}
    (square,) = sum_squares_by_group(grads, lambda path: "").values()
    assert square == 25
    optimizer = optim.make_optimizer("adamw", lambda _: 0.1, weight_decay=0.5)
    balancing = with_balancing(optimizer, RATE)
    updates, state = balancing.update(grads, balancing.init(params), params)
    (moved,) = biases(updates).values()
    np.testing.assert_allclose(moved, -RATE * np.sign(excess))
    # As if there had been no gradient; an optimizer of its own leaves that at 0.
    without = jax.tree.map_with_path(
        lambda path, x: 0 * x if path[-1].key == BALANCING_BIAS else x, grads
    )
    expected, other = optimizer.update(without, optimizer.init(params), params)
    np.testing.assert_array_equal(
        updates["layers"]["gate"]["w"], expected["layers"]["gate"]["w"]
    )
    jax.tree.map(np.testing.assert_array_equal, state, other)


def run_step(decoder: Decoder, params: Any, kind: str, rate: float) -> Any:
    """A step of AdamW, clipped and decayed; of DPO beside another reference."""
    batch, frozen = two_micro_batches(0), {}
    if kind == "preference":
        batch, frozen = PairBatch(batch, two_micro_batches(5)), other_weights(params)
    optimizer = optim.make_optimizer(
        "adamw", lambda _: 1e-2, weight_decay=0.5, epsilon=1e-3
    )
    train_step = step.make_train_step(
        make_objective(kind),
        decoder.token_log_probs,
        with_balancing(optimizer, rate) if rate else optimizer,
        lambda _: 1e-2,
        step.StepOptions(max_grad_norm=1e-3, with_reference=bool(frozen)),
    )
    state = TrainState(
        jnp.int32(0), params, frozen, optimizer.init(params), jax.random.key(0)
    )
    return jax.jit(train_step)(state, batch)


def two_micro_batches(seed: int) -> Batch:
    parts = [make_batch(seed + i) for i in range(2)]
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def other_weights(params: Any) -> Any:
    return jax.tree.map(lambda x: jnp.flip(x, -1), params)


def count_tokens(directory: Any, batches: list[Batch]) -> list[np.ndarray]:
    """How many tokens transformers sends to each expert, a layer after the other."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    counts: dict[int, np.ndarray] = {}

    def count(layer: int, module: Any, given: Any) -> None:
        chosen = given[1].numpy()
        assert chosen.dtype == np.int64
        found = np.bincount(chosen.reshape(-1), minlength=EXPERTS)
        counts[layer] = counts.get(layer, 0) + found

    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(
                functools.partial(count, number)
            )
    for batch in batches:
        for tokens, segments in zip(
            batch.tokens.reshape(-1, batch.tokens.shape[-1]),
            batch.segment_ids.reshape(-1, batch.tokens.shape[-1]),
            strict=True,
        ):
            with torch.no_grad():
                model(torch.tensor(tokens[None, segments > 0].tolist()))
    return [counts[layer] for layer in sorted(counts)]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("glm4_moe", "next_token"),
        pytest.param("deepseek_v3", "preference", marks=pytest.mark.on_request),
    ],
)
def test_a_step_moves_each_bias_by_the_sign_of_its_experts_load(family, kind, tmp_path):
    """All micro-batches and both sides count, padding and the reference do not."""
    pytest.importorskip("torch")
    options = SIZES | ROUTED | (LATENT if family == "deepseek_v3" else {})
    del options["router_aux_loss_coef"]
    config = ModelConfig.from_hf({"model_type": family, **options})
    decoder = Decoder(config, compute_dtype="float32", balances_experts=True)
    params = decoder.init(jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if (x != 1).any() else x, params)
    save_pretrained(tmp_path, config, params, dtype="float32")
    batches = [two_micro_batches(0)]
    if kind == "preference":
        batches.append(two_micro_batches(5))
    counts = count_tokens(tmp_path, batches)
    real = sum(int((batch.segment_ids > 0).sum()) for batch in batches)
    assert all(layer.sum() == 2 * real for layer in counts) and counts
    expected = [RATE * np.sign(layer.mean() - layer) for layer in counts]

    state, metrics = run_step(decoder, params, kind, RATE)
    moved = [x for stack in biases(state.trainable).values() for x in stack]
    np.testing.assert_array_equal(moved, np.asarray(expected, np.float32))
    if kind == "next_token":
        return
    # Nothing else is touched: neither the norm nor what the optimizer does. These are
    # two programs, whose sums may be rounded in another order.
    plain = Decoder(config, compute_dtype="float32")
    other, other_metrics = run_step(plain, params, kind, 0)
    of_norm = metrics["grad_norm"].mean(), other_metrics["grad_norm"].mean()
    np.testing.assert_allclose(*of_norm, rtol=1e-6)
    assert not any(map(np.any, biases(state.opt_state[0].mu).values()))
    rest = jax.tree.map_with_path(
        lambda path, x: 0 * x if path[-1].key == BALANCING_BIAS else x, state.trainable
    )
    for ours, theirs in zip(
        jax.tree.leaves((rest, state.opt_state)),
        jax.tree.leaves((other.trainable, other.opt_state)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


# --- whole runs -----------------------------------------------------------------------


def run(base: Any, workdir: Any, mesh: dict[str, int], **training: Any) -> None:
    """A run of SFT with these keys of `training` on 40 rows."""
    config = tiny_config(
        "sft", str(base), num_gpus=8 if mesh else 1, lr_scheduler_type="constant",
        router_bias_update_rate=RATE, weight_decay=0.3,
        deepspeed__zero_stage=3 if mesh else 0, **training,
    )  # fmt: skip
    for axis, size in mesh.items():
        config.mesh[axis] = size
    draw = np.random.default_rng(0)
    texts = ["".join(map(chr, draw.integers(97, 123, 24))) for _ in range(40)]
    rows = [
        {"prompt": t[:6], "completion": t[6 : 8 + i % 16]} for i, t in enumerate(texts)
    ]
    train(config, workdir, train_dataset=rows)


@pytest.mark.parametrize(
    "parts", [(3,), pytest.param((2, 4), marks=pytest.mark.on_request)]
)
def test_meshes_accumulation_and_a_resumed_run_give_the_same_biases(parts, tmp_path):
    """One device and one batch a step; eight devices, two micro-batches, a restart."""
    one, many = tmp_path / "one", tmp_path / "many"
    base = write_base(
        tmp_path / "base", chat_tokenizer(), model_type="glm4_moe", num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **ROUTED,
    )  # fmt: skip
    rows = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    run(base, one, {}, **rows, max_steps=parts[-1])
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    mesh = {"data": 2, "fsdp": 2, "expert": 2}
    for steps in parts:
        run(base, many, mesh, **rows, max_steps=steps)
    ours, theirs = weights(many), weights(one)
    names = [name for name in theirs if name.endswith(BALANCING_BIAS)]
    assert names == ["model.layers.1.mlp.gate.e_score_correction_bias"]
    for name in names:
        assert np.abs(theirs[name]).max() > RATE
        np.testing.assert_array_equal(ours[name], theirs[name])
    for line in records(many):
        assert "loss" not in line or 1 <= line["router_load"] <= EXPERTS / 2


# --- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "experts"), [("qwen3_moe", 8), ("qwen2", 0), ("deepseek_v3", 0)]
)
def test_models_without_such_a_bias_are_refused(family, experts):
    config = default_config()
    config.training.router_bias_update_rate = 1e-3
    run = resolve(config)
    sizes = types.SimpleNamespace(
        num_experts=experts,
        model_type=family,
        family=ModelConfig.from_hf({"model_type": family}).family,
    )
    with pytest.raises(ValueError, match=f"0.001: a {family} has no .*aux_loss_coef"):
        balances_experts(run, sizes)


def test_adapters_beside_it_are_refused():
    config = default_config()
    config.training.training_type = "lora"
    config.training.router_bias_update_rate = 1e-3
    with pytest.raises(ValueError, match=r"router_bias_update_rate.*adapters leave"):
        resolve(config)
