"""The head's kernels on a mesh: each device's tokens, a table in parts.

The kernels are hopper_test.py's; XLA stands in for them here.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.aot.hlo_cost import analyze
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.kernels.linear_cross_entropy import (
    fused,
    hopper,
    linear_log_probs,
    partition,
)
from tests.plain_kernels import weigh_plainly

ROWS, LENGTH, WIDTH, VOCAB = 8, 16, 32, 192


def make_layout(data, fsdp, context=1):
    devices = np.array(jax.devices()[: data * fsdp * context])
    mesh = Mesh(devices.reshape(data, fsdp, context, 1), (*"dfc", "t"))
    return Layout(mesh, rows=("d", "f"), tokens=("c",), vocab=("t",), weights=("f",))


def make_inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(ROWS, LENGTH, WIDTH)), dtype)
    table = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(ROWS, LENGTH)), jnp.float32)
    return hidden, table, targets, weights


def make_steps(layout, vocab_axis, targets, weights, chunk=None):
    """Values and gradients on the mesh, and of the same head in one piece."""
    score = functools.partial(linear_log_probs, vocab_axis=vocab_axis, chunk=chunk)

    def on_shards(hidden, table):
        scores = partition.score_on_shards(
            functools.partial(score, fuse=True),
            layout,
            hidden,
            table,
            (targets, None),
            vocab_axis,
        )
        logps, *rest = (layout.split_tokens(x, targets.shape) for x in scores)
        return (logps * weights).sum(), rest

    def whole(hidden, table):
        scores = score(hidden.reshape(-1, WIDTH), table, targets.reshape(-1))
        logps, *rest = (x.reshape(targets.shape) for x in scores)
        return (logps * weights).sum(), rest

    return (
        jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        for loss in (on_shards, whole)
    )


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("sizes", [(2, 1), (1, 4), (2, 2, 2), (1, 3)])
def test_a_mesh_scores_as_one_device_and_so_are_its_gradients(sizes, vocab_axis):
    """Over three devices neither rows nor the table's width can be divided."""
    layout = make_layout(*sizes)
    hidden, table, targets, weights = make_inputs()
    table = table if vocab_axis == 0 else table.T
    steps = make_steps(layout, vocab_axis, targets, weights)
    found, wanted = (step(hidden, table) for step in steps)
    # Sums of float32 in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5),
                 found, wanted)  # fmt: skip


def test_parts_travel_in_the_compute_type_and_their_gradient_in_the_tables():
    """Both once, each device's 24 tokens in slices: a scatter over fsdp, then a sum."""
    layout = make_layout(2, 2)
    hidden, table, targets, weights = make_inputs(jnp.bfloat16)
    step, _ = make_steps(layout, 0, targets, weights, chunk=8)
    placed = jax.device_put(table, NamedSharding(layout.mesh, PartitionSpec(None, "f")))
    program = step.lower(hidden, placed).compile().as_text()
    collectives = analyze(program).collectives
    assert collectives["reduce-scatter"][1] == 4 * table.size
    assert f"bf16[{VOCAB},{WIDTH}]" in program
    (_, _), gradients = step(hidden, placed)
    assert gradients[1].dtype == jnp.float32
    narrow = step.lower(hidden, placed.astype(jnp.bfloat16)).as_text()
    assert re.findall(r"reduce_scatter(?:.*\n){4}.*x(\w+)>\n", narrow) == ["bf16"]


@pytest.mark.parametrize("vocab_axis", [0, 1])
@pytest.mark.parametrize("sizes", [(4, 1), (1, 4)])
def test_sums_in_the_compute_type_are_those_of_float32_rounded(sizes, vocab_axis):
    layout = make_layout(*sizes)
    hidden, table, targets, weights = make_inputs(jnp.bfloat16)
    narrow = (table if vocab_axis == 0 else table.T).astype(jnp.bfloat16)
    step, _ = make_steps(layout, vocab_axis, targets, weights)
    found, wanted = (step(hidden, x)[1][1] for x in (narrow, narrow.astype(float)))
    assert (found.dtype, wanted.dtype) == (jnp.bfloat16, jnp.float32)
    # Each of four devices rounds its own sum to eight bits, and then their sums are.
    np.testing.assert_allclose(
        np.float32(found), wanted, rtol=2**-8, atol=2**-8 * np.abs(wanted).max()
    )


def test_only_a_table_that_is_worth_its_memory_is_brought_together(monkeypatch):
    asked = []

    def choose(hidden, vocab, device):
        asked.append(hidden.shape)
        return "tiles"

    monkeypatch.setattr(fused, "choose_tiles", choose)
    hidden = jax.ShapeDtypeStruct((8, 4096, 4096), jnp.bfloat16)
    assert partition.serves(make_layout(2, 2), hidden, 128256, None)
    assert asked == [(8 * 4096 // 4, 4096)]  # the tokens of one device
    wide = jax.ShapeDtypeStruct((8, 4096, 8192), jnp.bfloat16)
    assert not partition.serves(make_layout(2, 2), wide, 128256, None)
    mesh = Mesh(np.array(jax.devices()[:2]), ("t",))
    assert not partition.serves(Layout(mesh, vocab=("t",)), hidden, 128256, None)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("sizes", [(2, 2), (1, 4), (2, 2, 2), (1, 3)])
def test_shares_of_the_loss_sum_up_over_devices(sizes, frozen, monkeypatch):
    """Each device walks over its tokens once; plain jax stands in for the kernel."""
    monkeypatch.setattr(fused, "choose_tiles", lambda *_: hopper.Tiles())
    monkeypatch.setattr(fused, "weigh_logits", weigh_plainly)
    layout = make_layout(*sizes)
    hidden, table, targets, shares = make_inputs(jnp.bfloat16)

    def on_shards(hidden, table):
        score = functools.partial(linear_log_probs, chunk=8, fuse=True)
        *scores, parts = partition.score_on_shards(
            score, layout, hidden, table, (targets, shares), 0
        )
        return parts.sum(), layout.split_tokens(scores[0], targets.shape)

    def whole(hidden, table):
        logps, *_ = linear_log_probs(
            hidden.reshape(-1, WIDTH), table, targets.reshape(-1)
        )
        logps = logps.reshape(targets.shape)
        return (logps * shares).sum(), logps

    of = 0 if frozen else (0, 1)
    found, wanted = (
        jax.jit(jax.value_and_grad(loss, of, has_aux=True))(hidden, table)
        for loss in (on_shards, whole)
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, found[0], wanted[0])
    # Slopes are rounded to bfloat16 before one product and after the other.
    for a, b in zip(*map(jax.tree.leaves, (found[1], wanted[1])), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=2**-6, atol=4e-3 * np.abs(b).max())
