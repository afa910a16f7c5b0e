"""Whole runs on streamed rows: they learn, stop, resume bit-exactly, and refuse."""

import json
import pathlib
import sys
import threading

import datasets
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxtrain.config import ConfigError, default_config, resolve
from jaxtrain.run.step_log import StepLog
from jaxtrain.trainer import TrainingOrchestrator

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import act_at_log, interrupt, records, tiny_config, train, weights


def streaming_config(training_type, **training):
    settings = {"save_steps": 2, "max_steps": 6} | training
    config = tiny_config(training_type, **settings)
    config.data.streaming = True
    config.data.shuffle_buffer_size, config.data.stream_window_rows = 16, 4
    return config


def test_a_run_that_dies_and_resumes_is_the_run_that_did_not(tmp_path, monkeypatch):
    """Packed text, shares of two devices, two formats, into the second epoch."""
    config = streaming_config("from_scratch", num_gpus=2)
    config.data.train, config.data.eval = _write_mixture(tmp_path)
    whole = train(config, tmp_path / "whole")
    assert whole["global_step"] == 6 and np.isfinite(whole["final_loss"])
    assert whole["epoch"] >= 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StepLog, "ask", act_at_log(5, interrupt))
        train(config, tmp_path / "killed")
    assert not (tmp_path / "killed" / "model").exists()
    names = [thread.name for thread in threading.enumerate()]
    assert "jaxtrain-stream" not in names, "an error must stop the reading too"
    train(config, tmp_path / "killed")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    for name, value in weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(weights(tmp_path / "killed")[name], value)


def _write_mixture(folder):
    """A mixture of an ArrayRecord file and a JSON one, and a file to evaluate on."""
    rows = [{"text": f"row {n} has " + f"word {n} " * 40} for n in range(8)]
    lines = [json.dumps(row).encode() for row in rows]
    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for line in lines[:5]:
        writer.write(line)
    writer.close()
    (folder / "b.jsonl").write_bytes(b"\n".join(lines[5:]))
    parts = [{"path": str(folder / "a.array_record"), "weight": 2.0},
             {"path": str(folder / "b.jsonl"), "weight": 1.0}]  # fmt: skip
    return parts, str(folder / "b.jsonl")


def test_an_iterable_dataset_is_a_stream(tmp_path):
    """Here of preference pairs, several a row."""
    rows = [
        {"prompt": f"{i} and", "chosen": f" {i + 1}", "rejected": " no"}
        for i in range(20)
    ]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    config = streaming_config("dpo", max_steps=2, save_steps=0, save_final_model=False)
    config.data.packing = True
    results = train(config, tmp_path, train_dataset=stream)
    assert results["global_step"] == 2
    orchestrator = TrainingOrchestrator(config)
    orchestrator.prepare()
    with pytest.raises(ValueError, match="evaluation rows are a stream"):
        orchestrator.prepare_data(rows, stream)
    config.data.streaming = False
    orchestrator.prepare()
    with pytest.raises(ValueError, match="an IterableDataset is a stream; set it true"):
        orchestrator.prepare_rows(stream)


def test_what_needs_all_rows_is_refused_all_at_once():
    config = default_config()
    config.data.streaming = True
    config.training.training_type = "dpo"
    config.training.dpo.precompute_ref_log_probs = True
    config.training.curriculum.enabled = True
    config.training.early_stopping_patience = 2
    with pytest.raises(ConfigError) as refused:
        resolve(config)
    text = str(refused.value)
    for problem in (
        "data.streaming = True: the length of a stream is not known",
        "set training.max_steps",
        "training.curriculum.enabled = True: a curriculum chooses among all rows",
        "training.dpo.precompute_ref_log_probs = True: it scores all rows before",
        "training.eval_steps = None: a stream has no known epoch",
    ):
        assert problem in text


def test_what_a_stream_changes_is_said():
    config = default_config()
    config.data.shuffle_buffer_size = 5
    (note,) = resolve(config).notes
    wanted = "data.shuffle_buffer_size = 5 has no effect: data.streaming is false"
    assert str(note) == wanted
    config.data.streaming = True
    config.training.max_steps = 3
    notes = "\n".join(map(str, resolve(config).notes))
    assert "shuffle_buffer_size" not in notes
    assert "training.save_steps = None (unset): with data.streaming only at" in notes
    assert "data.cache = True keeps evaluation rows only" in notes
