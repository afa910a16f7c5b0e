"""Qwen3.5's text decoder against transformers, whose layers are of two kinds.

The weights are those of the family's row in conftest.py: two periods of two layers of
Gated DeltaNet and one of attention. Documents are longer than a chunk of the kernel.
"""

import dataclasses

import jax
import numpy as np
import pytest

from jaxtrain import sharding
from jaxtrain.config import resolve
from jaxtrain.evaluation.generate import make_generate
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.hf_names import leaves_of
from jaxtrain.models.load import make_decoder, make_plan
from jaxtrain.tree import flatten
from jaxtrain.types import Batch

pytestmark = pytest.mark.torch
LENGTH = 112
# The documents of each row.
ROWS = ((75, 30), (100,), (5, 64, 3), (1, 66))


of_qwen = pytest.mark.parametrize("family", ["qwen3_5"], indirect=True)


@pytest.fixture(scope="module")
def batch():
    """Packed rows; how much each target weighs, 0 at documents' ends."""
    rng = np.random.default_rng(0)
    fields = {
        name: np.zeros((len(ROWS), LENGTH), np.int32)
        for name in ("tokens", "targets", "positions", "segment_ids")
    }
    mask = np.zeros((len(ROWS), LENGTH), np.float32)
    for b, lengths in enumerate(ROWS):
        start = 0
        for number, length in enumerate(lengths, start=1):
            own = (b, slice(start, start + length))
            document = rng.integers(3, 128, length)
            fields["tokens"][own], fields["segment_ids"][own] = document, number
            fields["targets"][own] = np.roll(document, -1)
            fields["positions"][own] = np.arange(length)
            mask[b, start : start + length - 1] = rng.normal(size=length - 1)
            start += length
    return Batch(**fields, loss_mask=mask)


def documents_of(batch):
    for b, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            yield b, slice(start, start + length)
            start += length


def loss_and_gradients(model, params, batch):
    def loss(params):
        scores = model.token_log_probs(params, batch)
        return (scores.logps * batch.loss_mask).sum(), scores.logps

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def ours(torch_model, batch):
    return loss_and_gradients(torch_model.model, torch_model.params, batch)


@of_qwen
def test_packed_log_probs_and_all_gradients_equal_transformers(
    torch_model, batch, ours
):
    import torch

    peer = torch_model.torch_model
    peer.zero_grad()
    (_, logps), gradients = ours
    for b, own in documents_of(batch):
        tokens = torch.tensor(batch.tokens[b, own].astype(int))
        scores = torch.log_softmax(peer(tokens[None]).logits[0], dim=-1)
        targets = torch.tensor(batch.targets[b, own].astype(int))
        expected = scores[torch.arange(len(targets)), targets]
        np.testing.assert_allclose(
            logps[b, own], expected.detach().numpy(), rtol=0, atol=1e-4
        )
        (expected * torch.tensor(batch.loss_mask[b, own])).sum().backward()
    named = {name: weight.grad.numpy() for name, weight in peer.named_parameters()}
    gradients = flatten(gradients)
    for leaf in leaves_of(torch_model.model.config):
        for place in leaf.places:
            expected = named.pop(leaf.tensor_name(place))
            if leaf.transposed:
                expected = expected.T
            got = np.asarray(gradients[leaf.path][place])
            bound = 1e-4 * max(1.0, np.abs(expected).max())
            np.testing.assert_allclose(
                got, expected, rtol=0, atol=bound, err_msg=leaf.tensor_name(place)
            )
    assert not named


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}])
@of_qwen
def test_a_mesh_of_eight_changes_no_number(torch_model, batch, ours, sizes):
    plan = sharding.ShardingPlan(sharding.make_mesh(sizes), zero_stage=3)
    rules = sharding.ACTIVATION_RULES
    model = dataclasses.replace(
        torch_model.model,
        constrain=plan.constrain,
        map_shards=plan.map_shards,
        layout=Layout(
            plan.mesh,
            rows=rules["batch"],
            heads=rules["heads"],
            tokens=rules["sequence"],
            vocab=rules["vocab"],
        ),
    )
    layouts = plan.parameters(model.abstract_params(), model.logical_axes())
    params = jax.device_put(torch_model.params, layouts)
    placed = jax.device_put(batch, plan.batch())
    (loss, logps), gradients = loss_and_gradients(model, params, placed)
    (one_loss, one_logps), one = ours
    np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
    real = batch.segment_ids != 0
    np.testing.assert_allclose(logps[real], one_logps[real], atol=2e-5)

    def assert_close(a, b):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))

    jax.tree.map(assert_close, gradients, one)


def test_a_mesh_that_cuts_rows_is_refused():
    config = ModelConfig.from_hf({"model_type": "qwen3_5_text"})
    training = {"training_type": "sft"}
    run = resolve({"mesh": {"context": 2}, "training": training}, device_count=2)
    plan = make_plan(run, config, jax.devices()[:2])
    with pytest.raises(
        ValueError, match=r"mesh\.context = 2: .* set mesh\.context = 1"
    ):
        make_decoder(run, config, plan)


@of_qwen
def test_prompts_are_not_shared_and_the_reason_is_given(torch_model):
    assert "from left to right" in torch_model.model.why_no_shared_prompts(10)


@pytest.mark.parametrize(
    "side", ["left", pytest.param("right", marks=pytest.mark.on_request)]
)
@of_qwen
def test_generation_goes_on_from_the_states_as_transformers_does(torch_model, side):
    import torch

    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 128, length) for length in (70, 2, 33)]
    rows = {
        name: (np.zeros((3, 70), int), np.zeros((3, 70), int))
        for name in ("left", "right")
    }
    for b, prompt in enumerate(prompts):
        for name, (tokens, mask) in rows.items():
            own = (
                slice(0, len(prompt)) if name == "right" else slice(-len(prompt), None)
            )
            tokens[b, own], mask[b, own] = prompt, 1
    count = 20
    with torch.no_grad():
        tokens, mask = map(torch.tensor, rows["left"])
        expected = torch_model.torch_model.generate(
            tokens,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=2,
            pad_token_id=0,
        )[:, 70:].numpy()
    generate = make_generate(
        torch_model.model, max_new_tokens=count, temperature=0, eos_ids=(2,), pad_id=0
    )
    tokens, mask = (x.astype(np.int32) for x in rows[side])
    found = np.asarray(generate(torch_model.params, tokens, mask, jax.random.key(0)))
    np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
    assert len(np.unique(expected)) > 6


@of_qwen
def test_weights_start_as_transformers_starts_them(torch_model):
    model = Decoder(torch_model.model.config)
    layers = model.init(jax.random.key(0))["layers"].values()
    nets = [layer["linear_attn"] for layer in layers if "linear_attn" in layer]
    rates = np.exp(np.concatenate([np.ravel(net["A_log"]) for net in nets]))
    assert rates.min() >= 0.01 and rates.max() <= 16 and len(np.unique(rates)) == 16
    for net in nets:
        np.testing.assert_array_equal(net["dt_bias"], 1)
        np.testing.assert_array_equal(net["norm"]["scale"], 1)
        deviation = np.std(net["conv1d"]["weight"])
        np.testing.assert_allclose(deviation, 0.02, rtol=0.2)


@of_qwen
def test_the_config_is_read_back_and_by_transformers(torch_model):
    import transformers

    config = torch_model.model.config
    assert config.layer_types[:3] == (*["linear_attention"] * 2, "full_attention")
    assert config.rope.partial_rotary_factor == 0.5
    stored = config.to_hf()
    assert ModelConfig.from_hf(stored) == config
    theirs = transformers.AutoConfig.for_model(**stored)
    peer = torch_model.torch_model.config
    for name in stored.keys() & {*vars(peer)} - {"rope_parameters", "architectures"}:
        assert getattr(theirs, name) == getattr(peer, name), name
    assert theirs.rope_parameters["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"linear_num_value_heads": 3},
            "3 is not a multiple of linear_num_key_heads = 2",
        ),
        (
            {"linear_conv_kernel_dim": 0},
            "linear_conv_kernel_dim = 0: must be an integer",
        ),
        ({"hidden_act": "gelu"}, "only 'silu' is implemented"),
        (
            {"layer_types": None, "full_attention_interval": 0},
            "full_attention_interval = 0: must be a positive integer",
        ),
    ],
)
@of_qwen
def test_what_cannot_be_is_refused(torch_model, changed, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**torch_model.model.config.to_hf(), **changed})


def test_every_fourth_layer_attends_where_the_config_says_no_more():
    config = ModelConfig.from_hf({"model_type": "qwen3_5_text"})
    assert [i for i, kind in enumerate(config.layer_types) if "full" in kind] == [
        *range(3, 32, 4)
    ]
    assert config.rope.partial_rotary_factor == 0.25
    assert 8e9 < config.num_params() < 10e9
    # 6 a weight of a matrix, 12 a query and key of 8 layers, the states of 24.
    states = 3 * 24 * 6 * 32 * 128 * 128
    assert config.flops_per_token(1) - states > 6 * 7.5e9
