"""Mixtures of experts in training: against transformers, PEFT, and over meshes."""

import dataclasses
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain import sharding
from jaxtrain.aot.jaxpr_cost import count_flops
from jaxtrain.lora import LoraConfig, init_adapters, make_shape, resolve_targets
from jaxtrain.lora.targets import resolve_modules_to_save
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.hf import load_config, load_params
from jaxtrain.models.hf_experts import split_fused
from jaxtrain.models.hf_names import leaves_of
from jaxtrain.models.mixture_options import router_loss_coefficient
from jaxtrain.objectives import make_objective
from jaxtrain.objectives.added import with_router_loss
from jaxtrain.optimizers import optim
from jaxtrain.step import StepOptions, make_train_step
from jaxtrain.tree import flatten, select
from jaxtrain.types import Batch, PairBatch, TokenLogProbs, TrainState, WeightedSum
from tests.runs import tiny_config, train

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 0.3,
}
_SHARED = {
    "num_experts": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
_DELTA_NETS = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rms_norm_eps": 1e-2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 8,
        "sliding_window": 5,
        "swiglu_limit": 0.9,
    },
    "qwen2_moe": _SHARED | {"num_hidden_layers": 3, "mlp_only_layers": [1]},
    "qwen3_next": _SHARED | _DELTA_NETS,
    "qwen3_5_moe_text": _SHARED | _DELTA_NETS | {"intermediate_size": None},
}
LENGTHS = (13, 16, 7, 11)
T = 16


def make_batch(seed: int = 0, rows: int = len(LENGTHS)) -> Batch:
    """Right-padded rows [1 B T]; targets are the next token."""
    rng = np.random.default_rng(seed)
    lengths = np.resize(LENGTHS, rows)
    real = np.arange(T) < lengths[:, None]
    tokens = rng.integers(0, 96, (rows, T)) * real
    batch = Batch(
        tokens=tokens.astype(np.int32),
        targets=np.roll(tokens, -1, axis=1).astype(np.int32),
        segment_ids=real.astype(np.int32),
        positions=(np.arange(T) * real).astype(np.int32),
        loss_mask=(np.arange(T) < lengths[:, None] - 1).astype(np.float32),
    )
    return jax.tree.map(lambda x: x[None], batch)


def make_step(decoder: Decoder, objective: str = "next_token", **options: Any) -> Any:
    """One step of plain gradient descent at rate 1, the router's loss in it."""
    coefficient = decoder.config.router_aux_loss_coef
    return make_train_step(
        with_router_loss(make_objective(objective), coefficient),
        functools.partial(decoder.token_log_probs, with_router_loss=True),
        optax.sgd(1.0),
        lambda _: 1.0,
        StepOptions(**options),
    )


def make_state(trainable: Any, frozen: Any) -> TrainState:
    opt_state = optax.sgd(1.0).init(trainable)
    return TrainState(jnp.int32(0), trainable, frozen, opt_state, jax.random.key(0))


# --- transformers -----------------------------------------------------------------


class Stored:
    """A gradient of transformers as `split_fused` reads a file."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def get_shape(self) -> list[int]:
        return list(self.array.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.array[index]


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "remat"),
    [
        ("mixtral", "minimal"),
        ("qwen3_moe", "full"),
        ("gpt_oss", "none"),
        pytest.param("qwen2_moe", "minimal", marks=pytest.mark.on_request),
        pytest.param("qwen3_next", "full", marks=pytest.mark.on_request),
        pytest.param("qwen3_5_moe_text", "full", marks=pytest.mark.on_request),
    ],
)
def test_loss_router_loss_and_gradients_equal_transformers(family, remat, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    theirs = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for parameter in theirs.parameters():  # at 0.02 all logits are near 0
            parameter.normal_(0, 0.2)
    # transformers' own stacks on disk; the hub's form is what hf_save_test.py reads.
    theirs.save_pretrained(tmp_path, save_original_format=False)
    batch = make_batch()
    labels = np.where(np.asarray(batch.segment_ids[0]) > 0, batch.tokens[0], -100)
    output = theirs(
        torch.tensor(np.asarray(batch.tokens[0], np.int64)),
        attention_mask=torch.tensor(np.asarray(batch.segment_ids[0], np.int64)),
        labels=torch.tensor(np.asarray(labels, np.int64)),
        output_router_logits=True,
    )
    output.loss.backward()

    decoder = Decoder(load_config(tmp_path), compute_dtype="float32", remat=remat)
    params = load_params(tmp_path, decoder)
    new_state, metrics = jax.jit(make_step(decoder))(make_state(params, {}), batch)
    np.testing.assert_allclose(
        metrics["aux_loss"].mean(), output.aux_loss.item(), rtol=2e-6
    )
    np.testing.assert_allclose(metrics["loss"].mean(), output.loss.item(), rtol=2e-6)
    expected = split_fused(
        family, {n: Stored(p.grad.numpy()) for n, p in theirs.named_parameters()}
    )
    before, after = flatten(params), flatten(new_state.trainable)
    for leaf in leaves_of(decoder.config):
        gradient = np.asarray(before[leaf.path] - after[leaf.path])
        for place in leaf.places:
            part = gradient[place].T if leaf.transposed else gradient[place]
            name = leaf.tensor_name(place)
            # The subtraction rounds to weights' float32 spacing: 6e-8 near 0.5.
            np.testing.assert_allclose(
                part,
                expected.pop(name)[(slice(None),) * part.ndim],
                rtol=1e-4, atol=3e-6, err_msg=name,
            )  # fmt: skip
    assert not expected


# --- meshes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral() -> tuple[Decoder, Any]:
    """A decoder, and weights so large that all of them matter."""
    config = ModelConfig.from_hf(
        {"model_type": "mixtral", **SIZES, **FAMILIES["mixtral"]}
    )
    decoder = Decoder(config, compute_dtype="float32", remat="minimal")
    params = decoder.init(jax.random.key(0))
    return decoder, jax.tree.map(lambda x: 5 * x if (x != 1).any() else x, params)


def run_step(decoder, params, kind, plan):
    """One step of SFT, or of DPO with adapters; the new weights and metrics."""
    options: dict[str, Any] = {}
    batch: Any = make_batch(rows=8)
    trainable, frozen, objective = params, {}, "next_token"
    if kind == "lora dpo":
        entries = ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
        lora = LoraConfig(r=4, alpha=8, target_parameters=entries)
        decoder = dataclasses.replace(decoder, lora=make_shape(lora, params))
        adapters = init_adapters(jax.random.key(1), params, lora)
        trainable, frozen = jax.tree.map(lambda x: x + 0.05, adapters), params
        objective, options = "preference", {"with_reference": True}
        batch = PairBatch(batch, make_batch(seed=1, rows=8))
    if plan is None:
        return jax.jit(make_step(decoder, objective, **options))(
            make_state(trainable, frozen), batch
        )
    decoder = dataclasses.replace(
        decoder, constrain=plan.constrain, map_shards=plan.map_shards
    )
    axes = decoder.logical_axes()
    trainable = jax.device_put(
        trainable, plan.parameters(trainable, select(axes, trainable))
    )
    frozen = jax.device_put(frozen, plan.parameters(frozen, select(axes, frozen)))
    state = make_state(trainable, frozen)
    step = jax.jit(make_step(decoder, objective, **options))
    return step(state, jax.device_put(batch, plan.batch(1)))


def assert_same_step(meshed, expected):
    """Two steps' states and metrics are equal but for the order of sums."""
    (meshed_state, meshed_metrics), (state, metrics) = meshed, expected
    for name in ("loss", "aux_loss", "grad_norm"):
        np.testing.assert_allclose(
            meshed_metrics[name].mean(), metrics[name].mean(), rtol=1e-5, err_msg=name
        )
    # Gradients of order 1 and sums in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5),
        meshed_state.trainable,
        state.trainable,
    )


@pytest.mark.parametrize(
    ("kind", "sizes", "split"),
    [
        ("sft", {"data": 2, "fsdp": 2, "tensor": 2}, (1, 3)),
        # 4 experts do not divide over 8 devices; their width is split instead.
        pytest.param("lora dpo", {"fsdp": 8}, (2,), marks=pytest.mark.slow),
    ],
)
def test_loss_and_next_weights_are_the_same_on_a_mesh_of_eight(
    mixtral, kind, sizes, split
):
    decoder, params = mixtral
    plan = sharding.ShardingPlan(sharding.make_mesh(sizes))
    layouts = plan.parameters(decoder.abstract_params(), decoder.logical_axes())
    spec = layouts["layers"]["mlp"]["experts"]["gate_proj"].spec
    assert tuple(i for i, axes in enumerate(spec) if axes) == split
    expected = run_step(decoder, params, kind, None)
    assert_same_step(run_step(decoder, params, kind, plan), expected)


def test_each_device_routes_its_own_tokens(mixtral):
    """Experts cost gathers of weights and sums of gradients: no token travels."""
    decoder, params = mixtral
    plan = sharding.ShardingPlan(sharding.make_mesh({"fsdp": 8}))
    decoder = dataclasses.replace(
        decoder, constrain=plan.constrain, map_shards=plan.map_shards
    )
    batch = jax.tree.map(lambda x: x[0], make_batch(rows=8))
    layouts = plan.parameters(params, decoder.logical_axes())
    score = jax.jit(
        lambda params, batch: decoder.token_log_probs(params, batch).logps,
        in_shardings=(layouts, plan.batch()),
    )
    program = score.lower(params, batch).compile().as_text().splitlines()
    names = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    moved = {
        name for name in names for line in program if f" {name}(" in line
        and re.search(r'op_name="[^"]*/mlp/', line)
    }  # fmt: skip
    assert moved == {"all-gather"}


# --- the objective ----------------------------------------------------------------


def scored(router_loss: float) -> TokenLogProbs:
    zeros = jnp.zeros((1, 3))
    return TokenLogProbs(
        zeros - 1, zeros, zeros, zeros, router_loss=jnp.float32(router_loss)
    )


def test_the_router_loss_is_added_in_the_losses_weight_and_hidden_from_it():
    def objective(policy, reference, batch):
        first, second = policy(batch), policy(batch)
        assert first.router_loss is None
        assert reference(batch).router_loss is None
        loss = WeightedSum(-(first.logps + second.logps).sum(), jnp.float32(3))
        return loss, dict(own)

    answers = iter([2.5, 99.0])  # only a step's first forward pass counts
    own: dict[str, WeightedSum] = {}
    batch = jax.tree.map(lambda x: x[0], make_batch(rows=1))
    loss, metrics = with_router_loss(objective, 0.1)(
        lambda rows: scored(next(answers)), lambda rows: scored(7.0), batch
    )
    np.testing.assert_allclose(loss.mean(), 2 + 0.1 * 2.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["aux_loss"].mean(), 2.5)
    own["aux_loss"] = WeightedSum(jnp.float32(1), jnp.float32(1))
    _, metrics = with_router_loss(objective, 0.1)(
        lambda rows: scored(2.5), lambda rows: scored(7.0), batch
    )
    assert metrics["aux_loss"].mean() == 1
    np.testing.assert_allclose(metrics["router_aux_loss"].mean(), 2.5)


# --- LoRA -------------------------------------------------------------------------


def test_a_mixture_trains_in_full_but_for_its_experts(mixtral):
    """Adapters on experts: expert_adapters_test.py."""
    _, params = mixtral
    for target in ("gate_proj", "experts", "mlp.gate", "w1"):
        with pytest.raises(
            ValueError, match="experts go by target_parameters"
        ) as error:
            resolve_targets(LoraConfig(target_modules=(target,)), params)
        assert target in str(error.value)
    with pytest.raises(ValueError, match="selects the experts"):
        resolve_modules_to_save(LoraConfig(modules_to_save=("experts",)), params)
    router = resolve_modules_to_save(LoraConfig(modules_to_save=("mlp.gate",)), params)
    assert router == {("layers", "mlp", "gate")}


# --- costs and optimizers ---------------------------------------------------------


def test_flops_count_the_experts_that_a_token_visits():
    config = ModelConfig.from_hf(
        {"model_type": "qwen3_moe", **SIZES, **FAMILIES["qwen3_moe"]}
    )
    attention = 2 * 32 * (4 + 2) * 8
    sparse = 32 * 4 + 2 * 3 * 32 * 24
    scores = 12 * 4 * 8 * 10 * 2
    expected = 6 * (2 * (attention + sparse) + 96 * 32) + scores
    assert config.flops_per_token(10) == expected
    # The forward pass as traced: of the experts, those visited; scores in full.
    tokens = jnp.zeros((1, 10), jnp.int32)
    decoder = Decoder(config, compute_dtype="float32", attention="reference")
    params = decoder.abstract_params()
    traced = jax.make_jaxpr(decoder.logits)(params, tokens, tokens, tokens + 1)
    assert count_flops(traced) == 10 * expected / 3


def test_optimizers_treat_every_expert_as_a_matrix_of_its_own():
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.normal(size=(2, 3, 8, 6)), jnp.float32)
    together = {"layers": {"mlp": {"experts": {"up_proj": stack}}}}
    apart = {"layers": {"mlp": {"up_proj": {"kernel": stack.reshape(6, 8, 6)}}}}
    for name in ("muon", "adafactor"):
        optimizer = optim.make_optimizer(name, lambda step: 1.0)
        updates = [
            jax.tree.leaves(optimizer.update(tree, optimizer.init(tree), tree)[0])[0]
            for tree in (together, apart)
        ]
        np.testing.assert_allclose(
            updates[0].reshape(6, 8, 6), updates[1], rtol=1e-6, err_msg=name
        )
        assert np.abs(updates[1]).min() > 0


# --- refusals ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts_per_tok": 5}, "exceeds num_experts = 4"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ({"router_aux_loss_coef": -1.0}, "at least 0"),
        ({"model_type": "mixtral", "num_local_experts": 0}, "positive integer"),
        ({"model_type": "mixtral", "norm_topk_prob": False}, "always sum to 1"),
    ],
)
def test_a_mixture_that_the_decoder_has_not_is_refused(options, words):
    given = {"model_type": "qwen3_moe", **SIZES, "num_experts": 4, **options}
    if given["model_type"] == "mixtral":
        del given["num_experts"]
    with pytest.raises(ValueError, match=words):
        ModelConfig.from_hf(given)


# --- whole runs -------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A mixture trained from scratch for some steps, and what was logged."""
    config = tiny_config(
        "from_scratch", max_steps=3, eval_steps=3, save_steps=0, router_z_loss_coef=0.1
    )
    with config.unlocked():
        config.model.architecture.update(
            model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, router_aux_loss_coef=0.5,
        )  # fmt: skip
    workdir = tmp_path_factory.mktemp("moe")
    results = train(config, workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return results, [json.loads(line) for line in lines]


def test_a_run_logs_the_router_loss_and_keeps_it_out_of_the_perplexity(trained):
    _, logged = trained
    evaluated = [line for line in logged if "eval_loss" in line]
    steps = [line for line in logged if "loss" in line]
    assert len(steps) == 3 and evaluated
    for line, prefix in [(steps[-1], ""), (evaluated[-1], "eval_")]:
        router = line[f"{prefix}aux_loss"]
        assert 1.9 < router < 4  # K where even, E at worst
        likelihood = line[f"{prefix}loss"] - 0.5 * router
        likelihood -= 0.1 * line[f"{prefix}router_z_loss"]
        assert 1 <= line[f"{prefix}router_load"] <= 2  # E / K at worst
        assert 0 < line[f"{prefix}router_entropy"] <= np.log(4)
        assert line[f"{prefix}router_dropped"] == 0
        np.testing.assert_allclose(
            line[f"{prefix}perplexity"], np.exp(likelihood), rtol=1e-5
        )


@pytest.mark.torch
def test_an_exported_run_has_the_same_logits_in_transformers(trained):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = trained[0]["model_path"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    decoder = Decoder(load_config(directory), compute_dtype="float32")
    tokens = np.arange(3, 15, dtype=np.int32)[None]
    ours = decoder.logits(
        load_params(directory, decoder), tokens, tokens - 3, np.ones_like(tokens)
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens.tolist())).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert theirs.config.num_local_experts == 4


def test_dpo_with_adapters_over_a_mesh_logs_the_router_loss(trained, tmp_path):
    config = tiny_config(
        "dpo", trained[0]["model_path"], max_steps=1, num_gpus=2,
        lora__enabled=True, gradient_accumulation_steps=1, save_final_model=False,
        per_device_train_batch_size=1, per_device_eval_batch_size=1,
        router_aux_loss_coef=0.01,
    )  # fmt: skip
    config.mesh.tensor = 2
    config.data.max_length = 32
    results = train(config, tmp_path)
    assert 1.9 < results["aux_loss"] < 4
    # New adapters add nothing, so the first loss is log 2 and the router's part.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first = next(line for line in map(json.loads, lines) if "loss" in line)
    expected = np.log(2) + 0.01 * first["aux_loss"]
    np.testing.assert_allclose(first["loss"], expected, rtol=1e-5)


def test_a_coefficient_for_a_model_without_experts_is_refused(trained):
    run = tiny_config("sft", router_aux_loss_coef=0.01)
    from jaxtrain.config import resolve

    dense = ModelConfig.from_hf({"model_type": "llama"})
    with pytest.raises(ValueError, match="llama has no experts"):
        router_loss_coefficient(resolve(run, device_count=1), dense)
