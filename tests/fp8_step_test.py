"""training.fp8: what it refuses, how near its gradients are, and a run of each kind."""

import dataclasses
import importlib.util
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from runs import tiny_config, train

from jaxtrain import aot, sharding
from jaxtrain.aot.compile import _abstract_batch, describe_step
from jaxtrain.aot.jaxpr_cost import _inner
from jaxtrain.aot.report import CHIPS, Report
from jaxtrain.config import resolve
from jaxtrain.kernels import fp8 as kernels_fp8
from jaxtrain.kernels import xla_options
from jaxtrain.kernels.fp8 import Weight
from jaxtrain.models import fp8
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.load import load_abstract_model, make_plan
from jaxtrain.models.transformer import Decoder
from jaxtrain.optimizers.multipliers import without_frozen
from jaxtrain.run import fp8_step
from jaxtrain.run.fp8_step import CheckedStep, Expected, check_products
from jaxtrain.types import Batch

SIZES = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


SHAPES = ((256, 512), (512, 1024))  # of an input and a kernel
FROZEN = [("layers/0/.*/kernel", 0), (".*", 1)]  # rates by parameter


def config_of(**changed):
    return ModelConfig.from_hf(SIZES | changed)


def device(kind, capability=None, platform="gpu"):
    return types.SimpleNamespace(
        platform=platform, device_kind=kind, compute_capability=capability
    )


# --- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "said"),
    [
        (device("NVIDIA A100-SXM4-40GB", "8.0"), r"A100-SXM4-40GB of compute .* 8\.0"),
        (device("Tesla T4", "7.5"), r"Tesla T4 of compute capability 7\.5"),
        (device("AMD Instinct MI300X", "gfx942"), "no compute capability"),
        (device("TPU v6 lite", platform="tpu"), "TPU v6 lite, which does .* TPU7x"),
    ],
)
def test_a_device_that_cannot_is_refused_by_its_name(present, said):
    with pytest.raises(ValueError, match=rf"training\.fp8 = True: .*{said}"):
        fp8.check(config_of(), present)


@pytest.mark.parametrize("capability", ["8.9", "9.0", "10.0", "12.0"])
def test_devices_that_can_are_taken(capability):
    fp8.check(config_of(), device("NVIDIA", capability))
    fp8.check(config_of(), device("cpu", platform="cpu"))
    fp8.check(config_of(), device("TPU7x", platform="tpu"))


def test_models_with_other_products_and_odd_widths_are_refused():
    cpu = device("cpu", platform="cpu")
    with pytest.raises(ValueError, match="multiples of 16, and intermediate_size = 88"):
        fp8.check(config_of(intermediate_size=88), cpu)
    mixture = {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
        "norm_topk_prob": True,
    }
    with pytest.raises(ValueError, match="its experts are multiplied in groups"):
        fp8.check(config_of(**mixture), cpu)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"fp8": True, "bf16": False}, r"training\.fp8.*it needs bf16"),
        ({"fp8": True, "fp16": True}, r"training\.fp8.*it needs bf16"),
        (
            {"training_type": "lora", "lora": {"quantization": "nf4"}, "fp8": True},
            r"training\.lora\.quantization = 'nf4'.*change one of the two",
        ),
        (
            {"training_type": "lora", "lora": {"quantization": "fp8"}},
            r"training\.lora\.quantization = 'fp8'.*change one of the two",
        ),
        (
            {
                "training_type": "lora",
                "lora": {"init_lora_weights": "pissa"},
                "fp8": True,
            },
            r"init_lora_weights.*or unset training\.fp8",
        ),
        (
            {"training_type": "dpo", "dpo": {"sync_ref_model": True}, "fp8": True},
            r"training\.fp8.*small updates are lost",
        ),
        (
            {"deepspeed": {"zero_stage": 3, "offload_param": True}, "fp8": True},
            r"training\.fp8.*it is not implemented",
        ),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        resolve({"training": {"training_type": "sft"} | keys}, device_count=1)


def test_the_plan_says_to_the_compiler_what_keeps_products_in_eight_bits(monkeypatch):
    monkeypatch.setattr(sharding.ShardingPlan, "platform", "gpu")
    for training in ({"training_type": "sft"}, {"training_type": "lora"}):
        run = resolve({"training": training | {"fp8": True}}, device_count=1)
        plan = make_plan(run, config_of(), jax.devices()[:1])
        assert plan.unrolled and plan.compiler_options == xla_options.FP8
        # XLA reads the options of every platform: it would refuse a wrong name.
        assert plan.jit(lambda x: x + 1)(1) == 2
    assert run.lora.quantization == "fp8"


# --- the compiled program ----------------------------------------------------------


def line(which, target, module="mlp.up_proj"):
    call = "dot(%a, %b), lhs_contracting_dims={1}"
    if target:
        call = (
            f'custom-call(%a, %b), custom_call_target="{target}", backend_config={{}}'
        )
    name = f"jit(step)/jvp(layers)/mlp/fp8/{module}/{which}/dot_general"
    return f'  %x = bf16[16,16] {call}, metadata={{op_name="{name}" stack_frame_id=1}}'


IN_FP8, IN_BF16 = "__cublas$lt$matmul$f8", "__cublas$lt$matmul"
PASSES = ("forward", "input", "kernel")
OTHER = '  %y = f32[] custom-call(%a), custom_call_target="__cublas$gemm", metadata={}'


def text_of(**targets):
    passes = dict.fromkeys(PASSES, IN_FP8) | targets
    return "\n".join([OTHER, *(line(which, to) for which, to in passes.items())] * 2)


def test_a_program_with_all_products_in_eight_bits_passes():
    check_products(text_of(), Expected(frozenset({"mlp.up_proj"}), 2, 2, 2))


@pytest.mark.parametrize("target", [IN_BF16, "__cublas$gemm", None])
@pytest.mark.parametrize(
    ("which", "said"),
    list(zip(PASSES, ["forward product", "input's", "kernel's"], strict=True)),
)
def test_one_in_more_bits_is_named(which, said, target):
    expected = Expected(frozenset({"mlp.up_proj"}), 1, 1, 1)
    with pytest.raises(ValueError, match=rf"mlp\.up_proj its {said}.*in more bits"):
        check_products(text_of(**{which: target}), expected)


def test_one_that_lost_its_name_is_missed():
    expected = Expected(frozenset({"mlp.up_proj", "mlp.down_proj"}), 2, 1, 1)
    with pytest.raises(ValueError, match=r"mlp\.down_proj its forward.*0 times in pla"):
        check_products(text_of(), expected)
    expected = dataclasses.replace(expected, modules={"mlp.up_proj"}, forward=3)
    with pytest.raises(ValueError, match="2 times in place of 3"):
        check_products(text_of(), expected)


@pytest.mark.parametrize(
    ("types", "is_refused"),
    [(("f8e4m3fn", "f8e5m2"), False), (("bf16", "f8e4m3fn"), True)],
)
def test_for_tpus_a_products_operands_tell(types, is_refused):
    """As XLA prints them: by name, defined above in the same computation."""
    left, right = types
    name = "jit(step)/layers/mlp/fp8/mlp.up_proj/forward/dot_general"
    text = f"""
%other (p: f8e4m3fn[16,16]) -> f8e4m3fn[16,16] {{
  %fusion.1 = f8e4m3fn[16,16]{{1,0}} parameter(0)
}}
%fused (p: bf16[16,16]) -> f32[16,16] {{
  %fusion.1 = {left}[16,16]{{1,0:T(8,128)(4,1)}} fusion(%p), kind=kLoop, calls=%c.1
  %fusion.2 = {right}[16,16]{{1,0}} fusion(%q), kind=kLoop, calls=%c.2
  ROOT %convolution.1 = f32[16,16]{{1,0}} convolution(%fusion.1, %fusion.2), \
dim_labels=bf_oi->bf, metadata={{op_name="{name}"}}
}}"""
    expected = Expected(frozenset({"mlp.up_proj"}), 1, 0, 0)
    if not is_refused:
        check_products(text, expected)
        return
    with pytest.raises(ValueError, match=r"up_proj its forward.*in more bits"):
        check_products(text, expected)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the compiler: pip install 'jaxtrain[tpu]'; no TPU",
)
@pytest.mark.parametrize(
    ("topology", "of_codes", "said"),
    [
        ("tpu7x:2x2x1", True, None),
        ("tpu7x:2x2x1", False, "in more bits"),  # what GPUs are given
    ],
)
def test_products_of_codes_are_found_in_a_program_for_tpus(topology, of_codes, said):
    place = jax.sharding.SingleDeviceSharding(aot.describe_devices(topology)[0])
    site = kernels_fp8.Site("mlp.up_proj", of_codes=of_codes)

    def loss(x, kernel):
        weight = fp8.in_fp8(kernel, master=kernel)
        with jax.named_scope("layers"):  # as a decoder's are, for the names
            y = kernels_fp8.project(site, kernels_fp8.share(x), weight)
        return jnp.sum(y**2)

    sizes = (jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=place) for s in SHAPES)
    program = jax.jit(jax.grad(loss, (0, 1))).lower(*sizes).compile()
    expected = Expected(frozenset({"mlp.up_proj"}), 1, 1, 1)
    if said is None:
        check_products(program.as_text(), expected)
        return
    with pytest.raises(ValueError, match=said):
        check_products(program.as_text(), expected)


def test_a_step_is_read_before_it_runs():
    ran = []
    program = types.SimpleNamespace(as_text=lambda: text_of(forward=IN_BF16))
    lowered = types.SimpleNamespace(compile=lambda: program)
    step = types.SimpleNamespace(lower=lambda state, batch: lowered)
    checked = CheckedStep(step, Expected(frozenset({"mlp.up_proj"}), 1, 1, 1))
    with pytest.raises(ValueError, match="in more bits"):
        checked(None, np.zeros(3))
    assert not ran


def test_products_bear_the_names_that_are_looked_for():
    """In a real program, as it is compiled for a CPU after it was kept on disk."""
    decoder, params, batch = tiny_decoder(fp8=True, scan_layers=False)
    run = jax.jit(jax.grad(lambda params: loss_of(decoder, params, batch)))
    kept = export.deserialize(bytearray(export.export(run)(params).serialize()))
    names = fp8_step._NAME.findall(jax.jit(kept.call).lower(params).compile().as_text())
    expected = {(m, p) for m in decoder.linear_kernels() for p in PASSES}
    assert set(names) == expected


def count_casts(jaxpr, stacks):
    """Casts to e4m3 that run in a program: of arrays shaped as one of these, of others.

    In the program as it is traced. XLA's compiler for CPUs moves casts out of a loop,
    and that for GPUs does not.
    """
    casts = np.zeros(2, int)
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        times = equation.params.get("length", 1)  # of a scan
        if equation.primitive.name == "convert_element_type":
            made = equation.outvars[0].aval
            casts[int(made.shape not in stacks)] += made.dtype == kernels_fp8.INPUT
        for inner in _inner(equation.params):
            casts += times * count_casts(inner, stacks)
    return casts


def test_kernels_are_quantized_once_for_all_micro_batches(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    config = tiny_config("dpo", str(tmp_path), bf16=True, fp8=True)
    config.training.gradient_accumulation_steps = 3
    config.data.max_length = 128  # so that activations have other shapes than kernels
    run = resolve(config, device_count=1)
    model = load_abstract_model(run, jax.devices()[:1]).for_training(packed=False)
    step, state = describe_step(run, model)
    stacks = {leaf.shape for leaf in jax.tree.leaves(model.params["layers"])}
    traced = step.trace(state, _abstract_batch(model, run))
    of_kernels, of_others = count_casts(traced.jaxpr, stacks)
    assert of_kernels == 7  # of the policy alone: the reference is kept in codes
    assert of_others >= 3 * 2 * 4  # four inputs of a layer in each micro-batch


@pytest.mark.parametrize(("in_fp8", "secs"), [(False, 1.0), (True, 0.5)])
def test_a_bound_on_a_steps_time_holds_in_eight_bits(in_fp8, secs):
    """Dense products of an H100 by NVIDIA's data sheet: 989 TFLOP/s, and 1,979."""
    run = resolve({"training": {"training_type": "sft", "fp8": in_fp8}}, device_count=1)
    chip = CHIPS["NVIDIA H100 80GB HBM3"]
    report = Report("h100:1", 1, chip, 1, run, flops=989e12)
    assert report.secs["compute"] == pytest.approx(secs, rel=1e-3)


# --- numbers -----------------------------------------------------------------------


def tiny_decoder(**options):
    decoder = Decoder(config_of(), attention="xla", packed=False, **options)
    params = decoder.init(jax.random.key(0))
    # Wide enough that attention and the gate are far from linear.
    params = jax.tree.map(lambda x: x * 4 if x.ndim == 3 else x, params)
    draw = np.random.default_rng(0)
    tokens, targets = draw.integers(0, 96, (2, 4, 64), np.int32)
    ones = np.ones((4, 64), np.int32)
    place = np.broadcast_to(np.arange(64, dtype=np.int32), ones.shape)
    batch = Batch(tokens, targets, ones, place, ones.astype(np.float32))
    return decoder, params, batch


def loss_of(decoder, params, batch):
    return -jnp.mean(decoder.token_log_probs(params, batch).logps)


@pytest.mark.parametrize("remat", ["none", "minimal"])
def test_gradients_of_a_step_are_near_those_in_bfloat16(remat):
    """Rounding adds noise of 2 ** -4 to a product's inputs and 2 ** -3 to gradients."""
    gradients = {}
    for in_fp8 in (False, True):
        decoder, params, batch = tiny_decoder(fp8=in_fp8, remat=remat)
        run = jax.jit(jax.value_and_grad(lambda p: loss_of(decoder, p, batch)))  # noqa: B023
        gradients[in_fp8] = run(params)
    (exact_loss, exact), (loss, found) = gradients[False], gradients[True]
    assert loss != exact_loss and abs(float(loss / exact_loss) - 1) < 2e-3
    for (path, a), b in zip(
        jax.tree.leaves_with_path(exact), jax.tree.leaves(found), strict=True
    ):
        cosine = float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b))
        assert cosine > 0.97, (jax.tree_util.keystr(path), cosine)
        assert abs(float(jnp.linalg.norm(b) / jnp.linalg.norm(a)) - 1) < 0.05


def test_kernels_quantized_before_give_the_same_gradients_and_frozen_ones_none():
    decoder, params, batch = tiny_decoder(fp8=True, compute_dtype="float32")
    score = without_frozen(decoder.token_log_probs, FROZEN)

    def gradient(params, read):
        def loss(params):
            return -jnp.mean(score(read(params), batch).logps)

        return jax.grad(loss)(params)["layers"]

    once = jax.jit(lambda params: gradient(params, fp8.quantize_once(params)))(params)
    each = jax.jit(lambda params: gradient(params, lambda tree: tree))(params)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(once), jax.tree.leaves(each), strict=True
    ):
        assert np.any(a[0]) == (path[-1].key != "kernel") and np.any(a[1])
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_reference_in_codes_scores_as_the_policy_that_it_is_a_copy_of():
    decoder, params, batch = tiny_decoder(fp8=True)
    copied = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    frozen = fp8.freeze_kernels(params, copied)
    kernel = frozen["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(kernel, Weight) and kernel.codes.dtype.itemsize == 1
    np.testing.assert_array_equal(
        decoder.token_log_probs(frozen, batch).logps,
        decoder.token_log_probs(params, batch).logps,
    )


def test_over_a_mesh_numbers_are_the_same_and_kernels_are_gathered_as_codes():
    """Scales are those of whole tensors, so no rounding changes: only sums' order.

    Outside of the products in float32, for what bfloat16 rounds otherwise on a mesh
    would fall on the other side of a code here and there.
    """
    decoder, params, batch = tiny_decoder(fp8=True, compute_dtype="float32")
    sizes = {"data": 1, "fsdp": 2, "context": 1, "tensor": 2}
    plan = sharding.ShardingPlan(sharding.make_mesh(sizes, jax.devices()[:4]))
    split = dataclasses.replace(
        decoder, constrain=plan.constrain, map_shards=plan.map_shards
    )
    layouts = plan.parameters(params, decoder.logical_axes())
    run = jax.jit(jax.value_and_grad(lambda p, b: loss_of(split, p, b)))
    placed = (jax.device_put(params, layouts), jax.device_put(batch, plan.batch()))
    loss, gradient = run(*placed)
    whole = jax.jit(jax.value_and_grad(lambda p, b: loss_of(decoder, p, b)))
    expected_loss, expected = whole(params, batch)
    assert abs(float(loss / expected_loss) - 1) < 1e-5
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(gradient), strict=True):
        b = np.asarray(b)
        cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
        assert cosine > 0.9999
    # Where a device keeps a part of a kernel, it is codes that travel.
    text = run.lower(*placed).compile().as_text()
    of_layers = [line for line in text.splitlines() if "(layers)" in line]
    found = (re.search(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", x) for x in of_layers)
    kernels = [match for match in found if match and "," in match[2]]
    # The CPU's compiler widens codes to f16: it has no such collective of eight bits.
    assert {match[1] for match in kernels} <= {"f8e4m3fn", "f16"} and len(kernels) >= 7


@pytest.mark.parametrize("kind", ["lora", "dpo"])
def test_runs_train_with_a_frozen_model_in_eight_bits(kind, tmp_path):
    config = tiny_config(kind, bf16=True, fp8=True, max_steps=3, save_steps=0)
    results = train(config, tmp_path)
    assert results["global_step"] == 3 and np.isfinite(results["final_loss"])
