"""Rotary embeddings: frequencies against transformers, rotations against algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.models.rope import (
    RopeConfig,
    inverse_frequencies,
    rotary_tables,
    rotate,
)

YARN = {"factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = RopeConfig(
    kind="longrope",
    factor=4.0,
    original_max_position_embeddings=8,
    short_factor=(1.0, 1.0),
    long_factor=(2.0, 4.0),
)


def test_default_frequencies_are_powers_of_the_base() -> None:
    frequencies, scale = inverse_frequencies(RopeConfig(theta=10_000.0), 8)
    np.testing.assert_allclose(frequencies, [[1, 0.1, 0.01, 0.001]], rtol=1e-6)
    assert scale == 1


def test_llama3_keeps_fast_frequencies_and_divides_slow_ones() -> None:
    rope = RopeConfig(
        kind="llama3",
        theta=1e8,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    (frequencies,), _ = inverse_frequencies(rope, 8)
    # 8192 f / 2 pi turns: 1303, 13, 0.13 and 0.0013.
    np.testing.assert_allclose(frequencies, [1, 1e-2, 1e-4 / 8, 1e-6 / 8], rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(),
        RopeConfig(kind="linear", factor=3.0),
        RopeConfig(
            kind="llama3",
            theta=500.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=256,
        ),
        RopeConfig(kind="yarn", **YARN),
        RopeConfig(kind="yarn", attention_factor=0.7, truncate=False, **YARN),
        RopeConfig(kind="yarn", beta_fast=16, beta_slow=2, **YARN),
        RopeConfig(kind="yarn", mscale=0.7, mscale_all_dim=1.3, **YARN),
    ],
    ids=lambda rope: rope.kind,
)
def test_frequencies_equal_those_of_transformers(rope: RopeConfig) -> None:
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters=rope.to_hf(),
    )
    make = ROPE_INIT_FUNCTIONS.get(
        rope.kind, LlamaRotaryEmbedding.compute_default_rope_parameters
    )
    expected, expected_scale = make(config)
    (frequencies,), scale = inverse_frequencies(rope, 64)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=2e-6)
    assert scale == pytest.approx(expected_scale)


@pytest.mark.torch
@pytest.mark.parametrize("length", [5, 8, 9, 30])
def test_dynamic_tables_equal_those_of_transformers(length: int) -> None:
    """Each document by itself, shorter and longer than the trained length of 8."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = RopeConfig(kind="dynamic", factor=3.0, original_max_position_embeddings=8)
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=8,
        rope_parameters=rope.to_hf(),
    )
    place = torch.arange(length)[None]
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1, length, 64), place)
    # A shorter document in front of it in the row changes nothing.
    positions = jnp.asarray([[*range(3), *range(length)]])
    segment_ids = jnp.asarray([[1] * 3 + [2] * length])
    tables = rotary_tables(rope, 16, positions, segment_ids)
    for ours, theirs in zip(tables, expected, strict=True):
        np.testing.assert_allclose(ours[0, 3:], theirs[0, :, :8].numpy(), atol=1e-6)


@given(
    first=st.integers(0, 1000), second=st.integers(0, 1000), shift=st.integers(0, 1000)
)
def test_scores_depend_on_the_distance_of_two_tokens_only(
    first: int, second: int, shift: int
) -> None:
    rng = np.random.default_rng(0)
    q, k = jnp.asarray(rng.standard_normal((2, 1, 1, 1, 16)), jnp.float32)
    ones = jnp.ones((1, 1), jnp.int32)

    def score(q_position: int, k_position: int) -> float:
        turned = [
            rotate(x, *rotary_tables(RopeConfig(), 16, position * ones, ones))
            for x, position in ((q, q_position), (k, k_position))
        ]
        return float((turned[0] * turned[1]).sum())

    near, far = score(first, second), score(first + shift, second + shift)
    assert near == pytest.approx(far, abs=3e-3)


def test_a_pair_turns_by_its_angle_and_the_rest_passes() -> None:
    # One pair at frequency 1, position 1; features 2 and 3 do not turn.
    rope = RopeConfig(partial_rotary_factor=0.5)
    ones = jnp.ones((1, 1), jnp.int32)
    x = jnp.asarray([3.0, 4.0, 5.0, 6.0])[None, None, None]
    turned = rotate(x, *rotary_tables(rope, 4, ones, ones))[0, 0, 0]
    expected = [
        3 * np.cos(1) - 4 * np.sin(1),
        4 * np.cos(1) + 3 * np.sin(1),
        5,
        6,
    ]
    np.testing.assert_allclose(turned, expected, rtol=1e-6)


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_gradient_turns_back(pairs: str, share: float) -> None:
    """As jax derives it, and by one pass over it: sums of padded halves take two."""
    rng = np.random.default_rng(0)
    x, gradient = jnp.asarray(rng.standard_normal((2, 2, 5, 3, 16)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 1000, (2, 5)))
    rope = RopeConfig(partial_rotary_factor=share)
    cos, sin = rotary_tables(rope, 16, positions, jnp.ones_like(positions))
    turned, turn_back = jax.vjp(lambda x: rotate(x, cos, sin, pairs), x)
    (ours,) = turn_back(gradient)

    def in_equations(x: jax.Array) -> jax.Array:
        half = cos.shape[-1]
        places = slice(half), slice(half, 2 * half)
        if pairs == "interleaved":
            places = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
        first, second = (x[..., place] for place in places)
        c, s = cos[:, :, None], sin[:, :, None]
        return jnp.concatenate(
            [first * c - second * s, second * c + first * s, x[..., 2 * half :]], -1
        )

    expected, derived = jax.vjp(in_equations, x)
    np.testing.assert_array_equal(turned, expected)
    # One rounding of a sum of two products, whichever order it is taken in.
    np.testing.assert_allclose(ours, derived(gradient)[0], rtol=1e-6, atol=1e-6)
    program = jax.make_jaxpr(turn_back)(gradient)
    assert " pad[" not in str(program)


def test_longrope_takes_each_documents_own_length() -> None:
    positions = jnp.asarray([[*range(9), *range(3)]])
    segment_ids = jnp.asarray([[1] * 9 + [2] * 3])
    cos, _ = rotary_tables(LONGROPE, 4, positions, segment_ids)
    scale = np.sqrt(1 + np.log(4) / np.log(8))
    long = np.cos(np.arange(9) * 0.01 / 4) * scale
    short = np.cos(np.arange(3) * 0.01) * scale
    np.testing.assert_allclose(cos[0, :9, 1], long, rtol=1e-6)
    np.testing.assert_allclose(cos[0, 9:, 1], short, rtol=1e-6)
