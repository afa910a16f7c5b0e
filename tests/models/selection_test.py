"""The loss head on the predictions that count alone, against all of them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.batch import Batch
from jaxtrain.data.batches.scoring import with_scored
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layers import LoraShape
from jaxtrain.models.selection import join_rows, make_selection, pick, put_back
from jaxtrain.models.transformer import Decoder
from jaxtrain.sharding import ShardingPlan, make_mesh, place_batch

SIZES = {
    "model_type": "gemma2", "vocab_size": 97, "hidden_size": 16, "head_dim": 8,
    "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "sliding_window": 8,
}  # fmt: skip


def make_rows(seed=0, rows=2, length=32):
    """Rows of one document and some padding, about a third of it trained."""
    random = np.random.default_rng(seed)
    ends = random.integers(length // 2, length, (rows, 1))
    places = np.arange(length)
    inside = places < ends
    return Batch(
        tokens=random.integers(0, 97, (rows, length)).astype(np.int32),
        targets=random.integers(0, 97, (rows, length)).astype(np.int32),
        segment_ids=inside.astype(np.int32),
        positions=(places * inside).astype(np.int32),
        loss_mask=(inside & (random.random((rows, length)) < 0.4)).astype(np.float32),
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.booleans())
def test_what_is_picked_is_put_back_and_each_is_the_other_s_transpose(seed, is_wide):
    random = np.random.default_rng(seed)
    batch = with_scored(make_rows(seed), 24, 2)
    chosen = make_selection(jnp.asarray(batch.scored), 32)
    wide = (3,) if is_wide else ()
    x, y = (random.normal(size=(2, n, *wide)).astype(np.float32) for n in (32, 24))
    mask = batch.loss_mask.reshape(2, 32, *(1 for _ in wide))
    np.testing.assert_array_equal(put_back(pick(x, chosen), chosen), (x * mask))
    picked, transpose = jax.vjp(lambda x: pick(x, chosen), jnp.asarray(x))
    # <pick(x), y> = <x, put_back(y)>, and jax is told so.
    product = np.vdot(picked, y)
    np.testing.assert_allclose(np.vdot(x, put_back(y, chosen)), product, rtol=1e-4)
    np.testing.assert_array_equal(transpose(jnp.float32(y))[0], put_back(y, chosen))
    back = jax.vjp(lambda y: put_back(y, chosen), jnp.asarray(y))[1]
    np.testing.assert_array_equal(back(jnp.float32(x))[0], pick(jnp.float32(x), chosen))


@pytest.mark.parametrize(("has_adapter", "groups"), [(False, 4), (True, 4), (False, 2)])
def test_the_head_gives_the_same_where_it_is_asked_and_0_elsewhere(has_adapter, groups):
    lora = LoraShape(2, 2.0, targets=frozenset({"embed_tokens"}))
    decoder = Decoder(
        ModelConfig.from_hf(SIZES),
        compute_dtype="float32",
        lora=dataclasses.replace(lora, ties_head=True) if has_adapter else None,
    )
    params = decoder.init(jax.random.key(0))
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), params
    )
    batch = make_rows(rows=4)
    selected = with_scored(batch, 96 // groups, groups)

    @jax.jit
    def loss(params, batch):
        scored = decoder.token_log_probs(
            params, batch, with_collision=True, with_log_total=True
        )
        sums = (scored.logps + 0.1 * scored.log_total**2) * batch.loss_mask
        return sums.sum(), scored

    both = [
        jax.value_and_grad(loss, has_aux=True)(params, each)
        for each in (batch, selected)
    ]
    ((_, whole), expected), ((_, part), found) = both
    for name, values in vars(part).items():
        if values is None:
            continue
        of_all = getattr(whole, name) * batch.loss_mask
        # The same products of float32 in matrices of other sizes.
        np.testing.assert_allclose(values, of_all, rtol=1e-5, atol=1e-5, err_msg=name)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_devices_pick_from_their_own_rows():
    """Whole rows are split over two devices, each with a line of places."""
    plan = ShardingPlan(make_mesh({"data": 2}, jax.devices()[:2]))
    batch = with_scored(make_rows(rows=8), 64, 2)
    placed = place_batch(batch, plan.batch())

    @jax.jit
    def picked(rows):
        chosen = make_selection(rows.scored, 4 * 32)
        found = pick(join_rows(rows.tokens.astype(jnp.float32), 2), chosen)
        return put_back(found, chosen).reshape(rows.tokens.shape)

    # The places, which are integers, do travel.
    text = picked.lower(placed).compile().as_text()
    assert not re.findall("= f32.* (all-|collective-permute)", text)
    np.testing.assert_array_equal(picked(placed), batch.tokens * (batch.loss_mask > 0))
