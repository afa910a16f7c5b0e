"""The scripts that measure several GPUs of a host (benchmarks/host_scaling.py)."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))
import host_scaling
import kill_and_resume
import random_model
import trace_share
from host_scaling import CASES


def test_a_collective_counts_as_exposed_only_where_nothing_else_runs():
    ms = 1e6
    kernels = [
        ("gemm", 0, 4 * ms),
        (
            "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(nccl)",
            3 * ms,
            6 * ms,
        ),  # 1 ms hidden, 2 ms not
        ("fusion", 5 * ms, 5.5 * ms),  # which hides half a ms of these
        ("ncclDevKernel_AllGather", 8 * ms, 10 * ms),  # behind a gap of 2 ms
        ("adam", 10.05 * ms, 20 * ms),  # behind a short one
    ]
    shares = trace_share.divide(kernels)
    assert shares.secs == pytest.approx(0.020)
    assert shares.collective == pytest.approx(5 / 20)
    assert shares.exposed == pytest.approx(3.5 / 20)
    by_kind = {"AllReduce": 1.5 / 20, "AllGather": 2 / 20}
    assert shares.exposed_by_kind == pytest.approx(by_kind)
    assert shares.idle == pytest.approx(2.05 / 20)
    assert shares.long_gaps == pytest.approx(2 / 20)
    with pytest.raises(ValueError, match="no kernel"):
        trace_share.divide([])


@pytest.mark.parametrize("name", CASES)
def test_a_gpu_has_as_many_examples_on_any_number_of_them(name):
    case = CASES[name]
    for gpus in (1, 2, 4, 8):
        sizes = case.mesh_on(gpus)
        product = 1
        for size in sizes.values():
            product *= size
        assert product == gpus
        groups = gpus // sizes.get("context", 1) // sizes.get("tensor", 1)
        rows = case.examples(gpus) * groups
        wanted = case.batch * (groups if case.mesh == "context" else gpus)
        assert rows == wanted or (case.mesh == "fsdp_tensor" and gpus == 1)
    with pytest.raises(ValueError, match="even"):
        case.mesh_on(3)


def test_the_table_puts_ratios_and_predictions_beside_results():
    rates = {1: 20_000.0, 4: 19_000.0}
    results = [
        {"case": "sft_3b", "side": "ours", "gpus": gpus, "tokens_per_sec_per_gpu": rate}
        for gpus, rate in rates.items()
    ]
    predictions = [
        {"case": "sft_3b", "topology": "h100:4", "tokens_per_sec_per_gpu": 39_832}
    ]
    lines = host_scaling.table(results, predictions).splitlines()
    assert "| 4 | 19,000 | 3.800 of 1 |" in lines[-1] and "| 39,832 |" in lines[-1]
    assert "| 1 | 20,000 | 1.000 of 1 |" in lines[-2]
    assert host_scaling.describe(results[0]).startswith("20,000 tokens/s a GPU, sft_3b")


def test_weights_have_the_names_and_shapes_of_published_checkpoints():
    """Of Llama 3.1 8B and Qwen3-30B-A3B: numbers of parameters, and some names."""

    def count(shape):
        total, names = 0, {}
        for part in random_model.shards(host_scaling.model_config(shape)):
            names |= part
            for sizes in part.values():
                size = 1
                for n in sizes:
                    size *= n
                total += size
        return total, names

    total, names = count("8b")
    assert total == 8_030_261_248  # as its model card says, 8.03B
    assert names["model.layers.31.self_attn.k_proj.weight"] == (1024, 4096)
    total, names = count("30b_a3b")
    assert total == 30_532_122_624
    assert names["model.layers.0.mlp.experts.127.down_proj.weight"] == (2048, 768)
    with pytest.raises(ValueError, match="gemma"):
        next(random_model.shards({"model_type": "gemma"}))


@pytest.mark.on_request  # half a minute
@pytest.mark.parametrize("shape", ["smoke", "moe_smoke"])
def test_transformers_takes_the_weights(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    random_model.write(host_scaling.model_config(shape), tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    _, found = load(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys"))


@pytest.mark.on_request  # six trainings: two minutes of an idle machine
@pytest.mark.slow
def test_a_killed_process_is_resumed_bit_by_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(host_scaling.HERE.parent))
    assert kill_and_resume.check(tmp_path, 2)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["fine"] for line in lines] == [True] * 4
    assert lines[0]["exit_codes"][-1] == -9
