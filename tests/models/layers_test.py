"""Modules against numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtrain.models import LoraShape, ModelConfig
from jaxtrain.models.layers import Embedding, Linear, Mlp, Options, RMSNorm


def make_options(model_type: str = "llama", **options: Any) -> Options:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = ModelConfig.from_hf(
        {"model_type": model_type, "vocab_size": 16, "head_dim": 4, **sizes}
    )
    dtypes = {"compute_dtype": "float32", "param_dtype": "float32"}
    return Options(config, constrain=lambda x, axes: x, **{**dtypes, **options})


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("model_type", "offset"), [("llama", 0.0), ("gemma2", 1.0)])
def test_norm_divides_by_the_root_mean_square(model_type: str, offset: float) -> None:
    norm = RMSNorm(8, None, make_options(model_type))
    norm.scale[...] = random(8)
    x = random(2, 3, 8)
    root = np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm(x), x / root * (random(8) + offset), rtol=1e-5)


def test_norm_of_bfloat16_is_taken_in_float32() -> None:
    norm = RMSNorm(256, None, make_options())
    x = jnp.asarray(300 + random(1, 1, 256), jnp.bfloat16)
    exact = np.asarray(x, np.float32)
    expected = exact / np.sqrt((exact * exact).mean())
    assert norm(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(x)[0, 0], expected[0, 0].astype(jnp.bfloat16))


def test_gemma_scales_embeddings_by_a_root_rounded_to_the_compute_type() -> None:
    for dtype in ("float32", "bfloat16"):
        embed = Embedding(make_options("gemma2", compute_dtype=dtype), nnx.Rngs(0))
        table = embed.embedding[...]
        expected = table[3].astype(dtype) * jnp.asarray(np.sqrt(8), dtype)
        np.testing.assert_array_equal(embed(jnp.asarray([[3]]))[0, 0], expected)


def test_the_gate_is_activated_and_the_other_half_is_not() -> None:
    fused = Mlp(make_options("phi3"), nnx.Rngs(0))
    x = random(1, 2, 8)
    gate, up = np.split(x @ np.asarray(fused.gate_up_proj.kernel[...]), 2, axis=-1)
    expected = (gate / (1 + np.exp(-gate)) * up) @ fused.down_proj.kernel[...]
    np.testing.assert_allclose(fused(x, None), expected, atol=1e-6)


def test_adapter_dropout_drops_its_share_of_inputs_and_scales_the_rest() -> None:
    lora = LoraShape(r=2, scaling=1.0, dropout=0.25, targets=frozenset({"up"}))
    options = make_options(lora=lora)
    linear = Linear("up", (4000, 2), ("embed", "mlp"), options, nnx.Rngs(0))
    linear.kernel[...] = jnp.zeros((4000, 2))
    # The first output counts the inputs that the adapter sees, times 4 / 3.
    linear.lora_a[...] = jnp.ones((4000, 2)).at[:, 1].set(0)
    linear.lora_b[...] = jnp.eye(2)
    x = jnp.ones((1, 1, 4000))
    assert linear(x)[0, 0, 0] == 4000
    seen = linear(x, jax.random.key(0))[0, 0, 0] * 0.75
    assert 2900 < seen < 3100
    other = Linear("down", (4000, 2), ("embed", "mlp"), options, nnx.Rngs(0))
    assert not hasattr(other, "lora_a")
