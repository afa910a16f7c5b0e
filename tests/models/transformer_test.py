"""The decoder: parity with transformers, and the properties that training rests on."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.models import REMAT_POLICIES, Decoder, LoraShape, layers
from jaxtrain.models.parts import layer_windows
from jaxtrain.models.quantization import STAY_FLOAT32
from jaxtrain.tree import flatten, overlay
from jaxtrain.types import Batch, Params

LENGTH = 24


def pack(documents: list[list[np.ndarray]], length: int = LENGTH) -> dict[str, Any]:
    """Rows of documents, padded on the right, as tokens, positions, segment ids."""
    shape = (len(documents), length)
    row = {
        name: np.zeros(shape, np.int32)
        for name in ("tokens", "positions", "segment_ids")
    }
    for b, documents_of_row in enumerate(documents):
        start = 0
        for number, document in enumerate(documents_of_row, start=1):
            part = (b, slice(start, start + len(document)))
            row["tokens"][part] = document
            row["positions"][part] = np.arange(len(document))
            row["segment_ids"][part] = number
            start += len(document)
    return row


def make_documents(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 128, length) for length in lengths]


@functools.cache
def compiled_logits(model: Decoder) -> Any:
    return jax.jit(model.logits)


@pytest.fixture(scope="module")
def scored(torch_model) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Each document of a padded and a packed row, with our scores of its tokens."""
    documents = make_documents(17, 9, 11)
    rows = pack([documents[:1], documents[1:]])
    targets = np.roll(rows["tokens"], -1, axis=1)
    batch = Batch(**rows, targets=targets, loss_mask=np.ones(targets.shape))

    @jax.jit
    def score(params):
        scores = torch_model.model.token_log_probs(params, batch)
        logits = torch_model.model.logits(params, **rows)
        return {"logits": logits, "targets": targets, **vars(scores)}

    scores = score(torch_model.params)
    scores = {name: x for name, x in scores.items() if x is not None}
    spans = [(0, slice(0, 17)), (1, slice(0, 9)), (1, slice(9, 20))]
    return [
        (document, {name: np.asarray(x[b, span]) for name, x in scores.items()})
        for document, (b, span) in zip(documents, spans, strict=True)
    ]


@pytest.mark.torch
def test_logits_equal_transformers_in_padded_and_packed_rows(
    torch_model, scored
) -> None:
    for document, ours in scored:
        expected = torch_model.torch_logits(document)
        assert np.abs(expected).max() > 1  # else the bound below would mean little
        np.testing.assert_allclose(ours["logits"], expected, rtol=0, atol=1e-4)


@pytest.mark.torch
def test_token_log_probs_equal_the_softmax_of_transformers(torch_model, scored) -> None:
    import torch

    for document, ours in scored:
        logits = torch.tensor(torch_model.torch_logits(document))
        expected = torch.log_softmax(logits, dim=-1).numpy()
        places = np.arange(len(document))
        np.testing.assert_allclose(
            ours["logps"], expected[places, ours["targets"]], atol=1e-4
        )
        entropy = -(np.exp(expected) * expected).sum(-1)
        np.testing.assert_allclose(ours["entropy"], entropy, atol=1e-4)
        mean_logit = logits.mean(-1).numpy()
        np.testing.assert_allclose(ours["mean_logit"], mean_logit, atol=1e-4)


# --- properties that need no peer; Gemma 3 has every kind of layer and norm ----------


@pytest.fixture(scope="module")
def mixed(make_model) -> tuple[Decoder, Params]:
    return make_model("gemma3")


def test_no_output_depends_on_a_later_token(mixed) -> None:
    # By gradient, so that a leak of any size shows.
    model, params = mixed
    rows = pack([make_documents(8)], 8)
    rows["tokens"] = np.arange(3, 11)[None]  # distinct: one embedding row each

    def score(table):
        weights = overlay(params, {"embed_tokens": {"embedding": table}})
        return model.hidden_states(weights, **rows)[0, 4].sum()

    gradient = jax.jit(jax.grad(score))(params["embed_tokens"]["embedding"])
    moved = np.abs(np.asarray(gradient)[rows["tokens"][0]]).sum(axis=1)
    assert (moved[:5] > 0).all()
    np.testing.assert_array_equal(moved[5:], 0)


def test_a_sliding_layer_reads_its_window_and_no_further(make_model) -> None:
    model, params = make_model("mistral")  # two layers with a window of 5
    rows = pack([make_documents(16)], 16)
    rows["tokens"] = np.arange(3, 19)[None]

    def score(table):
        weights = overlay(params, {"embed_tokens": {"embedding": table}})
        return model.hidden_states(weights, **rows)[0, 15].sum()

    gradient = jax.grad(score)(params["embed_tokens"]["embedding"])
    moved = np.abs(np.asarray(gradient)[rows["tokens"][0]]).sum(axis=1)
    # Each layer reaches 4 tokens back, so two reach 8: tokens 7 to 15.
    assert (moved[7:] > 0).all()
    np.testing.assert_array_equal(moved[:7], 0)


@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=3),
    seed=st.integers(0, 100),
)
def test_packed_documents_score_as_they_do_alone(mixed, lengths, seed) -> None:
    model, params = mixed
    documents = make_documents(*lengths, seed=seed)
    one_each = [[d] for d in documents] + [[]] * (3 - len(documents))
    rows = pack([documents, *one_each])
    logits = compiled_logits(model)(params, **rows)
    start = 0
    for number, document in enumerate(documents, start=1):
        together = logits[0, start : start + len(document)]
        alone = logits[number, : len(document)]
        np.testing.assert_allclose(together, alone, atol=1e-5)
        start += len(document)


def test_what_stands_in_padding_changes_nothing(mixed) -> None:
    model, params = mixed
    rows = pack([make_documents(9)])
    other = {**rows, "tokens": np.where(rows["segment_ids"] == 0, 77, rows["tokens"])}
    np.testing.assert_array_equal(
        compiled_logits(model)(params, **rows)[0, :9],
        compiled_logits(model)(params, **other)[0, :9],
    )


@functools.cache
def compiled_loss_and_gradients(model: Decoder) -> Any:
    rows = pack([make_documents(17), make_documents(9, 11)])
    targets = np.roll(rows["tokens"], -1, axis=1)
    batch = Batch(**rows, targets=targets, loss_mask=np.ones(targets.shape))
    real = rows["segment_ids"] != 0

    def loss(params, dropout_key):
        scored = model.token_log_probs(params, batch, dropout_key=dropout_key)
        return -(scored.logps * real).mean()

    return jax.jit(jax.value_and_grad(loss))


def loss_and_gradients(model: Decoder, params: Params, dropout_key=None) -> Any:
    return compiled_loss_and_gradients(model)(params, dropout_key)


@pytest.mark.parametrize(
    "change",
    [*({"remat": name} for name in ("full", "offload", "minimal")),
     {"scan_layers": False}],
    ids=str,
)  # fmt: skip
def test_how_layers_are_run_changes_no_loss_and_no_gradient(mixed, change) -> None:
    model, params = mixed
    plain, plain_gradients = loss_and_gradients(model, params)
    again, gradients = loss_and_gradients(dataclasses.replace(model, **change), params)
    np.testing.assert_allclose(again, plain, rtol=1e-6)
    for ours, expected in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(plain_gradients), strict=True
    ):
        np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_layers_compiled_one_by_one_are_recomputed_all_the_same(make_model) -> None:
    """No loop keeps the compiler from merging the recomputation with the first."""
    model, params = make_model("qwen3")

    def count_products(remat: str) -> int:
        apart = dataclasses.replace(model, scan_layers=False, remat=remat)
        program = compiled_loss_and_gradients(apart).lower(params, None).compile()
        return len(re.findall(r" dot\(", program.as_text()))

    assert count_products("full") > count_products("none")


@pytest.mark.parametrize("packed", [True, False])
def test_the_layers_share_one_schedule_of_blocks(mixed, packed) -> None:
    """One for each window: nothing in the scan over layers sorts blocks."""
    model, params = mixed
    model = dataclasses.replace(model, attention="pallas_tpu", packed=packed)
    rows = pack([make_documents(17), make_documents(9, 11)])
    program = jax.make_jaxpr(functools.partial(model.hidden_states, **rows))(params)
    (scan,) = (e for e in program.eqns if e.primitive.name == "scan")
    assert "argsort" not in str(scan.params["jaxpr"])
    windows = len(set(layer_windows(model.config, LENGTH)))
    sorts = 3  # key blocks, query blocks, and query blocks by their visits
    assert str(program).count("name=argsort") == sorts * windows


@pytest.mark.parametrize(("remat", "runs"), [("full", 2), ("save_attention", 1)])
def test_a_kernel_whose_result_is_kept_does_not_run_again(
    make_model, remat, runs
) -> None:
    model, params = make_model("qwen3")
    model = dataclasses.replace(model, attention="pallas_tpu", remat=remat)
    rows = pack([make_documents(17), make_documents(9, 11)])

    def total(params: Params) -> Any:
        return model.hidden_states(params, **rows).sum()

    program = str(jax.make_jaxpr(jax.grad(total))(params))
    assert program.count("name=attention_forward") == runs


def test_rematerialization_keeps_less_for_the_backward_pass(mixed) -> None:
    model, params = mixed
    rows = pack([make_documents(17)])

    def kept_bytes(remat: str) -> int:
        chosen = dataclasses.replace(model, remat=remat)

        def hidden(params):
            return chosen.hidden_states(params, **rows)

        _, pullback = jax.eval_shape(lambda p: jax.vjp(hidden, p), params)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))

    kept = {name: kept_bytes(name) for name in REMAT_POLICIES}
    assert kept["full"] < kept["save_attention"] < kept["minimal"] < kept["none"]
    assert kept["full"] < kept["dots_no_batch"] <= kept["dots"] <= kept["none"]


def test_offloading_leaves_no_layers_input_on_the_device(mixed) -> None:
    model, params = mixed
    rows = pack([make_documents(17)])

    def stacked_residuals(remat: str) -> list[str]:
        chosen = dataclasses.replace(model, remat=remat)

        def total(params: Params) -> Any:
            return chosen.hidden_states(params, **rows).sum()

        program = jax.make_jaxpr(jax.grad(total))(params)
        forward = next(e for e in program.eqns if e.primitive.name == "scan")
        stack = (model.config.num_hidden_layers, 1, LENGTH, model.config.hidden_size)
        return [str(x.aval) for x in forward.outvars if x.aval.shape == stack]

    assert len(stacked_residuals("full")) == 1
    assert "host" not in stacked_residuals("full")[0]
    (kept,) = stacked_residuals("offload")
    assert "host" in kept


def test_the_backward_pass_keeps_no_float32_copy_of_activations(make_model) -> None:
    model, params = make_model("gemma3", compute_dtype="bfloat16")
    rows = pack([make_documents(17)])

    def pullback(params):
        return jax.vjp(lambda p: model.hidden_states(p, **rows), params)[1]

    stacked = (model.config.num_hidden_layers, 1, LENGTH)
    wide = (model.config.hidden_size, model.config.intermediate_size)
    kept = [
        leaf.dtype
        for leaf in jax.tree.leaves(jax.eval_shape(pullback, params))
        if leaf.shape[:3] == stacked and leaf.shape[-1] in wide
    ]
    assert kept and set(kept) == {jnp.dtype(jnp.bfloat16)}


def test_a_layer_that_adds_nothing_leaves_the_model_of_the_others(make_model) -> None:
    # The second layer switched off leaves the model of the first alone.
    model, params = make_model("qwen3")
    off = {
        "self_attn": {"o_proj": {"kernel": 0.0, "bias": 0.0}},
        "mlp": {"down_proj": {"kernel": 0.0}},
    }

    def switch_off_second(path: tuple[str, ...], off: Any, layers: Any) -> Any:
        if isinstance(off, dict):
            return {
                **layers,
                **{n: switch_off_second((*path, n), off[n], layers[n]) for n in off},
            }
        return layers.at[1].set(off)

    both = {**params, "layers": switch_off_second((), off, params["layers"])}
    single = dataclasses.replace(
        model,
        config=dataclasses.replace(
            model.config, num_hidden_layers=1, layer_types=model.config.layer_types[:1]
        ),
    )
    first = {**params, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    rows = pack([make_documents(17)])
    np.testing.assert_allclose(
        compiled_logits(model)(both, **rows),
        compiled_logits(single)(first, **rows),
        atol=1e-6,
    )


def test_bfloat16_compute_keeps_float32_logits_near_the_float32_model(mixed) -> None:
    model, params = mixed
    rows = pack([make_documents(17)])
    exact = compiled_logits(model)(params, **rows)
    half = dataclasses.replace(model, compute_dtype="bfloat16")
    logits = compiled_logits(half)(params, **rows)
    assert logits.dtype == jnp.float32
    assert half.hidden_states(params, **rows).dtype == jnp.bfloat16
    np.testing.assert_allclose(logits[:, :17], exact[:, :17], atol=0.3)


def test_eight_devices_score_as_one(mixed) -> None:
    model, params = mixed
    mesh = jax.make_mesh(
        (4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    spec = jax.sharding.PartitionSpec

    def constrain(x, axes):
        names = {"batch": "data", "heads": "model", "mlp": "model", "vocab": "model"}
        split = spec(*(names.get(axis) for axis in axes))
        sharding = jax.sharding.NamedSharding(mesh, split)
        return jax.lax.with_sharding_constraint(x, sharding)

    def place(leaf, axes):
        split = spec(*("model" if axis in ("heads", "mlp") else None for axis in axes))
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, split))

    rows = pack([[d] for d in make_documents(17, 9, 12, 24)])
    expected = compiled_logits(model)(params, **rows)
    spread = dataclasses.replace(model, constrain=constrain)
    placed = jax.tree.map(place, params, model.logical_axes())
    logits = compiled_logits(spread)(placed, **rows)
    assert len(logits.sharding.device_set) == 8
    real = rows["segment_ids"] != 0
    np.testing.assert_allclose(logits[real], expected[real], atol=2e-5)


# --- adapters ------------------------------------------------------------------------

TARGETS = frozenset({"self_attn.q_proj", "mlp.down_proj"})


def test_adapters_change_nothing_at_the_start(make_model) -> None:
    lora = LoraShape(r=4, scaling=2.0, dropout=0.5, targets=TARGETS)
    model, _ = make_model("qwen3", lora=lora)
    params = model.init(jax.random.key(0))
    base = jax.tree.map(lambda x: x, params)
    for part, module in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        del (
            base["layers"][part][module]["lora_a"],
            base["layers"][part][module]["lora_b"],
        )
    rows = pack([make_documents(17)])
    adapted = compiled_logits(model)(params, **rows)
    np.testing.assert_array_equal(adapted, compiled_logits(model)(base, **rows))
    a = params["layers"]["self_attn"]["q_proj"]["lora_a"]
    assert a.shape == (2, 64, 4)
    assert 0.11 < np.abs(a).max() <= 1 / np.sqrt(64)  # uniform within 1 / sqrt(inputs)


def test_an_adapter_equals_its_product_added_to_the_kernel(make_model) -> None:
    lora = LoraShape(r=4, scaling=2.0, targets=TARGETS)
    model, params = make_model("qwen3", lora=lora)
    merged = jax.tree.map(lambda x: x, params)
    for part, module in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        leaves = merged["layers"][part][module]
        delta = jnp.einsum("LIR,LRO->LIO", leaves.pop("lora_a"), leaves.pop("lora_b"))
        leaves["kernel"] += 2.0 * delta
    rows = pack([make_documents(17)])
    adapted = compiled_logits(model)(params, **rows)
    np.testing.assert_allclose(
        adapted, compiled_logits(model)(merged, **rows), atol=1e-4
    )


def test_adapter_dropout_follows_its_key_and_rests_without_one(make_model) -> None:
    lora = LoraShape(r=4, scaling=2.0, dropout=0.5, targets=TARGETS)
    model, params = make_model("qwen3", lora=lora)
    plain, _ = loss_and_gradients(model, params)
    losses = [
        float(loss_and_gradients(model, params, jax.random.key(seed))[0])
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    assert float(plain) not in losses
    checkpointed = dataclasses.replace(model, remat="full")
    again, _ = loss_and_gradients(checkpointed, params, jax.random.key(0))
    np.testing.assert_allclose(again, losses[0], rtol=1e-6)


def test_every_adapter_of_every_layer_drops_by_a_key_of_its_own(
    make_model, monkeypatch
) -> None:
    lora = LoraShape(r=4, scaling=2.0, dropout=0.5, targets=TARGETS)
    model, params = make_model("qwen3", lora=lora)
    keys = []

    def record(x, rate, key):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        return x

    monkeypatch.setattr(layers, "drop_inputs", record)
    with jax.disable_jit():  # the scan becomes a loop over concrete keys
        rows = jax.tree.map(jnp.asarray, pack([make_documents(2)], 2))
        model.hidden_states(params, **rows, dropout_key=jax.random.key(0))
    assert len(set(keys)) == len(keys) == model.config.num_hidden_layers * len(TARGETS)


def test_adapters_without_a_shape_or_a_module_are_refused(make_model) -> None:
    lora = LoraShape(r=4, scaling=2.0, targets=TARGETS)
    model, params = make_model("qwen3", lora=lora)
    rows = pack([make_documents(5)])
    with pytest.raises(ValueError, match=r"adapters of.*mlp.down_proj.*LoraShape"):
        dataclasses.replace(model, lora=None).logits(params, **rows)
    wrong = dataclasses.replace(lora, targets=frozenset({"self_attn.qkv_proj"}))
    with pytest.raises(ValueError, match=r"qkv_proj.*self_attn.k_proj"):
        dataclasses.replace(model, lora=wrong)
    with pytest.raises(ValueError, match=r"lora.r = 0"):
        LoraShape(r=0, scaling=1.0)


def test_weights_that_do_not_fit_are_named(make_model) -> None:
    model, params = make_model("qwen3")
    other = {**params, "final": params["norm"]}
    del other["norm"]
    with pytest.raises(ValueError, match=r"missing \['norm/scale'\].*final/scale"):
        model.logits(other, **pack([make_documents(5)]))


def test_an_unknown_remat_policy_is_refused_with_those_that_exist(config) -> None:
    with pytest.raises(ValueError, match=r"remat = 'some' is unknown.*dots_no_batch"):
        Decoder(config, remat="some")


# --- decoding with a cache -----------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["gemma3", "mistral", "qwen3", "mixtral", "gpt_oss", "lfm2", "gemma4"]
)
def test_greedy_decoding_equals_the_argmax_of_whole_forward_passes(
    make_model, name
) -> None:
    model, params = make_model(name)
    prompts = make_documents(7, 3)
    new, places = 9, 16
    left = pack([[d] for d in prompts], 7)
    left = {
        key: np.stack(
            [np.roll(row, 7 - len(d)) for row, d in zip(rows, prompts, strict=True)]
        )
        for key, rows in left.items()
    }
    right = pack([[d] for d in prompts], 7)

    @jax.jit
    def generate(tokens, positions, segment_ids):
        cache = model.init_cache(2, places)
        logits, cache = model.decode(params, tokens, positions, cache, segment_ids)
        lengths = (segment_ids != 0).sum(axis=1)

        def step(carry, count):
            logits, cache = carry
            token = logits.argmax(-1)[:, None]
            at = (lengths + count)[:, None]
            logits, cache = model.decode(params, token, at, cache)
            return (logits, cache), (token[:, 0], logits)

        return jax.lax.scan(step, (logits, cache), jnp.arange(new))[1]

    for rows in (left, right):
        tokens, logits = generate(**rows)
        for b, prompt in enumerate(prompts):
            whole = np.concatenate([prompt, tokens[:, b]])
            expected = compiled_logits(model)(params, **pack([[whole]]))[0]
            span = slice(len(prompt), len(whole))
            np.testing.assert_allclose(logits[:, b], expected[span], atol=2e-5)
            previous = slice(len(prompt) - 1, len(whole) - 1)
            np.testing.assert_array_equal(tokens[:, b], expected[previous].argmax(-1))


def test_a_prompt_longer_than_the_cache_is_refused(make_model) -> None:
    model, params = make_model("qwen3")
    rows = pack([make_documents(5)], 8)
    with pytest.raises(ValueError, match=r"8 tokens do not fit a cache of max_len=6"):
        model.decode(params, rows["tokens"], rows["positions"], model.init_cache(1, 6))


# --- trees ---------------------------------------------------------------------------


def test_abstract_weights_axes_and_initial_weights_are_one_tree(config) -> None:
    target = max(Decoder(config).linear_kernels())
    lora = LoraShape(r=4, scaling=1.0, targets=frozenset({target}))
    model = Decoder(config, param_dtype="bfloat16", lora=lora)
    abstract, axes = model.abstract_params(), model.logical_axes()
    jax.tree.map(lambda leaf, names: leaf.shape[: len(names)], abstract, axes)
    names = flatten(axes)
    for path, leaf in flatten(abstract).items():
        assert len(leaf.shape) == len(names[path])
        stays = path[-1] in STAY_FLOAT32
        assert leaf.dtype == (jnp.float32 if stays else jnp.bfloat16)
    assert hash(model) == hash(dataclasses.replace(model))


def test_initial_weights_have_the_configs_deviation_and_differ_by_layer(
    make_model,
) -> None:
    model, _ = make_model("gemma3")
    params = model.init(jax.random.key(0))
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_allclose(kernel.std(), model.config.initializer_range, rtol=0.05)
    assert not np.array_equal(kernel[0], kernel[1])
    # Gemma multiplies by 1 + scale.
    np.testing.assert_array_equal(params["norm"]["scale"], 0)
    llama = make_model("llama")[0].init(jax.random.key(0))
    np.testing.assert_array_equal(llama["norm"]["scale"], 1)
    np.testing.assert_array_equal(llama["layers"]["mlp"]["up_proj"]["bias"], 0)
