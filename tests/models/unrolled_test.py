"""When each layer is compiled on its own, and what XLA is told then."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxtrain import sharding
from jaxtrain.aot.compile import _abstract_batch, describe_step
from jaxtrain.config import resolve
from jaxtrain.kernels import xla_options
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.models import Decoder, fp8
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.load import load_abstract_model, make_decoder, make_plan
from jaxtrain.models.quantization import Quantization
from jaxtrain.models.transformer import for_reference
from tests.equations import equations
from tests.runs import tiny_config


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


def unrolled_decoder(layers: int, **options) -> Decoder:
    """Layers whose matrices differ in shape from what runs through them."""
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 192}
    config = dataclasses.replace(config_of(layers), **sizes)
    return Decoder(
        config, compute_dtype="bfloat16", scan_layers=False, attention="xla", **options
    )


def over_two_devices() -> Layout:
    """The weights of each layer are split over two devices."""
    return Layout(Mesh(np.array(jax.devices()[:2]), ("f",)), weights=("f",))


def plan_of(layers: int = 2, fsdp: int = 1, devices: int = 1, **sections):
    training = {"training_type": "sft"} | sections.pop("training", {})
    values = {"mesh": {"data": devices // fsdp, "fsdp": fsdp}, "training": training}
    run = resolve(values | sections, device_count=devices)
    return run, make_plan(run, config_of(layers), jax.devices()[:devices])


@pytest.fixture
def gpu(monkeypatch):
    jax.devices()  # so many as XLA_FLAGS say
    monkeypatch.setattr(sharding.ShardingPlan, "platform", "gpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)


def test_elsewhere_one_layer_is_compiled_for_all():
    run, plan = plan_of()
    assert not plan.unrolled and plan.compiler_options is None
    assert make_decoder(run, config_of(), plan).scan_layers


@pytest.mark.usefixtures("gpu")
def test_on_gpus_each_layer_is_compiled_on_its_own_by_cublas():
    run, plan = plan_of(devices=2, fsdp=2)
    assert plan.unrolled and plan_of(devices=2)[1].unrolled
    wanted = {
        "xla_gpu_enable_triton_gemm": False,
        "xla_disable_hlo_passes": "slice-sinker,convert-mover",
    }
    assert plan.compiler_options == plan_of()[1].compiler_options == wanted
    # XLA reads the options of every platform, so it would refuse a wrong one here too.
    assert plan.jit(lambda x: x + 1)(1) == 2
    assert not make_decoder(run, config_of(), plan).scan_layers


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    "given",
    [
        {"layers": 80},
        {"training": {"remat_policy": "offload", "gradient_checkpointing": True}},
        {"model": {"scan_layers": True}},
    ],
    ids=["long", "offloaded", "as asked for"],
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
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_weights_are_unrolled_too(kind):
    training = {"training_type": "lora", "lora": {"quantization": kind}}
    assert plan_of(training=training)[1].unrolled


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("given", "joins"),
    [
        ({}, True),
        ({"training": {"reduce_dtype": "float32"}}, False),
        ({"training": {"training_type": "lora"}}, False),
        ({"devices": 2}, False),
        ({"devices": 2, "fsdp": 2}, False),
    ],
)
def test_wide_kernels_act_side_by_side_on_one_gpu(given, joins):
    run, plan = plan_of(**given)
    wide = dataclasses.replace(config_of(), hidden_size=2048)
    assert make_decoder(run, wide, plan).joins_products is joins
    assert not make_decoder(run, config_of(), plan).joins_products


@pytest.mark.parametrize(
    ("options", "joins"),
    [({}, True), ({"scan_layers": True}, False), ({"remat": "full"}, False)],
)
def test_kernels_act_side_by_side_where_that_spares_reading(options, joins):
    """Gate's and up's, of 192 columns each; q's, k's and v's, of 64 each."""
    decoder = unrolled_decoder(1, joins_products=True)
    decoder = dataclasses.replace(decoder, **options)
    params = jax.eval_shape(decoder.init, jax.random.key(0))

    def widths(length):
        rows = np.zeros((1, length), np.int32)
        program = jax.make_jaxpr(decoder.hidden_states)(params, rows, rows, rows + 1)
        return [
            equation.outvars[0].aval.shape[-1]
            for equation in equations(program)
            if equation.primitive.name == "dot_general"
        ]

    assert (2 * 192 in widths(64) and 3 * 64 in widths(64)) is joins
    assert 2 * 192 not in widths(40)  # fewer rows than are in a column


def test_a_key_unrolls_anywhere():
    _, plan = plan_of(model={"scan_layers": False})
    assert plan.unrolled and plan.compiler_options is None  # no GPU


@pytest.mark.usefixtures("gpu")
def test_flags_that_name_the_option_win(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert [*plan_of()[1].compiler_options] == ["xla_disable_hlo_passes"]
    monkeypatch.setenv("XLA_FLAGS", "--xla_disable_hlo_passes=dot-merger")
    assert [*plan_of()[1].compiler_options] == ["xla_gpu_enable_triton_gemm"]


@pytest.mark.usefixtures("gpu")
def test_an_option_that_xla_no_longer_has_is_left_out_and_said(monkeypatch, caplog):
    monkeypatch.setitem(xla_options._UNROLLED, "xla_gpu_enable_what_was", True)
    _, plan = plan_of()
    assert plan.jit(lambda x: x + 1)(1) == 2
    assert "xla_gpu_enable_what_was" not in plan.compiler_options
    (line,) = caplog.messages  # once
    assert "has no xla_gpu_enable_what_was" in line


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("scan_layers", [False, True])
def test_full_determinism_has_no_kernel_chosen_by_its_time(scan_layers):
    given = {"model": {"scan_layers": scan_layers}}
    _, plan = plan_of(**given, training={"full_determinism": True})
    options = plan.compiler_options
    assert options["xla_gpu_deterministic_ops"] is True
    others = {n: v for n, v in options.items() if n != "xla_gpu_deterministic_ops"}
    assert others == (plan_of(**given)[1].compiler_options or {})
    assert plan.jit(lambda x: x + 1)(1) == 2


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("kind", "mesh", "hides"),
    [
        ("lora", {"data": 2}, False),
        ("lora", {"context": 2}, False),
        ("lora", {"fsdp": 2}, True),
        ("sft", {"data": 2}, True),
        ("sft", {"context": 2}, True),
    ],
)
def test_sums_of_adapters_alone_are_not_hidden(kind, mesh, hides):
    """It would cost memory: see benchmarks/RESULTS.md."""
    name = "xla_gpu_enable_latency_hiding_scheduler"
    training = {"training_type": kind}
    _, plan = plan_of(devices=2, mesh=mesh, training=training)
    assert plan.compiler_options.get(name, True) is hides
    assert plan.jit(lambda x: x + 1)(1) == 2
    assert name not in plan_of(training=training)[1].compiler_options


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("kind", "mesh", "large"),
    [
        ("sft", {"data": 2}, True),
        ("dpo", {"data": 2}, True),
        ("sft", {"context": 2}, True),
        ("sft", {"fsdp": 2}, False),
        ("lora", {"data": 2}, False),
    ],
)
def test_gradients_of_whole_weights_travel_in_large_sums(kind, mesh, large):
    """And are not copied into one array for it."""
    _, plan = plan_of(devices=2, mesh=mesh, training={"training_type": kind})
    options = plan.compiler_options
    assert ("xla_gpu_all_reduce_combine_threshold_bytes" in options) is large
    left_out = options["xla_disable_hlo_passes"].split(",")
    assert ("all-reduce-contiguous" in left_out) is large
    assert {"slice-sinker", "convert-mover"} <= {*left_out}
    assert plan.jit(lambda x: x + 1)(1) == 2


@pytest.mark.parametrize("kind", ["whole", "codes", "split over devices"])
def test_what_is_computed_again_does_not_copy_weights(kind):
    """What keeps it from being merged is a barrier; weights behind it are copied.

    Those that a layer makes of codes, or brings together, are kept apart, or those of
    all layers would stay.
    """
    decoder = unrolled_decoder(
        layers=3,
        param_dtype="bfloat16",
        remat="full",
        quantization=Quantization("int8") if kind == "codes" else None,
        layout=over_two_devices() if kind.startswith("split") else None,
    )
    params = jax.eval_shape(decoder.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)

    def loss(embedding, params, tokens):
        params = {**params, "embed_tokens": {"embedding": embedding}}
        return decoder.hidden_states(params, tokens, tokens, tokens).sum()

    own = params["embed_tokens"]["embedding"]
    text = jax.jit(jax.grad(loss)).lower(own, params, tokens).as_text()
    barriers = [line for line in text.splitlines() if "optimization_barrier" in line]
    barriers = [x for x in barriers if not x.endswith("tensor<i32>")]  # layers' numbers
    assert barriers
    assert all("tensor<1x16x64x" in line for line in barriers)  # its input
    assert all(("tensor<64x192x" in x) == (kind != "whole") for x in barriers)


def lower_gradient(layers: int, **options):
    """The gradient of every weight of unrolled layers, as it is given to XLA."""
    decoder = unrolled_decoder(layers, **options)
    params = jax.eval_shape(decoder.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)

    def loss(params, tokens):
        return decoder.hidden_states(params, tokens, tokens, tokens).sum()

    return jax.jit(jax.grad(loss)).lower(params, tokens)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_are_calls_of_one_function(remat):
    few, many = (lower_gradient(n, remat=remat).as_text() for n in (3, 6))
    assert few.count("dot_general") == many.count("dot_general") > 0


def test_no_kernel_reads_a_layer_at_a_place_of_its_own():
    """XLA compiles one that reads `weights[7]` beside the one for `weights[6]`."""
    text = lower_gradient(4, remat="full").compile().as_text()
    layer = r"f32\[1,(?:64|64,64|64,192|192,64)\]"  # in float32, as the stack is
    assert re.search(rf"{layer}\S* dynamic-slice\(", text)
    assert not re.search(rf"{layer}\S* slice\(", text)


@pytest.mark.parametrize("split", [False, True])
def test_a_reference_is_scored_in_a_loop_where_that_gathers_no_weights(split):
    """It costs a step no time there: nothing goes backward through it."""
    layout = over_two_devices() if split else None
    decoder = Decoder(config_of(), scan_layers=False, layout=layout)
    assert for_reference(decoder).scan_layers == (not split)


def test_the_step_of_a_preference_loss_has_that_loop():
    config = tiny_config("dpo", bf16=True, gradient_checkpointing=True)
    config.model.scan_layers = False
    run = resolve(config, device_count=1)
    model = load_abstract_model(run, jax.devices()[:1]).for_training(packed=False)
    step, state = describe_step(run, model)
    traced = step.trace(state, _abstract_batch(model, run))
    scans = [
        equation.params["unroll"]
        for equation in equations(traced.jaxpr)
        if equation.primitive.name == "scan"
        and "layers" in str(equation.source_info.name_stack)
    ]
    # One loop, and the policy's layers forward and backward.
    layers = model.config.num_hidden_layers
    assert model.plan.unrolled and sorted(scans) == [1, layers, layers]
