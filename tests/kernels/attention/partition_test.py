"""Attention on a mesh: the same values and gradients, and no more moved than needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.kernels.attention import (
    Layout,
    attention,
    context,
    cudnn,
    plan_attention,
    xla_blocks,
)
from jaxtrain.kernels.attention.blocked import attention_blocked
from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.pallas_tpu import KERNELS
from jaxtrain.kernels.attention.partition import attend_on_shards
from jaxtrain.kernels.attention.reference import attention_reference
from jaxtrain.kernels.attention.xla import attention_xla
from tests.equations import equations

LENGTH = 96


def make_layout(data, tokens, tensor):
    devices = np.array(jax.devices()[: data * tokens * tensor])
    mesh = Mesh(devices.reshape(data, tokens, tensor), ("data", "context", "tensor"))
    return Layout(mesh, ("data",), ("tensor",), ("context",))


def make_inputs(kv_heads, length=LENGTH):
    rng = np.random.default_rng(0)
    shapes = [(4, length, n, 16) for n in (4, kv_heads, kv_heads)]
    inputs = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    ids = np.sort(rng.integers(0, 4, (4, length)), axis=1)
    # Documents in any order of their numbers, and padding in between.
    segments = jnp.asarray(ids[:, np.roll(np.arange(length), 37)], jnp.int32)
    prompts = jnp.where(segments == 3, 2, 0)
    return inputs, segments, prompts


def attend(implementation, softcap, q, k, v, mask, schedule=None, sinks=None):
    options = {"softcap": softcap, "scale": 0.25, "sinks": sinks}
    if implementation == "pallas_tpu":
        options |= {"interpret": True, "schedule": schedule}
        return attention_blocked(KERNELS, q, k, v, mask, **options)
    if implementation == "xla_blocks":
        kernels = xla_blocks.with_blocks(16)
        return attention_blocked(kernels, q, k, v, mask, **options, schedule=schedule)
    if implementation == "xla":
        return attention_xla(q, k, v, mask, **options, chunk=16)
    return attention_reference(q, k, v, mask, **options)


def make_step(layout, implementation, *, window=None, softcap=None):
    call = functools.partial(attend, implementation, softcap)

    def loss(q, k, v, sinks, segments, prompts):
        mask = Mask(segments, prompts, True, window)
        if layout is None:
            out = call(q, k, v, mask, sinks=sinks)
        else:
            out = attend_on_shards(call, layout, q, k, v, mask, sinks=sinks)
        return (out * jnp.cos(out)).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))


def place(layout, inputs, sinks, segments, prompts):
    def put(x, *names):
        return jax.device_put(x, NamedSharding(layout.mesh, PartitionSpec(*names)))

    heads = [
        put(x, "data", "context", "tensor" if x.shape[2] % 4 == 0 else None)
        for x in inputs
    ]
    ids = [
        None if x is None else put(x, "data", "context") for x in (segments, prompts)
    ]
    return (*heads, sinks if sinks is None else put(sinks, "tensor"), *ids)


CASES = {
    "rows_and_heads": ((4, 1, 2), "pallas_tpu", 2, {}),
    "fewer_key_heads_than_devices": ((2, 1, 4), "xla", 2, {}),
    "rows_heads_and_tokens": ((2, 2, 2), "xla_blocks", 2, {"window": 20}),
    "two_share_a_row": ((1, 2, 1), "pallas_tpu", 2, {"window": 20, "softcap": 3.0}),
    "three_share_a_row": ((2, 3, 1), "reference", 4, {"softcap": 3.0}),
    "four_share_a_row": ((1, 4, 2), "xla", 1, {"window": 40}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_one_device(case):
    sizes, implementation, kv_heads, options = CASES[case]
    layout = make_layout(*sizes)
    inputs, segments, prompts = make_inputs(kv_heads)
    sinks = jnp.linspace(-1.0, 2.0, 4)
    want_value, want = make_step(None, "reference", **options)(
        *inputs, sinks, segments, prompts
    )
    value, gradients = make_step(layout, implementation, **options)(
        *place(layout, inputs, sinks, segments, prompts)
    )
    # The order of float32 sums.
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    for got, expected in zip(gradients, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "tokens"), [("segments", 4), ("plain", 2), ("bidirectional", 2)]
)
def test_a_plan_of_all_parts_serves_every_layer(kind, tokens):
    layout = make_layout(2, tokens, 1)
    (q, k, v), segments, prompts = make_inputs(2)
    ids = {"segment_ids": segments, "prompt_ids": prompts} if kind == "segments" else {}
    options = {"causal": kind != "bidirectional", "implementation": "xla_blocks"}

    def layers(q, k, v, ids, planned, count=1):
        given = {**ids, **options, "layout": layout}
        schedule = plan_attention(q, **given) if planned else None
        for _ in range(count):
            q = attention(q, k, v, **given, schedule=schedule)
        return (q * jnp.cos(q)).sum()

    def gradients(planned):
        step = jax.jit(jax.value_and_grad(layers, (0, 1, 2)), static_argnums=4)
        return step(q, k, v, ids, planned)

    def count_sorts(planned):
        traced = jax.make_jaxpr(lambda *args: layers(*args, planned, 2))(q, k, v, ids)
        return sum(e.primitive.name == "sort" for e in equations(traced))

    for found, expected in zip(
        jax.tree.leaves(gradients(True)), jax.tree.leaves(gradients(False)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    # Two lists and an order of each part, once; else as many again for each layer.
    assert count_sorts(True) == 3 * 2 * tokens
    assert count_sorts(False) == 2 * count_sorts(True)


def test_a_schedule_of_whole_rows_is_refused_where_they_are_cut():
    (q, k, v), segments, _ = make_inputs(2)
    whole = plan_attention(q, segment_ids=segments, implementation="xla_blocks")
    with pytest.raises(ValueError, match="it is of whole rows"):
        attention(q, k, v, segment_ids=segments, implementation="xla_blocks",
                  schedule=whole, layout=make_layout(1, 2, 1))  # fmt: skip


def test_no_row_and_no_head_is_gathered():
    layout = make_layout(2, 1, 4)
    step = make_step(layout, "xla")
    inputs, segments, _ = make_inputs(4)
    arguments = place(layout, inputs, None, segments, None)
    _, gradients = step(*arguments)
    for x, gradient in zip(arguments[:3], gradients[:3], strict=True):
        assert gradient.sharding.is_equivalent_to(x.sharding, 4)
    assert "all-gather" not in step.lower(*arguments).compile().as_text()


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_every_part_of_a_row_is_attended_for_once_and_shares_are_equal(size):
    shares = [context.parts_of(index, size) for index in range(size)]
    assert sorted(sum(shares, ())) == list(range(2 * size))
    for even, odd in shares:
        assert (even % 2, odd % 2) == (0, 1)
        # A part reads its own keys and all before it.
        assert (even + 1) + (odd + 1) == 2 * size + 1


def test_tokens_of_one_device_are_joined_and_come_back():
    layout = make_layout(2, 4, 1)
    tokens = jnp.arange(4 * 16).reshape(4, 16)
    joined = layout.join_tokens(tokens[..., None])[:, 0]
    # The first device's: four tokens of each of its two rows.
    assert joined[:8].tolist() == [0, 1, 2, 3, 16, 17, 18, 19]
    np.testing.assert_array_equal(layout.split_tokens(joined, (4, 16)), tokens)
    np.testing.assert_array_equal(Layout().join_tokens(tokens), tokens.reshape(-1))


def test_a_row_that_parts_do_not_divide_is_whole_on_every_device(caplog):
    layout = make_layout(2, 4, 1)
    with caplog.at_level("INFO"):
        assert layout.token_shards(100) == 1
    assert "size of 100 does not divide" in caplog.text
    assert layout.token_shards(96) == 4


@pytest.mark.parametrize(
    ("packed", "softcap", "choice"),
    [(True, None, "pallas_gpu"), (False, 3.0, "pallas_gpu"), (False, None, "cudnn")],
)
def test_auto_on_hopper_chooses_for_cut_rows_as_for_whole_ones(
    packed, softcap, choice, monkeypatch
):
    inputs, segments, _ = make_inputs(2)
    inputs = [x.astype(jnp.bfloat16) for x in inputs]
    chosen = []

    def record(implementation, softcap, scale, q, k, v, mask, schedule, sinks):
        chosen.append((implementation, mask.offset, k.shape[1]))
        return q

    monkeypatch.setitem(attention.__globals__, "_attend", record)
    monkeypatch.setitem(attention.__globals__, "_MEASURED_ROW", 95)
    monkeypatch.setattr(cudnn, "compute_capability", lambda device=None: 9.0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attend = functools.partial(attention, softcap=softcap, layout=make_layout(2, 2, 1))
    jax.eval_shape(attend, *inputs, segment_ids=segments if packed else None)
    # Four parts, each with the keys up to its own end.
    assert sorted(chosen) == [(choice, end - 24, end) for end in (24, 48, 72, 96)]


@pytest.mark.parametrize(
    ("length", "width", "packed", "ours"),
    [
        (2048, 128, False, True),
        (2048, 64, False, True),
        (8192, 128, False, True),
        (16384, 128, False, False),
        (16384, 128, True, True),
        (16384, 256, False, True),  # which cuDNN refuses
        (2048, 512, False, False),
        (2048, 512, True, True),  # by plain XLA
    ],
)
def test_auto_on_hopper_goes_by_the_row_and_the_head(
    length, width, packed, ours, monkeypatch
):
    monkeypatch.setattr(cudnn, "compute_capability", lambda device=None: 9.0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    q = jax.ShapeDtypeStruct((1, length, 4, width), jnp.bfloat16)
    segments = jnp.ones((1, length), jnp.int32) if packed else None
    plan = jax.eval_shape(lambda: plan_attention(q, segment_ids=segments))
    assert (plan is not None) == ours  # cuDNN visits no blocks, nor does `xla`


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["auto", "pallas_gpu", "pallas_triton"])
def test_on_gpus_that_share_a_row_values_and_gradients_are_those_of_one(name):
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    layout = make_layout(1, 2, 1)
    rng = np.random.default_rng(0)
    q, k, v, cotangent = (
        jnp.asarray(rng.normal(size=(2, 1200, n, 128)), jnp.bfloat16)
        for n in (4, 2, 2, 4)
    )
    _, segments, prompts = make_inputs(2, 1200)

    def run(q, k, v, segments, prompts, cotangent, **options):
        def call(q, k, v):
            ids = {"segment_ids": segments[:2], "prompt_ids": prompts[:2]}
            return attention(q, k, v, window=500, **ids, **options)

        out, pull = jax.vjp(call, q, k, v)
        return out, *pull(cotangent)

    arrays = (q, k, v, segments, prompts, cotangent)
    one = jax.jit(functools.partial(run, implementation="reference"))(*arrays)
    two = jax.jit(functools.partial(run, implementation=name, layout=layout))
    for have, want in zip(two(*arrays), one, strict=True):
        have, want = (np.asarray(x, np.float32) for x in (have, want))
        # Rounding to bfloat16 (8 bits), here and in the reference.
        bound = 3e-2 * max(1.0, np.abs(want).max())
        np.testing.assert_allclose(have, want, rtol=0, atol=bound)
