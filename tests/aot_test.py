"""FLOPs, the abstract train state, and compiling for chips that are not there."""

import functools
import importlib.util
import json
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

from jaxtrain import aot, assets, sharding
from jaxtrain.aot import search
from jaxtrain.aot.jaxpr_cost import count_flops
from jaxtrain.aot.report import CHIPS, Chip
from jaxtrain.config import resolve
from jaxtrain.models import layers
from jaxtrain.models.load import load_abstract_model, load_model
from jaxtrain.models.state import abstract_state, init_state
from jaxtrain.optimizers.configured import make_optimizer

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the compiler: pip install 'jaxtrain[tpu]'; no TPU",
)


# --- FLOPs -------------------------------------------------------------------------


def flops(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count_flops(jax.make_jaxpr(function)(*arguments))


@pytest.mark.parametrize("objective", ["auto", "simpo", "kto"])
def test_every_kind_of_batch_compiles_ahead_of_time(objective):
    config = tiny_config("dpo", objective=objective)
    chip = Chip("fake", 1e12, 2**34, 1e12, 1e9, 1e9)
    report = aot.compile_for(config, jax.devices()[:1], "cpu", chip=chip)
    assert report.fits and report.flops > 0


def test_what_no_result_needs_does_not_count(monkeypatch, tmp_path):
    """As gradients of frozen kernels that share a product with adapters."""
    sizes = json.loads((assets.asset_path(assets.MODEL) / "config.json").read_text())
    sizes["num_key_value_heads"] = 1  # of 32 columns, 128 rows
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    config = tiny_config("lora", str(tmp_path))
    config.training.lora.target_modules = ("q_proj", "k_proj", "v_proj")
    chip = Chip("fake", 1e12, 2**34, 1e12, 1e9, 1e9)

    def count():
        return aot.compile_for(config, jax.devices()[:1], "cpu", chip=chip).flops

    together = count()
    monkeypatch.setattr(layers.Linear, "narrow_matrices", lambda *_: {})
    jax.clear_caches()
    assert count() == together > 0


def test_a_product_counts_twice_its_three_sizes():
    assert flops(jnp.matmul, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(
        lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)
    ) == (4 * 2 * 3 * 5 * 7)


def test_a_loop_counts_as_often_as_it_runs_and_recomputation_counts():
    def layers(x, w):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(body, x, w)[0].sum()

    one = 2 * 3 * 8 * 8
    assert flops(layers, (3, 8), (6, 8, 8)) == 6 * one
    # Forward, again in backward, and two products of the backward pass. The first
    # pass of the last product's result is needed for tanh alone.
    assert flops(jax.grad(layers, argnums=(0, 1)), (3, 8), (6, 8, 8)) == 6 * 4 * one


def test_of_a_conditional_the_dearest_branch_counts():
    def choose(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops(choose, (3, 8), (8, 8)) == 2 * 2 * 3 * 8 * 8


def test_the_train_steps_flops_are_near_six_per_parameter_and_token():
    """Against the usual 6 N, whose N has no embedding table that is only looked up."""
    config = tiny_config("from_scratch")
    run = resolve(config, device_count=1)
    model = load_abstract_model(run, jax.devices())
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.params)
    batch = model_batch(4, 64)

    def loss(params):
        return model.decoder.token_log_probs(params, batch).logps.sum()

    counted = count_flops(jax.make_jaxpr(jax.grad(loss))(params))
    expected = model.config.flops_per_token(64) * 4 * 64
    assert counted == pytest.approx(expected, rel=0.35)  # the head is recomputed


def model_batch(rows, length):
    from jaxtrain.types import Batch

    ids = jnp.ones((rows, length), jnp.int32)
    return Batch(ids, ids, ids, ids * 0 + jnp.arange(length), ids.astype(jnp.float32))


# --- the abstract state --------------------------------------------------------------


@pytest.mark.parametrize(
    ("training_type", "settings"),
    [
        ("from_scratch", {"deepspeed__zero_stage": 3, "num_gpus": 4}),
        (
            "sft",
            {"deepspeed__zero_stage": 1, "num_gpus": 4, "moment_dtype": "int8"},
        ),
        (
            "sft",
            {
                "deepspeed__offload_optimizer": True,
                "fp16": True,
                "moment_dtype": "bfloat16",
            },
        ),
        ("lora", {"deepspeed__zero_stage": 3, "num_gpus": 4, "moment_dtype": "int8"}),
        ("dpo", {"deepspeed__zero_stage": 3, "num_gpus": 4}),
        ("dpo", {"lora__enabled": True, "dpo__sync_ref_model": True}),
        ("dpo", {"deepspeed__offload_param": True, "optimizer": "adafactor"}),
        ("dpo", {"dpo__precompute_ref_log_probs": True}),
    ],
)
def test_the_abstract_state_is_the_real_one_without_arrays(training_type, settings):
    run = resolve(tiny_config(training_type, **settings), device_count=8)
    _, optimizer = make_optimizer(run, 10)
    state = init_state(load_model(run), run, optimizer)
    devices = jax.devices()[: run.devices.num_gpus]
    abstract = abstract_state(load_abstract_model(run, devices), run, optimizer)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    describe = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype, x.sharding))
    assert jax.tree.leaves(describe(abstract)) == jax.tree.leaves(describe(state))


# --- the search ----------------------------------------------------------------------


def test_the_search_compiles_real_steps_and_the_best_one_fits():
    config = tiny_config("sft", num_gpus=None, gradient_accumulation_steps=1)
    # Of several chips' memory, with links that make large batches pay.
    chip = Chip("fake", 1e12, 1e9, 1e12, 1e9, 1e9)
    lines = []
    outcomes, best = aot.search_settings(
        config, jax.devices(), "cpu", chip=chip, max_compiles=2, log=lines.append
    )
    assert len(lines) == sum(o.result is not None for o in outcomes) == 2
    assert best.result.fits and best.result.step_secs > 0
    for flag, value in search.as_flags(best.candidate).items():
        assert any(f"--{flag}={value}" in line for line in lines)
    # What it is compiled with is what it is named by.
    assert best.result.run.mesh.sizes == dict(best.candidate.mesh)
    assert best.result.run.precision.remat == best.candidate.remat
    bounds = [o for o in outcomes if o.reason.startswith("state and layers'")]
    assert not bounds  # a tiny model is never too large


def test_the_search_shares_out_a_mixtures_experts_and_counts_no_empty_slots(
    monkeypatch,
):
    config = tiny_config("from_scratch", num_gpus=None, gradient_accumulation_steps=1)
    with config.unlocked():
        config.model.architecture.update(
            model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32,
        )  # fmt: skip
    config.model.expert_exchange = "copies"
    chip = Chip("fake", 1e12, 1e9, 1e12, 1e9, 1e9)
    given = []

    def only_two(*arguments, **options):
        given.append(options["experts"])
        axes = [{"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 1, "expert": 4}]
        rest = {"context": 1, "tensor": 1}
        meshes = [tuple((mesh | rest).items()) for mesh in axes]
        return [search.Candidate(mesh, "full", 2) for mesh in meshes]

    monkeypatch.setattr(search, "make_candidates", only_two)
    outcomes, _ = aot.search_settings(config, jax.devices(), "cpu", chip=chip)
    assert given == [4]
    results = [outcome.result for outcome in outcomes]
    assert {dict(result.run.mesh.sizes).get("expert", 1) for result in results} == {
        1,
        4,
    }
    for outcome in outcomes:
        assert outcome.result.run.mesh.sizes == dict(outcome.candidate.mesh)
    # Buffers have more rows than are filled, which are not multiplied, and gathering
    # the weights of a layer that overflows is no part of a usual step.
    assert results[0].flops == results[1].flops


# --- compiling for a TPU -------------------------------------------------------------


def compile_for(topology, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [
            sys.executable, "-m", "jaxtrain.aot", "--config=configs/base.py",
            f"--topology={topology}", *arguments,
        ],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )  # fmt: skip


TINY = (
    "--config.training.training_type=from_scratch",
    "--config.data.max_length=128",
    "--config.training.deepspeed.zero_stage=3",
)


def test_the_help_says_what_the_command_does_and_needs():
    done = subprocess.run(
        [sys.executable, "-m", "jaxtrain.aot", "--help"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert "--topology=v5e:4x4" in done.stdout and "Exits with 3" in done.stdout


@needs_libtpu
def test_a_topology_that_is_none_is_refused_in_words():
    done = compile_for("v5e:3x7", *TINY)
    assert done.returncode == 2
    assert "topology = 'v5e:3x7'" in done.stderr


GPUS_AND_TPUS = (
    "name GPUs of l4, rtx4090, a100-40, a100-80, h100, h200, as h200:8, or TPUs of v4,"
    " v5e, v5p, v6e, tpu7x, as v5e:4x4"
)


@pytest.mark.parametrize(
    ("topology", "told"),
    [
        ("v5e:2x2x2", "name 2 sides in chips, as v5e:4x4"),
        ("v6e:2x2x1", "name 2 sides in chips, as v6e:4x4"),
        ("v4:4x4", "name 3 sides in chips, as v4:2x2x1"),
        ("v5p:2x2", "name 3 sides in chips, as v5p:2x2x1"),
        ("tpu7x:4", "name 3 sides in chips, as tpu7x:2x2x1"),
        ("v5e", "name 2 sides in chips, as v5e:4x4"),
        ("v5e:-1x2", "name 2 sides in chips, as v5e:4x4"),
        ("v5e:0x0", "name 2 sides in chips, as v5e:4x4"),
        ("v5e:16x32", "a pod has 16x16; take several by num_slices"),
        ("v6e:32x8", "a pod has 16x16; take several by num_slices"),
        ("v5p:32x32x32", "a pod has 16x20x28; take several by num_slices"),
        ("b200:4", f"no such chip is known; {GPUS_AND_TPUS}"),
        ("h999:2", f"no such chip is known; {GPUS_AND_TPUS}"),
        ("a100:-1", f"no such chip is known; {GPUS_AND_TPUS}"),
    ],
)
def test_what_nobody_builds_is_refused_before_libtpu_is_asked(
    monkeypatch, topology, told
):
    monkeypatch.setattr(topologies, "get_topology_desc", None)
    with pytest.raises(ValueError) as error:
        aot.describe_devices(topology)
    name, _, shape = topology.partition(":")
    assert str(error.value) == f"topology = '{name}:{shape}': {told}"


@pytest.mark.parametrize("num_slices", [0, -2])
@pytest.mark.parametrize("topology", ["v5e:2x2", "h200:8"])
def test_there_is_at_least_one_slice(topology, num_slices):
    with pytest.raises(ValueError, match=f"num_slices = {num_slices}: give 1 or more"):
        aot.describe_devices(topology, num_slices)


@pytest.mark.parametrize(
    ("topology", "options"),
    [
        ("v4:2x2x1", {"chip_config_name": "megacore"}),
        ("v4:4x4x256", {"chip_config_name": "megacore"}),  # of a torus that is joined
        ("v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
        ("v5e:16x16", {}),
        ("v5p:4x4x8_untwisted", {}),
    ],
)
def test_libtpu_is_told_what_its_names_leave_open(monkeypatch, topology, options):
    given = []

    def describe(**arguments):
        given.append(arguments)
        return types.SimpleNamespace(devices=[])

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    aot.describe_devices(topology)
    assert given == [{"platform": "tpu", "topology_name": topology} | options]


@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "v4:1x1x1", "v5p:1x1x1"])
def test_one_chip_is_a_machine(topology):
    (device,) = aot.describe_devices(topology)
    assert device.device_kind in CHIPS


@needs_libtpu
def test_a_chip_of_v4_is_one_device():
    devices = aot.describe_devices("v4:2x2x2")
    assert len(devices) == len({tuple(device.coords) for device in devices}) == 8
    assert sharding.make_mesh({"data": 2, "fsdp": 4}, devices).size == 8


@needs_libtpu
def test_an_axis_may_take_part_of_an_axis_of_the_torus():
    """`jax.make_mesh` refuses that for v5p; 32 are two neighbouring rings of 16."""
    devices = aot.describe_devices("v5p:8x16x16")
    mesh = sharding.make_mesh({"data": 64, "fsdp": 32}, devices)
    rings = mesh.devices.reshape(64, 32)
    for ring in (rings[0], rings[-1]):
        spread = np.array([device.coords for device in ring])
        assert sorted(np.ptp(spread, axis=0) + 1) == [1, 2, 16]


@needs_libtpu
def test_weights_split_over_chips_are_gathered_before_they_are_multiplied():
    """Compiled in the test below; else each part would be multiplied by itself."""
    devices = aot.describe_devices("v5p:2x2x2")

    def told(**sizes):
        plan = sharding.ShardingPlan(sharding.make_mesh(sizes, devices))
        return plan.compiler_options

    assert told(fsdp=8) == told(data=2, fsdp=4) == told(data=2, context=4) is not None
    assert told(data=8) is told(fsdp=4, tensor=2) is None
    plan = sharding.ShardingPlan(sharding.make_mesh({"fsdp": 8}))
    assert plan.compiler_options is None  # these are CPU devices


@needs_libtpu
def test_a_step_that_does_not_fit_says_what_to_change():
    done = compile_for(
        "v5e:2x2",
        *TINY,
        "--config.model.architecture.hidden_size=16384",
        "--config.model.architecture.intermediate_size=65536",
    )
    assert done.returncode == 3, done.stderr[-3000:]
    assert "DOES NOT FIT" in done.stdout
    assert "try training.gradient_checkpointing = True" in done.stdout
    assert "zero_stage" not in done.stdout  # it is 3 already


@needs_libtpu  # in CI's second run
def test_rows_split_over_devices_and_several_slices_compile_with_the_kernel():
    mesh = ("--config.mesh.data=2", "--config.mesh.context=2")
    done = compile_for("v5e:2x2", "--num_slices=2", *TINY, *mesh)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    shape = "8 devices of v5e, mesh data 2 x fsdp 2 x context 2 x tensor 1"
    assert shape in done.stdout
    assert "4096 tokens a step" in done.stdout
    assert "FITS" in done.stdout.splitlines()
    # Each device's two parts of a row, for two devices: forward, and again in the
    # backward pass, dq, and dk with dv.
    (kernels,) = re.findall(r"\((\d+) Pallas kernels", done.stdout)
    assert int(kernels) >= 2 * 2 * 4
    assert re.search(r"all-gather +[\d.]+ GB in [1-9]", done.stdout)
    # Gradients are added up between the slices.
    assert re.search(r"all-reduce, slices +[\d.]+ GB in [1-9]", done.stdout)
    assert "network" in done.stdout


@needs_libtpu
@pytest.mark.on_request  # a minute and a half; the one above compiles the same parts
def test_dpo_of_qwen_3b_fits_on_sixteen_v5e_chips():
    done = compile_for(
        "v5e:4x4",
        "--config.model.name_or_path=configs/shapes/qwen2.5-3b",
        "--config.training.training_type=dpo",
        "--config.training.gradient_checkpointing=True",
        "--config.training.deepspeed.zero_stage=3",
        "--config.training.per_device_train_batch_size=1",
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "32768 tokens a step" in done.stdout
    # Forward, forward again in the backward pass, dq, and dk with dv; the reference.
    assert "attention 'auto' (5 Pallas kernels in the program)" in done.stdout
    # Weights are gathered whole, not multiplied part by part as parts come by.
    assert "collective-permute" not in done.stdout
    # 3.09e9 parameters of 12 bytes (AdamW) and a reference of 2, over 16 chips.
    (state,) = re.findall(r"state and batch +([\d.]+) GiB", done.stdout)
    assert float(state) == pytest.approx(3.086e9 * 14 / 16 / 2**30, rel=0.02)


@needs_libtpu
@pytest.mark.slow
def test_moments_in_host_memory_come_to_the_device_a_layer_at_a_time():
    done = compile_for(
        "v5e:2x2",
        *TINY,
        "--config.model.architecture.hidden_size=1024",
        "--config.model.architecture.intermediate_size=4096",
        "--config.model.architecture.num_hidden_layers=12",
        "--config.training.gradient_checkpointing=True",
        "--config.training.per_device_train_batch_size=1",
        "--config.training.deepspeed.offload_optimizer=True",
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]

    def gib(name):
        (found,) = re.findall(rf"{name} +([\d.]+) GiB", done.stdout)
        return float(found)

    weights = gib("state and batch")  # 4 bytes a parameter, its moments 8
    assert gib("pinned host") == pytest.approx(2 * weights, abs=0.02)
    # Gradients are as much as the weights again; little of the moments is ever there.
    assert gib("sum") < 2.4 * weights


@needs_libtpu
@pytest.mark.slow
def test_layers_inputs_wait_in_host_memory():
    done = compile_for(
        "v5e:2x2",
        *(flag for flag in TINY if "max_length" not in flag),
        "--config.model.architecture.hidden_size=1024",
        "--config.model.architecture.num_hidden_layers=12",
        "--config.data.max_length=2048",
        "--config.training.bf16=True",
        "--config.training.gradient_checkpointing=True",
        "--config.training.remat_policy=offload",
        "--config.training.per_device_train_batch_size=8",
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    (kept,) = re.findall(r"pinned host +([\d.]+) GiB", done.stdout)
    assert float(kept) == pytest.approx(12 * 8 * 2048 * 1024 * 2 / 2**30, abs=0.006)
