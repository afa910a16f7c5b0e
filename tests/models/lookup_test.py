"""The gradient of looking tokens up: its order of sums, and what travels for it."""

import copy
import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.aot.hlo_cost import analyze
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.lora import LoraConfig, init_adapters, make_shape
from jaxtrain.models import Decoder, ModelConfig, lookup
from jaxtrain.models.lookup import look_up, sum_rows
from jaxtrain.tree import overlay
from tests.equations import equations
from tests.models.families_test import make_batch
from tests.models.published_configs import PUBLISHED, shrunk

ROWS, LENGTH, WIDTH = 8, 8, 16


def make_layout(data, fsdp):
    mesh = Mesh(np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp), ("d", "f"))
    return Layout(mesh, rows=("d", "f"), weights=("f",))


def differentiate(layout, vocab, dtype="float32"):
    """The table's gradient on the mesh, in numpy's float64, and the program."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(vocab, WIDTH)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, vocab, (ROWS, LENGTH)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype)

    def loss(table, tokens, weights):
        return (look_up(layout, table, tokens, dtype) * weights).sum()

    def place(x, *axes):
        return jax.device_put(x, NamedSharding(layout.mesh, PartitionSpec(*axes)))

    own = (place(table, None, "f"), *(place(x, ("d", "f")) for x in (tokens, weights)))
    step = jax.jit(jax.grad(loss), out_shardings=own[0].sharding)
    wanted = np.zeros((vocab, WIDTH))
    np.add.at(wanted, np.asarray(tokens), np.asarray(weights, np.float64))
    return step(*own), wanted, step.lower(*own).compile().as_text()


@pytest.fixture
def as_on_gpus(monkeypatch):
    monkeypatch.setattr(lookup, "_on_gpu", lambda layout: True)


jitted = jax.jit(sum_rows, static_argnums=(2, 3))
SIZES = [(8, 1), (4, 2), (1, 8), (2, 1), (1, 1)]


@pytest.mark.parametrize("sizes", SIZES)
def test_the_tables_gradient_is_the_sum_of_its_tokens_gradients(sizes):
    found, wanted, _ = differentiate(make_layout(*sizes), 96)
    # Sums of a few float32 numbers, in another order than numpy's.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_vectors_travel_in_place_of_a_table_that_is_larger():
    *_, program = differentiate(make_layout(4, 1), 512, "bfloat16")
    moved = analyze(program).collectives
    assert "all-reduce" not in moved
    # A device gets all vectors, as XLA for a CPU has it in float32, and all tokens.
    assert moved["all-gather"][1] <= 4 * ROWS * LENGTH * (WIDTH + 1)

    *_, program = differentiate(make_layout(4, 1), 16, "bfloat16")
    assert analyze(program).collectives == {"all-reduce": (1, 4 * 16 * WIDTH)}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("vocab", [5, 96], ids=["tables", "vectors"])
def test_it_is_the_same_sum_as_gpus_take_it(as_on_gpus, sizes, vocab):
    """Whether devices then add up tables or exchange vectors."""
    found, wanted, _ = differentiate(make_layout(*sizes), vocab)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_tokens_along_rows_may_lie_on_several_devices(as_on_gpus):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("d", "c"))
    layout = Layout(mesh, rows=("d",), tokens=("c",))
    tokens = jnp.arange(ROWS * 2 * LENGTH, dtype=jnp.int32).reshape(ROWS, -1) % 3
    table = jnp.ones((3, WIDTH))
    place = NamedSharding(mesh, PartitionSpec("d", "c"))
    step = jax.jit(jax.grad(lambda t, x: look_up(layout, t, x, "float32").sum()))
    found = step(table, jax.device_put(tokens, place))
    wanted = np.bincount(np.asarray(tokens).ravel())[:, None]
    np.testing.assert_array_equal(found, np.broadcast_to(wanted, (3, WIDTH)))


@hypothesis.given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 700),
    st.sampled_from([1, 2, 130, 5000]),
    st.sampled_from([1.1, 2.0, None]),
)
@hypothesis.settings(deadline=None, max_examples=30)
def test_rows_are_added_up_by_their_places(seed, rows, count, exponent):
    """Whole numbers, whose sums float32 holds: no digit may differ."""
    rng = np.random.default_rng(seed)
    if exponent is None:
        places = rng.integers(0, count, rows)
    else:  # as often as words are used
        places = np.minimum(rng.zipf(exponent, rows) - 1, count - 1)
    values = rng.integers(-99, 100, (rows, 3))
    wanted = np.zeros((count, 3))
    np.add.at(wanted, places, values)
    # Of few lengths, so that few programs are compiled; zeros change no sum.
    missing = -rows % 140
    values = np.pad(values, ((0, missing), (0, 0))).astype(np.float32)
    places = np.pad(places, (0, missing)).astype(np.int32)
    found = jitted(values, places, count, "float32")
    np.testing.assert_array_equal(found, wanted)


def test_a_place_may_go_on_over_more_chunks_than_one_chunk_has_rows():
    rows = np.ones((3 * 128 * 128 + 7, 1), np.float32)
    places = np.repeat([2, 4], [128 * 128 + 5, len(rows) - 128 * 128 - 5])
    found = jitted(rows, places.astype(np.int32), 6, "float32")
    np.testing.assert_array_equal(found[:, 0], np.bincount(places, minlength=6))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_of_rounded_vectors_are_of_float32(dtype):
    """Of 1,000 ones, added up one by one in bfloat16, at most 256 would be left."""
    rows = jnp.full((1000, 2), 1.0, jnp.bfloat16)
    found = jitted(rows, jnp.zeros(1000, jnp.int32), 1, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, 1000)


@pytest.mark.parametrize("has_adapters", [False, True])
@pytest.mark.parametrize(
    "name", ["Qwen/Qwen2-1.5B", "google/gemma-4-E2B", "Qwen/Qwen3-30B-A3B"]
)
def test_no_step_for_gpus_adds_up_vectors_in_no_certain_order(
    as_on_gpus, name, has_adapters
):
    """As a scatter does there whose places may be the same."""
    config = ModelConfig.from_hf(shrunk(copy.deepcopy(PUBLISHED[name])))
    decoder = Decoder(config, scan_layers=False)
    params = decoder.abstract_params()
    if has_adapters:
        settings = LoraConfig(r=2, alpha=2, target_modules=("embed_tokens", "q_proj"))
        decoder = dataclasses.replace(decoder, lora=make_shape(settings, params))
        make = functools.partial(init_adapters, jax.random.key(0), lora=settings)
        adapters = jax.eval_shape(make, params)
        params = overlay(params, adapters)

    def loss(params, rows):
        return (decoder.token_log_probs(params, rows).logps * rows.loss_mask).sum()

    traced = jax.make_jaxpr(jax.grad(loss, allow_int=True))(params, make_batch())
    adds = [e for e in equations(traced) if e.primitive.name == "scatter-add"]
    assert adds  # those of the embedding, at places of their own
    for equation in adds:
        vectors = equation.params["dimension_numbers"].update_window_dims
        assert equation.params["unique_indices"] or not vectors, equation


def test_a_single_device_has_nothing_to_say_of_odd_lengths(caplog):
    caplog.set_level("INFO", logger="jaxtrain")
    tokens = jnp.zeros((3, 5), jnp.int32)

    def loss(table, layout):
        return look_up(layout, table, tokens, "float32").sum()

    for layout in (None, make_layout(1, 1)):
        jax.grad(loss)(jnp.ones((4, 2)), layout)
    assert not caplog.messages


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_makes_the_same_gradient_each_time(dtype):
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.2, (8, 2048)) - 1, 999).astype(np.int32)
    table = jnp.zeros((1000, 896))
    weights = jnp.asarray(rng.normal(size=(*tokens.shape, 896)), dtype)
    step = jax.jit(
        jax.grad(lambda table: (look_up(None, table, tokens, dtype) * weights).sum())
    )
    first = step(table)
    for _ in range(10):
        np.testing.assert_array_equal(step(table), first)
    wanted = np.zeros(table.shape)
    np.add.at(wanted, tokens, np.asarray(weights, np.float64))
    # Sums of thousands of numbers of size 1, in float32.
    np.testing.assert_allclose(first, wanted, rtol=1e-5, atol=1e-3)
