"""Whole runs, tiny: every training type, resume after SIGKILL, the Python interface."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxtrain import build, model_manager
from jaxtrain.config import ConfigManager, default_config
from jaxtrain.dpo_trainer import DPOTrainer
from jaxtrain.sharding import ShardingPlan
from jaxtrain.trainer import TrainingOrchestrator
from jaxtrain.types import WeightedSum

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import STEPS, TIMES, tiny_config, train

TYPES = ("from_scratch", "sft", "lora", "dpo")


@pytest.fixture(scope="session")
def base_model(tmp_path_factory):
    """A directory that our own from_scratch run exported."""
    workdir = tmp_path_factory.mktemp("base")
    results = train(tiny_config("from_scratch", save_steps=0), workdir)
    return results["model_path"]


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory, base_model):
    """Each type, run without interruption, once for all tests: its work directory."""
    made = {}

    def run(training_type):
        if training_type not in made:
            workdir = tmp_path_factory.mktemp(training_type)
            model = "" if training_type == "from_scratch" else base_model
            results = train(tiny_config(training_type, model), workdir)
            made[training_type] = (workdir, results)
        return made[training_type]

    return run


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(directory):
    return safetensors.numpy.load_file(pathlib.Path(directory) / "model.safetensors")


def numbers(record):
    """A log record without what the clock says."""
    return {k: v for k, v in record.items() if not k.endswith(TIMES)}


@pytest.mark.parametrize("training_type", TYPES)
def test_every_training_type_runs_to_the_end_and_exports(training_type, whole_runs):
    workdir, results = whole_runs(training_type)
    assert results["global_step"] == STEPS
    assert np.isfinite(results["final_loss"])
    assert [r["step"] for r in records(workdir)] == list(range(1, STEPS + 1))
    directory = pathlib.Path(results["best_model_path"])
    assert (directory / "config.json").is_file()
    assert (directory / "tokenizer.json").is_file()
    assert (workdir / "adapter").is_dir() == (training_type == "lora")
    first = records(workdir)[0]
    assert {"loss", "learning_rate", "grad_norm", "epoch", "num_tokens"} <= set(first)
    if training_type == "dpo":
        # Policy and reference are one model; compiled apart, they round differently.
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
        assert first["kl"] == pytest.approx(0, abs=1e-9)
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.parametrize("training_type", TYPES)
def test_the_export_loads_in_transformers(training_type, whole_runs):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, results = whole_runs(training_type)
    path = results["model_path"]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer("In the beginning God created")["input_ids"]
    config = tiny_config("sft", path)
    loaded = model_manager.ModelManager(config).load_model()
    row = np.asarray([ids], np.int32)
    ours = loaded.decoder.logits(
        loaded.params, row, np.arange(len(ids))[None], np.ones_like(row)
    )
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
    # float32 sums of width 64 in another order, through two layers.
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("training_type", TYPES)
def test_resume_after_sigkill_is_bit_exact(
    training_type, whole_runs, base_model, tmp_path
):
    """Losses, norms and final weights, to the bit; and each step logged once."""
    expected_workdir, expected = whole_runs(training_type)
    model = "" if training_type == "from_scratch" else base_model
    killed = subprocess.run(
        [
            sys.executable,
            str(pathlib.Path(__file__).parent / "runs.py"),
            training_type,
            model,
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        cwd=pathlib.Path(__file__).parent.parent,
        check=False,
    )
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6]
    results = train(tiny_config(training_type, model), tmp_path)
    for ours, theirs in zip(records(tmp_path), records(expected_workdir), strict=True):
        assert numbers(ours) == numbers(theirs)
    for name, value in weights(expected["model_path"]).items():
        np.testing.assert_array_equal(weights(results["model_path"])[name], value)


def test_a_finished_run_started_again_trains_no_further(whole_runs):
    workdir, results = whole_runs("from_scratch")
    again = train(tiny_config("from_scratch"), workdir)
    assert again["global_step"] == STEPS
    for name, value in weights(results["model_path"]).items():
        np.testing.assert_array_equal(weights(again["model_path"])[name], value)


def test_never_resume_refuses_a_used_workdir(whole_runs):
    workdir, _ = whole_runs("from_scratch")
    config = tiny_config("from_scratch", resume_from_checkpoint="never")
    with pytest.raises(ValueError, match="new workdir"):
        train(config, workdir)


@pytest.mark.parametrize("training_type", ["lora", "dpo"])
def test_a_run_on_eight_devices_equals_one_on_one(
    training_type, whole_runs, base_model, tmp_path
):
    """The same rows a step: 8 devices x 1 row x 1 micro-batch against 1 x 2 x 2."""
    overrides = {"save_steps": 0, "max_steps": 2, "lr_scheduler_type": "constant"}
    one = tiny_config(training_type, base_model, **overrides)
    eight = tiny_config(
        training_type,
        base_model,
        **overrides,
        num_gpus=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        deepspeed__zero_stage=3,
    )
    for config in (one, eight):
        config.training.lora.lora_dropout = 0.0
        config.data.shuffle = False
    train(one, tmp_path / "one")
    train(eight, tmp_path / "eight")
    for a, b in zip(
        records(tmp_path / "one"), records(tmp_path / "eight"), strict=True
    ):
        for name in ("loss", "grad_norm", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=2e-5), name


def test_evaluations_without_rows_are_told_of_once(
    base_model, tmp_path, monkeypatch, caplog
):
    """As the command calls it: rows are prepared first, then handed over."""
    monkeypatch.setattr(build, "run_to_end", lambda *_: {})
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": " b"}\n' * 4)
    config = tiny_config("sft", base_model, eval_steps=2)
    config.data.train = str(tmp_path / "rows.jsonl")
    orchestrator = TrainingOrchestrator(config, workdir=tmp_path / "out")
    caplog.set_level("INFO")
    orchestrator.prepare()
    orchestrator.train(*orchestrator.prepare_data())
    assert caplog.text.count("training.eval_steps = 2 does nothing") == 1


def test_evaluation_picks_the_best_and_stops_early(base_model, tmp_path):
    """At learning rate 0 nothing improves: the first evaluation stays the best."""
    config = tiny_config(
        "sft",
        base_model,
        learning_rate=0.0,
        max_steps=12,
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        early_stopping_patience=2,
    )
    results = train(config, tmp_path)
    evaluations = [r for r in records(tmp_path) if "eval_loss" in r]
    losses = {r["step"]: r["eval_loss"] for r in evaluations}
    assert list(losses) == [2, 4, 6]  # two evaluations after the best
    assert results["best_metric"] == losses[2] == losses[6]
    assert results["global_step"] == 6
    assert evaluations[0]["eval_perplexity"] == pytest.approx(np.exp(losses[2]))
    kept = {int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")}
    assert kept == {2, 6}
    assert results["best_model_path"] == str(tmp_path / "best_model")
    assert results["model_path"] == str(tmp_path / "model")


def test_an_unknown_best_metric_is_named_with_those_there_are(base_model, tmp_path):
    config = tiny_config(
        "sft", base_model, eval_steps=1, metric_for_best_model="eval_quality"
    )
    with pytest.raises(ValueError, match=r"'eval_quality'.*eval_loss"):
        train(config, tmp_path)


def test_precomputed_reference_log_probs_change_no_loss(
    whole_runs, base_model, tmp_path, monkeypatch
):
    workdir, _ = whole_runs("dpo")
    config = tiny_config("dpo", base_model, save_steps=0)
    config.training.dpo.precompute_ref_log_probs = True
    compiled, jit = [], ShardingPlan.jit
    monkeypatch.setattr(
        ShardingPlan,
        "jit",
        lambda plan, program, **options: (
            compiled.append(program.__name__) or jit(plan, program, **options)
        ),
    )
    train(config, tmp_path)
    # What XLA is told about a mesh it is told about every pass over rows.
    assert compiled == ["sums", "train_step", "eval_step"]
    for ours, theirs in zip(records(tmp_path), records(workdir), strict=True):
        # Sums over up to 64 tokens, taken in another program: float32 rounding.
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
        assert ours["rewards/margins"] == pytest.approx(
            theirs["rewards/margins"], abs=2e-5
        )


@pytest.mark.parametrize("with_lora", [False, True])
def test_a_synced_reference_follows_the_policy(with_lora, base_model, tmp_path):
    """TR-DPO with mixup 1 makes them one model again, so the next margin is 0."""
    config = tiny_config("dpo", base_model, save_steps=2, max_steps=4)
    config.training.lora.enabled = with_lora
    config.training.dpo.sync_ref_model = True
    config.training.dpo.ref_model_mixup_alpha = 1.0
    config.training.dpo.ref_model_sync_steps = 2
    train(config, tmp_path)
    margins = [r["rewards/margins"] for r in records(tmp_path)]
    assert np.abs(margins)[[0, 2]] == pytest.approx(0, abs=1e-5)
    assert np.abs(margins)[[1, 3]].min() > 1e-4


def test_an_adapter_run_keeps_the_base_and_merges_on_export(whole_runs, base_model):
    workdir, results = whole_runs("lora")
    adapter = safetensors.numpy.load_file(workdir / "adapter/adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    product = adapter[name.format("B")] @ adapter[name.format("A")]
    key = "model.layers.0.self_attn.q_proj.weight"
    scaling = 32 / 16
    expected = weights(base_model)[key] + scaling * product
    np.testing.assert_allclose(weights(results["model_path"])[key], expected, atol=1e-6)


def test_from_scratch_takes_only_the_sizes_of_a_directory(base_model):
    config = default_config()
    config.training.training_type = "from_scratch"
    config.training.num_gpus = 1
    config.model.name_or_path = base_model
    model = model_manager.ModelManager(config).load_model()
    assert model.config.hidden_size == 64
    embedding = np.asarray(model.params["embed_tokens"]["embedding"])
    assert not np.allclose(embedding, weights(base_model)["model.embed_tokens.weight"])


# --- the documented Python interface -----------------------------------------------


def test_an_address_that_cannot_be_used_is_no_workdir():
    for address, told in (
        ("hdfs://bucket/run", "workdir = 'hdfs://bucket/run'.*give gs://"),
        (pathlib.Path("gs://bucket/run"), "has lost a slash"),
    ):
        with pytest.raises(ValueError, match=told):
            TrainingOrchestrator(tiny_config("sft"), workdir=address)


def test_prepare_training_gives_false_and_logs_why(tmp_path, caplog):
    config = ConfigManager()
    config.training.num_gpus = 1
    trainer = TrainingOrchestrator(config, workdir=tmp_path)
    missing = str(tmp_path / "no_such_model")
    assert trainer.prepare_training(training_type="dpo", model_name=missing) is False
    assert "no_such_model" in caplog.text


def test_train_before_the_model_is_ruined_by_a_second_call(whole_runs, tmp_path):
    config = tiny_config("from_scratch", max_steps=1, save_steps=0)
    config.training.save_final_model = False
    trainer = TrainingOrchestrator(config, workdir=tmp_path)
    assert trainer.prepare_training()
    trainer.train()
    with pytest.raises(ValueError, match="prepare"):
        trainer.train()


def test_dpo_trainer_takes_a_loaded_model_and_rows(base_model, tmp_path):
    config = tiny_config("dpo", base_model, save_steps=0, eval_steps=4)
    manager = model_manager.ModelManager(config)
    manager.load_model()
    trainer = DPOTrainer(
        model=manager.model,
        tokenizer=manager.tokenizer,
        config=config,
        workdir=tmp_path,
    )
    rows = [
        {
            "prompt": f"What is {n} and {n}?",
            "chosen": f" It is {2 * n}.",
            "rejected": " I do not know.",
        }
        for n in range(12)
    ]
    dataset = trainer.prepare_dataset(rows)
    results = trainer.train(train_dataset=dataset, eval_dataset=dataset)
    assert results["reward_margin"] > 0.1
    assert results["accuracy"] > 0.9


def test_an_auxiliary_loss_is_one_overridden_method(whole_runs, tmp_path):
    class LongerSighted(TrainingOrchestrator):
        def compute_auxiliary_loss(self, outputs, batch):
            return WeightedSum(
                (outputs.logps**2 * batch.loss_mask).sum(), batch.loss_mask.sum()
            )

    config = tiny_config("from_scratch", max_steps=2, save_steps=0)
    config.training.use_auxiliary_loss = True
    trainer = LongerSighted(config, workdir=tmp_path)
    assert trainer.prepare_training()
    trainer.train()
    workdir, _ = whole_runs("from_scratch")
    plain, extended = records(workdir)[0], records(tmp_path)[0]
    assert extended["loss"] == pytest.approx(
        plain["loss"] + 0.1 * extended["aux_loss"], rel=1e-6
    )
    assert extended["grad_norm"] != plain["grad_norm"]


def test_an_auxiliary_loss_that_is_not_asked_for_is_told_of(tmp_path, caplog):
    class Added(TrainingOrchestrator):
        def compute_auxiliary_loss(self, outputs, batch):
            raise AssertionError

    config = tiny_config("from_scratch", max_steps=1, save_steps=0)
    Added(config, workdir=tmp_path).train()
    assert "Added.compute_auxiliary_loss does nothing: training.use_aux" in caplog.text


def test_preparing_rows_without_a_return_is_told(tmp_path):
    class Forgetful(TrainingOrchestrator):
        def prepare_rows(self, rows):
            super().prepare_rows(rows)

    config = tiny_config("from_scratch", max_steps=1, save_steps=0)
    with pytest.raises(ValueError, match=r"Forgetful\.prepare_rows returned a None"):
        Forgetful(config, workdir=tmp_path).train()


def test_an_auxiliary_loss_without_one_is_refused(tmp_path):
    config = tiny_config("from_scratch", use_auxiliary_loss=True)
    with pytest.raises(ValueError, match="compute_auxiliary_loss"):
        TrainingOrchestrator(config, workdir=tmp_path).prepare()


def test_offloaded_state_trains_the_same(whole_runs, base_model, tmp_path):
    workdir, _ = whole_runs("dpo")
    config = tiny_config("dpo", base_model, save_steps=0, cpu_offload=True)
    orchestrator = TrainingOrchestrator(config, workdir=tmp_path)
    orchestrator.prepare()
    leaf = jax.tree.leaves(orchestrator.model.params)[0]
    assert leaf.sharding.memory_kind == "pinned_host"
    orchestrator.train()
    for ours, theirs in zip(records(tmp_path), records(workdir), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
