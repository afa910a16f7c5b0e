"""Moments in fewer bits: bounds of the error, its mean, what a run makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from runs import records, tiny_config, train, weights

from jaxtrain import sharding
from jaxtrain.optimizers import moments, optim
from jaxtrain.optimizers.moments import EightBits, with_compact_moments

SHORT = ("bfloat16", "int8")


def draw_bits(shape, number=0):
    draw = np.random.default_rng(number).integers(0, 2**32, shape, np.uint32)
    return jnp.asarray(draw)


def to_eight_bits(x, draw, *, signed):
    x = jnp.asarray(x)
    return moments.to_eight_bits(x, moments.scales_of(x), draw, signed=signed)


def spread_values(*shape, octaves, seed=0):
    """Positive numbers over that many octaves below 3, some of them zero."""
    rng = np.random.default_rng(seed)
    x = 3.0 * 2.0 ** -rng.uniform(0, octaves, shape)
    return np.where(rng.random(shape) < 0.05, 0.0, x).astype(np.float32)


def adam(dtype, beta2=0.999):
    return with_compact_moments(optax.scale_by_adam(0.9, beta2), dtype)


def moment(state, name):
    return getattr(moments._restore(state.inner), name)["layers"]["kernel"]


@pytest.mark.parametrize(("signed", "octaves"), [(True, 15.9), (False, 23.9)])
def test_an_eight_bit_number_is_one_of_its_neighbours(signed, octaves):
    """Every error is below a level's spacing, of each number and not of the largest."""
    x = spread_values(3, 64, 40, octaves=octaves)
    if signed:
        x *= np.random.default_rng(1).choice([-1.0, 1.0], x.shape)
    kept = to_eight_bits(x, draw_bits((64, 40)), signed=signed)
    assert kept.codes.dtype == (jnp.int8 if signed else jnp.uint8)
    assert kept.scale.shape == (3, 64, 1)  # the shorter axis is the block
    found = np.asarray(moments.from_eight_bits(kept))
    spacing = 2 ** (16 / 126) if signed else 2 ** (24 / 254)
    np.testing.assert_array_equal(found == 0, x == 0)
    share = np.divide(found, x, where=x != 0, out=np.ones_like(x))
    assert share.min() > 0.999 / spacing
    assert share.max() < 1.001 * spacing
    largest = np.abs(x).max(-1)
    np.testing.assert_allclose(np.abs(found).max(-1), largest, rtol=1e-6)


def test_below_the_least_level_first_moments_may_vanish_and_second_ones_may_not():
    tiny = np.full((40, 64), 2.0**-30, np.float32)
    tiny[0] = 1.0
    draw = draw_bits((40, 64))
    first = to_eight_bits(tiny, draw, signed=True)
    assert first.scale.shape == (1, 64)
    assert (moments.from_eight_bits(first)[1:] == 0).mean() > 0.99
    second = to_eight_bits(tiny, draw, signed=False)
    np.testing.assert_allclose(moments.from_eight_bits(second)[1:], 2.0**-24)


@pytest.mark.parametrize("dtype", SHORT)
def test_rounding_keeps_the_mean(dtype):
    x = jnp.asarray(spread_values(16, 32, octaves=12))
    total = 0.0
    draws = 400
    for number in range(draws):
        bits = moments._draw_bits((16, 32), jnp.int32(number))
        if dtype == "bfloat16":
            total += np.asarray(moments.to_bfloat16(x, bits), np.float64)
        else:
            kept = to_eight_bits(x, bits, signed=True)
            total += np.asarray(moments.from_eight_bits(kept), np.float64)
    # The standard deviation of one is at most half the spacing, 2^-7 or 0.092.
    of_mean = (2**-8 if dtype == "bfloat16" else 0.046) / np.sqrt(draws)
    off = (total / draws - x)[x > 0] / x[x > 0]
    assert np.abs(off).max() < 5 * of_mean
    assert np.abs(off.mean()) < 5 * of_mean / np.sqrt(off.size)


@pytest.mark.parametrize("dtype", SHORT)
def test_a_second_moment_falls_by_a_thousandth_a_step(dtype):
    """Rounded to the nearest it would stay where it is for good."""
    optimizer = adam(dtype)
    params = {"layers": {"kernel": jnp.zeros((1, 64, 64))}}
    grads = {"layers": {"kernel": jnp.asarray(spread_values(1, 64, 64, octaves=4))}}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    first = np.asarray(moment(state, "nu"), np.float64)
    zero = jax.tree.map(jnp.zeros_like, grads)

    @jax.jit
    def decay(state):
        def body(_, state):
            return optimizer.update(zero, state, params)[1]

        return jax.lax.fori_loop(0, 1000, body, state)

    left = np.asarray(moment(decay(state), "nu"), np.float64)
    share = left.sum() / first.sum()
    assert share == pytest.approx(0.999**1000, rel=0.03)


@pytest.mark.parametrize("dtype", SHORT)
def test_directions_are_near_those_of_float32(dtype):
    """A noisy gradient of a constant mean: Adam's steps, beside exact moments'."""
    short, exact = adam(dtype), adam("float32")
    params = {"layers": {"kernel": jnp.zeros((1, 48, 48)), "bias": jnp.zeros((1, 48))}}
    rng = np.random.default_rng(0)
    mean = jax.tree.map(lambda p: rng.standard_normal(p.shape), params)
    states = [tx.init(params) for tx in (short, exact)]
    updates = [jax.jit(tx.update) for tx in (short, exact)]
    for _ in range(300):
        grads = jax.tree.map(
            lambda m: jnp.float32(m + rng.standard_normal(m.shape)), mean
        )
        found, states[0] = updates[0](grads, states[0], params)
        expected, states[1] = updates[1](grads, states[1], params)
    a, b = found["layers"], expected["layers"]
    np.testing.assert_array_equal(a["bias"], b["bias"])  # float32 as ever
    off = np.asarray(a["kernel"] - b["kernel"])
    rms = np.sqrt(np.mean(off**2)) / np.sqrt(np.mean(np.asarray(b["kernel"]) ** 2))
    assert 0 < rms < (0.02 if dtype == "bfloat16" else 0.15)


def test_eight_bits_are_split_as_their_parameters():
    """Over two devices: the layouts, and the same codes as on one."""
    mesh = sharding.make_mesh(
        {axis: 2 if axis == "fsdp" else 1 for axis in sharding.MESH_AXES},
        jax.devices()[:2],
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    rng = np.random.default_rng(0)
    shapes = {"q_proj": (2, 8, 12), "down_proj": (2, 12, 8), "norm": (2, 8)}
    params = {"layers": {n: jnp.float32(rng.random(s)) for n, s in shapes.items()}}
    over = {
        "q_proj": PartitionSpec(None, "fsdp", None),
        "down_proj": PartitionSpec(None, None, "fsdp"),
        "norm": PartitionSpec(None, "fsdp"),
    }
    layouts = {"layers": {n: NamedSharding(mesh, spec) for n, spec in over.items()}}
    optimizer = adam("int8")
    stored = optim.state_shardings(optimizer, params, layouts, replicated)
    kept = stored.inner.mu["layers"]
    assert kept["q_proj"].codes.spec == over["q_proj"]
    assert kept["q_proj"].scale.spec == PartitionSpec(None, None, None)
    assert kept["down_proj"].scale.spec == PartitionSpec(None, None, None)
    update = jax.jit(
        optimizer.update,
        in_shardings=(layouts, stored, layouts),
        out_shardings=(layouts, stored),
    )
    whole, state = jax.jit(optimizer.update), optimizer.init(params)
    split = jax.device_put(state, stored)
    for step in range(3):
        grads = jax.tree.map(lambda p, i=step: jnp.sin(9 * p + i), params)
        _, state = whole(grads, state, params)
        _, split = update(jax.device_put(grads, layouts), split, params)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert isinstance(state.inner.nu["layers"]["q_proj"], EightBits)


def test_a_run_with_eight_bit_moments_resumes_bit_by_bit(tmp_path):
    """Stopped at step 3 and started again it ends at the weights of one in a piece."""
    keys = {"moment_dtype": "int8", "max_steps": 5, "lr_scheduler_type": "constant"}
    train(tiny_config("from_scratch", **keys), tmp_path / "whole")
    train(tiny_config("from_scratch", **keys | {"max_steps": 3}), tmp_path / "halves")
    train(tiny_config("from_scratch", **keys), tmp_path / "halves")
    assert [r["step"] for r in records(tmp_path / "halves")][-1] == 5
    again = weights(tmp_path / "halves")
    for name, value in weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(again[name], value)
    # Another type is another state, and the message names the key.
    other = keys | {"moment_dtype": "bfloat16", "max_steps": 6}
    with pytest.raises(ValueError, match=r"moment_dtype: 'int8' -> 'bfloat16'"):
        train(tiny_config("from_scratch", **other), tmp_path / "halves")


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_every_optimizer_with_moments_keeps_them_in_eight_bits(name):
    momentum = 0.9 if name == "sgd" else None
    inner = optim.make_optimizer(name, lambda step: 0.1, momentum=momentum)
    optimizer = with_compact_moments(inner, "int8")
    params = {
        "embed_tokens": {"embedding": jnp.ones((64, 32))},
        "layers": {"up_proj": {"kernel": jnp.ones((2, 32, 64))}},
        "norm": {"scale": jnp.ones(32)},
    }
    full, short = inner.init(params), optimizer.init(params)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(s)) for s in (full, short)]
    assert sizes[1] < 0.29 * sizes[0]  # a quarter, scales and vectors
    updates, after = optimizer.update(params, short, params)
    expected, _ = inner.update(params, full, params)
    assert jax.tree.structure(after) == jax.tree.structure(short)
    for a, b in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)  # nothing was rounded before the first


def test_a_type_that_is_none_is_refused():
    with pytest.raises(ValueError, match="moment_dtype = 'fp4' is unknown: choose"):
        with_compact_moments(optax.scale_by_adam(), "fp4")


@pytest.mark.on_request
def test_loss_curves_on_real_text_stay_together(tmp_path):
    """300 steps on the embedded text: the three curves' last tenths, held-out too."""
    losses = {}
    for dtype in ("float32", *SHORT):
        config = tiny_config(
            "from_scratch",
            moment_dtype=dtype,
            max_steps=300,
            save_steps=0,
            eval_steps=300,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
        )
        config.data.max_train_rows, config.data.max_eval_rows = 2000, 200
        results = train(config, tmp_path / dtype)
        curve = [r["loss"] for r in records(tmp_path / dtype) if "loss" in r]
        losses[dtype] = (np.mean(curve[-30:]), results["eval_loss"])
    print(losses)
    for dtype in SHORT:
        np.testing.assert_allclose(losses[dtype], losses["float32"], rtol=0.01)
