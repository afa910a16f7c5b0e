"""NF4 and int8 kernels against numpy, and QLoRA runs from loading to export."""

import importlib.util
import json
import pathlib
import shutil
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain import assets
from jaxtrain.config import default_config, resolve
from jaxtrain.lora import LoraConfig, trainable_and_frozen
from jaxtrain.models import hf, load
from jaxtrain.models.layers import LoraShape
from jaxtrain.models.quantization import (
    NF4_VALUES,
    Quantization,
    dequantize,
    multiply,
    quantize,
    quantize_tree,
    requested,
)
from jaxtrain.models.transformer import Decoder
from jaxtrain.trainer import TrainingOrchestrator

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config, train

qwix = pytest.importorskip("qwix")
EMBEDDED = str(assets.asset_path(assets.MODEL))


def make_kernel(shape, seed=0, dtype=np.float32):
    draw = np.random.default_rng(seed)
    # Widths that differ by output, as those of trained kernels do.
    widths = np.exp(draw.normal(size=shape[-1:]))
    return (0.02 * widths * draw.standard_normal(shape)).astype(dtype)


# --- the format --------------------------------------------------------------------


def test_the_code_book_is_that_of_the_papers_definition():
    """arXiv:2305.14314, section 3: quantiles of N(0, 1), 8 above 0, 7 below, and 0.

    Each half is cut evenly in probability, from a tail of 1 - 0.9677083 to 1/2; the
    values are scaled to end at 1. The paper prints float32 numbers.
    """
    quantile = statistics.NormalDist().inv_cdf
    tail = 0.9677083

    def half(count):
        return [quantile(p) for p in np.linspace(tail, 0.5, count + 1)[:-1]]

    values = sorted([-x for x in half(7)] + [0.0] + half(8))
    np.testing.assert_allclose(NF4_VALUES, np.array(values) / max(values), atol=2e-7)


quantize_in = {
    kind: jax.jit(lambda x, kind=kind: dequantize(*quantize(x, Quantization(kind))))
    for kind in ("nf4", "int8")
}


@given(seed=st.integers(0, 2**16), dtype=st.sampled_from([np.float32, jnp.bfloat16]))
def test_each_entry_becomes_the_nearest_value_of_its_block(seed, dtype):
    blocks, outputs = 2, 5
    kernel = make_kernel((64 * blocks, outputs), seed, dtype)
    exact = kernel.astype(np.float64)
    largest = np.abs(exact.reshape(blocks, 64, outputs)).max(1)
    largest = np.repeat(largest, 64, axis=0)
    values = np.array(NF4_VALUES)
    nearest = np.abs(exact[..., None] / largest[..., None] - values).min(-1) * largest

    nf4 = np.asarray(quantize_in["nf4"](kernel))
    error = np.abs(nf4 - exact)
    # Ties of float32 quotients: as near as the nearest, but for their rounding.
    np.testing.assert_allclose(error, nearest, atol=3e-7 * largest.max())
    # Half of the widest gap, between -1 and -0.696.
    assert (error <= 0.152 * largest).all()

    int8 = np.asarray(quantize_in["int8"](kernel))
    assert (np.abs(int8 - exact) <= (0.5 / 127.5 + 1e-6) * largest).all()


def test_qwix_reads_the_same_from_its_own_arrays():
    kernel = jnp.asarray(make_kernel((2, 128, 8)))
    for kind, qtype in (("nf4", "nf4"), ("int8", jnp.int8)):
        theirs = qwix.dequantize(
            qwix.quantize(kernel, qtype, channelwise_axes=(0, 2), tiled_axes={1: 64})
        )
        ours = dequantize(*quantize(kernel, Quantization(kind)))
        np.testing.assert_array_equal(ours, theirs)


def test_a_weight_takes_four_and_a_half_bits_or_eight_and_a_half():
    kernel = jnp.asarray(make_kernel((2, 128, 16)))
    for kind, bits in (("nf4", 4.5), ("int8", 8.5)):
        parts = quantize(kernel, Quantization(kind))
        stored = sum(
            shard.data.nbytes for part in parts for shard in part.addressable_shards
        )
        assert 8 * stored / kernel.size == bits


def test_the_gradient_of_a_product_is_that_of_the_kernel_it_stands_for():
    kernel, x = make_kernel((64, 24)), make_kernel((24, 5, 64), 1)
    weights = make_kernel((24, 5, 24), 2)
    for kind in ("nf4", "int8"):
        parts = quantize(kernel, Quantization(kind))
        whole = np.asarray(dequantize(*parts), np.float64)
        gradient = jax.grad(lambda x: (multiply(x, *parts) * weights).sum())  # noqa: B023
        np.testing.assert_allclose(multiply(x, *parts), x @ whole, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(gradient(x), weights @ whole.T, rtol=1e-5, atol=1e-7)


# --- refusals ----------------------------------------------------------------------


def test_without_qwix_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'jaxtrain\[qlora\]'"):
        requested("nf4", 64)


def test_a_block_that_does_not_divide_the_inputs_is_refused():
    with pytest.raises(ValueError, match="64 does not divide the 96 inputs"):
        quantize(jnp.zeros((96, 4)), Quantization("nf4"))


def test_a_module_kept_as_codes_is_not_trained_in_full():
    kernel = {"kernel": jnp.asarray(make_kernel((1, 64, 8)))}
    tree = {"layers": {"mlp": {"up_proj": kernel, "down_proj": dict(kernel)}}}
    tree = quantize_tree(tree, {"mlp.up_proj", "mlp.down_proj"}, Quantization("nf4"))
    lora = LoraConfig(target_modules=("up_proj",), modules_to_save=("down_proj",))
    with pytest.raises(ValueError, match=r"mlp\.down_proj.*in full.*as codes"):
        trainable_and_frozen(tree, {}, lora)


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("sft", {"quantization": "nf4"}, "a quantized base does not train"),
        ("lora", {"load_in_4bit": True, "load_in_8bit": True}, "asks for another"),
        ("lora", {"quantization": "int8", "load_in_4bit": True}, "asks for another"),
        ("lora", {"quantization": "nf4", "init_lora_weights": "pissa"}, "codes cannot"),
        ("lora", {"quantization": "nf4", "quantization_block_size": 7}, "even number"),
        ("lora", {"quantization": "fp4"}, "quantization = 'fp4'"),
        ("lora", {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type = 'fp4'"),
    ],
)
def test_what_cannot_be_is_refused_with_its_fix(kind, keys, message):
    config = default_config().to_dict()
    config["training"]["training_type"] = kind
    config["training"]["lora"] |= keys
    with pytest.raises(ValueError, match=message):
        resolve(config, device_count=1)


@pytest.mark.parametrize(
    ("keys", "kind"),
    [({"load_in_4bit": True}, "nf4"), ({"load_in_8bit": True}, "int8"), ({}, None)],
)
def test_transformers_names_choose_the_same(keys, kind):
    config = default_config().to_dict()
    config["training"]["training_type"] = "lora"
    config["training"]["lora"] |= keys
    assert resolve(config, device_count=1).lora.quantization == kind


# --- models ------------------------------------------------------------------------


def test_a_quantized_model_is_the_model_of_its_dequantized_kernels():
    """One decoder computes with either tree, adapters with DoRA and dropout too."""
    config = hf.load_config(EMBEDDED)
    shape = LoraShape(
        r=4,
        scaling=2.0,
        targets=frozenset({"self_attn.q_proj", "mlp.down_proj"}),
        use_dora=True,
        dropout=0.5,
    )
    decoder = Decoder(
        config,
        compute_dtype="float32",
        lora=shape,
        quantization=Quantization("nf4"),
    )
    few = hf.load_params(EMBEDDED, decoder, dtype="float32")
    whole = hf.load_params(EMBEDDED, Decoder(config), dtype="float32")
    again = quantize_tree(
        jax.tree.map(jnp.copy, whole), decoder.linear_kernels(), decoder.quantization
    )
    jax.tree.map(np.testing.assert_array_equal, few, again)
    draw = np.random.default_rng(0).standard_normal
    for module, name in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        kernel = whole["layers"][module][name]["kernel"]
        layers, width_in, width_out = kernel.shape
        adapter = {
            "lora_a": 0.1 * draw((layers, width_in, 4)),
            "lora_b": 0.1 * draw((layers, 4, width_out)),
            "lora_magnitude": 1 + draw((layers, width_out)) ** 2,
        }
        for tree in (few, whole):
            tree["layers"][module][name] |= {
                k: jnp.asarray(v, jnp.float32) for k, v in adapter.items()
            }
    for module in ("self_attn", "mlp"):
        for name in whole["layers"][module]:
            parts = few["layers"][module][name]
            if "kernel_codes" not in parts:
                continue
            whole["layers"][module][name]["kernel"] = dequantize(
                parts["kernel_codes"], parts["kernel_scales"]
            )
    tokens = np.random.default_rng(1).integers(1, 100, (2, 7)).astype(np.int32)
    positions = np.broadcast_to(np.arange(7), tokens.shape)

    @jax.jit
    def hidden(params):
        return decoder.hidden_states(
            params,
            tokens,
            positions,
            np.ones_like(tokens),
            dropout_key=jax.random.key(0),
        )

    np.testing.assert_allclose(hidden(few), hidden(whole), atol=1e-5)


# --- runs --------------------------------------------------------------------------


STEPS = {
    "max_steps": 4, "save_steps": 2, "eval_steps": 4, "eval_on_start": True,
    "learning_rate": 5e-3,
}  # fmt: skip


def eval_perplexities(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [r["eval_perplexity"] for r in records if "eval_perplexity" in r]


@pytest.fixture(scope="module")
def qlora_run(tmp_path_factory):
    """A run of 4 steps with a checkpoint at 2 and 4, its adapter merged at the end."""
    workdir = tmp_path_factory.mktemp("qlora")
    config = tiny_config("lora", **STEPS, lora__load_in_4bit=True)
    orchestrator = TrainingOrchestrator(config, workdir=workdir)
    orchestrator.prepare()
    base = jax.tree.map(np.asarray, orchestrator.model.params)
    orchestrator.train()
    return config, workdir, base


def test_a_resumed_run_ends_at_the_same_bits(qlora_run, tmp_path):
    config, workdir, _ = qlora_run
    shutil.copytree(workdir / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    train(config, tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4
    ours, theirs = (
        (path / "adapter" / "adapter_model.safetensors").read_bytes()
        for path in (tmp_path, workdir)
    )
    assert ours == theirs


def test_four_bits_cost_a_few_percent_of_perplexity(qlora_run, tmp_path):
    """Before and after the same steps; configs/lora.py in full: benchmarks/RESULTS.md.

    Measured: 1.011 at the start and 0.999 after 120 steps (int8: 0.9999, 0.9998).
    """
    train(tiny_config("lora", save_final_model=False, **STEPS), tmp_path)
    few, whole = eval_perplexities(qlora_run[1]), eval_perplexities(tmp_path)
    ratios = np.divide(few, whole)
    assert (ratios > 0.97).all() and (ratios < 1.03).all()
    assert not np.isclose(ratios, 1, rtol=1e-4).all()  # it is another base
    assert few[-1] < few[0]  # and its adapter learns


@pytest.mark.torch
def test_the_merged_model_is_the_dequantized_base_with_the_adapter(qlora_run, tmp_path):
    """By PEFT, from our adapter: no weight of the base as it was is in the merge."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    _, workdir, base = qlora_run
    tensors = safetensors.numpy.load_file(pathlib.Path(EMBEDDED) / "model.safetensors")
    changed = 0
    for module in ("self_attn", "mlp"):
        for name, parts in base["layers"][module].items():
            if "kernel_codes" not in parts:
                continue
            kernels = dequantize(parts["kernel_codes"], parts["kernel_scales"])
            for layer, kernel in enumerate(kernels):
                key = f"model.layers.{layer}.{module}.{name}.weight"
                assert not np.allclose(tensors[key], kernel.T, atol=1e-3)
                tensors[key] = np.array(kernel.T)
                changed += 1
    assert changed == 7 * len(kernels)
    shutil.copytree(EMBEDDED, tmp_path / "base")
    safetensors.numpy.save_file(
        tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"}
    )
    load = transformers.AutoModelForCausalLM.from_pretrained
    adapted = peft.PeftModel.from_pretrained(
        load(tmp_path / "base", dtype=torch.float32), workdir / "adapter"
    )
    tokens = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = adapted.eval()(tokens).logits
        merged = load(workdir / "model", dtype=torch.float32).eval()(tokens).logits
    # Logits of size 14: float32 sums of other order differ by 1e-6 of that.
    np.testing.assert_allclose(merged, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_dpo_reference_is_the_quantized_base_on_any_mesh(tmp_path):
    config = tiny_config(
        "dpo",
        max_steps=1,
        save_steps=0,
        save_final_model=False,
        num_gpus=2,
        per_device_train_batch_size=1,
        deepspeed__zero_stage=3,
        lora__enabled=True,
        lora__quantization="nf4",
    )
    orchestrator = TrainingOrchestrator(config, workdir=tmp_path)
    orchestrator.prepare()
    codes = orchestrator.model.params["layers"]["mlp"]["up_proj"]["kernel_codes"]
    assert codes.dtype == jnp.uint8 and codes.sharding.spec[1] is not None
    assert orchestrator.train()["loss"] == pytest.approx(np.log(2), abs=1e-6)
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    # Adapters add nothing yet: what is left is the rounding of sums of log-probs.
    assert abs(record["rewards/margins"]) < 1e-6
    assert record["nll/policy"] == pytest.approx(record["nll/reference"], rel=1e-6)


def test_a_loaded_model_is_quantized_for_a_run_and_refused_by_another():
    def run_of(quantization):
        config = tiny_config("lora", lora__quantization=quantization)
        return resolve(config, device_count=1)

    plain = load.load_model(run_of(None))
    model = load.adopt(plain, run_of("nf4"))
    assert plain.weights is None  # taken over
    kernel = model.params["layers"]["mlp"]["up_proj"]
    assert set(kernel) == {"kernel_codes", "kernel_scales"}
    again = load.adopt(model, run_of("nf4"))
    assert again.params["layers"]["mlp"]["up_proj"]["kernel_codes"].dtype == jnp.uint8
    with pytest.raises(ValueError, match="load the model anew"):
        load.adopt(again, run_of("int8"))
