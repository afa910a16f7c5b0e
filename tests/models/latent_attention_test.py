"""DeepSeek's attention: its cache, its scale, its operations."""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.aot.jaxpr_cost import count_flops
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.models.hf_config import load_config
from jaxtrain.models.parts import stacks

SHAPES = pathlib.Path(__file__).parents[2] / "configs" / "shapes"


def test_keys_and_values_of_two_widths_are_cached_and_read(make_model) -> None:
    """Token by token, behind padding, the logits are those of whole rows."""
    model, params = make_model("deepseek_v3")
    cache = model.init_cache(2, 9)
    shapes = {name: x.shape[1:] for name, x in cache["layers"]["0"].items()}
    assert shapes == {"key": (2, 9, 4, 24), "value": (2, 9, 4, 12)}
    rng = np.random.default_rng(0)
    tokens, segments = rng.integers(3, 128, (2, 9)), np.ones((2, 9), int)
    segments[1, :3] = 0  # the second row begins with padding
    positions = np.maximum(np.cumsum(segments, axis=1) - 1, 0)
    rows = [jnp.asarray(x, jnp.int32) for x in (tokens, positions, segments)]
    expected = jax.jit(model.logits)(params, *rows)
    decode = jax.jit(model.decode)
    start = [x[:, :6] for x in rows]
    found, cache = decode(params, *start[:2], cache, start[2])
    for at in range(6, 10):
        np.testing.assert_allclose(found, expected[:, at - 1], rtol=0, atol=2e-5)
        if at < 9:
            step = [x[:, at : at + 1] for x in rows]
            found, cache = decode(params, *step[:2], cache, step[2])


def test_scores_of_a_stretched_context_are_scaled_as_published() -> None:
    """By 1 + 0.1 mscale_all_dim log(factor), squared, as DeepSeek's own code does."""
    config = load_config(SHAPES / "deepseek-v2-lite")
    assert (config.head_dim, config.value_head_dim) == (192, 128)
    assert config.attention_scale == pytest.approx(
        (1 + 0.1 * 0.707 * math.log(40)) ** 2 / math.sqrt(192)
    )
    assert [len(stack.layers) for stack in stacks(config)] == [1, 26]
    plain = ModelConfig.from_hf({"model_type": "deepseek_v3"})
    assert plain.attention_scale == pytest.approx(192**-0.5)


def test_operations_are_those_that_are_traced() -> None:
    config = ModelConfig.from_hf(
        {
            "model_type": "deepseek_v3",
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 12,
            "kv_lora_rank": 20,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 2,
        }
    )
    attention = 32 * 12 + 12 * 2 * 24 + 32 * (20 + 8) + 20 * 2 * (16 + 12) + 2 * 12 * 32
    matrices = 2 * (attention + 3 * 32 * 48) + 64 * 32
    scores = 2 * 2 * 2 * (24 + 12) * 10
    assert config.flops_per_token(10) == 6 * matrices + 3 * scores
    decoder = Decoder(config, compute_dtype="float32", attention="reference")
    tokens = jnp.zeros((1, 10), jnp.int32)
    params = decoder.abstract_params()
    traced = jax.make_jaxpr(decoder.logits)(params, tokens, tokens, tokens + 1)
    assert count_flops(traced) == 10 * (2 * matrices + scores)
