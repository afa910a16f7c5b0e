"""Models whose layers are of several kinds: stacks, files, adapters, training."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxtrain import lora as adapters
from jaxtrain import sharding
from jaxtrain.kernels.convolution import causal_convolution, continue_convolution
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.hf import load_params, save_pretrained
from jaxtrain.models.hf_names import leaves_of
from jaxtrain.models.layer_kinds import kinds_of
from jaxtrain.models.stacks import (
    layer_numbers,
    layers_of,
    plan_segments,
    split_path,
    stack_name,
)
from jaxtrain.optimizers.multipliers import make_multipliers, with_multipliers
from jaxtrain.tree import flatten, overlay
from jaxtrain.types import Batch, Params

LENGTH = 24


# --- stacks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        # LFM2 of 16 layers, convolutions but for c's; DeepSeek's dense layers first;
        # Gemma 4 E2B's layers, of which the last 20 read others' keys and values.
        (
            "ccaccaccacacacac",
            "0to1 2to5by3 3to6by3 4to7by3 8to14by2 9to15by2",
        ),
        ("ddd" + "m" * 5, "0to2 3to7"),
        (
            "ssssf" * 3 + "SSSSF" * 4,
            "0to10by5 1to11by5 2to12by5 3to13by5 4to14by5"
            " 15to30by5 16to31by5 17to32by5 18to33by5 19to34by5",
        ),
        ("ab", "0 1"),
        ("a" * 4, "0to3"),
    ],
)
def test_stacks_of_known_patterns_never_change(kinds: str, names: str) -> None:
    """Checkpoints call them so."""
    found = [
        stack_name(stack)
        for segment in plan_segments(kinds)
        for stack in segment.stacks
    ]
    assert found == names.split()


@given(kinds=st.text("abc", min_size=1, max_size=40))
def test_every_layer_stands_in_one_stack_of_its_kind(kinds: str) -> None:
    segments = plan_segments(kinds)
    covered = []
    for segment in segments:
        for stack in segment.stacks:
            assert len({kinds[layer] for layer in stack}) == 1
            assert layers_of(stack_name(stack)) == stack
        in_order = zip(*segment.stacks, strict=True)
        covered += [layer for period in in_order for layer in period]
    assert covered == list(range(len(kinds)))


def test_a_path_tells_its_stack_from_what_is_below() -> None:
    alike = ("layers", "mlp", "up_proj")
    assert split_path(alike) == (("layers",), ("mlp", "up_proj"))
    assert split_path(("layers", "1to5by2", "mlp")) == (("layers", "1to5by2"), ("mlp",))
    assert split_path(("norm", "scale")) == ((), ("norm", "scale"))
    assert list(layer_numbers(("layers", "1to5by2"), 3)) == [1, 3, 5]
    assert list(layer_numbers(("layers",), 3)) == [0, 1, 2]


# --- a convolution -------------------------------------------------------------------


def test_a_convolution_reads_its_own_document_and_no_other() -> None:
    rng = np.random.default_rng(0)
    taps = rng.standard_normal((3, 2))
    x = rng.standard_normal((1, 9, 2))
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0, 0]])
    found = causal_convolution(*map(jnp.asarray, (x, taps, segments)))
    for t in range(6):
        own = [
            t - j for j in range(3) if t >= j and segments[0, t - j] == segments[0, t]
        ]
        expected = sum(x[0, at] * taps[2 - (t - at)] for at in own)
        np.testing.assert_allclose(found[0, t], expected, rtol=1e-5, atol=1e-6)


def test_steps_go_on_where_the_last_ended_whatever_the_padding() -> None:
    rng = np.random.default_rng(1)
    taps = jnp.asarray(rng.standard_normal((4, 2)))
    x = rng.standard_normal((1, 8, 2))
    whole = causal_convolution(jnp.asarray(x), taps)
    state = jnp.zeros((1, 3, 2))
    done = 0
    for real in ([0, 0, 1, 1, 1], [1, 1, 0], [0, 1], [1], [0], [1]):
        is_real = np.array([real], bool)
        given = rng.standard_normal((1, len(real), 2))
        given[is_real] = x[0, done : done + is_real.sum()]
        mixed, state = continue_convolution(jnp.asarray(given), taps, is_real, state)
        np.testing.assert_allclose(
            mixed[is_real], whole[0, done : done + is_real.sum()], rtol=1e-5, atol=1e-6
        )
        done += is_real.sum()
    assert done == 8


# --- the decoder ---------------------------------------------------------------------


ASKED = pytest.param("qwen3_5", marks=pytest.mark.on_request)


@pytest.fixture(scope="module", params=["lfm2", "gemma4", ASKED])
def of_kinds(request, make_model) -> tuple[Decoder, Params]:
    return make_model(request.param)


@pytest.fixture(scope="module")
def lfm2(make_model) -> tuple[Decoder, Params]:
    return make_model("lfm2")


@pytest.fixture(scope="module")
def gemma4(make_model) -> tuple[Decoder, Params]:
    return make_model("gemma4")


def make_batch(lengths: list[list[int]]) -> Batch:
    """Rows of documents of these lengths, padded on the right; all tokens count."""
    rng = np.random.default_rng(0)
    fields = {
        name: np.zeros((len(lengths), LENGTH), np.int32)
        for name in ("tokens", "targets", "positions", "segment_ids")
    }
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, start=1):
            part = (row, slice(start, start + length))
            fields["tokens"][part] = rng.integers(3, 128, length)
            fields["targets"][part] = np.roll(fields["tokens"][part], -1)
            fields["positions"][part] = np.arange(length)
            fields["segment_ids"][part] = number
            start += length
    mask = (fields["segment_ids"] != 0).astype(np.float32)
    return Batch(**fields, loss_mask=mask)


def unpack(batch: Batch) -> Batch:
    """The same documents, each in a row of its own, on the left."""
    arrays = {name: np.asarray(x) for name, x in vars(batch).items() if x is not None}
    rows = []
    for row, segments in enumerate(arrays["segment_ids"]):
        for number in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == number)
            own = {name: x[row, places] for name, x in arrays.items()}
            own["segment_ids"] = np.ones_like(own["segment_ids"])
            pad = LENGTH - len(places)
            rows.append({name: np.pad(x, (0, pad)) for name, x in own.items()})
    return Batch(**{name: np.stack([r[name] for r in rows]) for name in arrays})


@functools.cache
def compiled(decoder: Decoder) -> Any:
    def loss(params: Params, batch: Batch, key: Any = None) -> Any:
        scored = decoder.token_log_probs(params, batch, dropout_key=key)
        return -(scored.logps * batch.loss_mask).sum()

    return jax.jit(jax.value_and_grad(loss))


def assert_equal_trees(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a) / scale, np.asarray(b) / scale, rtol=0, atol=tolerance
        ),
        found,
        expected,
    )


PACKED = [[9, 11], [17, 1, 4], [24], [2, 2, 2]]


def test_packed_documents_learn_as_they_do_alone(of_kinds) -> None:
    decoder, params = of_kinds
    packed = make_batch(PACKED)
    loss, gradients = compiled(decoder)(params, packed)
    alone, expected = compiled(decoder)(params, unpack(packed))
    np.testing.assert_allclose(loss, alone, rtol=1e-6)
    assert_equal_trees(gradients, expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma4", {"scan_layers": False, "remat": "minimal"}),
        pytest.param("lfm2", {"remat": "full"}, marks=pytest.mark.on_request),
        pytest.param("gemma4", {"remat": "full"}, marks=pytest.mark.on_request),
        pytest.param("qwen3_5", {"remat": "full"}, marks=pytest.mark.on_request),
    ],
    ids=str,
)
def test_how_layers_are_run_changes_no_gradient(make_model, name, change) -> None:
    decoder, params = make_model(name)
    batch = make_batch(PACKED)
    loss, expected = compiled(decoder)(params, batch)
    changed = dataclasses.replace(decoder, **change)
    again, gradients = compiled(changed)(params, batch)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert_equal_trees(gradients, expected, 5e-6)


@pytest.mark.parametrize(
    "name",
    [
        "lfm2",
        pytest.param("gemma4", marks=pytest.mark.on_request),
        pytest.param("gemma4_keys_as_values", marks=pytest.mark.on_request),
        pytest.param("deepseek_v3", marks=pytest.mark.on_request),
    ],
)
def test_eight_devices_learn_as_one(make_model, name) -> None:
    decoder, params = make_model(name)
    batch = make_batch(PACKED)
    loss, expected = compiled(decoder)(params, batch)
    sizes = dict.fromkeys(sharding.MESH_AXES, 1) | {
        "fsdp": 2, "tensor": 2, "context": 2
    }  # fmt: skip
    plan = sharding.ShardingPlan(sharding.make_mesh(sizes))
    layouts = plan.parameters(params, decoder.logical_axes())
    spread = dataclasses.replace(
        decoder, constrain=plan.constrain, map_shards=plan.map_shards
    )
    placed = jax.device_put((params, batch), (layouts, plan.batch()))
    again, gradients = compiled(spread)(*placed)
    split = [
        not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed[0])
    ]
    assert sum(split) > len(split) / 2
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    assert_equal_trees(gradients, expected)


def test_prompts_are_not_shared_by_what_reads_rows_in_order(lfm2) -> None:
    decoder, params = lfm2
    reason = decoder.why_no_shared_prompts()
    assert reason == "its layers of convolution read a row from left to right"
    batch = make_batch([[5]])
    rows = {n: getattr(batch, n) for n in ("tokens", "positions", "segment_ids")}
    with pytest.raises(ValueError, match="prompt_ids: its layers of convolution"):
        decoder.hidden_states(params, **rows, prompt_ids=rows["segment_ids"])


def test_operations_are_those_of_each_kinds_matrices() -> None:
    config = ModelConfig.from_hf(
        {
            "model_type": "lfm2",
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 48,
            "block_auto_adjust_ff_dim": False,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": ["conv", "full_attention"] * 2 + ["conv"],
        }
    )
    mlp, convolution = 3 * 32 * 48, 4 * 32 * 32 + 3 * 32
    attention = 2 * 32 * 32 + 2 * 32 * 16
    matrices = 100 * 32 + 5 * mlp + 3 * convolution + 2 * attention
    scores = 2 * 4 * 32 * 10  # two layers; 4 D a key; forward
    assert config.flops_per_token(10) == 6 * matrices + 3 * scores
    norms = (2 * 5 + 1) * 32 + 2 * 2 * 8
    assert config.num_params() == matrices + norms


def test_published_sizes_have_the_weights_that_they_are_known_for() -> None:
    """LiquidAI/LFM2-1.2B's card: 1.17 billion."""
    config = ModelConfig.from_hf(
        {
            "model_type": "lfm2",
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        }
    )
    assert round(config.num_params() / 1e6) == 1170
    mixers = [kind.mixer for kind in kinds_of(config)]
    assert mixers.count("attention") == 6 and mixers[2] == "attention"


def test_layers_that_read_others_keys_have_none_of_their_own(gemma4) -> None:
    decoder, params = gemma4
    layers = params["layers"]
    assert list(layers) == ["0to2by2", "1to3by2", "4to6by2", "5to7by2"]
    readers = {"q_proj", "q_norm", "o_proj"}
    assert set(layers["4to6by2"]["self_attn"]) == readers
    assert set(layers["0to2by2"]["self_attn"]) == readers | {
        "k_proj", "k_norm", "v_proj"
    }  # fmt: skip
    assert layers["5to7by2"]["mlp"]["up_proj"]["kernel"].shape == (2, 64, 192)
    assert layers["5to7by2"]["self_attn"]["q_proj"]["kernel"].shape == (2, 64, 96)
    cache = decoder.init_cache(1, 5)["layers"]
    assert not cache["4to6by2"] and cache["1to3by2"]["key"].shape == (2, 1, 5, 2, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_moe_block": True}, "model.num_experts = None: must be a positive"),
        ({"num_kv_shared_layers": 5}, "num_kv_shared_layers = 5: no layer before"),
        ({"num_kv_shared_layers": 6}, "num_kv_shared_layers = 6: must be an integer"),
        ({"vocab_size_per_layer_input": 8}, "vocab_size = 16 exceeds"),
        (
            {"per_layer_config": {"0": {"head_dim": 8}}},
            "per_layer_config = .*the same for every layer of type 'full_attention'",
        ),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
    ],
)
def test_what_gemma4_cannot_be_is_refused(options: Any, message: str) -> None:
    sizes = {
        "model_type": "gemma4_text",
        "vocab_size": 16,
        "hidden_size": 16,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] + ["full_attention"] * 5,
    }
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(sizes | options)


def test_keys_that_no_layer_reads_are_passed_over(gemma4, tmp_path) -> None:
    """Published checkpoints have them in the layers that read others'."""
    decoder, params = gemma4
    save_pretrained(tmp_path, decoder.config, params)
    file = tmp_path / "model.safetensors"
    unread = {
        f"model.layers.7.self_attn.{name}.weight": np.ones((2, 2), np.float32)
        for name in ("k_proj", "v_proj", "k_norm")
    }
    tensors = load_file(file)
    save_file(tensors | unread, file)
    read = load_params(tmp_path, decoder)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    save_file(tensors | {name.replace("7", "8"): x for name, x in unread.items()}, file)
    with pytest.raises(
        ValueError, match=r"unexpected model\.layers\.8\.self_attn\.k_proj"
    ):
        load_params(tmp_path, decoder)


def test_both_ways_of_writing_the_sizes_of_full_layers_are_read() -> None:
    sizes = {"model_type": "gemma4_text", "num_hidden_layers": 6, "head_dim": 32}
    published = sizes | {
        "global_head_dim": 64,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    }
    resaved = sizes | {
        "attention_k_eq_v": True,
        "per_layer_config": {"05": {"head_dim": 64, "num_key_value_heads": 1}},
    }
    config = ModelConfig.from_hf(published)
    assert ModelConfig.from_hf(resaved) == config
    assert ModelConfig.from_hf(config.to_hf()) == config


# --- trees: rates, files, adapters ----------------------------------------------------


def test_rates_go_by_the_layers_own_numbers(lfm2) -> None:
    _, params = lfm2
    patterns = [(r"layers/[12]/.*", 0.0), (r"layers/3/.*", 0.5), (".*", 1.0)]
    rates = make_multipliers(patterns, params)
    by_layer: dict[int, set[float]] = {}
    for path, rate in flatten(rates).items():
        root, _ = split_path(path)
        if not root:
            assert float(rate) == 1.0
            continue
        values = np.ravel(rate)
        for layer, value in zip(layer_numbers(root, len(values)), values, strict=True):
            by_layer.setdefault(layer, set()).add(float(value))
    assert by_layer == {0: {1.0}, 1: {0.0}, 2: {0.0}, 3: {0.5}, 4: {1.0}}
    optimizer = with_multipliers(optax.sgd(1.0), patterns)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert not np.any(updates["layers"]["1to3by2"]["self_attn"]["q_proj"]["kernel"][0])


def test_tensors_are_written_layer_by_layer_whatever_their_stacks(lfm2) -> None:
    decoder, _ = lfm2
    leaves = leaves_of(decoder.config)
    names = [leaf.tensor_name(place) for leaf in leaves for place in leaf.places]
    assert len(set(names)) == len(names)
    for layer in range(5):
        own = [name for name in names if name.startswith(f"model.layers.{layer}.")]
        is_convolution = layer % 2 == 0
        assert (f"model.layers.{layer}.conv.in_proj.weight" in own) == is_convolution
        assert any("self_attn.q_proj" in name for name in own) != is_convolution


# In one stack alone, in all that have it, and in one kind of layer of two.
SOME = r".*\.0\.conv\.in_proj|.*\.feed_forward\.w2|.*\.[13]\.self_attn\.out_proj"
ON_REQUEST = (
    ("lfm2", ["in_proj", "out_proj", "w1", "q_proj"]),
    ("lfm2", ["self_attn.out_proj", "v_proj"]),
    ("lfm2", "all-linear"),
    ("gemma4_keys_as_values", "all-linear"),
    ("qwen3_5_moe", "all-linear"),
    # To PEFT all-linear means experts, too, in these, and gate_proj can't but.
    ("glm4_moe", r".*\.self_attn\.[qv]_proj"),
    ("qwen3_moe_dense", r".*\.[ko]_proj"),
    ("qwen3_next", r".*\.(in_proj_qkvz|in_proj_ba|shared_expert_gate|out_proj)"),
    ("deepseek_v3", r".*\.(q_[ab]_proj|kv_\w+_proj|kv_\w+_mqa|o_proj)"),
    ("deepseek_v2", r".*\.(q_proj|kv_b_proj)"),
)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("family", "chosen"),
    [
        ("lfm2", SOME),
        ("gemma4", "all-linear"),
        ("qwen3_5", "all-linear"),
        *(pytest.param(*case, marks=pytest.mark.on_request) for case in ON_REQUEST),
    ],
)
def test_adapters_cross_between_peft_and_us(
    make_model, family, chosen, tmp_path
) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    decoder, params = make_model(family)
    save_pretrained(tmp_path / "base", decoder.config, params)

    def load() -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        return model.eval()

    settings = peft.LoraConfig(
        r=3,
        target_modules=chosen,
        rank_pattern={"w2": 2, "down_proj": 2},
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(load(), settings).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    batch = make_batch([[LENGTH]])

    def logits_of(model: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(batch.tokens.tolist())).logits.numpy()

    def our_logits(tree: Params, shape: Any) -> Any:
        model = dataclasses.replace(decoder, lora=shape)
        rows = (batch.tokens, batch.positions, batch.segment_ids)
        return model.logits(tree, *rows)

    trainable, settings = adapters.load_adapter(tmp_path / "theirs", params)
    shape = adapters.make_shape(settings, params)
    expected = logits_of(theirs)
    assert np.abs(expected - logits_of(load())).max() > 0.05
    policy = overlay(params, trainable)
    np.testing.assert_allclose(our_logits(policy, shape), expected, atol=1e-4)
    # A decoder told of these adapters has no others.
    described = dataclasses.replace(decoder, lora=shape).abstract_params()
    assert jax.tree.structure(described) == jax.tree.structure(policy)
    merged = adapters.merge_into_base(params, trainable, settings)
    np.testing.assert_allclose(our_logits(merged, None), expected, atol=1e-4)

    adapters.save_adapter(
        tmp_path / "ours", trainable, settings, None, tied_embeddings=True
    )
    named = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    again = peft.PeftModel.from_pretrained(load(), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits_of(again), expected, atol=1e-4)
    count = sum("lora_A" in name for name, _ in again.named_parameters())
    assert len(named["target_modules"]) == count
    reread, settings = adapters.load_adapter(tmp_path / "ours", params)
    assert adapters.make_shape(settings, params) == shape
    jax.tree.map(np.testing.assert_array_equal, reread, trainable)
