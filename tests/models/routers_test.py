"""Choosing experts against plain loops in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.layers import Options
from jaxtrain.models.mixtures import Routing
from jaxtrain.models.routers import Float32Router, best_of_groups, choose

E, K = 12, 3


class Bias:
    """A router's bias for choosing."""

    def __init__(self, bias: np.ndarray) -> None:
        self.e_score_correction_bias = jnp.asarray(bias, jnp.float32)


def make_config(**options) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "model_type": "glm4_moe",
            "vocab_size": 8,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "n_routed_experts": E,
            "num_experts_per_tok": K,
            **options,
        }
    )


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.sampled_from([(1, 1), (3, 1), (3, 2), (6, 2), (4, 4)]),
    counted=st.sampled_from([1, 2]),
)
def test_the_best_experts_of_the_best_groups_are_chosen(seed, sizes, counted) -> None:
    groups, kept = sizes
    scores = np.random.default_rng(seed).normal(size=(2, 3, E)).astype(np.float32)
    found = best_of_groups(
        jnp.asarray(scores), K, Routing(groups, kept), counted=counted
    )
    for at in np.ndindex(2, 3):
        by_group = scores[at].reshape(groups, -1)
        worth = [sorted(group)[-counted:] for group in by_group]
        best = sorted(range(groups), key=lambda g: -sum(worth[g]))[:kept]
        allowed = [e for e in range(E) if e // (E // groups) in best]
        expected = sorted(allowed, key=lambda e: -scores[at][e])[:K]
        assert found[at].tolist() == expected


@pytest.mark.parametrize("normalize", [True, False])
def test_a_bias_decides_who_is_chosen_and_nothing_else(normalize: bool) -> None:
    rng = np.random.default_rng(0)
    logits, bias = rng.normal(size=(1, 5, E)), rng.normal(size=E)
    config = make_config(norm_topk_prob=normalize, routed_scaling_factor=2.5)
    shares, weights, experts = choose(config, Bias(bias), jnp.asarray(logits, "f4"))
    scores = 1 / (1 + np.exp(-logits))
    order = np.argsort(-(scores + bias))[..., :K]
    np.testing.assert_array_equal(experts, order)
    assert (order != np.argsort(-scores)[..., :K]).any()
    expected = np.take_along_axis(scores, order, -1)
    if normalize:
        expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, 2.5 * expected, rtol=1e-5)
    np.testing.assert_allclose(
        shares, scores / scores.sum(-1, keepdims=True), rtol=1e-5
    )

    def total(logits, bias):
        weights = choose(config, Bias(bias), logits)[1]
        return (weights * jnp.arange(K)).sum()

    of_logits, of_bias = jax.grad(total, (0, 1))(jnp.asarray(logits, "f4"), bias)
    assert np.abs(of_logits).max() > 0.01
    np.testing.assert_array_equal(of_bias, 0)


def test_a_router_in_float32_is_so_whatever_the_others_are(tmp_path) -> None:
    """Rounded to bfloat16, a bias would choose others; in files it is float32 too."""
    from safetensors.numpy import load_file

    from jaxtrain.models.hf import load_params, save_pretrained

    decoder = Decoder(make_config(), param_dtype="bfloat16")
    params = decoder.init(jax.random.key(0))
    gate = params["layers"]["1"]["mlp"]["gate"]
    fine = jnp.float32(1 + 2**-12) + jnp.zeros_like(gate["e_score_correction_bias"])
    gate["e_score_correction_bias"] = fine
    save_pretrained(tmp_path, decoder.config, params, dtype="bfloat16")
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.gate"
    np.testing.assert_array_equal(stored[f"{name}.e_score_correction_bias"], fine[0])
    assert stored[f"{name}.weight"].dtype == np.float32
    loaded = load_params(tmp_path, decoder, dtype="bfloat16")
    types = jax.tree.map(lambda leaf: leaf.dtype, params)
    assert jax.tree.map(lambda leaf: leaf.dtype, loaded) == types
    # No stack of routers' weights is rounded on its way to the layers either.
    rows = np.arange(4)[None], np.arange(4)[None], np.ones((1, 4), int)
    half = dataclasses.replace(decoder, compute_dtype="bfloat16").logits
    program = str(jax.make_jaxpr(half)(loaded, *rows))
    assert "f32[1,16,12]" in program and "bf16[1,16,12]" not in program
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 16)), jnp.bfloat16)
    router = Float32Router(Options(decoder.config), nnx.Rngs(params=jax.random.key(1)))
    exact = np.float64(x) @ np.float64(router.router_weight[...])
    np.testing.assert_allclose(router(x), exact, rtol=0, atol=1e-6)
