"""How a run begins: the block of the log, and the provenance in config.json."""

import dataclasses
import importlib.metadata
import json
import logging
import math
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxtrain import assets, build, loop
from jaxtrain.config import RunConfig, load_config, resolve
from jaxtrain.config.notes import Note
from jaxtrain.record import provenance, start
from jaxtrain.record.memory import Estimate
from jaxtrain.trainer import TrainingOrchestrator, _loss_of
from tests.runs import tiny_config, train

WORKDIR = pathlib.Path("out") / "a_run"


def make_parts(config) -> loop.Parts:
    orchestrator = TrainingOrchestrator(config, workdir=WORKDIR)
    orchestrator.prepare()
    rows = orchestrator.prepare_data()
    run, model = orchestrator.run, orchestrator.model
    return build.build(run, model, rows, _loss_of(orchestrator), WORKDIR)


def block(parts: loop.Parts, step: int = 0) -> dict[str, str]:
    """The entries of the block by their labels, lines joined."""
    progress = loop.Progress(loop.BestMetric(greater_is_better=False), step=step)
    lines = start.describe(parts, progress, WORKDIR)
    assert max(map(len, lines)) <= 100 - len("00:00:00 ")
    assert len(lines) <= 15
    entries: dict[str, str] = {"title": lines[0]}
    for line in lines[1:]:
        assert line[:2] == "  " and line[13] != " "  # aligned
        if label := line[2:13].strip():
            entries[label] = line[13:]
        else:
            entries[list(entries)[-1]] += f" {line[13:]}"
    return entries


def embedded_weights() -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(
        pathlib.Path(assets.asset_path(assets.MODEL)) / "model.safetensors"
    )


def numbers(text: str) -> dict[str, float]:
    """`a 1.5, b c 2` -> {"a": 1.5, "b c": 2.0}."""
    return {name: float(x) for name, x in re.findall(r"([a-z ]+?) ([\d.]+)", text)}


@pytest.fixture(scope="module")
def dpo_parts() -> loop.Parts:
    config = tiny_config("dpo")
    config.training.num_gpus = 4
    config.mesh.fsdp, config.mesh.data = 2, 2
    config.data.train = str(assets.asset_path(assets.DATA["preference"][0]))
    return make_parts(config)


def test_the_block_of_a_full_run_tells_what_can_be_counted_by_hand(dpo_parts):
    entries = block(dpo_parts)
    weights = embedded_weights()
    count = sum(array.size for array in weights.values())
    assert start.count_parameters(dpo_parts) == (count, count)
    assert f"{count / 1e6:.1f}M parameters, all trained" in entries["model"]
    assert entries["model"].startswith("qwen3, ")
    # 48 rows (tiny_config); a device takes 2 pairs, twice, on 4 devices.
    assert entries["data"].startswith("48 pairs, ") and "train.jsonl" in entries["data"]
    assert (
        "16 rows a step = 2 a device x 4 data-parallel x 2 micro-" in entries["batch"]
    )
    (shape,) = dpo_parts.train_batches.reader.packing.shapes
    assert "of which an epoch has" not in entries["batch"]
    assert "tokens (shared prompts once)" in entries["data"]
    assert "packed by" in entries["data"]
    tokens = dpo_parts.train_data.stats.tokens
    about = f"about {start.short(tokens / 42 * 16)} tokens in rows of"
    assert f"{about} {shape.rows} x {shape.length}" in entries["batch"]
    assert entries["steps"].startswith("8, 2.67 epochs of 3; log every 1, save every 3")
    assert "4 x cpu; mesh data 2 x fsdp 2" in entries["devices"]
    assert "parameters and optimizer split" in entries["devices"]
    assert entries["precision"].startswith("float32 compute, float32 parameters")
    assert entries["writes"] == f"{WORKDIR}; metrics.jsonl"
    assert "resumes" not in entries
    resumed = block(dpo_parts, step=3)
    assert resumed["resumes"] == f"from step 3 of 8; {WORKDIR}/checkpoints/3"


def test_the_memory_estimate_is_what_one_device_holds_and_below_what_xla_takes(
    dpo_parts,
):
    found = start.estimate_memory(dpo_parts).device

    def on_first_device(tree) -> int:
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    state = dpo_parts.state
    assert found["parameters"] == on_first_device(state.trainable)
    assert found["reference"] == on_first_device(state.frozen)
    assert found["optimizer"] == on_first_device(state.opt_state)
    assert found["gradients"] == found["parameters"]  # float32, split alike
    # A device's rows of T with two pairs, width D, in float32, for each layer.
    config = dpo_parts.model.config
    (shape,) = dpo_parts.train_batches.reader.packing.shapes
    inputs = shape.tokens * config.hidden_size * 4 * config.num_hidden_layers
    assert found["layer inputs"] == inputs
    batch = next(dpo_parts.train_batches)
    placed = dpo_parts.feed.place(batch, leading_axes=1)
    analysis = dpo_parts.train_step.lower(state, placed).compile().memory_analysis()
    taken = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    assert 0.3 * taken < sum(found.values()) < taken


@pytest.mark.parametrize("width", [96, 95])
def test_weights_are_told_to_be_in_parts_as_far_as_they_are(width):
    """On three devices a width of 95 divides none of an MLP's axes, nor does 64."""
    config = tiny_config("from_scratch", num_gpus=3)
    config.model.architecture.intermediate_size = width
    parts = make_parts(config)
    weights = parts.state.trainable["layers"]["mlp"]
    divided = 0 if width % 3 else sum(each["kernel"].size for each in weights.values())
    found = start.estimate_memory(parts).device
    assert found.get("gathered weights", 0) == divided * 4
    assert ("kept in parts" in block(parts)["devices"]) is (divided > 0)


def test_the_block_of_an_adapter_tells_how_little_is_trained():
    config = tiny_config("lora", lora__r=4, run_name="mine", dpo__beta=0.3)
    config.training.lora.target_modules = ["q_proj", "down_proj"]
    config.training.curriculum.start_length = 32
    config.training.learning_rate = 1e-2
    config.training.lora.learning_rate = 1e-3
    parts = make_parts(config)
    weights = embedded_weights()
    trained = sum(
        4 * sum(array.shape)
        for name, array in weights.items()
        if name.endswith(("q_proj.weight", "down_proj.weight"))
    )
    total = trained + sum(array.size for array in weights.values())
    assert start.count_parameters(parts) == (total, trained)
    entries = block(parts)
    assert entries["title"].endswith("lora run 'mine'")
    share = f"{start.short(trained)} ({trained / total:.2%}) trained by LoRA of rank 4"
    assert share in entries["model"]
    assert "base" in entries["memory"] and "reference" not in entries["memory"]
    # One line each, by names alone.
    assert "training.curriculum.start_length" in entries["no effect"]
    gives_way = "training.learning_rate to training.lora.learning_rate"
    assert entries["gives way"] == gives_way


def test_the_longest_names_and_paths_stay_within_100_columns(dpo_parts):
    named = dataclasses.replace(
        dpo_parts.run,
        loop=dataclasses.replace(dpo_parts.run.loop, run_name="long" * 50),
        data=dataclasses.replace(dpo_parts.run.data, train="/long" * 50),
        notes=tuple(Note("inactive", f"training.key_{i}", 1, "why") for i in range(40)),
    )
    entries = block(dataclasses.replace(dpo_parts, run=named))
    assert entries["title"].endswith("…") and "/long/long..." in entries["data"]
    assert entries["no effect"].startswith("training.key_0, training.key_1, ")
    assert entries["no effect"].endswith(" ...")


def test_an_estimate_names_its_unit_and_the_limit():
    estimate = Estimate({"parameters": 3 * 2**30, "gradients": 2**29}, host=6 * 2**30)
    assert estimate.describe(80 * 2**30) == (
        "at least 3.5 of 80.0 GiB a device: parameters 3.0, gradients 0.5;"
        " 6.0 in host memory"
    )
    small = Estimate({"parameters": 3 * 2**20})
    assert small.describe().startswith("at least 3.0 MiB a")
    assert small.describe(2**30).startswith("at least 3.0 MiB of 1.0 GiB a device")


def test_config_json_keeps_each_start_and_stays_a_configuration(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "jaxtrain")
    config = tiny_config("from_scratch", max_steps=2, save_steps=2)
    config.training.save_final_model = False
    train(config, tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    (first,) = before["provenance"]["starts"]
    assert first["versions"]["jax"] == jax.__version__
    assert first["versions"]["numpy"] == np.__version__
    assert first["devices"]["count"] == 1 and first["devices"]["platform"] == "cpu"
    assert math.prod(first["mesh"].values()) == 1
    assert first["data"]["train"]["rows"] == 48 and first["data"]["eval"]["rows"] == 12
    prints = {side: first["data"][side]["fingerprint"] for side in ("train", "eval")}
    assert len(set(prints.values())) == 2
    # The same program went on under another version, with one row less.
    monkeypatch.setattr(provenance, "versions", lambda: {"jax": "99.0"})
    config.training.max_steps = 3
    config.data.max_eval_rows = 11
    train(config, tmp_path)
    assert "from step 2 of 3" in caplog.text
    saved = json.loads((tmp_path / "config.json").read_text())
    starts = saved["provenance"]["starts"]
    assert starts[0] == first
    assert [s["step"] for s in starts] == [0, 2]
    assert starts[1]["versions"] == {"jax": "99.0"}
    assert starts[1]["data"]["train"]["fingerprint"] == prints["train"]
    assert starts[1]["data"]["eval"]["fingerprint"] != prints["eval"]
    # What reads a configuration reads this one, from the dict and from the file.
    run = resolve(config, device_count=8)
    assert RunConfig.from_dict(saved) == run
    assert resolve(load_config(tmp_path / "config.json")) == run


def test_a_run_that_begins_anew_forgets_the_starts_before(tmp_path):
    (tmp_path / "config.json").write_text('{"provenance": {"starts": [{"step": 0}]}}')
    again = provenance.with_history({"a": 1}, {"step": 0}, tmp_path)
    assert again == {"a": 1, "provenance": {"starts": [{"step": 0}]}}
    onward = provenance.with_history({"a": 1}, {"step": 4}, tmp_path)
    assert onward["provenance"]["starts"] == [{"step": 0}, {"step": 4}]
    for text in ('{"training": {}}', '{"prov', "[]"):
        (tmp_path / "config.json").write_text(text)
        found = provenance.with_history({}, {"step": 4}, tmp_path)
        assert found["provenance"]["starts"] == [{"step": 4}]


def test_torch_is_named_only_where_it_was_loaded(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"{name} 1.0")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert provenance.versions()["torch"] == "torch 1.0"
    monkeypatch.delitem(sys.modules, "torch")
    assert "torch" not in provenance.versions()


def test_a_commit_is_told_of_a_checkout_alone_and_whether_its_code_differs(tmp_path):
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    (tmp_path / "jaxtrain").mkdir()
    (tmp_path / "jaxtrain" / "a.py").write_text("1\n")
    assert provenance.commit(tmp_path) is None
    git("init")
    assert provenance.commit(tmp_path) is None  # nothing is committed yet
    git("add", ".")
    git("commit", "-m", "first")
    clean = {"id": git("rev-parse", "HEAD").strip(), "dirty": False}
    assert provenance.commit(tmp_path) == clean
    (tmp_path / "out").mkdir()  # results are no change of the code
    (tmp_path / "out" / "x").write_text("")
    assert provenance.commit(tmp_path) == clean
    (tmp_path / "jaxtrain" / "a.py").write_text("2\n")
    assert provenance.commit(tmp_path) == clean | {"dirty": True}
    # Installed below a repository of the user's: not our checkout.
    assert provenance.commit(tmp_path / "jaxtrain") is None


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["python", "-m", "jaxtrain", "--a.b=0.5"], "python -m jaxtrain --a.b=0.5"),
        (["x", "--config.hub.hf_token=abc123"], "x '--config.hub.hf_token=***'"),
        (["x", "--api-key", "abc123", "y"], "x --api-key '***' y"),
        (["x", "--url=https://me:abc123@host/a"], "x '--url=https://***@host/a'"),
        (["x", '--kw={"token": "abc123"}'], """x '--kw={"token": "***"}'"""),
        (["python", "-c", "token = 'abc123'", "z"], "python -c ... z"),
        (["x", "--max_tokens=12", "a b"], "x --max_tokens=12 'a b'"),
    ],
)  # fmt: skip
def test_a_command_line_is_told_without_its_secrets(arguments, shown):
    assert provenance.command_line(arguments) == shown
    assert "abc123" not in provenance.command_line(arguments)


def test_a_step_of_more_rows_than_there_are_is_told(dpo_parts):
    """Micro-batches without a row are computed all the same."""
    few = dataclasses.replace(dpo_parts.run.loop, gradient_accumulation_steps=50)
    parts = dataclasses.replace(
        dpo_parts, run=dataclasses.replace(dpo_parts.run, loop=few)
    )
    told = block(parts)["batch"]
    assert (
        told.startswith("400 rows a step")
        and f"an epoch has {len(parts.train_data)}" in told
    )
    assert "gradient_accumulation_steps lower" in told
