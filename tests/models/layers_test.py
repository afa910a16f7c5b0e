"""Modules against numpy."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtrain.models import LoraShape, ModelConfig
from jaxtrain.models.layers import (
    Embedding,
    Linear,
    Mlp,
    Options,
    RMSNorm,
    multiply_each,
    project_all,
)


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


def make_adapted(dropout: float, targets: list[str]) -> list[Linear]:
    """Projections of one input of 8 to 6, 4 and 2, their adapters of ranks 2, 3, 2."""
    lora = LoraShape(2, 0.5, dropout, frozenset(targets), own=(("k", 3, 0.25),))
    options, rngs = make_options(lora=lora), nnx.Rngs(0)
    draw = np.random.default_rng(1).standard_normal
    made = []
    for path, width in (("q", 6), ("k", 4), ("v", 2)):
        linear = Linear(path, (8, width), ("embed", "heads"), options, rngs)
        linear.kernel[...] = jnp.asarray(draw((8, width)), jnp.float32)
        if path in targets:
            linear.lora_b[...] = jnp.asarray(
                draw(linear.lora_b[...].shape), jnp.float32
            )
        made.append(linear)
    return made


@pytest.mark.parametrize("targets", ["", "q", "qv", "qkv"])
def test_adapters_of_one_input_give_what_each_gives_alone(targets: str) -> None:
    projections = make_adapted(0.0, list(targets))
    x = random(2, 3, 8)
    exact = x.astype(np.float64)
    for linear, y in zip(projections, project_all(projections, x, None), strict=True):
        expected = exact @ np.asarray(linear.kernel[...], np.float64)
        if hasattr(linear, "lora_a"):
            a, b = (
                np.asarray(w[...], np.float64) for w in (linear.lora_a, linear.lora_b)
            )
            expected += exact @ a @ b * linear.scaling
        # Sums of 8 products in float32.
        np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_is_narrow_beside_adapters_has_one_product_for_the_gradient(
    dropout: float,
) -> None:
    """An adapter's A, unless it has dropout of its own, and v's kernel of 2 columns."""
    projections = make_adapted(dropout, ["q", "k", "v"])
    key = jax.random.key(0)

    def total(x: jax.Array) -> jax.Array:
        return sum(y.sum() for y in project_all(projections, x, key))

    program = str(jax.make_jaxpr(jax.grad(total))(random(2, 3, 8)))
    of_x = [
        line for line in program.splitlines() if ":f32[2,3,8] = dot_general" in line
    ]
    # Of q's and k's kernels, and of all else; or of all three and of each adapter.
    assert len(of_x) == (6 if dropout else 3)


def test_dropout_of_adapters_of_one_input_is_each_ones_own() -> None:
    projections, key = make_adapted(0.5, ["q", "k", "v"]), jax.random.key(3)
    x = random(2, 3, 8)
    together = project_all(projections, x, key)
    for linear, y in zip(projections, together, strict=True):
        np.testing.assert_array_equal(y, linear(x, key))


def test_products_of_one_input_and_their_gradients() -> None:
    draw = np.random.default_rng(0).standard_normal
    x, matrices = draw((2, 5, 8)), [draw((8, width)) for width in (3, 1, 4)]
    gradients = [draw((2, 5, width)) for width in (3, 1, 4)]
    single = jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), (x, matrices))
    products, backward = jax.vjp(multiply_each, *single)
    of_x, of_matrices = backward(
        [jnp.asarray(gradient, jnp.float32) for gradient in gradients]
    )
    close = functools.partial(np.testing.assert_allclose, atol=1e-5)  # float32's sums
    parts = zip(products, matrices, gradients, of_matrices, strict=True)
    for product, matrix, gradient, of_matrix in parts:
        close(product, x @ matrix)
        close(of_matrix, np.einsum("bti,bto->io", x, gradient))
    pairs = zip(gradients, matrices, strict=True)
    close(of_x, sum(gradient @ matrix.T for gradient, matrix in pairs))
