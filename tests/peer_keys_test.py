"""Options of TRL, PEFT and transformers that are no keys: what to write is told."""

import dataclasses
import re

import pytest

from jaxtrain import cli
from jaxtrain.config import ConfigError, default_config, load_yaml, peer_keys, resolve
from jaxtrain.config.flags import keys_by_last_part, resolve_flags, split_flags
from jaxtrain.config.sections import SCHEMA
from jaxtrain.tree import dotted


def told(mapping: dict) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(mapping, device_count=1)
    return caught.value.problems


def test_advice_names_keys_that_exist_and_is_for_names_that_are_none():
    keys = set(dotted(SCHEMA))
    sections = {key.rsplit(".", 1)[0] for key in keys}
    for name, text in peer_keys.ADVICE.items():
        named = set(re.findall(r"\b(?:model|data|training|mesh)\.[\w.]*\w", text))
        assert named <= keys | sections, name
        assert name not in keys_by_last_part() or name == "fsdp"  # another thing's name


@pytest.mark.torch
@pytest.mark.parametrize(
    "config", ["SFTConfig", "DPOConfig", "ModelConfig", "ScriptArguments"]
)
def test_every_option_of_trl_is_a_key_or_has_advice(config):
    trl = pytest.importorskip("trl")
    for field in dataclasses.fields(getattr(trl, config)):
        assert field.name in keys_by_last_part() or peer_keys.advice(field.name), (
            field.name
        )


def test_a_file_of_trl_is_answered_key_by_key(tmp_path):
    file = tmp_path / "trl.yaml"
    file.write_text(
        "model_name_or_path: x/y\ndataset_name: x/z\noutput_dir: out\n"
        "eval_strategy: epoch\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n"
        "learning_rate: 1e-4\nmax_length: 64\nrpo_alpha: 1.0\n"
        "training:\n  use_liger_kernel: true\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_yaml(file)
    fixes = ("--model", "data.train", "--workdir", "training.eval_steps",
             "training.lr_scheduler_kwargs", "training.learning_rate?",
             "data.max_length?", "['sigmoid', 'sft']", "remove it")  # fmt: skip
    for line, fix in zip(caught.value.problems, fixes, strict=True):
        assert fix in line
    assert not any("the keys here are" in line for line in caught.value.problems)


def test_flags_of_trl_are_all_answered_at_once(capsys):
    command = "train sft --model_name_or_path x --lr=3 --learning-rate 2 --nonsense=1"
    assert cli.main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for fix in (
        "--model_name_or_path; set model.name_or_path, or give the flag --model;",
        "--lr; set training.learning_rate;",
        "--learning-rate; did you mean --training.learning_rate?;",
        "unknown argument --nonsense (see",
    ):
        assert fix in line


def test_a_dotted_flag_is_answered_like_a_key():
    flags, _ = split_flags(["--training.dpo.rpo_alpha=1.0", "--training.optim=adamw"])
    with pytest.raises(ConfigError) as caught:
        resolve_flags(default_config(), flags)
    first, second = caught.value.problems
    assert "training.dpo.loss_weights = [1.0, alpha]" in first
    assert "training.moment_dtype" in second


@pytest.mark.parametrize(
    ("command", "fix"),
    [
        ("train kto", "jaxtrain train dpo --training.objective=kto"),
        ("train grpo", "GRPO is not implemented"),
        ("dpo", "write `jaxtrain train dpo`"),
        ("merge out/run", "model/ is merged"),
    ],
)
def test_commands_of_trl_are_answered(command, fix, capsys):
    assert cli.main(command.split()) == 2
    assert fix in capsys.readouterr().err


def test_an_idle_option_of_the_loss_is_told_once():
    for value in ("0.1", "0.0"):
        flags, _ = split_flags(
            ["--training.training_type=dpo", "--training.dpo.loss_type=ipo",
             f"--training.dpo.label_smoothing={value}"]
        )  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            resolve_flags(default_config(), flags)
        (line,) = caught.value.problems
        assert "loss_type ['ipo'] does not read it" in line


def test_modules_with_commas_are_a_list_and_a_pattern_stays_one():
    for text, wanted in [
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        ("q_proj, v_proj,", ("q_proj", "v_proj")),
        ("q_proj", ("q_proj",)),
        ("all-linear", "all-linear"),
        ("[all-linear]", "all-linear"),
        (r".*\.(q|v){1,2}_proj", r".*\.(q|v){1,2}_proj"),
    ]:
        flags, _ = split_flags(
            ["--training.training_type=lora", f"--training.lora.target_modules={text}"]
        )
        _, run = resolve_flags(default_config(), flags)
        assert run.lora is not None and run.lora.target_modules == wanted


def test_all_linear_beside_names_is_refused():
    lora = {"target_modules": ["all-linear", "lm_head"]}
    problem = told({"training": {"training_type": "lora", "lora": lora}})
    assert "stands alone" in "".join(problem)


def test_one_number_is_a_list_of_one():
    given = {"training_type": "dpo", "dpo": {"loss_weights": 0.5}}
    run = resolve({"training": given}, device_count=1)
    assert run.dpo is not None and run.dpo.loss_weights == (0.5,)
    given["dpo"] = {"loss_type": "sigmoid,sft", "loss_weights": 0.5}
    assert "one weight for each" in "".join(told({"training": given}))
