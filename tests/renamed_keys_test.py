"""A key that was renamed keeps its old name for a release, wherever it may stand."""

import logging
from unittest import mock

import pytest

from jaxtrain.config import ConfigError, default_config, load_yaml, resolve
from jaxtrain.config.flags import resolve_flags, split_flags
from jaxtrain.config.renamed import RENAMED, _default, _warn

# As if these had been renamed in this release.
TABLE = {
    "training.lr": "training.learning_rate",
    "training.mixed_precision": "training.bf16",
    "data.max_len": "data.max_length",
    "training.bits": "training.lora.quantization_block_size",
}


@pytest.fixture(autouse=True)
def table():
    _warn.cache_clear()
    with mock.patch.dict(RENAMED, TABLE):
        yield
    _warn.cache_clear()


def test_the_table_names_keys_that_exist_and_keys_that_do_not():
    for old, new in RENAMED.items():  # the package's own lines, and ours
        assert _exists(new) and not _exists(old)


def _exists(key: str) -> bool:
    at = default_config()
    for name in key.split("."):
        if name not in at:
            return False
        at = at[name]
    return True


def test_an_old_name_in_a_file_sets_the_new_key_and_warns_once(tmp_path, caplog):
    file = tmp_path / "run.yaml"
    file.write_text(
        "training:\n  training_type: sft\n  lr: 3e-4\n  bits: 32\n"
        "  sft:\n    mixed_precision: false\n"
        "data:\n  max_len: 77\n"
    )
    with caplog.at_level(logging.WARNING, "jaxtrain"):
        config = load_yaml(file)
        run = resolve(config, device_count=1)
    assert run.optimizer.learning_rate == 3e-4
    assert run.precision.bf16 is False
    assert run.data.max_length == 77
    assert config.training.lora.quantization_block_size == 32
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4
    assert told[0].startswith("training.lr is called training.learning_rate now")


def test_an_old_name_in_a_flag_in_a_program_and_in_a_saved_config():
    flags, others = split_flags(
        [
            "x",
            "--training.lr=2e-4",
            "--notraining.mixed_precision",
            "--data.max_len",
            "9",
        ]
    )
    assert others == ["x"]
    assert [flag.key for flag in flags] == [
        "training.learning_rate", "training.bf16", "data.max_length",
    ]  # fmt: skip
    config = default_config()
    _, run = resolve_flags(config, flags)
    assert (run.optimizer.learning_rate, run.data.max_length) == (2e-4, 9)
    assert run.precision.bf16 is False

    program = default_config()
    program.training.lr = 1e-3
    assert resolve(program, device_count=1).optimizer.learning_rate == 1e-3

    saved = run.to_dict()
    saved["training"]["lr"] = saved["training"].pop("learning_rate")
    assert resolve(saved).optimizer.learning_rate == 2e-4


def test_both_names_must_say_the_same():
    same = {"training": {"lr": 1e-3, "learning_rate": 1e-3}}
    assert resolve(same, device_count=1).optimizer.learning_rate == 1e-3
    other = {"training": {"lr": 1e-3, "learning_rate": 2e-3}}
    with pytest.raises(ConfigError, match=r"are one key: remove training\.lr"):
        resolve(other, device_count=1)


def test_without_an_entry_an_unknown_key_stays_an_error():
    with mock.patch.dict(RENAMED, clear=True), pytest.raises(ConfigError, match="lr"):
        resolve({"training": {"lr": 1e-3}}, device_count=1)


def test_defaults_are_found_by_full_key():
    assert _default("data.shuffle") is True
    assert _default("data.no_such_key") is None
