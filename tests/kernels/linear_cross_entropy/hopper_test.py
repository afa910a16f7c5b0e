"""The head's kernels for Hopper, interpreted, against float64 numpy; who takes them.

The interpreter runs barriers, copies and products; what only a GPU shows is timed and
compared by benchmarks/head_kernels.py.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxtrain.aot import compile as aot
from jaxtrain.config import default_config, resolve
from jaxtrain.kernels.linear_cross_entropy import fused, hopper, linear_log_probs
from jaxtrain.models.load import load_abstract_model

needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="this jax has no interpreter for Mosaic GPU",
)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels wherever they serve, whatever the device."""
    tiles = hopper.Tiles(columns=128, stages=2, interpret=True)

    def choose(hidden, entries, device):
        return None if fused.refusal(hidden, entries) else tiles

    monkeypatch.setattr(fused, "choose_tiles", choose)


@needs_interpreter
def test_sums_and_slopes_are_those_of_float64_on_both_layouts_of_the_table():
    """Two tiles of columns, the last half outside the vocabulary."""
    rng = np.random.default_rng(0)
    tokens, width, vocab, scale = 128, 64, 192, 0.7
    hidden = jnp.asarray(rng.normal(size=(tokens, width)), jnp.bfloat16)
    table = jnp.asarray(rng.normal(size=(vocab, width)), jnp.bfloat16)
    # All logits far below what is outside, which counts as nothing.
    table = table.at[:, 0].set(-25.0)
    hidden = hidden.at[:, 0].set(4.0)
    # The same entry twice: a token whose target is the second is not right.
    table = table.at[70].set(table[5]).at[150].set(table[5])
    logits = scale * np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    targets = rng.integers(0, vocab, tokens)
    targets[:100] = logits[:100].argmax(1)
    best = np.flatnonzero(logits.argmax(1) == 5)
    assert len(best) >= 2
    targets[best[0]], targets[best[1]] = 70, 150
    weights = np.exp(logits - logits.max(1, keepdims=True))

    tiles = hopper.Tiles(columns=128, stages=2, interpret=True)
    head = hopper.Head(hidden, table, 0, scale)
    sums = hopper.sum_logits(head, jnp.asarray(targets, jnp.int32), tiles)
    rows = np.arange(tokens)
    np.testing.assert_allclose(sums.highest, logits.max(1), rtol=1e-6)
    np.testing.assert_allclose(sums.total, weights.sum(1), rtol=3e-5)
    np.testing.assert_allclose(sums.weighted, (weights * logits).sum(1), rtol=3e-5)
    np.testing.assert_allclose(sums.target, logits[rows, targets], rtol=1e-6)
    np.testing.assert_array_equal(sums.is_first, logits.argmax(1) == targets)

    on_target, share = rng.normal(size=(2, tokens))
    log_total = logits.max(1) + np.log(weights.sum(1))
    expected = -np.exp(logits - log_total[:, None]) * share[:, None] * scale
    expected[rows, targets] += on_target * scale
    expected[:, :64] = 0
    numbers = (jnp.asarray(x, jnp.float32) for x in (log_total, on_target, share))
    slope = hopper.Slope(jnp.asarray(targets, jnp.int32), *numbers, jnp.int32(64))
    by_column = hopper.Head(hidden, table.T, 1, scale)
    slopes = hopper.make_slopes(by_column, slope, tiles)
    # What a logit of -70 is rounded to in float32 shows in its exponential.
    np.testing.assert_allclose(
        np.asarray(slopes, np.float64), expected, rtol=2**-8, atol=2e-5
    )


@needs_interpreter
def test_the_head_by_kernels_is_the_head_without(interpreted):
    """Rows that fill no tile, three slices backward of which two overlap."""
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(100, 64)), jnp.bfloat16)
    table = jnp.asarray(rng.normal(size=(1600, 64)) / 4, jnp.float32)
    targets = jnp.asarray(rng.integers(0, 1600, 100), jnp.int32)
    cotangents = jnp.asarray(rng.normal(size=(2, 100)), jnp.float32)

    def loss(fuse, hidden, table):
        scores = linear_log_probs(
            hidden, table, targets, chunk=11, with_log_total=True, fuse=fuse
        )
        total = scores[0] * cotangents[0] + scores[-1] * cotangents[1]
        return total.sum(), scores

    found = [
        jax.jit(
            jax.value_and_grad(functools.partial(loss, fuse), (0, 1), has_aux=True)
        )(hidden, table)
        for fuse in (False, True)
    ]
    (_, plain), plain_gradients = found[0]
    (_, kept), kept_gradients = found[1]
    for name, a, b in zip(("logps", "entropy"), plain, kept, strict=False):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(kept[2], plain[2])
    np.testing.assert_allclose(kept[3], plain[3], atol=1e-5)
    np.testing.assert_allclose(kept[4], plain[4], rtol=1e-5)
    for a, b in zip(plain_gradients, kept_gradients, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(b, a, rtol=2**-7, atol=1e-2 * np.abs(a).max())


def test_kernels_are_taken_on_hopper_alone_for_what_they_serve(caplog):
    hopper_gpu, ampere = (
        types.SimpleNamespace(platform="gpu", compute_capability=capability)
        for capability in ("9.0", "8.0")
    )
    hidden = jax.ShapeDtypeStruct((4096, 896), jnp.bfloat16)
    assert fused.choose_tiles(hidden, 151936, hopper_gpu) == hopper.Tiles()
    assert fused.choose_tiles(hidden, 151936, ampere) is None
    assert fused.choose_tiles(hidden, 151937, hopper_gpu) is None
    few = jax.ShapeDtypeStruct((64, 896), jnp.bfloat16)
    assert fused.choose_tiles(few, 151936, hopper_gpu) is None
    exact = jax.ShapeDtypeStruct((4096, 896), jnp.float32)
    assert fused.choose_tiles(exact, 151936, hopper_gpu) is None


@pytest.mark.parametrize(
    "beside", [{"softcap": 30.0}, {"with_collision": True}, {"shards": 2}]
)
def test_what_the_kernels_cannot_do_is_never_asked_of_them(beside, monkeypatch):
    def refuse(*_):
        raise AssertionError("asked for kernels")

    monkeypatch.setattr(fused, "choose_tiles", refuse)
    hidden, table = jnp.ones((4, 8)), jnp.ones((16, 8))
    score = functools.partial(linear_log_probs, fuse=True, **beside)
    jax.eval_shape(score, hidden, table, jnp.zeros(4, jnp.int32))
    with pytest.raises(AssertionError, match="asked for kernels"):
        linear_log_probs(hidden, table, jnp.zeros(4, jnp.int32), fuse=True)


@pytest.mark.parametrize(("scored", "rows"), [(None, 8 * 64), (300, 384)])
def test_a_runs_own_step_takes_them_for_each_batch_and_in_both_passes(
    scored, rows, monkeypatch
):
    """The step that `build` makes of a config, traced; of several devices each does.

    `scored`: places that the loss reads, padded to whole tiles of 128 rows.
    """
    config = default_config()
    config.data.max_length = 64
    config.training.bf16 = True
    config.training.training_type = "sft"
    config.training.per_device_train_batch_size = 8
    asked, taken = [], []

    def choose(hidden, entries, device):
        asked.append(device)
        assert fused.refusal(hidden, entries) is None
        return hopper.Tiles()

    monkeypatch.setattr(fused, "choose_tiles", choose)
    for name in ("sum_logits", "make_slopes", "weigh_logits"):
        own = getattr(fused, name)

        def note(tiles, hidden, *rest, name=name, own=own):
            taken.append((name, len(hidden)))
            return own(tiles, hidden, *rest)

        monkeypatch.setattr(fused, name, note)

    def trace(devices):
        run = resolve(config, device_count=len(devices))
        model = load_abstract_model(run, devices)
        step, state = aot.describe_step(run, model)
        batch = aot._abstract_batch(model, run)
        if scored:
            layout = batch.tokens.sharding
            places = jax.ShapeDtypeStruct((1, 1, scored), jnp.int32, sharding=layout)
            batch = dataclasses.replace(batch, scored=places)
        step.trace(state, batch)

    trace(jax.devices()[:1])
    assert asked[0].platform == jax.devices()[0].platform
    assert set(taken) == {("weigh_logits", rows)}
    if scored is None:
        taken.clear()
        config.mesh.fsdp = 2
        trace(jax.devices()[:2])
        assert set(taken) == {("weigh_logits", rows)}
        taken.clear()
        config.mesh.fsdp, config.mesh.tensor = 1, 2  # which splits the vocabulary
        trace(jax.devices()[:2])
        assert not taken
        config.mesh.tensor = 1
        config.training.training_type = "dpo"  # whose slopes are known at the end
        trace(jax.devices()[:1])
        assert {name for name, _ in taken} == {"sum_logits", "make_slopes"}
