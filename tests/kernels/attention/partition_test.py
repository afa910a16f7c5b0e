"""Attention on a mesh: the same values and gradients, and no more moved than needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.kernels.attention import Layout, attention, context
from jaxtrain.kernels.attention.blocked import attention_blocked
from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.pallas_tpu import KERNELS
from jaxtrain.kernels.attention.partition import attend_on_shards
from jaxtrain.kernels.attention.reference import attention_reference
from jaxtrain.kernels.attention.xla import attention_xla

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


def attend(implementation, softcap, q, k, v, mask, schedule=None):
    options = {"softcap": softcap, "scale": 0.25}
    if implementation == "pallas_tpu":
        options |= {"interpret": True, "schedule": schedule}
        return attention_blocked(KERNELS, q, k, v, mask, **options)
    if implementation == "xla":
        return attention_xla(q, k, v, mask, **options, chunk=16)
    return attention_reference(q, k, v, mask, **options)


def make_step(layout, implementation, *, window=None, softcap=None):
    call = functools.partial(attend, implementation, softcap)

    def loss(q, k, v, segments, prompts):
        mask = Mask(segments, prompts, True, window)
        if layout is None:
            out = call(q, k, v, mask)
        else:
            out = attend_on_shards(call, layout, q, k, v, mask)
        return (out * jnp.cos(out)).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


def place(layout, inputs, segments, prompts):
    def put(x, *names):
        return jax.device_put(x, NamedSharding(layout.mesh, PartitionSpec(*names)))

    heads = [
        put(x, "data", "context", "tensor" if x.shape[2] % 4 == 0 else None)
        for x in inputs
    ]
    ids = [
        None if x is None else put(x, "data", "context") for x in (segments, prompts)
    ]
    return (*heads, *ids)


CASES = {
    "rows_and_heads": ((4, 1, 2), "pallas_tpu", 2, {}),
    "fewer_key_heads_than_devices": ((2, 1, 4), "xla", 2, {}),
    "two_share_a_row": ((1, 2, 1), "pallas_tpu", 2, {"window": 20, "softcap": 3.0}),
    "three_share_a_row": ((2, 3, 1), "reference", 4, {"softcap": 3.0}),
    "four_share_a_row": ((1, 4, 2), "xla", 1, {"window": 40}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_one_device(case):
    sizes, implementation, kv_heads, options = CASES[case]
    layout = make_layout(*sizes)
    inputs, segments, prompts = make_inputs(kv_heads)
    want_value, want = make_step(None, "reference", **options)(
        *inputs, segments, prompts
    )
    value, gradients = make_step(layout, implementation, **options)(
        *place(layout, inputs, segments, prompts)
    )
    # The order of float32 sums.
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    for got, expected in zip(gradients, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_no_row_and_no_head_is_gathered():
    layout = make_layout(2, 1, 4)
    step = make_step(layout, "xla")
    inputs, segments, _ = make_inputs(4)
    arguments = place(layout, inputs, segments, None)
    _, gradients = step(*arguments)
    for x, gradient in zip(arguments, gradients, strict=False):
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


def test_kernels_that_take_whole_rows_only_refuse_parts_by_name(monkeypatch):
    layout = make_layout(2, 4, 1)
    inputs, segments, _ = make_inputs(2)
    monkeypatch.setitem(
        attention.__globals__["_REFUSALS"], "pallas_gpu", lambda *call: None
    )
    with pytest.raises(NotImplementedError, match=r"pallas_gpu.*mesh\.context"):
        attention(
            *inputs, segment_ids=segments, implementation="pallas_gpu", layout=layout
        )
