"""The loss head against float64 numpy, and its memory, sharding and refusals."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.aot.hlo_cost import analyze
from jaxtrain.kernels.linear_cross_entropy import linear_log_probs
from jaxtrain.kernels.linear_cross_entropy.api import HeadAdapter, TokenShards


def make_inputs(tokens, width, vocab, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    table = jnp.asarray(rng.normal(size=(vocab, width)), dtype)
    targets = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
    return hidden, table, targets


def compute_in_float64(hidden, table, targets, softcap=None, scale=1.0):
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T * scale
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    p = np.exp(log_p)
    rows = np.arange(len(targets))
    return (
        log_p[rows, targets],
        -(p * log_p).sum(-1),
        (logits.argmax(-1) == np.asarray(targets)).astype(np.float64),
        logits.mean(-1),
        np.log((p * p).sum(-1)),
    )


def differentiate_in_float64(
    hidden, table, targets, cotangent, softcap=None, scale=1.0
):
    """d(sum cotangent * logps) by hand: onehot - softmax, through the cap."""
    hidden, table = np.asarray(hidden, np.float64), np.asarray(table, np.float64)
    raw = hidden @ table.T * scale
    chain = np.full_like(raw, scale)
    logits = raw
    if softcap is not None:
        logits = softcap * np.tanh(raw / softcap)
        chain *= 1 - np.tanh(raw / softcap) ** 2
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    slope = -p
    slope[np.arange(len(targets)), targets] += 1
    slope *= chain * np.asarray(cotangent, np.float64)[:, None]
    return slope @ table, slope.T @ hidden


OPTIONS = [
    pytest.param({}, id="plain"),
    pytest.param({"softcap": 5.0}, id="softcap"),
    pytest.param({"scale": 0.3}, id="scale"),
    pytest.param({"scale": 1.7, "softcap": 5.0}, id="scale and softcap"),
]


def test_two_entries_give_the_logistic_value():
    hidden = jnp.array([[2.0]])
    table = jnp.array([[1.0], [0.0]])
    logps, entropy, correct, mean = linear_log_probs(hidden, table, jnp.array([0]))
    p = 1 / (1 + np.exp(-2.0))
    np.testing.assert_allclose(logps, [np.log(p)], rtol=1e-6)
    np.testing.assert_allclose(
        entropy, [-(p * np.log(p) + (1 - p) * np.log(1 - p))], rtol=1e-6
    )
    assert correct[0] == 1 and mean[0] == 1.0


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize(("chunk", "shards"), [(1000, 1), (9, 1), (9, 2)])
def test_outputs_and_gradients_equal_float64(options, vocab_axis, chunk, shards):
    """Of one slice, of three that overlap, and of three that overlap in each shard."""
    hidden, table, targets = make_inputs(37, 8, 1543 * shards)
    cotangent = jax.random.normal(jax.random.key(1), (37,))
    given_table = table if vocab_axis == 0 else table.T

    def head(hidden, table):
        return linear_log_probs(
            hidden,
            table,
            targets,
            vocab_axis=vocab_axis,
            chunk=chunk,
            shards=shards,
            with_collision=True,
            **options,
        )

    outputs = jax.jit(head)(hidden, given_table)
    expected = compute_in_float64(hidden, table, targets, **options)
    for got, want in zip(outputs, expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)

    _, pull = jax.vjp(lambda h, t: head(h, t)[0], hidden, given_table)
    d_hidden, d_table = jax.jit(pull)(cotangent)
    _, pull = jax.vjp(lambda h: head(h, given_table)[0], hidden)
    (of_frozen,) = jax.jit(pull)(cotangent)
    want_hidden, want_table = differentiate_in_float64(
        hidden,
        table,
        targets,
        cotangent,
        **options,
    )
    if vocab_axis == 1:
        want_table = want_table.T
    np.testing.assert_allclose(d_hidden, want_hidden, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(of_frozen, want_hidden, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(d_table, want_table, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize(("vocab_axis", "chunk"), [(0, 9), (1, 9), (1, 1000)])
def test_an_adapters_part_equals_that_of_whole_logits(vocab_axis, chunk, with_gain):
    """Outputs and every gradient, over 3 slices of a vocabulary and over 1."""
    hidden, table, targets = make_inputs(37, 8, 1543)
    draw = np.random.default_rng(2).normal
    parts = HeadAdapter(
        jnp.asarray(draw(size=(37, 3)), jnp.float32),
        jnp.asarray(draw(size=(3, 1543)), jnp.float32),
        jnp.asarray(1 + 0.1 * draw(size=1543), jnp.float32) if with_gain else None,
    )
    cotangent = jnp.asarray(draw(size=37), jnp.float32)

    def sliced(hidden, parts):
        given_table = table if vocab_axis == 0 else table.T
        outputs = linear_log_probs(
            hidden,
            given_table,
            targets,
            vocab_axis=vocab_axis,
            chunk=chunk,
            scale=0.8,
            softcap=9.0,
            adapter=parts,
        )
        return (outputs[0] * cotangent).sum(), outputs

    def whole(hidden, parts):
        logits = hidden @ table.T + parts.low @ parts.up
        logits = logits if parts.gain is None else logits * parts.gain
        logits = 9.0 * jnp.tanh(0.8 * logits / 9.0)
        logps = jax.nn.log_softmax(logits)
        own = logps[jnp.arange(37), targets]
        entropy = -(jnp.exp(logps) * logps).sum(-1)
        correct = (logits.argmax(-1) == targets).astype(jnp.float32)
        return (own * cotangent).sum(), (own, entropy, correct, logits.mean(-1))

    got, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, parts)
        for f in (sliced, whole)
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=5e-5),
        got,
        expected,
    )


@settings(max_examples=8)
@given(st.integers(1, 40), st.integers(2, 3000), st.integers(1, 50), st.integers(0, 99))
def test_any_size_and_chunk_gives_the_same_log_probs(tokens, vocab, chunk, seed):
    hidden, table, targets = make_inputs(tokens, 4, vocab, seed)
    call = functools.partial(linear_log_probs, chunk=chunk)
    got = jax.jit(call)(hidden, table, targets)
    want = compute_in_float64(hidden, table, targets)[:4]
    for have, expected in zip(got, want, strict=True):
        np.testing.assert_allclose(have, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [100, 1])
def test_ties_count_for_the_first_entry_only(chunk):
    hidden = jnp.ones((3, 2))
    table = jnp.zeros((2048, 2)).at[jnp.array([700, 701, 1999])].set(3.0)
    targets = jnp.array([701, 700, 1999])
    correct = linear_log_probs(hidden, table, targets, chunk=chunk)[2]
    np.testing.assert_array_equal(correct, [0, 1, 0])


def test_only_log_probs_carry_a_gradient():
    hidden, table, targets = make_inputs(5, 4, 600)

    def total(hidden, index):
        return linear_log_probs(hidden, table, targets)[index].sum()

    assert jnp.any(jax.grad(total)(hidden, 0) != 0)
    for index in (1, 2, 3):
        assert not jnp.any(jax.grad(total)(hidden, index))


def test_large_logits_stay_finite():
    hidden = jnp.array([[300.0], [-300.0]])
    table = jnp.array([[1.0], [-1.0], [0.5]])
    targets = jnp.array([1, 1])
    logps, pull = jax.vjp(lambda h: linear_log_probs(h, table, targets)[0], hidden)
    np.testing.assert_allclose(logps, [-600.0, 0.0])
    np.testing.assert_allclose(pull(jnp.ones(2))[0], [[-2.0], [0.0]])


def test_a_frozen_unembedding_costs_no_gradient_product():
    hidden, table, targets = make_inputs(8, 4, 2048)

    def total(hidden, table):
        return linear_log_probs(hidden, table, targets, chunk=2)[0].sum()

    def products(arguments):
        return str(jax.make_jaxpr(jax.grad(total, arguments))(hidden, table)).count(
            "dot_general["
        )

    assert products(0) == 2  # logits, and the gradient of the hidden states with them
    assert products((0, 1)) == 4  # logits twice


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_a_frozen_unembedding_gives_the_same_gradient_in_bfloat16(vocab_axis):
    """Beside float64 it is as near as the gradient that is taken backward.

    Some tokens are sure of their target, whose share and 1 then nearly cancel.
    """
    hidden, table, targets = make_inputs(64, 32, 3000, dtype=jnp.bfloat16)
    sure = jnp.arange(64) < 16
    hidden = jnp.where(sure[:, None], table[targets] * 0.8, hidden)
    given_table = table if vocab_axis == 0 else table.T
    cotangent = jax.random.normal(jax.random.key(1), (64,))

    def gradient(arguments):
        def total(hidden, table):
            logps = linear_log_probs(
                hidden, table, targets, vocab_axis=vocab_axis, chunk=16
            )[0]
            return (logps * cotangent).sum()

        return jax.jit(jax.grad(total, arguments))(hidden, given_table)[0]

    exact, _ = differentiate_in_float64(hidden, table, targets, cotangent, None)
    logps = compute_in_float64(hidden, table, targets)[0]
    assert np.median(np.exp(logps[:16])) > 0.99

    def errors(found):
        off = np.linalg.norm(np.asarray(found, np.float64) - exact, axis=1)
        return off / np.linalg.norm(exact, axis=1)

    ahead = errors(gradient((0,)))
    backward = errors(gradient((0, 1)))
    assert ahead.max() < 0.02
    assert ahead.max() < 1.5 * backward.max()  # which rounds 1 - p of the surest
    assert np.median(ahead) < 1.1 * np.median(backward)


def test_memory_stays_far_below_the_logits_in_both_passes():
    tokens, width, vocab = 2048, 32, 16384
    hidden = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    table = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def total(hidden, table, targets):
        return linear_log_probs(hidden, table, targets, chunk=128)[0].sum()

    step = jax.jit(jax.grad(total, (0, 1)))
    memory = step.lower(hidden, table, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tokens * vocab * 4 / 4


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="this jax's CPU compiler widens the whole table to float32",
)
@pytest.mark.parametrize(
    ("width", "vocab"), [(896, 151936), (2048, 151936), (2304, 262144), (4096, 262144)]
)
def test_temporaries_are_under_a_fifth_more_than_the_inputs(width, vocab):
    """As the compiler counts them, here a CPU's; on an H200: benchmarks/RESULTS.md."""
    hidden = jax.ShapeDtypeStruct((8192, width), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((vocab, width), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((8192,), jnp.int32)

    def total(hidden, table, targets):
        return linear_log_probs(hidden, table, targets)[0].sum()

    step = jax.jit(jax.grad(total, (0, 1)))
    memory = step.lower(hidden, table, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.2 * 2 * (hidden.size + table.size)


def test_bfloat16_hidden_with_float32_unembedding_keeps_both_dtypes():
    hidden, table, targets = make_inputs(16, 8, 1024)
    hidden = hidden.astype(jnp.bfloat16)

    def total(hidden, table):
        return linear_log_probs(hidden, table, targets, chunk=8)[0].sum()

    d_hidden, d_table = jax.grad(total, (0, 1))(hidden, table)
    assert d_hidden.dtype == jnp.bfloat16 and d_table.dtype == jnp.float32
    want = compute_in_float64(hidden, table.astype(jnp.bfloat16), targets)[0]
    got = linear_log_probs(hidden, table, targets, chunk=8)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_sharded_head_gives_the_same_values_and_gathers_no_table():
    devices = np.array(jax.devices()[:8]).reshape(4, 2)
    mesh = Mesh(devices, ("data", "tensor"))
    hidden, table, targets = make_inputs(64, 16, 4096)

    def place(x, *names):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))

    def total(hidden, table, targets):
        return linear_log_probs(hidden, table, targets, chunk=16, shards=2)[0].sum()

    step = jax.jit(jax.value_and_grad(total, (0, 1)))
    sharded = (place(hidden, "data"), place(table, "tensor"), place(targets, "data"))
    value, gradients = step(*sharded)
    want_value, want = step(hidden, table, targets)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    for got, expected in zip(gradients, want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    program = step.lower(*sharded).compile().as_text()
    assert "all-gather" not in program


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_devices_that_share_tokens_add_up_the_tables_gradient_once(vocab_axis):
    mesh = Mesh(np.array(jax.devices()[:8]), ("tokens",))
    hidden, table, targets = make_inputs(256, 16, 4096)
    layout = NamedSharding(mesh, PartitionSpec("tokens"))

    def constrain(x, axes):
        spec = PartitionSpec(*(axis if axis == "tokens" else None for axis in axes))
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def total(hidden, kernel, shards):
        options = {"chunk": 8, "vocab_axis": vocab_axis, "token_shards": shards}
        return linear_log_probs(hidden, kernel, targets, **options)[0].sum()

    kernel = table if vocab_axis == 0 else table.T
    step = jax.jit(jax.grad(total, (0, 1)), static_argnums=2)
    sharded = (jax.device_put(hidden, layout), kernel, TokenShards(8, constrain))
    got = step(*sharded)
    want = differentiate_in_float64(hidden, table, targets, np.ones(256))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4)
    found = got[1] if vocab_axis == 0 else got[1].T
    np.testing.assert_allclose(found, want[1], rtol=1e-4, atol=1e-4)
    program = step.lower(*sharded).compile().as_text()
    # By the whole table's bytes: once over the links. And 256 tokens over 8 devices
    # are cut like 32 tokens of one, four slices at 8 tokens' logits.
    assert analyze(program).collectives == {"all-reduce": (1, 4 * table.size)}
    assert len(set(re.findall(r'known_trip_count":{"n":"(\d+)"', program))) == 1
    assert 'known_trip_count":{"n":"4"' in program


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_axis": 2}, "vocab_axis=2"),
        ({"vocab_axis": 1}, "do not fit"),
        ({"chunk": 0}, "chunk=0"),
        ({"shards": 7}, "shards=7 does not divide a vocabulary of 600"),
        ({"token_shards": TokenShards(3)}, "token_shards.number=3 does not divide"),
        ({"softcap": -1.0}, "softcap=-1.0"),
        ({"targets": jnp.zeros(4, jnp.int32)}, "targets"),
    ],
)
def test_bad_arguments_are_refused_by_name(change, words):
    hidden, table, targets = make_inputs(5, 4, 600)
    arguments = {"targets": targets} | change
    with pytest.raises(ValueError, match=words):
        linear_log_probs(hidden, table, **arguments)
