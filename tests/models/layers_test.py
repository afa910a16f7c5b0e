"""Modules against numpy."""

import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.aot.gpus import describe_gpus
from jaxtrain.models import LoraShape, ModelConfig, layers
from jaxtrain.models.layers import Embedding, Linear, Mlp, Options, RMSNorm, fan_out


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


def test_on_gpus_gradients_of_one_input_are_added_with_each_product_first() -> None:
    """As cuBLAS can add them: else every other addition is a pass of its own."""
    x, kernels = random(2, 3, 4), [random(4, n) for n in (4, 6, 8)]

    def run(x: Any) -> Any:
        copies = fan_out(len(kernels), x)
        return [copy @ kernel for copy, kernel in zip(copies, kernels, strict=True)]

    def pull(gradients: Any) -> Any:
        return jax.vjp(run, x)[1](gradients)[0]

    gradients = [random(2, 3, kernel.shape[1]) for kernel in kernels]
    expected = sum(g @ w.T for g, w in zip(gradients, kernels, strict=True))
    np.testing.assert_allclose(pull(gradients), expected, rtol=1e-5)
    lines = jax.jit(pull).lower(gradients).as_text().splitlines()
    products = {line.split()[0] for line in lines if "dot_general" in line}
    added = [line.split()[3].rstrip(",") for line in lines if "stablehlo.add" in line]
    assert len(added) == 2 and set(added) <= products


@pytest.mark.on_request
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="needs jax's CUDA plugin",
)
def test_xla_for_gpus_leaves_no_addition_of_products_to_a_kernel_of_its_own() -> None:
    """Of q, k and v with adapters, compiled for a GPU that is not here."""
    mesh = Mesh(np.array(describe_gpus("h100:1")), ("data",))

    def describe(*shape: int) -> jax.ShapeDtypeStruct:
        whole = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole)

    def pull(copy: Any, x: Any, kernels: Any, gradients: Any) -> Any:
        def run(x: Any) -> Any:
            pairs = zip(copy(len(kernels), x), kernels, strict=True)
            return [own @ kernel for own, kernel in pairs]

        return jax.vjp(run, x)[1](gradients)[0]

    widths = (2048, 16, 256, 16, 256, 16)
    x, kernels = describe(8, 2048, 2048), [describe(2048, n) for n in widths]
    gradients = [describe(8, 2048, n) for n in widths]

    def additions(copy: Any) -> int:
        step = jax.jit(
            lambda *given: pull(copy, *given),
            compiler_options={"xla_gpu_enable_triton_gemm": False},
        )
        text = step.trace(x, kernels, gradients).lower().compile().as_text()
        return len(re.findall(r" fusion\(", text[text.index("\nENTRY") :]))

    assert additions(fan_out) == 0
    assert additions(lambda count, x: (x,) * count) == 2  # else fan_out is idle


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_on_gpus_adapters_read_copies_and_gradients_stay(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = frozenset({"mlp.gate_proj", "mlp.down_proj"})
    shape = LoraShape(r=2, scaling=2.0, dropout=dropout, targets=targets)
    mlp = Mlp(make_options(lora=shape), nnx.Rngs(0), inner=12)
    mlp.gate_proj.lora_b[...] = random(2, 12)
    static, weights = nnx.split(mlp)
    x, key = random(2, 3, 8), jax.random.key(0)

    def pull() -> Any:
        def loss(weights: Any, x: Any) -> Any:
            return (nnx.merge(static, weights)(x, key) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(weights, x)

    expected, taken = pull(), []
    monkeypatch.setattr(layers, "_platform", lambda _: "gpu")
    monkeypatch.setattr(
        layers, "fan_out", lambda n, x: taken.append(n) or fan_out(n, x)
    )
    found = pull()
    assert taken == [3]  # the kernels of gate and up, and the gate's adapter
    for result, right in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        largest = np.abs(right).max()
        np.testing.assert_allclose(result, right, rtol=1e-5, atol=1e-6 * largest)
