"""Residual sums with their norms by kernels, interpreted, against float64 and XLA."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxtrain.kernels import norm
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.kernels.norm import add_and_norm, choose_tiles, pallas_triton
from jaxtrain.kernels.norm.pallas_triton import Tiles
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.types import Batch

EPSILON = 1e-5
# Uneven in every way: neither rows nor turns divide the tokens.
TILES = Tiles(rows=2, turns=3, interpret=True)


def exact(x, added, scale, of_total, of_out):
    """The sum, its norm, and the gradients of both terms and of the scale."""
    total = x + added
    factor = 1 / np.sqrt((total**2).mean(-1, keepdims=True) + EPSILON)
    normal, slope = total * factor, of_out * scale
    pull = (normal * slope).mean(-1, keepdims=True)
    of_sum = of_total + (slope - normal * pull) * factor
    of_scale = (of_out * normal).sum((0, 1))
    return total, normal * scale, of_sum, of_sum, of_scale


def make_arrays(shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x, added, of_total, of_out = (
        jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4)
    )
    scale = jnp.asarray(rng.normal(size=shape[-1:]), jnp.float32)
    return x, added, scale, of_total, of_out


def call(x, added, scale, layout=None):
    """The sum and its norm, put together from two copies."""
    total, (one, other) = add_and_norm(
        x, added, scale, epsilon=EPSILON, tiles=TILES, layout=layout, copies=2
    )
    return total, jnp.where(jnp.arange(x.shape[2]) % 3, one, other)


def run_both_passes(x, added, scale, of_total, of_out, layout=None):
    outputs, pull = jax.vjp(lambda *given: call(*given, layout), x, added, scale)
    return *outputs, *pull((of_total, of_out))


@pytest.mark.parametrize("shape", [(1, 13, 40), (3, 5, 24), (2, 6, 16)])
def test_values_and_gradients_are_those_of_float64(shape):
    arrays = make_arrays(shape)
    expected = exact(*(np.asarray(a, np.float64) for a in arrays))
    for found, right in zip(run_both_passes(*arrays), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-6)


def test_in_bfloat16_results_are_rounded_once():
    x, added, *rest = make_arrays((1, 9, 24))
    # Sums that bfloat16 holds: the interpreter would not round others.
    x, added = (jnp.clip(jnp.round(16 * a) / 16, -3, 3) for a in (x, added))
    rest = [rest[0], *(a.astype(jnp.bfloat16) for a in rest[1:])]
    half = (x.astype(jnp.bfloat16), added.astype(jnp.bfloat16), *rest)
    found = run_both_passes(*half)
    expected = exact(*(np.asarray(a, np.float64) for a in half))
    assert [a.dtype.name for a in found] == ["bfloat16"] * 4 + ["float32"]
    for result, right in zip(found[:4], expected[:4], strict=True):
        result = np.asarray(result, np.float64)
        np.testing.assert_allclose(result, right, rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(found[4], expected[4], rtol=1e-5, atol=1e-5)


def test_what_has_no_gradient_is_not_computed(monkeypatch):
    """Frozen scales, sums that nothing else reads, norms that nothing reads."""
    x, _, scale, of_total, of_out = make_arrays((2, 5, 16))
    asked = []
    plain = pallas_triton.backward

    def backward(total, scale, of_total, of_out, *rest, with_scale):
        asked.append((of_total is not None, len(of_out), with_scale))
        return plain(total, scale, of_total, of_out, *rest, with_scale=with_scale)

    monkeypatch.setattr(pallas_triton, "backward", backward)

    def differentiate(read):
        def loss(x):
            total, out = call(x, None, scale)
            return read(total, out)

        return jax.grad(loss)(x)

    arrays = [np.asarray(a, np.float64) for a in (x, scale, of_total, of_out)]
    none = np.zeros(())
    by_both = exact(arrays[0], none, *arrays[1:])[2]
    by_norm = exact(arrays[0], none, arrays[1], none, arrays[3])[2]
    tolerance = {"rtol": 2e-5, "atol": 2e-6}
    found = differentiate(lambda total, out: (total * of_total + out * of_out).sum())
    np.testing.assert_allclose(found, by_both, **tolerance)
    found = differentiate(lambda _, out: (out * of_out).sum())
    np.testing.assert_allclose(found, by_norm, **tolerance)
    found = differentiate(lambda total, _: (total * of_total).sum())
    np.testing.assert_array_equal(found, of_total)
    assert asked == [(True, 2, False), (False, 2, False)]


def test_devices_take_their_own_tokens_and_add_up_the_gradient_of_the_scale():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "context"))
    layout = Layout(mesh, rows=("data",), tokens=("context",))
    arrays = make_arrays((2, 12, 16))
    expected = exact(*(np.asarray(a, np.float64) for a in arrays))
    found = jax.jit(lambda *a: run_both_passes(*a, layout))(*arrays)
    for result, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(result, right, rtol=2e-5, atol=2e-6)


def test_only_half_precision_on_hopper_is_left_to_them():
    def gpu(capability):
        return types.SimpleNamespace(platform="gpu", compute_capability=capability)

    def stream(dtype=jnp.bfloat16, tokens=2048, width=896):
        return jax.ShapeDtypeStruct((1, tokens, width), dtype)

    hopper = gpu("9.0")
    assert choose_tiles(stream(), hopper) == Tiles.of_width(896)
    assert choose_tiles(stream(jnp.float16), hopper) is not None
    assert choose_tiles(stream(), None) is None  # a CPU
    for other in ("8.0", "10.0"):
        assert choose_tiles(stream(), gpu(other)) is None
    for refused in (
        stream(jnp.float32),
        stream(tokens=8),
        stream(width=900),
        stream(width=16384),
    ):
        assert choose_tiles(refused, hopper) is None


def make_decoder(family="qwen2", **options):
    config = ModelConfig.from_hf(
        {
            "model_type": family,
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 64,
        }
    )
    return Decoder(config, compute_dtype="float32", **options)


def make_batch():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 64, (2, 8))
    half = np.arange(8) // 4
    return Batch(
        tokens=jnp.asarray(tokens),
        targets=jnp.asarray(np.roll(tokens, -1, 1)),
        segment_ids=jnp.broadcast_to(1 + half, (2, 8)),
        positions=jnp.broadcast_to(np.arange(8) % 4, (2, 8)),
        loss_mask=jnp.ones((2, 8)),
    )


def make_loss(decoder):
    return lambda params: decoder.token_log_probs(params, make_batch()).logps.sum()


@pytest.fixture
def interpret(monkeypatch):
    """Call it to have kernels whatever the device; gives a list of what then ran.

    That is "forward", or whether the backward kernel was asked for the scale.
    """

    def begin():
        ran = []
        forward, backward = pallas_triton.forward, pallas_triton.backward

        def noted_forward(*arguments):
            ran.append("forward")
            return forward(*arguments)

        def noted_backward(*arguments, with_scale):
            ran.append(with_scale)
            return backward(*arguments, with_scale=with_scale)

        monkeypatch.setattr(norm, "choose_tiles", lambda *_: TILES)
        monkeypatch.setattr(pallas_triton, "forward", noted_forward)
        monkeypatch.setattr(pallas_triton, "backward", noted_backward)
        return ran

    return begin


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen2", {}),
        ("qwen2", {"scan_layers": False, "remat": "full"}),
        ("gemma2", {"scan_layers": False}),
    ],
    ids=["scan", "remat", "gemma2"],
)
def test_a_decoder_has_the_same_loss_and_gradients(family, options, interpret):
    decoder = make_decoder(family, **options)
    params = decoder.init(jax.random.key(0))

    def shift(x):  # norms that are not all alike, as after training
        return x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)

    params = jax.tree.map(shift, params)
    loss = make_loss(decoder)
    expected = jax.jit(jax.value_and_grad(loss))(params)
    ran = interpret()
    found = jax.jit(jax.value_and_grad(loss))(params)
    assert "forward" in ran and True in ran and False not in ran
    for result, right in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        largest = np.abs(np.asarray(right)).max()
        np.testing.assert_allclose(result, right, rtol=1e-4, atol=2e-5 * largest)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_where_scales_are_frozen_their_gradient_is_not_computed(remat, interpret):
    decoder = make_decoder(remat=remat)
    params = decoder.abstract_params()
    loss, ran = make_loss(decoder), interpret()

    def by_kernels(trained, params):
        layers = params["layers"] | {"mlp": trained}
        return loss(params | {"layers": layers})

    jax.eval_shape(jax.grad(by_kernels), params["layers"]["mlp"], params)
    assert False in ran and True not in ran


@pytest.mark.parametrize(
    "options", [{"family": "olmo2"}, {"family": "cohere2"}, {"fp8": True}], ids=str
)
def test_what_they_do_not_serve_is_left_to_xla(options, interpret):
    """Norms of what is added, of means too, and under fp8."""
    decoder, ran = make_decoder(**options), interpret()
    jax.eval_shape(make_loss(decoder), decoder.abstract_params())
    assert ran == (["forward"] if "olmo2" in options.values() else [])
