"""Writers: files on disk, resuming, masked secrets."""

import json
import math
import pathlib
import struct
import sys

import pytest
from tensorboardX.proto import event_pb2, plugin_hparams_pb2, types_pb2
from tensorboardX.record_writer import masked_crc32c

from jaxtrain.record import writers as tracking
from jaxtrain.record.safe_text import mask_secrets
from jaxtrain.record.writers import (
    JsonlWriter,
    WandbWriter,
    check_installed,
    make_writers,
)


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_events(folder: pathlib.Path) -> list[event_pb2.Event]:
    """TFRecords: length (8 bytes), checksum (4), event, checksum (4)."""
    events = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = content[12 : 12 + size]
            sums = content[8:12] + content[12 + size : 16 + size]
            assert struct.unpack("<II", sums) == (
                masked_crc32c(content[:8]),
                masked_crc32c(event),
            )
            events.append(event_pb2.Event.FromString(event))
            content = content[16 + size :]
    return events


def test_each_record_is_one_line_with_step_and_time_at_once_on_disk(tmp_path):
    writer = JsonlWriter(tmp_path, clock=lambda: 5.5)
    writer.write(1, {"loss": 2.0, "perplexity": math.inf, "bad": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "time": 5.5, "loss": 2.0, "perplexity": null, "bad": null}\n'
    )
    writer.write_text(1, {"prompt": "Füße\nnext"})
    writer.write_config({"a": {"b": 1}})
    assert read_lines(tmp_path / "samples.jsonl") == [
        {"step": 1, "time": 5.5, "prompt": "Füße\nnext"}
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": {"b": 1}}
    writer.close()


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with make_writers([], tmp_path, None, {}) as writers:
        for step in range(1, 6):
            writers.write(step, {"loss": step})
            writers.write_text(step, {"sample": "x"})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')  # as a kill leaves it
    with make_writers([], tmp_path, None, {}, resume_step=3) as writers:
        assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
        writers.write(4, {"loss": 40})
    found = [(line["step"], line["loss"]) for line in read_lines(path)]
    assert found == [(1, 1), (2, 2), (3, 3), (4, 40)]
    samples = read_lines(tmp_path / "samples.jsonl")
    assert [line["step"] for line in samples] == [1, 2, 3]
    # Begun anew without a checkpoint: curves start at zero.
    with make_writers([], tmp_path, None, {}) as writers:
        writers.write(1, {"loss": 7})
    assert [line["loss"] for line in read_lines(path)] == [7]


def test_a_text_with_a_line_separator_of_its_own_survives_a_resume(tmp_path):
    writer = JsonlWriter(tmp_path)
    writer.write_text(1, {"sample": "one\u2028two\x85three\x0cfour"})
    writer.close()
    before = (tmp_path / "samples.jsonl").read_bytes()
    tracking.drop_lines_after(tmp_path / "samples.jsonl", 1)
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_a_half_line_of_the_resumed_step_itself_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[]\n"text"\n{"no": 1}\n{"step": 2}')
    tracking.drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1}\n'


def test_tensorboard_holds_every_scalar_and_hides_what_a_resume_repeats(tmp_path):
    with make_writers(["tensorboard"], tmp_path, None, {"model": "tiny"}) as writers:
        for step in (1, 2, 3):
            writers.write(step, {"loss": step / 2, "eval/acc": 1})
    with make_writers("tensorboard", tmp_path, None, {}, resume_step=2) as writers:
        writers.write(3, {"loss": 9})
        writers.write_text(3, {"sample": "*text*"})
    events = read_events(tmp_path / "tensorboard")
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]
    losses = [(step, value) for step, tag, value in scalars if tag == "loss"]
    assert losses == [(1, 0.5), (2, 1.0), (3, 1.5), (3, 9.0)]
    assert {tag for _, tag, _ in scalars} == {"loss", "eval/acc"}
    # TensorBoard discards earlier events from a START's step on.
    starts = [
        event.step
        for event in events
        if event.session_log.status == event_pb2.SessionLog.START
    ]
    assert starts[-1] == 3
    texts = [
        value.tensor.string_val[0].decode()
        for event in events
        for value in event.summary.value
        if value.WhichOneof("value") == "tensor"
    ]
    assert any("    *text*" in text for text in texts)
    assert any('"model": "tiny"' in text for text in texts)


def test_tensorboard_has_the_keys_as_hyperparameters(tmp_path):
    training = {"learning_rate": 0.5, "bf16": True, "lora": {"r": 8}, "run_name": None}
    config = {
        "training": training,
        "data": {"train": "a.jsonl"},
        "provenance": {"n": 1},
    }
    with make_writers("tensorboard", tmp_path, None, config):
        pass
    (content,) = (
        value.metadata.plugin_data.content
        for event in read_events(tmp_path / "tensorboard")
        for value in event.summary.value
        if value.tag == "_hparams_/session_start_info"
    )
    found = plugin_hparams_pb2.HParamsPluginData.FromString(content)
    hparams = {
        name: getattr(value, value.WhichOneof("kind"))
        for name, value in found.session_start_info.hparams.items()
    }
    assert hparams == {
        "training.learning_rate": 0.5,
        "training.bf16": True,
        "training.lora.r": 8,
        "data.train": "a.jsonl",
    }


def test_tensorboard_takes_any_number_and_any_text(tmp_path):
    # Beyond float32, and a step, a tag and a text of several bytes' length each.
    numbers = {"huge": 1e300, "not": math.nan, "below": -math.inf, "ä" * 300: 0.1}
    text = "Füße " * 2000
    with make_writers("tensorboard", tmp_path, None, {}) as writers:
        writers.write(10**9, numbers)
        writers.write_text(10**9, {"sample": text})
    events = read_events(tmp_path / "tensorboard")
    assert events[0].file_version == "brain.Event:2"
    values = {
        value.tag: value
        for event in events
        for value in event.summary.value
        if event.step == 10**9
    }
    assert values["huge"].simple_value == math.inf
    assert math.isnan(values["not"].simple_value)
    assert values["below"].simple_value == -math.inf
    assert values["ä" * 300].simple_value == pytest.approx(0.1, rel=1e-7)
    sample = values["sample/text_summary"]
    assert sample.metadata.plugin_data.plugin_name == "text"
    assert [dim.size for dim in sample.tensor.tensor_shape.dim] == [1]
    assert sample.tensor.dtype == types_pb2.DT_STRING
    assert sample.tensor.string_val[0].decode() == f"    {text}"


def test_only_process_zero_writes(tmp_path):
    folder = tmp_path / "run"
    with make_writers(
        ["tensorboard"], folder, None, {"a": 1}, process_index=1
    ) as writers:
        writers.write(1, {"loss": 1})
        writers.write_text(1, {"a": "b"})
    assert not folder.exists()


def test_an_unknown_tracker_is_refused_on_every_process(tmp_path):
    for process_index in (0, 1):
        with pytest.raises(ValueError, match=r"'mlflow'.*tensorboard, wandb"):
            make_writers(["mlflow"], tmp_path, None, {}, process_index=process_index)


def test_missing_wandb_is_named_with_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"jaxtrain\[wandb\]"):
        WandbWriter(tmp_path)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"jaxtrain\[wandb\]"):
        check_installed(["wandb"])
    check_installed(["tensorboard"])


def test_wandb_keeps_one_run_over_a_resume_offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for resume_step in (None, 2, None):
        with make_writers(
            ["wandb"], tmp_path, "name", {"hf_token": "abc"}, resume_step
        ) as writers:
            writers.write((resume_step or 0) + 1, {"loss": 1.0})
            writers.write_text((resume_step or 0) + 1, {"sample": "text"})
        ids.append((tmp_path / "wandb_run_id.txt").read_text())
    assert ids[0] == ids[1] != ids[2]
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert runs
    for run in runs:
        assert b"abc" not in run.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "token",
        "hf_token",
        "auth-token",
        "accessToken",
        "api_key",
        "apiKey",
        "WANDB_API_KEY",
        "aws_access_key_id",
        "password",
        "db.password",
        "client_secret",
        "Secrets",
    ],
)
def test_a_secret_is_masked_by_its_key(name):
    assert mask_secrets({"hub": {name: "s3cr3t"}}) == {"hub": {name: "***"}}
    assert mask_secrets({name: ["s3cr3t"]}) == {name: ["***"]}
    assert mask_secrets({name: None, "a": ""}) == {name: None, "a": ""}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer", "qwen"),
        ("tokenizer_name", "qwen"),
        ("max_tokens", 100),
        ("tokens_per_sec", 1.5),
        ("num_key_value_heads", 2),
        ("eos_token", "</s>"),
        ("pad_token_id", 3),
        ("keys", "a"),
        ("monkey", "b"),
        ("metric_for_best_model", "loss"),
        ("passes", 3),
    ],
)
def test_what_only_looks_like_a_secret_stays(name, value):
    assert mask_secrets({name: value}) == {name: value}


def test_a_password_under_any_type_and_in_a_url_is_masked():
    assert mask_secrets({"password": 1234}) == {"password": "***"}
    assert mask_secrets({"proxy": "http://me:pw@host:80/x", "u": "http://host/@x"}) == {
        "proxy": "http://***@host:80/x",
        "u": "http://host/@x",
    }


def test_no_secret_reaches_any_file(tmp_path):
    config = {"hub": {"token": "s3cr3t", "revision": "main"}, "sizes": (1, 2)}
    with make_writers(["tensorboard", "jsonl"], tmp_path, None, config):
        pass
    assert config["hub"]["token"] == "s3cr3t"  # the run still has it
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"s3cr3t" not in path.read_bytes()
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "hub": {"token": "***", "revision": "main"},
        "sizes": [1, 2],
    }
