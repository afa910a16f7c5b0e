"""Out of memory: the message, the advice, the profile, and the exit code."""

import gzip

import jax
import pytest
from runs import tiny_config

from jaxtrain.cli import ending
from jaxtrain.config import resolve
from jaxtrain.run.out_of_memory import DeviceMemoryError, advise, explained
from jaxtrain.trainer import TrainingOrchestrator

SAID = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.5GiB."


def run_of(training_type="sft", **training):
    return resolve(tiny_config(training_type, **training), device_count=8)


def test_a_run_that_runs_out_says_what_to_change_and_keeps_a_profile(
    tmp_path, monkeypatch
):
    """Through the whole run: the device fails at the first step."""
    config = tiny_config("from_scratch", per_device_train_batch_size=4, save_steps=0)
    orchestrator = TrainingOrchestrator(config, workdir=tmp_path)
    orchestrator.prepare()

    def fail(*_):
        raise jax.errors.JaxRuntimeError(SAID)

    monkeypatch.setattr("jaxtrain.run.step_programs.StepPrograms.__call__", fail)
    with pytest.raises(DeviceMemoryError) as caught:
        orchestrator.train()
    code, message = ending.describe(caught.value)
    assert code == ending.FAULT
    first, *advice, last = message.splitlines()
    assert first.startswith("the device has no memory left of its ")
    assert "12.5GiB" in first
    assert "  try training.gradient_checkpointing = True" in advice
    assert any("per_device_train_batch_size = 2, gradient_acc" in x for x in advice)
    assert any("training.moment_dtype = 'int8'" in line for line in advice)
    profile = tmp_path / "memory.prof"
    assert str(profile) in last
    assert gzip.decompress(profile.read_bytes())  # pprof's format, with the arrays


def test_only_what_is_left_to_do_is_advised():
    keys = {
        "gradient_checkpointing": True,
        "remat_policy": "offload",
        "per_device_train_batch_size": 1,
        "moment_dtype": "int8",
        "deepspeed__offload_optimizer": True,
    }
    said = " ".join(advise(run_of(**keys)))
    for done in ("checkpointing", "remat", "batch_size", "moment_dtype", "offload"):
        assert done not in said
    assert "training.lora.enabled = True" in said
    assert not any("moment" in x or "lora" in x for x in advise(run_of("lora")))
    assert not any("moment" in x for x in advise(run_of(optimizer="adafactor")))


def test_other_errors_pass_and_a_profile_that_fails_hides_nothing(
    tmp_path, monkeypatch
):
    lost = jax.errors.JaxRuntimeError("INTERNAL: lost")
    with (
        pytest.raises(type(lost), match="lost") as caught,
        explained(run_of(), tmp_path),
    ):
        raise lost
    assert not isinstance(caught.value, DeviceMemoryError)
    assert not list(tmp_path.iterdir())

    def fail(path):
        raise OSError("disk full")

    monkeypatch.setattr(jax.profiler, "save_device_memory_profile", fail)
    with (
        pytest.raises(DeviceMemoryError, match="memory left") as caught,
        explained(run_of(), tmp_path),
    ):
        raise jax.errors.JaxRuntimeError(SAID)
    assert "memory.prof" not in str(caught.value)
