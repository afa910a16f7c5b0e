"""When each layer is compiled on its own, and what XLA is told then."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.config import resolve
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.models import Decoder, fp8
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.load import make_decoder, make_plan
from jaxtrain.models.quantization import Quantization


def config_of(layers: int = 2) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 16,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        }
    )


def plan_of(layers: int = 2, fsdp: int = 1, devices: int = 1, **sections):
    training = {"training_type": "sft"} | sections.pop("training", {})
    values = {"mesh": {"data": devices // fsdp, "fsdp": fsdp}, "training": training}
    run = resolve(values | sections, device_count=devices)
    return run, make_plan(run, config_of(layers), jax.devices()[:devices])


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(sharding.ShardingPlan, "platform", "gpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_elsewhere_one_layer_is_compiled_for_all():
    run, plan = plan_of()
    assert not plan.unrolled and plan.compiler_options is None
    assert make_decoder(run, config_of(), plan).scan_layers


@pytest.mark.usefixtures("gpu")
def test_on_gpus_each_layer_is_compiled_on_its_own_by_cublas():
    run, plan = plan_of(devices=2)
    assert plan.unrolled and plan_of(devices=2, fsdp=2)[1].unrolled
    assert plan.compiler_options == {
        "xla_gpu_enable_triton_gemm": False,
        "xla_disable_hlo_passes": "slice-sinker,convert-mover",
    }
    # XLA reads the options of every platform, so it would refuse a wrong one here too.
    assert plan.jit(lambda x: x + 1)(1) == 2
    assert not make_decoder(run, config_of(), plan).scan_layers


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "given",
    [
        {"layers": 80},
        {"training": {"remat_policy": "offload", "gradient_checkpointing": True}},
        {"training": {"training_type": "lora", "lora": {"quantization": "int8"}}},
        {"model": {"scan_layers": True}},
    ],
    ids=["long", "offloaded", "quantized", "as asked for"],
)
def test_what_was_measured_in_a_scan_stays_there(given):
    _, plan = plan_of(**given)
    assert not plan.unrolled and plan.compiler_options is None


@pytest.mark.usefixtures("gpu")
def test_fp8_is_unrolled_on_one_device_alone(monkeypatch):
    monkeypatch.setattr(fp8, "check", lambda *_: None)
    assert plan_of(training={"fp8": True})[1].unrolled
    assert not plan_of(devices=2, fsdp=2, training={"fp8": True})[1].unrolled


@pytest.mark.usefixtures("gpu")
def test_weights_in_nf4_are_unrolled_too():
    training = {"training_type": "lora", "lora": {"quantization": "nf4"}}
    assert plan_of(training=training)[1].unrolled


def test_a_key_unrolls_anywhere():
    _, plan = plan_of(model={"scan_layers": False})
    assert plan.unrolled and plan.compiler_options is None  # no GPU


@pytest.mark.usefixtures("gpu")
def test_flags_that_name_the_option_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert [*plan_of()[1].compiler_options] == ["xla_disable_hlo_passes"]
    monkeypatch.setenv("XLA_FLAGS", "--xla_disable_hlo_passes=dot-merger")
    assert [*plan_of()[1].compiler_options] == ["xla_gpu_enable_triton_gemm"]


@pytest.mark.parametrize("kind", ["whole", "codes", "split over devices"])
def test_what_is_computed_again_does_not_copy_weights(kind):
    """What keeps it from being merged is a barrier; weights behind it are copied.

    Those that a layer makes of codes, or brings together, are kept apart, or those of
    all layers would stay.
    """
    mesh = Mesh(np.array(jax.devices()[:2]), ("f",))
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 192}
    config = dataclasses.replace(config_of(layers=3), **sizes)
    decoder = Decoder(
        config,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
        remat="full",
        scan_layers=False,
        attention="xla",
        quantization=Quantization("int8") if kind == "codes" else None,
        layout=Layout(mesh, weights=("f",)) if kind.startswith("split") else None,
    )
    params = jax.eval_shape(decoder.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)

    def loss(embedding, params, tokens):
        params = {**params, "embed_tokens": {"embedding": embedding}}
        return decoder.hidden_states(params, tokens, tokens, tokens).sum()

    own = params["embed_tokens"]["embedding"]
    text = jax.jit(jax.grad(loss)).lower(own, params, tokens).as_text()
    barriers = [line for line in text.splitlines() if "optimization_barrier" in line]
    assert barriers
    assert all("tensor<1x16x64x" in line for line in barriers)  # its input
    assert all(("tensor<64x192x" in x) == (kind != "whole") for x in barriers)
