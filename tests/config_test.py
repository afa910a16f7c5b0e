"""The configuration: what the documented files mean, precedence, and refusals."""

import contextlib
import dataclasses
import json
import pathlib
import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from jaxtrain import schema
from jaxtrain.config import (
    ConfigError,
    ConfigManager,
    RunConfig,
    copy_config,
    default_config,
    diff,
    load_config,
    load_yaml,
    resolve,
    to_config_dict,
)
from jaxtrain.config.flags import override, split_flags
from jaxtrain.config.sections import GENERAL_KEYS, SCHEMA, TYPE_DEFAULTS
from jaxtrain.schema import OnlyIf
from jaxtrain.tree import dotted, get

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"


def training(**keys: Any) -> dict[str, Any]:
    return {"training": keys}


def problems_of(config: Any, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as refusal:
        resolve(config, **options)
    return refusal.value.problems


def write(directory: pathlib.Path, text: str, name: str = "run.yaml") -> str:
    path = directory / name
    path.write_text(text)
    return str(path)


# --- The documented YAML -------------------------------------------------------------

FROM_SCRATCH = """
training:
  training_type: "from_scratch"
  from_scratch:
    num_train_epochs: 3
    per_device_train_batch_size: 4
    per_device_eval_batch_size: 4
    gradient_accumulation_steps: 8
    learning_rate: 5e-5
    weight_decay: 0.01
    warmup_steps: 500
    max_grad_norm: 1.0
"""
HIGH_PERFORMANCE = """
training:
  training_type: "from_scratch"
  fp16: false
  bf16: true
  gradient_checkpointing: true
  dataloader_num_workers: 8
  dataloader_pin_memory: true
  distributed: true
  num_gpus: 8
  gradient_accumulation_steps: 4
  max_grad_norm: 1.0
  warmup_ratio: 0.05
  lr_scheduler_type: "cosine_with_restarts"
  deepspeed:
    zero_stage: 3
    offload_optimizer: true
    offload_param: true
"""
MEMORY_EFFICIENT = """
training:
  training_type: "lora"
  lora:
    r: 8  # Lower rank for memory efficiency
    lora_alpha: 16
    target_modules: ["q_proj", "v_proj"]  # Fewer modules
  gradient_checkpointing: true
  fp16: true
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 32
  cpu_offload: true
  pin_memory: false
"""
EXPERIMENT = """
training:
  training_type: "dpo"
  dpo:
    beta: 0.1
    max_length: 512
    reference_free: false
  num_train_epochs: 1
  eval_steps: 50
  save_steps: 100
  logging_steps: 10
  report_to: ["wandb", "tensorboard"]
  run_name: "dpo_experiment_v1"
"""


def test_the_documented_from_scratch_file_means_what_it_says(
    tmp_path: pathlib.Path,
) -> None:
    run = resolve(load_yaml(write(tmp_path, FROM_SCRATCH)))
    assert run.training_type == "from_scratch"
    assert run.objective == "next_token"
    assert run.optimizer.learning_rate == 5e-5  # a text, to PyYAML alone
    assert run.optimizer.weight_decay == 0.01
    assert run.schedule.warmup_steps == 500
    assert run.schedule.warmup_ratio == 0.0
    assert run.loop.num_train_epochs == 3
    assert run.loop.per_device_eval_batch_size == 4
    assert run.loop.gradient_accumulation_steps == 8
    assert run.data.packing
    assert run.lora is None and run.dpo is None


def test_the_documented_high_performance_file_means_what_it_says(
    tmp_path: pathlib.Path,
) -> None:
    run = resolve(load_yaml(write(tmp_path, HIGH_PERFORMANCE)), device_count=8)
    assert run.mesh.sizes == {"data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert run.devices.deepspeed.zero_stage == 3
    assert run.devices.deepspeed.offload_optimizer
    assert run.devices.deepspeed.offload_param
    assert run.precision.compute_dtype == "bfloat16"
    assert run.precision.remat == "full"
    assert run.schedule.lr_scheduler_type == "cosine_with_restarts"
    assert run.schedule.warmup_ratio == 0.05
    log = "\n".join(run.explain())
    assert "zero_stage = 3: parameters and optimizer split over devices" in log
    assert "optimizer state and parameters in pinned host memory" in log
    assert "data 1 x fsdp 8 x context 1 x tensor 1" in log


def test_a_copy_keeps_names_with_dots_and_shares_nothing() -> None:
    """In packages and regular expressions; a ConfigDict would refuse them."""
    config = default_config()
    config.training.lora.rank_pattern = {r".*\.down_proj": 4}
    config.training.callbacks = ["package.parts:Stop"]
    copied = copy_config(config)
    assert copied.to_dict() == config.to_dict()
    copied.training.lora.rank_pattern["q_proj"] = 2
    copied.training.seed = 5
    assert config.training.lora.rank_pattern == {r".*\.down_proj": 4}
    assert config.training.seed != 5
    with pytest.raises(TypeError):
        copied.training.seed = "five"
    assert copy_config(config.lock()).is_locked


def test_the_documented_memory_efficient_file_means_what_it_says(
    tmp_path: pathlib.Path,
) -> None:
    run = resolve(load_yaml(write(tmp_path, MEMORY_EFFICIENT)))
    assert run.lora is not None
    assert run.lora.enabled
    assert (run.lora.r, run.lora.lora_alpha) == (8, 16)
    assert run.lora.target_modules == ("q_proj", "v_proj")
    assert run.precision.compute_dtype == "float16"
    assert not run.precision.bf16
    assert run.devices.deepspeed.offload_optimizer
    assert run.devices.deepspeed.offload_param
    assert not run.devices.dataloader_pin_memory
    assert run.loop.gradient_accumulation_steps == 32


def test_the_documented_experiment_means_what_it_says(tmp_path: pathlib.Path) -> None:
    run = resolve(load_yaml(write(tmp_path, EXPERIMENT)))
    assert run.objective == "preference"
    assert run.dpo is not None
    assert run.dpo.beta == 0.1
    assert run.dpo.loss_type == ("sigmoid",)
    assert run.dpo.max_length == run.data.max_length == 512
    assert (run.loop.eval_steps, run.loop.save_steps) == (50, 100)
    assert run.loop.report_to == ("wandb", "tensorboard")
    assert run.loop.run_name == "dpo_experiment_v1"


def test_every_yaml_block_of_the_user_documentation_resolves(
    shared_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    text = (shared_directory / "USER_DOC.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 7
    for number, block in enumerate(blocks):
        run = resolve(load_yaml(write(tmp_path, block)))
        wanted = yaml.safe_load(block)["training"]["training_type"]
        assert run.training_type == wanted, f"block {number}"
        # `distributed` is PyTorch's: mesh does its work here.
        idle = [note for note in run.notes if note.kind != "foreign"]
        assert not idle, f"block {number} has keys without effect: {idle}"


def test_the_documented_python_assignments_work() -> None:
    config = ConfigManager()
    config.training.distributed = True
    config.training.num_gpus = 4
    config.training.gradient_accumulation_steps = 8
    config.training.gradient_checkpointing = True
    config.training.fp16 = True
    config.training.dataloader_pin_memory = True
    config.training.dataloader_num_workers = 4
    config.training.deepspeed = {
        "zero_stage": 2,
        "offload_optimizer": True,
        "offload_param": True,
    }
    config.training.curriculum = {
        "enabled": True,
        "strategy": "length_based",
        "start_length": 128,
        "end_length": 2048,
        "steps": 1000,
    }
    run = config.resolve(device_count=8)
    assert run.mesh.sizes == {"data": 4, "fsdp": 1, "context": 1, "tensor": 1}
    assert run.devices.deepspeed.zero_stage == 2
    assert run.devices.deepspeed.offload_param
    assert run.curriculum.end_length == 2048
    assert run.data.max_length == 2048  # the curriculum ends there
    assert run.precision.compute_dtype == "float16"


def test_a_dict_given_for_a_section_lies_over_its_defaults() -> None:
    config = ConfigManager()
    config.training.curriculum = {"enabled": True}
    config.training.deepspeed = {"zero_stage": 3}
    run = config.resolve()
    assert run.curriculum.steps == 1000
    assert run.curriculum.start_length == 128
    assert run.curriculum.end_length == 1024
    assert run.mesh.fsdp == -1
    assert not run.devices.deepspeed.offload_optimizer


def test_a_curriculum_may_end_at_the_length_at_which_it_starts():
    lengths = {"enabled": True, "start_length": 64, "end_length": 64}
    run = resolve({"training": {"curriculum": lengths}, "data": {"max_length": 64}})
    assert run.curriculum.start_length == run.curriculum.end_length


def test_a_manager_refuses_a_misspelt_attribute() -> None:
    config = ConfigManager()
    with pytest.raises(AttributeError, match="learning_rat"):
        config.training.learning_rat = 1e-3


def test_a_misspelt_key_in_an_assigned_dict_is_refused_with_the_right_name() -> None:
    config = ConfigManager()
    config.training.deepspeed = {"zero_stag": 2}
    assert problems_of(config) == [
        "training.deepspeed.zero_stag = 2: unknown key; did you mean"
        " training.deepspeed.zero_stage?"
    ]


# --- Files ---------------------------------------------------------------------------


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path: pathlib.Path) -> None:
    path = write(
        tmp_path,
        "training: {learning_rate: 1e-6, adam_epsilon: 1E-7, max_steps: 1e3,\n"
        "  weight_decay: 1, warmup_steps: 10, run_name: 5e-5x, momentum: .5,\n"
        "  optimizer: sgd}",
    )
    run = resolve(load_yaml(path))
    assert run.optimizer.learning_rate == 1e-6
    assert run.optimizer.adam_epsilon == 1e-7
    assert run.optimizer.weight_decay == 1.0
    assert run.optimizer.momentum == 0.5
    assert run.loop.max_steps == 1000 and isinstance(run.loop.max_steps, int)
    assert run.schedule.warmup_steps == 10
    assert run.loop.run_name == "5e-5x"


def test_reading_yaml_leaves_pyyaml_as_it_was(tmp_path: pathlib.Path) -> None:
    load_yaml(write(tmp_path, FROM_SCRATCH))
    assert yaml.safe_load("5e-5") == "5e-5"


def test_a_number_in_quotes_is_refused_with_the_reason(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, 'training: {learning_rate: "5e-5"}')
    with pytest.raises(ConfigError, match="write it without quotes"):
        load_yaml(path)


def test_a_yaml_file_that_fails_to_load_lists_its_other_problems_too(
    tmp_path: pathlib.Path,
) -> None:
    path = write(
        tmp_path,
        "training: {lerning_rate: 5e-5, warmup_ratio: 2, fp16: true, bf16: true}\n"
        "modle: {}",
    )
    with pytest.raises(ConfigError) as refusal:
        load_yaml(path)
    report = str(refusal.value)
    assert "training.lerning_rate" in report and "training.learning_rate?" in report
    assert "training.warmup_ratio = 2" in report
    assert "training.fp16" in report
    assert "modle" in report and "did you mean model?" in report


def test_a_yaml_key_given_twice_is_refused(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, "training:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ConfigError, match="'seed' is given twice"):
        load_yaml(path)


@pytest.mark.parametrize("text", ["- 1\n", "training: [unclosed", "7", "", "---\n"])
def test_a_file_that_is_no_yaml_mapping_is_refused(
    tmp_path: pathlib.Path, text: str
) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_yaml(write(tmp_path, text))


@pytest.mark.parametrize("text", ["{}", "training:\n", "training: {run_name: null}\n"])
def test_nothing_set_in_yaml_is_the_default(tmp_path: pathlib.Path, text: str) -> None:
    assert resolve(load_yaml(write(tmp_path, text))) == resolve({})


def test_null_for_a_key_that_has_a_default_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.seed = None: not an integer"):
        load_yaml(write(tmp_path, "training: {seed: null}"))


def test_a_yaml_merge_key_works(tmp_path: pathlib.Path) -> None:
    text = "training:\n  sft: &a {seed: 7}\n  dpo: {<<: *a, beta: 0.2}\n"
    config = load_yaml(write(tmp_path, text))
    assert config.training.dpo.seed == 7
    assert config.training.dpo.beta == 0.2


def test_load_config_reads_python_files_by_path() -> None:
    config = load_config(CONFIGS / "dpo.py")
    assert config.training.training_type == "dpo"


def test_load_config_passes_on_what_follows_the_colon(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, EXPERIMENT)
    manager = ConfigManager()
    manager.load_config(f"{CONFIGS / 'from_yaml.py'}:{path}")
    assert manager.resolve().loop.run_name == "dpo_experiment_v1"


def test_load_config_refuses_other_files(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"give a \.yaml or \.py file"):
        load_config(tmp_path / "run.toml")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_config(tmp_path / "absent.py")


# --- The command line ----------------------------------------------------------------


def parse(*arguments: str, config: str = "dpo.py") -> ConfigDict:
    """What a command makes of a file and these flags."""
    loaded = load_config(CONFIGS / config)
    found, rest = split_flags(arguments)
    assert not rest
    override(loaded, found)
    return loaded


def test_flags_override_keys_of_every_kind() -> None:
    config = parse(
        "--config.training.dpo.beta=0.2",
        "--config.training.learning_rate=1e-6",
        "--config.training.max_steps=3",
        "--config.training.bf16",
        "--config.training.report_to=wandb,jsonl",
        "--config.training.dpo.loss_type=['sigmoid','sft']",
        "--config.training.dpo.loss_weights=(1,0.5)",
        "--config.training.run_name=a",
        "--config.training.deepspeed={'zero_stage':3}",
        "--config.training.lora.enabled=true",
        "--config.training.lora.target_modules=all-linear",
        "--config.training.eval_steps=0",
        "--config.mesh.data=2",
        "--config.mesh.fsdp=-1",
        "--config.data.packing=false",
    )
    run = resolve(config, device_count=8)
    assert run.dpo is not None and run.lora is not None
    assert run.dpo.beta == 0.2
    assert run.dpo.loss_type == ("sigmoid", "sft")
    assert run.dpo.loss_weights == (1.0, 0.5)
    assert run.optimizer.learning_rate == 1e-6
    assert run.loop.max_steps == 3
    assert run.precision.bf16
    assert run.loop.report_to == ("wandb", "jsonl")
    assert run.loop.run_name == "a"
    assert run.loop.eval_steps == 0
    assert run.lora.target_modules == "all-linear"
    assert run.mesh.sizes == {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}


def test_flags_set_lists_and_mappings_of_the_architecture() -> None:
    config = parse(
        "--config.model.architecture.rope_scaling={'rope_type':'linear','factor':2.0}",
        "--config.model.architecture.layer_types=['full_attention']",
        "--config.model.architecture.num_hidden_layers=1",
        config="from_scratch.py",
    )
    sizes = resolve(config).model.architecture
    assert sizes.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert sizes.layer_types == ("full_attention",)


def sample_of(hint: Any) -> tuple[str, Any]:
    """A text of the command line, and the value that it should set."""
    names = schema._allowed_texts(hint)
    texts = ["3", "2", "1", "0.25", "true", "x", "['x']", "(1, 0.5)", "1,2"]
    texts += ["{'x': 1}", "x:y", "['x:y']", "[['x', 1]]", *names, *names]
    values = [3, 2, 1, 0.25, True, "x", ("x",), (1.0, 0.5), (1, 2), {"x": 1}]
    values += ["x:y", ("x:y",), (("x", 1.0),), *names]
    values += [(name,) for name in names]
    for text, value in zip(texts, values, strict=True):
        with contextlib.suppress(ValueError):
            if type(converted := schema.convert(value, hint)) is type(value):
                return text, converted
    raise AssertionError(f"no sample for {hint}")


@pytest.mark.parametrize("training_type", TYPE_DEFAULTS)
def test_every_key_can_be_overridden_by_a_flag(training_type: str) -> None:
    keys = [
        key
        for key in dotted(SCHEMA)
        if key.split(".")[1] not in {*TYPE_DEFAULTS} - {training_type}
        and key != "training.training_type"
    ]
    samples = {key: sample_of(get(SCHEMA, key).hint) for key in keys}
    texts = [f"--config.{key}={text}" for key, (text, _) in samples.items()]
    config = parse(
        f"--training.training_type={training_type}", *texts, config="base.py"
    )
    for key, (_, value) in samples.items():
        *sections, name = key.split(".")
        found = get(config, tuple(sections))[name]
        found = found.to_dict() if isinstance(found, ConfigDict) else found
        assert found == value, key


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lerning_rate: .* training\.learning_rate"):
        parse("--config.training.lerning_rate=1")


# --- Precedence ----------------------------------------------------------------------

_NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "learning_rate": st.floats(1e-7, 1.0),
    "weight_decay": st.floats(0, 1.0),
    "adam_beta2": st.floats(0, 0.999),
    "num_train_epochs": st.floats(0.1, 9.0),
    "per_device_train_batch_size": st.integers(1, 64),
    "seed": st.integers(0, 2**32 - 1),
    "max_grad_norm": st.floats(0, 10.0),
    "logging_steps": st.integers(1, 99),
    "gradient_checkpointing": st.booleans(),
    "run_name": st.sampled_from(["a", "b"]),
    "lr_scheduler_type": st.sampled_from(["linear", "cosine", "inverse_sqrt"]),
}


@given(
    st.data(), st.sampled_from(sorted(_NUMBERS)), st.sampled_from(sorted(TYPE_DEFAULTS))
)
def test_block_over_general_over_the_types_default(
    data: st.DataObject, key: str, training_type: str
) -> None:
    values = st.none() | _NUMBERS[key]
    block, general, other = (data.draw(values) for _ in range(3))
    bystander = "sft" if training_type != "sft" else "dpo"
    keys: dict[str, Any] = {"training_type": training_type}
    if general is not None:
        keys[key] = general
    if block is not None:
        keys[training_type] = {key: block}
    if other is not None:
        keys[bystander] = {key: other}
    resolved = resolve({"training": keys}).to_dict()["training"][key]

    default = TYPE_DEFAULTS[training_type].get(key, SCHEMA["training"][key].default)
    expected = block if block is not None else general
    expected = default if expected is None else expected
    assert resolved == expected


def test_a_nested_key_of_a_block_overrides_the_general_one() -> None:
    run = resolve(
        training(
            training_type="dpo",
            deepspeed={"zero_stage": 3, "offload_param": True},
            lr_scheduler_type="polynomial",
            lr_scheduler_kwargs={"power": 2.0},
            dpo={"deepspeed": {"zero_stage": 0}, "lr_scheduler_kwargs": {"power": 3}},
        )
    )
    assert run.devices.deepspeed.zero_stage == 0
    assert run.devices.deepspeed.offload_param
    assert run.schedule.options == {"power": 3.0}


def test_every_general_key_can_stand_in_every_block() -> None:
    for name in TYPE_DEFAULTS:
        assert set(GENERAL_KEYS) <= set(dotted(SCHEMA["training"][name]))


def test_a_blocks_warmup_ratio_is_not_overruled_by_general_warmup_steps() -> None:
    run = resolve(training(warmup_steps=100, sft={"warmup_ratio": 0.1}))
    assert (run.schedule.warmup_steps, run.schedule.warmup_ratio) == (0, 0.1)
    assert [str(note) for note in run.notes] == [
        "training.warmup_steps = 100 gives way to training.sft.warmup_ratio = 0.1",
    ]


def test_warmup_steps_overrule_warmup_ratio_as_in_transformers() -> None:
    run = resolve(training(warmup_steps=100, warmup_ratio=0.1))
    assert (run.schedule.warmup_steps, run.schedule.warmup_ratio) == (100, 0.0)
    (note,) = run.notes
    assert (note.kind, note.key) == ("overruled", "training.warmup_ratio")
    assert note.reason == "training.warmup_steps = 100"


def test_zero_warmup_steps_alone_means_no_warmup() -> None:
    run = resolve(training(training_type="from_scratch", warmup_steps=0))
    assert (run.schedule.warmup_steps, run.schedule.warmup_ratio) == (0, 0.0)


@pytest.mark.parametrize(
    ("training_type", "enabled", "rate"),
    [
        ("from_scratch", None, 3e-4),
        ("sft", None, 2e-5),
        ("sft", True, 2e-4),
        ("lora", None, 2e-4),
        ("dpo", None, 1e-6),
        ("dpo", True, 1e-5),
    ],
)
def test_the_default_learning_rate_is_by_type_and_by_adapters(
    training_type: str, enabled: bool | None, rate: float
) -> None:
    run = resolve(training(training_type=training_type, lora={"enabled": enabled}))
    assert run.optimizer.learning_rate == rate
    assert (run.lora is not None) == (training_type == "lora" or bool(enabled))


def test_a_key_without_effect_is_named_in_the_log() -> None:
    run = resolve(
        {
            "training": {
                "training_type": "sft",
                "seed": 1,
                "distributed": True,
                "sft": {"seed": 2},
                "dpo": {"learning_rate": 1e-3, "beta": 0.3},
                "lora": {"r": 4},
                "curriculum": {"steps": 5},
            },
            "model": {"architecture": {"hidden_size": 64}},
        }
    )
    log = "\n".join(run.explain())
    for line in (
        "training.seed = 1 gives way to training.sft.seed = 2",
        "training.dpo.beta = 0.3, training.dpo.learning_rate = 0.001 (training_type is",
        "training.lora.r = 4 (training.lora.enabled is false)",
        "training.curriculum.steps = 5 (curriculum.enabled is false)",
        "model.architecture.hidden_size = 64 (sizes come with the",
        "without effect in JAX: training.distributed = True",
    ):
        assert line in log
    assert len([line for line in log.splitlines() if "without effect:" in line]) == 1
    assert run.model.architecture.hidden_size == 128


def test_lora_keys_act_under_dpo_with_adapters() -> None:
    run = resolve(training(training_type="dpo", lora={"enabled": True, "r": 4}))
    assert run.lora is not None and run.lora.r == 4
    assert not run.notes


# --- Refusals ------------------------------------------------------------------------


def test_all_problems_are_reported_at_once() -> None:
    problems = problems_of(
        {
            "training": {
                "training_type": "dpo",
                "beta": 2,
                "lerning_rate": 1,
                "fp16": True,
                "bf16": True,
                "warmup_ratio": 1.5,
                "optimizer": "adam",
                "max_grad_norm": "1.0",
                "seed": True,
                "adam_epsilon": float("nan"),
                "dpo": {"loss_type": "sigmod", "max_prompt_length": 4096},
            },
            "model": {"architecture": {"model_type": "lama"}},
            "mesh": {"context": 3},
            "optimiser": {},
        }
    )
    expected = [
        "model.architecture.model_type = 'lama': not one of llama, qwen2",
        "training.beta = 2: unknown key; did you mean training.dpo.beta?",
        "training.lerning_rate = 1: unknown key; did you mean training.learning_rate?",
        "training.warmup_ratio = 1.5: not a number in [0, 1]; set one",
        "did you mean 'adamw'?",
        "training.max_grad_norm = '1.0': a string, not a number >= 0; write it without",
        "training.seed = True: not an integer",
        "training.adam_epsilon = nan: not a number in (0, 1]",
        "did you mean 'sigmoid'?",
        "optimiser = {}: unknown key; did you mean training.optimizer?",
        "training.fp16 = True: bf16 is true too",
        "mesh.context = 3",
        "training.dpo.max_prompt_length = 4096: leaves no room",
    ]
    assert len(problems) == len(expected)
    for text in expected:
        assert any(text in line for line in problems), text
    assert all("; " in line for line in problems)  # each names a fix


def test_the_error_is_a_value_error_that_can_be_raised_again_from_its_text() -> None:
    error = ConfigError(["a = 1: bad; fix", "b = 2: bad; fix"])
    assert isinstance(error, ValueError)
    # absl does this to an error from a config file.
    assert type(error)(str(error)).problems == error.problems


_DPO = {"training_type": "dpo"}
_SCRATCH = {"training_type": "from_scratch"}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"training": {"fp16": True, "bf16": True}}, "training.fp16 = True"),
        ({"training": {"sft": {"fp16": True}, "bf16": True}}, "training.sft.fp16"),
        ({"training": {"max_steps": 0}}, "training.max_steps = 0"),
        ({"training": {"training_type": "lora", "lora": {"enabled": False}}},
         "training.lora.enabled = False"),
        ({"training": {**_SCRATCH, "lora": {"enabled": True}}},
         "training.lora.enabled = True"),
        ({"training": {"training_type": "lora", "lora": {"target_modules": []}}},
         "training.lora.target_modules"),
        ({"training": {"training_type": "ppo"}}, "training.training_type = 'ppo'"),
        # schedule and optimizer
        ({"training": {"lr_scheduler_kwargs": {"power": 2.0}}},
         "lr_scheduler_kwargs.power = 2.0: lr_scheduler_type 'linear' does not read"),
        ({"training": {"lr_scheduler_type": "constant", "warmup_steps": 5}},
         "training.warmup_steps = 5: lr_scheduler_type 'constant' has no warm-up"),
        ({"training": {"lr_scheduler_type": "cosine_with_restarts",
                       "lr_scheduler_kwargs": {"num_cycles": 1.5}}}, "num_cycles"),
        ({"training": {"lr_scheduler_type": "cosine_with_min_lr"}}, "min_lr_rate"),
        ({"training": {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8,
                       "lr_scheduler_kwargs": {"lr_end": 1e-7}}}, "lr_end = 1e-07"),
        ({"training": {"momentum": 0.9}}, "training.momentum = 0.9"),
        # loop
        ({"training": {"report_to": ["none", "wandb"]}}, "training.report_to"),
        ({"training": {"report_to": "comet"}}, "training.report_to = 'comet'"),
        ({"training": {"early_stopping_patience": 2, "eval_steps": 0}},
         "training.early_stopping_patience = 2"),
        ({"training": {"load_best_model_at_end": True, "eval_steps": 20,
                       "save_steps": 30}}, "training.save_steps = 30"),
        ({"training": {"load_best_model_at_end": True, "save_steps": 0}},
         "training.save_steps = 0"),
        ({"training": {"resume_from_checkpoint": True}},
         "training.resume_from_checkpoint = True"),
        # numbers that no device counts to
        ({"training": {"max_steps": 3_000_000_000}},
         "training.max_steps = 3000000000: beyond 2147483647"),
        ({"training": {"warmup_steps": 2**31}}, "training.warmup_steps = 2147483648"),
        # as transformers 5 writes a share
        ({"training": {"warmup_steps": 0.1}}, "set training.warmup_ratio = 0.1"),
        ({"training": {"learning_rate": 1e39}},
         "training.learning_rate = 1e+39: beyond 3.402823466e+38"),
        ({"training": {"weight_decay": -1e40}}, "training.weight_decay = -1e+40"),
        ({"training": {"seed": 2**32}}, "training.seed = 4294967296: not an integer"),
        ({"training": {"gradient_accumulation_steps": 2_000_000_000}},
         "training.gradient_accumulation_steps = 2000000000: with per_device_train_"
         "batch_size = 8 and max_length = 1024 the rows of a step do not fit"),
        ({"training": {"per_device_train_batch_size": 2_000_000_000}},
         "training.per_device_train_batch_size = 2000000000: with gradient_acc"),
        # devices
        ({"training": {"pin_memory": False, "dataloader_pin_memory": True}},
         "training.pin_memory = False"),
        ({"training": {"cpu_offload": True, "deepspeed": {"offload_param": False}}},
         "training.deepspeed.offload_param = False"),
        ({"training": {"deepspeed": {"offload_param": {"device": "cpu"}}}},
         "training.deepspeed.offload_param"),
        ({"training": {"deepspeed": {"zero_stage": 4}}}, "zero_stage = 4"),
        ({"training": {"deepspeed": {"zero_stage": True}}}, "zero_stage = True"),
        ({"training": {"deepspeed": 2}}, "training.deepspeed = 2: a section"),
        ({"training": {"deepspeed": {"zero_stage": 3}}, "mesh": {"data": -1}},
         "training.deepspeed.zero_stage = 3"),
        ({"training": {"deepspeed": {"zero_stage": 2}}, "mesh": {"fsdp": 4}},
         "mesh.fsdp = 4"),
        ({"mesh": {"data": -1, "tensor": -1}}, "mesh.data = -1: mesh.tensor is -1"),
        ({"mesh": {"tensor": 0}}, "mesh.tensor = 0"),
        ({"mesh": {"data": 2}, "training": {"num_gpus": 4}},
         "uses 2 devices, but training.num_gpus is 4"),
        ({"mesh": {"tensor": 3}, "training": {"num_gpus": 4}}, "not divisible by 3"),
        ({"mesh": {"tensor": 3}, "training": {"num_gpus": 4}},
         "the nearest are data 2 x tensor 2"),
        ({"mesh": {"data": 3, "context": 2}, "training": {"num_gpus": 8}},
         "the nearest for 8 is data 4 x context 2"),
        ({"mesh": {"context": 12}}, "the nearest is 8"),
        ({"mesh": {"stage": 2}}, "mesh.stage = 2: layers are not split"),
        ({"mesh": {"expert": 3, "data": 2}, "training": {"num_gpus": 8}},
         "the nearest for 8 is data 4 x expert 2"),
        ({"mesh": {"data": 4, "dcn_data": 3}}, "mesh.dcn_data = 3: mesh.data = 4"),
        # curriculum and lengths
        ({"training": {"curriculum": {"enabled": True, "start_length": 64,
                                      "end_length": 32}}},
         "training.curriculum.start_length = 64"),
        ({"training": {"curriculum": {"enabled": True, "end_length": 512}},
          "data": {"max_length": 256}}, "training.curriculum.end_length = 512"),
        ({"training": {"curriculum": {"strategy": "hard"}}}, "strategy = 'hard'"),
        ({"training": {"curriculum": {"steps": 0}}}, "training.curriculum.steps = 0"),
        ({"training": _SCRATCH, "data": {"max_length": 8192}},
         "data.max_length = 8192: beyond model.architecture.max_position_embeddings"),
        # model
        ({"training": _SCRATCH,
          "model": {"name_or_path": "a/b", "architecture": {"hidden_size": 64}}},
         "model.architecture.hidden_size = 64"),
        ({"training": _SCRATCH, "model": {"architecture": {"hidden_size": 130}}},
         "model.architecture.hidden_size = 130"),
        ({"training": _SCRATCH, "model": {"architecture": {"num_key_value_heads": 3}}},
         "model.architecture.num_key_value_heads = 3"),
        ({"training": _SCRATCH, "model": {"architecture": {"head_dim": 33}}},
         "model.architecture.head_dim = 33"),
        ({"training": _SCRATCH, "model": {"architecture":
          {"model_type": "gemma2", "hidden_act": "silu"}}}, "set hidden_activation"),
        # data
        ({"training": _DPO, "data": {"format": "text"}}, "data.format = 'text'"),
        ({"data": {"format": "preference"}}, "data.format = 'preference'"),
        ({"data": {"format": "text", "assistant_only_loss": True}},
         "data.assistant_only_loss = True"),
        ({"data": {"train_on_turns": "last"}}, "data.train_on_turns = 'last'"),
        ({"data": {"train_on_thinking": False}}, "data.train_on_thinking = False"),
        ({"data": {"preserve_thinking": True}}, "data.preserve_thinking = True"),
        ({"data": {"assistant_only_loss": True, "train_on_turns": "first"}},
         "data.train_on_turns = 'first'"),
        ({"data": {"format": "text", "completion_only_loss": True}},
         "data.completion_only_loss = True"),
        ({"data": {"on_bad_row": "ignore"}}, "data.on_bad_row = 'ignore'"),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused_by_its_key(
    config: dict[str, Any], problem: str
) -> None:
    problems = problems_of(config)
    assert len(problems) == 1, problems
    assert problem in problems[0]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"beta": 0}, "beta = 0"),
        ({"loss_type": []}, "loss_type = ()"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1]}, "loss_weights"),
        ({"label_smoothing": 0.1}, "label_smoothing = 0.1: loss_type ['sigmoid']"),
        ({"label_smoothing": 0.5, "loss_type": "robust"}, "label_smoothing = 0.5"),
        ({"loss_type": "exo_pair"}, "label_smoothing = 0.0: exo_pair"),
        ({"loss_type": "hinge", "conservative_smoothing": 0.1}, "conservative_smooth"),
        ({"discopop_tau": 0.1}, "discopop_tau = 0.1"),
        ({"loss_type": "bco_pair", "f_divergence_type": "forward_kl"}, "f_divergence"),
        ({"loss_type": "aot", "use_weighting": True}, "use_weighting = True"),
        ({"reference_free": True, "precompute_ref_log_probs": True}, "precompute"),
        ({"reference_free": True, "sync_ref_model": True}, "sync_ref_model"),
        ({"precompute_ref_log_probs": True, "sync_ref_model": True}, "sync_ref_model"),
        ({"max_length": 64, "max_prompt_length": 64}, "max_prompt_length = 64"),
        ({"ld_alpha": 1.5}, "ld_alpha = 1.5"),
    ],
)
def test_a_dpo_contradiction_is_refused_by_its_key(
    keys: dict[str, Any], problem: str
) -> None:
    problems = problems_of(training(training_type="dpo", dpo=keys))
    assert len(problems) == 1, problems
    assert f"training.dpo.{problem}" in problems[0]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        # (a refused key, and one whose complaint would rest on its default)
        ({"training": {"optimizer": "sdg", "momentum": 0.9}}, "training.optimizer"),
        (
            {"training": {"sft": {"optimizer": "sdg"}, "momentum": 0.9}},
            "training.sft.optimizer",
        ),
        (
            {"training": {"lr_scheduler_type": "wdd",
                          "lr_scheduler_kwargs": {"num_decay_steps": 3}}},
            "training.lr_scheduler_type",
        ),
        (
            {"training": {"training_type": "lroa", "lora": {"quantization": "nf4"}}},
            "training.training_type",
        ),
        (
            {"training": {"load_best_model_at_end": True, "save_steps": 20,
                          "eval_steps": "10"}},
            "training.eval_steps",
        ),
        ({"mesh": {"data": "2", "tensor": 4}}, "mesh.data"),
        (
            {"training": {"num_gpus": "2"}, "mesh": {"data": 2}},
            "training.num_gpus",
        ),
        (
            {"training": {"curriculum": {"enabled": True, "start_length": 2000,
                                         "end_length": 0}}},
            "training.curriculum.end_length",
        ),
        (
            {"training": {"max_steps": "9"}, "data": {"streaming": True}},
            "training.max_steps",
        ),
        (
            {"training": {"training_type": "from_scratch"},
             "model": {"architecture": {"num_attention_heads": 0, "hidden_size": 33}}},
            "model.architecture.num_attention_heads",
        ),
        (
            {"training": {"training_type": "dpo",
                          "dpo": {"loss_type": "robst", "label_smoothing": 0.1}}},
            "training.dpo.loss_type",
        ),
        (
            {"training": {"training_type": "dpo",
                          "dpo": {"loss_type": "exo_pair", "label_smoothing": 1.5}}},
            "training.dpo.label_smoothing",
        ),
        (
            {"training": {"generation": 3, "metric_for_best_model": "bleu"}},
            "training.generation",
        ),
    ],
)  # fmt: skip
def test_a_refused_key_causes_no_second_complaint(
    config: dict[str, Any], key: str
) -> None:
    problems = problems_of(config, device_count=6)
    assert [problem.split(" = ")[0] for problem in problems] == [key]


def test_a_valid_value_of_the_block_is_judged_though_the_general_one_is_refused() -> (
    None
):
    problems = problems_of(
        training(optimizer="sdg", momentum=0.9, sft={"optimizer": "lion"})
    )
    assert len(problems) == 2
    assert "training.momentum = 0.9: optimizer 'lion' does not read it" in problems[1]


def test_the_conditions_of_keys_name_keys() -> None:
    keys = dotted(SCHEMA)
    conditions = {each.key for leaf in keys.values() for each in leaf.all(OnlyIf)}
    assert len(conditions) > 5
    assert conditions <= keys.keys()


def test_infinity_and_nan_are_no_numbers() -> None:
    keys = training(learning_rate=float("inf"), dpo={"loss_weights": [float("nan")]})
    assert len(problems_of(keys)) == 2


def test_a_problem_in_another_types_block_is_still_reported() -> None:
    problems = problems_of(training(dpo={"beta": -1.0}))
    assert problems == ["training.dpo.beta = -1.0: not a number > 0; set one"]


# --- Devices -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "devices", "sizes", "stage"),
    [
        ({}, None, (-1, 1, 1), 0),
        ({}, 8, (8, 1, 1), 0),
        ({"mesh": {"tensor": 2}}, 8, (4, 1, 2), 0),
        ({"mesh": {"tensor": -1}}, 8, (1, 1, 8), 0),
        ({"mesh": {"fsdp": -1}}, 8, (1, 8, 1), 3),
        ({"mesh": {"fsdp": 4}}, 8, (2, 4, 1), 3),
        ({"mesh": {"data": 2}}, 2, (2, 1, 1), 0),
        ({"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}, 8, (2, 2, 2), 3),
        ({"training": {"deepspeed": {"zero_stage": 3}}}, None, (1, -1, 1), 3),
        ({"training": {"deepspeed": {"zero_stage": 3}}}, 1, (1, 1, 1), 3),
        ({"training": {"deepspeed": {"zero_stage": 3}}, "mesh": {"data": 2}},
         8, (2, 4, 1), 3),
        ({"training": {"deepspeed": {"zero_stage": 1}}}, 8, (8, 1, 1), 1),
        ({"training": {"num_gpus": 4}}, 8, (4, 1, 1), 0),
        ({"training": {"num_gpus": 4}}, None, (4, 1, 1), 0),
        ({"training": {"num_gpus": 4}, "mesh": {"data": 4}}, 8, (4, 1, 1), 0),
    ],
)  # fmt: skip
def test_the_mesh_takes_the_devices_that_there_are(
    config: dict[str, Any],
    devices: int | None,
    sizes: tuple[int, int, int],
    stage: int,
) -> None:
    run = resolve(config, device_count=devices)
    assert (run.mesh.data, run.mesh.fsdp, run.mesh.tensor) == sizes
    assert run.devices.deepspeed.zero_stage == stage


def test_more_devices_than_present_are_refused_once_the_count_is_known() -> None:
    config = training(num_gpus=16)
    assert resolve(config).devices.num_gpus == 16
    (problem,) = problems_of(config, device_count=8)
    assert problem.startswith("training.num_gpus = 16: only 8 devices are present")


def test_a_mesh_of_another_size_than_the_devices_is_refused() -> None:
    config = {"mesh": {"data": 2, "fsdp": 2}}
    (problem,) = problems_of(config, device_count=8)
    assert "uses 4 devices, but the number of devices is 8" in problem


def test_the_log_counts_the_rows_of_a_step() -> None:
    keys = training(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    log = "\n".join(resolve(keys | {"mesh": {"tensor": 2}}, device_count=8).explain())
    assert "32 rows an optimizer step" in log  # 2 rows x 4 x (8 devices / 2 tensor)


# --- Derived values ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, "bfloat16"),
        ({"fp16": True}, "float16"),
        ({"bf16": False}, "float32"),
        ({"bf16": True}, "bfloat16"),
        ({"bf16": True, "fp16": False}, "bfloat16"),
    ],
)
def test_the_compute_dtype_follows_fp16_and_bf16(
    keys: dict[str, bool], dtype: str
) -> None:
    assert resolve(training(**keys)).precision.compute_dtype == dtype


@pytest.mark.parametrize(
    ("metric", "greater"),
    [("eval_loss", False), ("eval_perplexity", False), ("eval_kl", False),
     ("eval_rewards/accuracies", True), ("eval_bleu", True)],
)  # fmt: skip
def test_the_better_direction_is_read_off_the_metrics_name(
    metric: str, greater: bool
) -> None:
    keys = {"metric_for_best_model": metric}
    if metric == "eval_bleu":
        keys["generation"] = {"enabled": True, "metrics": ["bleu"]}
    assert resolve(training(**keys)).loop.greater_is_better == greater
    keys |= {"greater_is_better": not greater}
    assert resolve(training(**keys)).loop.greater_is_better != greater


def test_trackers_can_be_one_text_or_none() -> None:
    assert resolve(training(report_to="wandb")).loop.report_to == ("wandb",)
    assert resolve(training(report_to="none")).loop.report_to == ()
    assert resolve(training(report_to=[])).loop.report_to == ()


def test_dpos_own_max_length_wins_and_the_log_says_so() -> None:
    config = {**training(training_type="dpo", dpo={"max_length": 64})}
    config["data"] = {"max_length": 128}
    run = resolve(config)
    assert run.dpo is not None
    assert run.data.max_length == run.dpo.max_length == 64
    (note,) = run.notes
    assert str(note).startswith("data.max_length = 128 gives way")


def test_the_types_default_warmup_gives_way_to_a_constant_schedule() -> None:
    keys = training(training_type="from_scratch", lr_scheduler_type="constant")
    assert resolve(keys).schedule.warmup_ratio == 0.0


def test_a_resolved_run_has_no_unset_derived_field() -> None:
    for training_type in TYPE_DEFAULTS:
        run = resolve(training(training_type=training_type))
        flat = dotted(run.to_dict())
        for path, leaf in dotted(SCHEMA).items():
            if path in flat and flat[path] is None:
                assert schema.convert(None, leaf.hint) is None, f"{path} is unset"


def test_sections_are_frozen() -> None:
    run = resolve({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.optimizer.learning_rate = 1.0  # type: ignore[misc]


# --- Saving and comparing ------------------------------------------------------------

_CONFIGS = st.fixed_dictionaries(
    {
        "training": st.fixed_dictionaries(
            {"training_type": st.sampled_from(sorted(TYPE_DEFAULTS))},
            optional={
                **_NUMBERS,
                "fp16": st.booleans(),
                "report_to": st.sampled_from(["none", "wandb", ["jsonl", "wandb"]]),
                "warmup_steps": st.integers(0, 100),
                "warmup_ratio": st.floats(0, 1),
                "cpu_offload": st.booleans(),
                "pin_memory": st.booleans(),
                "deepspeed": st.sampled_from([{}, {"zero_stage": 3}]),
                "curriculum": st.sampled_from(
                    [{}, {"enabled": True, "end_length": 512}, {"steps": 7}]
                ),
                "dpo": st.sampled_from(
                    [{}, {"loss_type": ["ipo", "sft"], "loss_weights": [1, 0.1]}]
                ),
                "lora": st.sampled_from([{}, {"r": 2, "target_modules": ["q_proj"]}]),
            },
        )
    },
    optional={
        "mesh": st.sampled_from([{}, {"tensor": 2}]),
        "model": st.sampled_from([{}, {"architecture": {"hidden_size": 64}}]),
    },
)


@given(_CONFIGS, st.sampled_from([None, 8]))
def test_a_saved_run_comes_back_equal(
    config: dict[str, Any], device_count: int | None
) -> None:
    run = resolve(config, device_count=device_count)
    saved = json.loads(json.dumps(run.to_dict()))
    again = RunConfig.from_dict(saved)
    assert again == run
    assert resolve(to_config_dict(run)) == run
    assert diff(run, again) == diff(run, saved) == []
    assert not again.notes  # only what the run reads was saved


def test_diff_names_the_changed_keys() -> None:
    old = resolve(training(training_type="dpo", seed=1))
    new = resolve(training(training_type="dpo", seed=2, dpo={"beta": 0.2}))
    expected = [
        "training.dpo.beta: 0.1 -> 0.2",
        "training.seed: 1 -> 2",
    ]
    assert diff(old, new) == expected
    assert diff(json.loads(json.dumps(old.to_dict())), new.to_dict()) == expected


def test_diff_names_keys_that_only_one_side_has() -> None:
    plain, adapted = resolve({}), resolve(training(lora={"enabled": True}))
    changed = diff(plain, adapted)
    assert "training.lora.r: None -> 16" in changed


def test_a_key_that_an_earlier_release_lacked_is_no_difference() -> None:
    run = resolve({})
    earlier = run.to_dict()
    del earlier["training"]["compilation_cache"], earlier["training"]["seed"]
    assert diff(earlier, run) == []
    assert diff(earlier, resolve(training(seed=7))) == ["training.seed: 42 -> 7"]
    earlier["training"]["of_old"] = 1  # a key that is gone
    assert "training.of_old: 1 -> None" in diff(earlier, run)


def test_resolve_returns_a_run_as_it_is() -> None:
    run = resolve({})
    assert resolve(run) is run


def test_resolving_changes_nothing_in_the_config() -> None:
    config = default_config()
    before = config.to_dict()
    resolve(config, device_count=8)
    assert config.to_dict() == before
