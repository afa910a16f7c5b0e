"""Each family's gradients, on one device and eight, and its texts are transformers'."""

import dataclasses
import functools
import logging
import pathlib
import runpy
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain import sharding
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.models import Decoder
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.families import FAMILIES
from jaxtrain.models.hf_config import load_config
from jaxtrain.models.hf_experts import split_fused
from jaxtrain.models.hf_names import leaves_of
from jaxtrain.models.quantization import Quantization, quantize_tree
from jaxtrain.optimizers.optim import decay_mask
from jaxtrain.tree import flatten
from jaxtrain.types import Batch, Params
from tests.models.conftest import FAMILY_OPTIONS
from tests.moe_test import Stored

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
SHAPES = REPOSITORY / "configs" / "shapes"
# Of all families, those that run by default: they have most of what sets one apart.
DEFAULT = ("cohere2", "glm4")
NAMES = (
    "cohere2", "deepseek_v2", "deepseek_v3", "deepseek_v3_halves", "gemma", "gemma3",
    "gemma4_keys_as_values", "glm4", "glm4_moe", "granite", "granite4", "granite4_nope",
    "ministral3", "olmo2", "olmo3", "phi3", "qwen2_moe", "qwen3", "qwen3_5_moe",
    "qwen3_moe_dense", "qwen3_next", "seed_oss", "smollm3",
)  # fmt: skip
each_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=[pytest.mark.on_request] * (name not in DEFAULT))
        for name in NAMES
    ],
    indirect=True,
)
LENGTH = 24
# Documents of each row: one with padding behind it, two packed, and one that fills it.
ROWS = ((17,), (9, 11), (24,), (13, 8))


def make_batch(rows: tuple[tuple[int, ...], ...] = ROWS) -> Batch:
    """Rows of documents; every target but a document's last counts."""
    rng = np.random.default_rng(0)
    shape = (len(rows), LENGTH)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    mask = np.zeros(shape, np.float32)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths, start=1):
            place = (row, slice(start, start + length))
            tokens[place] = rng.integers(3, 128, length)
            positions[place], segments[place] = np.arange(length), number
            mask[row, start : start + length - 1] = 1
            start += length
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        loss_mask=mask,
        segment_ids=segments,
        positions=positions,
    )


def loss_and_gradients(decoder: Decoder, params: Params, batch: Batch, **options: Any):
    """The summed negative log-prob of the batch's targets, and its gradients."""

    def loss(params: Params, batch: Batch) -> jax.Array:
        scores = decoder.token_log_probs(params, batch)
        return -(scores.logps * batch.loss_mask).sum()

    return jax.jit(jax.value_and_grad(loss), **options)(params, batch)


def torch_loss(torch_model: Any, batch: Batch) -> Any:
    """The same of transformers, each document alone in its row."""
    import torch

    total = torch.zeros(())
    for row, segments in enumerate(np.asarray(batch.segment_ids)):
        for number in range(1, segments.max() + 1):
            tokens = np.asarray(batch.tokens)[row, segments == number]
            tokens = torch.tensor(tokens[None].tolist())
            logps = torch_model(tokens).logits[0].log_softmax(-1)
            total = total - logps[:-1].gather(1, tokens[0, 1:, None]).sum()
    return total


def torch_gradients(config: ModelConfig, torch_model: Any) -> dict[str, np.ndarray]:
    """Each tensor's of transformers, by the names that the hub has for them."""
    stored = {
        name: Stored(p.grad.numpy())
        for name, p in torch_model.named_parameters()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    return {
        name: part[(slice(None),) * len(part.get_shape())]
        for name, part in split_fused(config.model_type, stored).items()
    }


def assert_gradients(config: ModelConfig, ours: Params, torch_model: Any) -> None:
    """Each tensor's, to 1e-4 of its largest entry.

    Keys that do not turn may all be moved alike, so that their bias has no gradient but
    rounding: 1e-6 of the largest of all is allowed everywhere.
    """
    expected = torch_gradients(config, torch_model)
    buffers = {name for name, _ in torch_model.named_buffers()}
    flat, checked = flatten(ours), set()
    rounding = 1e-6 * max(np.abs(value).max() for value in expected.values())
    for leaf in leaves_of(config):
        gradient = np.asarray(flat[leaf.path])
        for place in leaf.places:
            part = gradient[place].T if leaf.transposed else gradient[place]
            name = leaf.tensor_name(place)
            if name in buffers:  # which train neither here nor there
                assert not np.any(part), name
                continue
            bound = 1e-4 * np.abs(expected[name]).max() + rounding
            np.testing.assert_allclose(
                part, expected[name], rtol=0, atol=bound, err_msg=name
            )
            checked.add(name)
    assert checked == set(expected)


@pytest.mark.torch
@each_family
def test_loss_and_gradients_are_those_of_transformers(torch_model) -> None:
    """Padded and packed rows, on one device and on a mesh of eight."""
    theirs, decoder, params = (
        torch_model.torch_model,
        torch_model.model,
        torch_model.params,
    )
    batch = make_batch()
    theirs.zero_grad()
    expected = torch_loss(theirs, batch)
    expected.backward()
    loss, gradients = loss_and_gradients(decoder, params, batch)
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    assert_gradients(decoder.config, gradients, theirs)

    rules = sharding.ACTIVATION_RULES
    plan = sharding.ShardingPlan(
        sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), zero_stage=3
    )
    spread = dataclasses.replace(
        decoder,
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
    layouts = plan.parameters(params, decoder.logical_axes())
    placed = jax.device_put(params, layouts)
    loss, gradients = loss_and_gradients(
        spread, placed, batch, in_shardings=(layouts, plan.batch())
    )
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-5)
    assert_gradients(decoder.config, gradients, theirs)


@functools.cache
def make_generate(decoder: Decoder, new: int) -> Any:
    """A function of prompts that appends `new` tokens, each the most likely."""

    @jax.jit
    def generate(params, tokens, positions, segment_ids):
        rows, length = tokens.shape
        cache = decoder.init_cache(rows, length + new)
        logits, cache = decoder.decode(params, tokens, positions, cache, segment_ids)
        lengths = (segment_ids != 0).sum(axis=1)

        def step(carry, count):
            logits, cache = carry
            token = logits.argmax(-1)[:, None]
            at = (lengths + count)[:, None]
            return decoder.decode(params, token, at, cache), token[:, 0]

        return jax.lax.scan(step, (logits, cache), jnp.arange(new))[1]

    return generate


@pytest.mark.torch
@each_family
def test_generated_tokens_are_those_of_transformers(torch_model) -> None:
    """Prompts padded on the left; transformers takes each alone, with its own cache."""
    import torch

    rng, new, longest = np.random.default_rng(1), 12, 7
    prompts = [rng.integers(3, 128, length) for length in (longest, 4)]
    rows = {
        name: np.zeros((2, longest), np.int32)
        for name in ("tokens", "positions", "segment_ids")
    }
    for row, prompt in enumerate(prompts):
        own = (row, slice(longest - len(prompt), longest))
        rows["tokens"][own], rows["positions"][own] = prompt, np.arange(len(prompt))
        rows["segment_ids"][own] = 1
    tokens = make_generate(torch_model.model, new)(torch_model.params, **rows)
    for row, prompt in enumerate(prompts):
        expected = torch_model.torch_model.generate(
            torch.tensor(prompt[None].tolist()),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens[:, row].tolist() == expected[0, len(prompt) :].tolist()


# --- without transformers -------------------------------------------------------------


@pytest.mark.parametrize("name", ["glm4", "granite4"])
def test_fused_projections_of_any_name_are_kept_in_few_bits(make_model, name) -> None:
    model, params = make_model(name)
    how = Quantization("int8", 16)
    small = dataclasses.replace(model, quantization=how)
    copy = jax.tree.map(lambda leaf: leaf, params)  # kernels leave it
    codes = quantize_tree(copy, model.linear_kernels(), how)
    assert jax.tree.structure(codes) == jax.tree.structure(small.abstract_params())
    batch = make_batch()
    rows = (batch.tokens, batch.positions, batch.segment_ids)
    whole, coarse = model.logits(params, *rows), small.logits(codes, *rows)
    real = batch.segment_ids != 0
    assert 0 < np.abs(whole - coarse)[real].max() < 0.1 * np.abs(whole[real]).max()


def tiny(model_type: str, **options: Any) -> ModelConfig:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
    sizes["num_key_value_heads"] = 2
    return ModelConfig.from_hf({"model_type": model_type, **sizes, **options})


def test_layers_turn_queries_and_keys_as_their_family_says() -> None:
    def turning(config: ModelConfig) -> list[bool]:
        return [rope.kind != "none" for rope in config.ropes]

    assert turning(tiny("smollm3")) == [True, True, True, False]
    assert turning(tiny("smollm3", no_rope_layers=[0, 1, 1, 0, 1])) == [
        False, True, True, False
    ]  # fmt: skip
    assert turning(tiny("cohere2")) == [True, True, True, False]
    four = {"layer_types": ["attention"] * 4, "num_local_experts": 0}
    assert turning(tiny("granitemoehybrid", **four)) == [False] * 4
    four["position_embedding_type"] = "rope"
    assert turning(tiny("granitemoehybrid", **four)) == [True] * 4


def test_gemma_means_the_approximation_when_it_says_gelu() -> None:
    assert tiny("gemma", hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0: must"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers names 2 layers"),
        ("cohere2", {"head_dim": 24}, "heads of a cohere2 always share hidden_size"),
        ("cohere2", {"logit_scale": -1.0}, "logit_scale = -1.0: must be a finite"),
        ("granite", {"logits_scaling": 0}, "logits_scaling = 0: must be a finite"),
        ("granitemoehybrid", {}, r"num_local_experts = 8 \(only 0\)"),
        (
            "granitemoehybrid",
            {"num_local_experts": 0, "layer_types": ["mamba"] * 4},
            r"layer_types has \['mamba'\]",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(model_type, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(model_type, **options)


def test_a_longer_context_keeps_the_scale_of_queries() -> None:
    config = tiny("ministral3")
    assert config.rope.llama_4_scaling_beta == 0.1
    yarn = {"rope_type": "yarn", "factor": 32.0}
    longer = config.with_rope_scaling(
        {**yarn, "original_max_position_embeddings": 16_384}
    )
    assert (longer.rope.factor, longer.rope.llama_4_scaling_beta) == (32.0, 0.1)
    assert ModelConfig.from_hf(longer.to_hf()) == longer
    with pytest.raises(ValueError, match="this kind has not; use yarn"):
        config.with_rope_scaling({"rope_type": "linear", "factor": 2.0})


def test_dropout_that_is_not_applied_is_named(tmp_path, caplog) -> None:
    shutil.copy(SHAPES / "seed-oss-36b" / "config.json", tmp_path)
    with caplog.at_level(logging.WARNING):
        config = load_config(tmp_path)
    (record,) = caplog.records
    assert "attention_dropout = 0.1, residual_dropout = 0.1, which" in record.message
    # Who trains the export in transformers applies what was applied here.
    assert config.to_hf()["residual_dropout"] == 0.0


# Families with parameters, or buffers, that others have not.
ODD = ("deepseek_v3", "gemma4", "gpt_oss", "lfm2", "qwen3_next")


@pytest.mark.torch
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.on_request] * (name not in ODD))
        for name in FAMILY_OPTIONS
    ],
)
def test_what_decays_is_what_decays_in_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    options = FAMILY_OPTIONS[name]
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**options)
        )
    known = dict(model.named_parameters()).keys() | dict(model.named_buffers()).keys()
    expected = {*transformers.Trainer.get_decay_parameter_names(None, model)}
    decoder = Decoder(ModelConfig.from_hf(options))
    decays = flatten(decay_mask(decoder.abstract_params()))
    matched = 0
    for leaf in leaves_of(decoder.config):
        for tensor in map(leaf.tensor_name, leaf.places):
            matched += tensor in known
            # What transformers has in one tensor with others is of a projection.
            decayed = tensor in expected if tensor in known else "bias" not in tensor
            assert decays[leaf.path] == decayed, tensor
    assert matched > len(known) / 2


def test_no_family_has_a_key_that_it_both_reads_and_passes_over() -> None:
    for name, family in FAMILIES.items():
        assert not family.keys & family.ignored_keys, name
        assert not family.keys & {*family.unused_dropout}, name


def test_the_page_has_the_table_that_the_code_gives(caplog) -> None:
    page = runpy.run_path(str(REPOSITORY / "docs" / "make_models.py"))
    with caplog.at_level(logging.CRITICAL, logger="jaxtrain"):
        assert page["make_page"]() == page["OUTPUT"].read_text(), (
            "run python docs/make_models.py"
        )
