"""GPUs that are not there: their names, and a step compiled for sixteen of them."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from jaxtrain import aot
from jaxtrain.aot import compile, gpus
from jaxtrain.aot.gpus import describe_gpus
from jaxtrain.aot.jaxpr_cost import count_flops
from jaxtrain.aot.report import CHIPS
from jaxtrain.config import resolve
from jaxtrain.kernels import delta_rule
from jaxtrain.kernels.attention import api, hopper
from jaxtrain.kernels.attention.masks import Extras, Mask
from jaxtrain.models.load import load_abstract_model
from jaxtrain.record.throughput import peak_flops
from tests.runs import tiny_config

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None


@pytest.mark.parametrize("name", ["h200", "h200:0", "h200:12", "h100:x", "h100:8x2"])
def test_numbers_that_are_none_are_refused_in_words(name):
    with pytest.raises(ValueError, match=r"h200:N, with N up to 8 or a multiple of it"):
        aot.describe_devices(name)


def test_slices_are_of_tpus():
    with pytest.raises(ValueError, match=r"num_slices = 2.*name all GPUs, as h200:16"):
        aot.describe_devices("h200:8", num_slices=2)


@pytest.mark.skipif(HAS_PLUGIN, reason="jax's CUDA plugin is installed")
def test_without_the_plugin_the_error_names_it():
    with pytest.raises(ValueError, match="pip install jax-cuda13-plugin"):
        describe_gpus("h200:8")


def test_a_jax_whose_kernels_tell_no_flops_is_refused(monkeypatch):
    found = types.SimpleNamespace(devices=[])
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **_: found)
    monkeypatch.setattr(hopper, "TELLS_COST", False)
    with pytest.raises(ValueError, match="the bound would be wrong; install jax"):
        describe_gpus("h200:8")


@pytest.mark.parametrize(
    ("capability", "in_plain_rows", "in_packed_rows"),
    [
        ("7.5", "xla", "xla_blocks"),
        ("8.0", "pallas_triton", "pallas_triton"),
        ("8.9", "pallas_triton", "pallas_triton"),
        ("9.0", "pallas_gpu", "pallas_gpu"),
        ("10.0", "pallas_triton", "pallas_triton"),
    ],
)
def test_attention_for_a_gpu_that_is_not_here_is_our_kernel(
    capability, in_plain_rows, in_packed_rows
):
    q = jax.ShapeDtypeStruct((1, 16384, 2, 64), jnp.bfloat16)  # cuDNN's, were it here
    gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    assert api._choose(q, Mask(), Extras(), gpu) == in_plain_rows
    packed = Mask(segment_ids=jax.ShapeDtypeStruct((1, 16384), jnp.int32))
    assert api._choose(q, packed, Extras(), gpu) == in_packed_rows


def test_the_delta_rule_for_a_gpu_that_is_not_here_is_our_kernel():
    rows = jax.ShapeDtypeStruct((1, 256, 4, 128), jnp.bfloat16)
    for capability, chosen in (("7.5", "xla"), ("8.0", "pallas_triton")):
        gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        assert delta_rule.api._choose(rows, rows, gpu) == chosen


@pytest.mark.parametrize("kind", [k for k in gpus._KINDS if not k.startswith("h")])
def test_kernels_for_hopper_are_never_chosen_for_other_gpus(kind):
    """Neither for rows that are packed nor for any other, and not by their name."""
    capability = gpus._KINDS[kind].capability
    assert float(capability) < 9.0
    gpu = types.SimpleNamespace(platform="gpu", compute_capability=capability)
    for length, width in ((512, 64), (2048, 128), (16384, 64)):
        q = jax.ShapeDtypeStruct((1, length, 2, width), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        for mask in (Mask(), Mask(segment_ids=ids), Mask(window=128)):
            assert api._choose(q, mask, Extras(), gpu) != "pallas_gpu"
            refusal = api._REFUSALS["pallas_gpu"](q, mask, Extras(), gpu)
            assert "needs a Hopper GPU" in refusal


def test_figures_of_gpus_are_those_that_utilization_is_reckoned_by():
    for kind in gpus._KINDS.values():
        assert CHIPS[kind.name].flops == peak_flops(kind.name)


@pytest.mark.skipif(not hopper.TELLS_COST, reason="this jax has no place for it")
def test_the_kernels_flops_are_those_of_the_tiles_it_visits(monkeypatch):
    monkeypatch.setitem(api._REFUSALS, "pallas_gpu", lambda *_: None)
    q = jax.ShapeDtypeStruct((2, 256, 4, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)

    def total(q, k, v):
        return api.attention(q, k, v, implementation="pallas_gpu").sum()

    # Of 2 x 2 tiles of 128 causality leaves 3, for each row and head: 2 products
    # forward, 3 for dq, 4 for dk with dv.
    tiles = 2 * 4 * 3
    expected = (2 + 3 + 4) * tiles * 2 * 128 * 128 * 64
    expected += 2 * 2 * 256 * 4 * 64  # each row's sum of result times gradient
    gradients = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(q, kv, kv)
    assert count_flops(gradients) == expected


needs_plugin = pytest.mark.skipif(
    not HAS_PLUGIN,
    reason="needs XLA's compiler for GPUs: pip install jax-cuda13-plugin"
    " jax-cuda13-pjrt; no GPU",
)


@needs_plugin
@pytest.mark.parametrize("kind", gpus._KINDS)
def test_gpus_are_eight_to_a_host_and_of_a_known_kind(kind):
    devices = describe_gpus(f"{kind}:16")
    assert [device.process_index for device in devices] == [0] * 8 + [1] * 8
    chip = CHIPS[devices[0].device_kind]
    assert chip.name.lower().replace(" ", "").removesuffix("gb") == kind.replace(
        "-", ""
    )
    expected = gpus._KINDS[kind].capability.removesuffix("a")
    assert devices[0].compute_capability == expected


@needs_plugin
def test_a_step_compiles_for_sixteen_gpus_with_our_kernel_and_tells_the_network():
    done = subprocess.run(
        [
            sys.executable, "-m", "jaxtrain.aot", "--config=configs/base.py",
            "--topology=h200:16", "--config.training.training_type=from_scratch",
            "--config.data.max_length=256", "--config.mesh.fsdp=8",
            "--config.training.deepspeed.zero_stage=3",
        ],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "16 devices of H200, mesh data 2 x fsdp 8 x context 1" in done.stdout
    # Forward, dq, and dk with dv of four layers, once each, and the head's two.
    assert "attention 'auto' (14 Pallas kernels in the program)" in done.stdout
    # Weights are gathered within a host, gradients summed between the two.
    assert re.search(r"all-gather +[\d.]+ GB in [1-9]", done.stdout)
    assert re.search(r"all-reduce, hosts +[\d.]+ GB in [1-9]", done.stdout)
    assert "all-gather, hosts" not in done.stdout
    assert "FITS" in done.stdout.splitlines()


def compiled_step(count=1, axis="fsdp"):
    """The text of a step of three wide layers, on so many H100 along an axis."""
    keys = {"num_gpus": count, "gradient_accumulation_steps": 1}
    config = tiny_config("from_scratch", bf16=True, **keys)
    config.mesh[axis] = count
    sizes = config.model.architecture
    sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers = 1024, 1536, 3
    run = resolve(config, device_count=count)
    devices = describe_gpus(f"h100:{count}")
    model = load_abstract_model(run, devices).for_training(packed=False)
    assert model.plan.unrolled
    step, state = compile.describe_step(run, model)
    batch = compile._abstract_batch(model, run)
    with jax.sharding.use_abstract_mesh(model.plan.mesh.abstract_mesh):
        return step.trace(state, batch).lower().compile().as_text()


@needs_plugin
def test_unrolled_layers_cast_no_wide_stack_at_once():
    """Its copy would live until the last layer's backward pass."""
    text = compiled_step()
    assert "f32[3,1024,1536]" in text and "bf16[1,1024,1536]{2,1,0} convert" in text
    assert "bf16[3,1024,1536]{2,1,0} convert" not in text


@needs_plugin
def test_gpus_that_share_weights_update_them_where_they_lie():
    """XLA transposed the gradients of what is split by columns, and copied the rest."""
    text = compiled_step(count=2)
    copied = re.findall(r"= (f32\[[\d,]+\])\S* copy\(", text)
    assert "f32[3,1536,512]" in text  # the down projections
    assert not [shape for shape in copied if shape.count(",") > 0], copied


@needs_plugin
def test_weights_in_parts_are_gathered_in_few_bits_and_gradients_scattered():
    """Matrices travel in bfloat16 each way; vectors alone are added up whole."""
    text = compiled_step(count=2, axis="data")
    kinds = "all-gather|reduce-scatter|all-reduce"
    found = re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", text)
    moved = {
        (kind, *shape)
        for shapes, kind in found
        for shape in re.findall(r"(\w+)\[([\d,]+)\]", shapes)
        if np.prod([int(size) for size in shape[1].split(",")]) >= 2**18
    }
    assert {kind for kind, *_ in moved} == {"all-gather", "reduce-scatter"}
    # Its head has no kernel, and adds up the slices of its gradient in float32.
    head = {"2048,1024", "1024,1024"}
    assert {dtype for _, dtype, shape in moved if shape not in head} == {"bf16"}, moved
    assert "f32[3,512,1536]" in text and "f32[3,1024,1536]" not in text  # as kept


@needs_plugin
def test_a_step_for_two_gpus_before_hopper_has_the_kernels_that_a_run_takes_there():
    config = tiny_config("from_scratch", num_gpus=2, bf16=True)
    config.data.max_length, config.mesh.fsdp = 256, 2
    config.model.scan_layers = True
    sizes = config.model.architecture
    sizes.hidden_size = 128
    sizes.num_attention_heads = sizes.num_key_value_heads = 2
    report = aot.compile_for(config, describe_gpus("l4:2"), "l4:2")
    assert report.cost.kernels == 3  # forward, dq, and dk with dv, in a scan
    assert report.fits
