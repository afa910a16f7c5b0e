"""The configuration files: base.py is complete, the others run as they stand."""

import dataclasses
import pathlib
import runpy
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from ml_collections import ConfigDict

from jaxtrain.cli.command import ConfigParser
from jaxtrain.config import (
    ConfigError,
    default_config,
    diff,
    load_config,
    resolve,
    sections,
    shipped,
)
from jaxtrain.config.flags import resolve_flags, split_flags

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
RUNNABLE = ("from_scratch", "sft", "lora", "dpo")


def keys_of(config: ConfigDict, prefix: str = "") -> dict[str, tuple[type, Any]]:
    """Every key with the type that the command line takes and its default."""
    keys = {}
    for name in config:
        if isinstance(config[name], ConfigDict):
            keys |= keys_of(config[name], f"{prefix}{name}.")
        else:
            keys[prefix + name] = (config.get_type(name), config[name])
    return keys


def load(path: pathlib.Path | str, *arguments: str) -> ConfigDict:
    """What a command makes of a file and these flags."""
    config = load_config(path)
    flags, rest = split_flags(arguments)
    assert not rest
    return resolve_flags(config, flags)[0]


def stored_type(hint: Any) -> type:
    """The type of a ConfigDict's key for an annotation; object: any literal."""
    arms = set(get_args(hint)) - {NoneType}
    if get_origin(hint) in (Union, UnionType):
        return stored_type(arms.pop()) if len(arms) == 1 else object
    if get_origin(hint) is Literal:
        (kind,) = {type(value) for value in arms}
        return kind
    return hint if hint in (bool, int, float, str) else object


def declared_keys(section: type, prefix: str) -> dict[str, tuple[type, Any]]:
    """Every key of a section with its stored type and default, sub-sections too."""
    keys: dict[str, tuple[type, Any]] = {}
    for field in dataclasses.fields(section):
        hint, path = get_type_hints(section)[field.name], f"{prefix}.{field.name}"
        if dataclasses.is_dataclass(hint):
            keys |= declared_keys(hint, path)
        else:
            keys[path] = (stored_type(hint), field.default)
    return keys


def test_base_has_every_declared_key_with_its_type_and_default() -> None:
    general: dict[str, tuple[type, Any]] = {}
    for section in sections.TRAINING_SECTIONS.values():
        general |= declared_keys(section, "training")
    for name, section in sections.NESTED_SECTIONS.items():
        general |= declared_keys(section, f"training.{name}")
    declared = {"training.training_type": (str, "sft"), **general}
    for name, section in sections.PLAIN_SECTIONS.items():
        declared |= declared_keys(section, name)
    for name in RUNNABLE:  # a block holds every general key, unset
        declared |= {
            key.replace("training.", f"training.{name}.", 1): (kind, None)
            for key, (kind, _) in general.items()
        }
    declared |= declared_keys(sections.LoraSection, "training.lora")
    declared |= declared_keys(sections.DpoSection, "training.dpo")
    listed = keys_of(runpy.run_path(str(CONFIGS / "base.py"))["get_config"]())
    assert listed == declared
    for key, (_, default) in listed.items():
        assert type(default) is type(declared[key][1]), key


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("data.max_length", int),
        ("data.packing", object),
        ("data.shuffle", bool),
        ("data.train", object),
        ("mesh.data", int),
        ("model.export_dtype", str),
        ("model.architecture.rope_scaling", object),
        ("training.deepspeed.zero_stage", int),
        ("training.learning_rate", float),
        ("training.max_grad_norm", float),
        ("training.report_to", object),
        ("training.dpo.beta", float),
        ("training.dpo.fp16", bool),
        ("training.dpo.loss_type", object),
        ("training.lora.target_modules", object),
        ("training.sft.run_name", str),
    ],
)
def test_the_command_line_takes_a_key_as_its_type(key: str, kind: type) -> None:
    assert keys_of(load(CONFIGS / "base.py"))[key][0] is kind


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_config_loads_from_any_directory_and_resolves(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = resolve(load(CONFIGS / f"{name}.py"), device_count=1)
    assert run.training_type == name
    assert not run.notes, "a key of the file does nothing"
    # Offline as they stand: the embedded model, tokenizer and data.
    assert run.model.name_or_path == run.model.tokenizer_name_or_path == ""
    assert run.data.train == run.data.eval == ""


def test_a_config_loads_by_a_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    run = resolve(load("configs/dpo.py", "--config.training.dpo.beta=0.2"))
    assert run.dpo is not None
    assert run.dpo.beta == 0.2


@pytest.mark.parametrize("name", RUNNABLE)
def test_general_keys_of_a_config_can_be_overridden_in_the_general_place(
    name: str,
) -> None:
    # A file that set training.dpo.learning_rate would make this flag do nothing.
    config = load(CONFIGS / f"{name}.py", "--config.training.learning_rate=0.125")
    assert resolve(config).optimizer.learning_rate == 0.125


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_config_differs_from_base_where_it_says_so(name: str) -> None:
    config = load(CONFIGS / f"{name}.py")
    base = default_config()
    base.training.training_type = name
    changed = diff(resolve(base), resolve(config))
    source = (CONFIGS / f"{name}.py").read_text()
    assert changed
    for line in changed:
        key = line.split(":")[0].rsplit(".", 1)[-1]
        # What other keys imply: the direction of the metric, and dpo's one length.
        if key not in ("greater_is_better", "max_length"):
            assert f".{key} = " in source, line


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_config_says_how_to_launch_it(name: str) -> None:
    text = (CONFIGS / f"{name}.py").read_text()
    command = f"jaxtrain train {name} --workdir=out/{name}"
    assert command in text.split('"""')[1]


def test_from_yaml_lays_the_file_over_base_and_flags_over_both(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {name_or_path: some/model}\n"
        "training: {training_type: dpo, dpo: {learning_rate: 1e-6, beta: 0.1}}\n"
    )
    config = load(
        f"{CONFIGS / 'from_yaml.py'}:{path}", "--config.training.dpo.beta=0.5"
    )
    run = resolve(config)
    assert run.dpo is not None
    assert run.dpo.beta == 0.5
    assert run.optimizer.learning_rate == 1e-6
    assert run.model.name_or_path == "some/model"


def test_a_yaml_problem_reaches_the_command_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training: {lerning_rate: 1e-6}\n")
    with pytest.raises(Exception, match=r"did you mean training\.learning_rate\?"):
        load(f"{CONFIGS / 'from_yaml.py'}:{path}")


@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        ("", 96),
        ("--data.max_length=64", None),
        ("--training.dpo.max_length=96", None),
        ("--training.objective=kto", None),
        ("--training.objective=orpo", 96),
        ("--training.dpo.max_length=64 --training.dpo.max_prompt_length=32", 32),
    ],
)
def test_a_presets_limit_of_prompts_gives_way_to_flags(flags, limit):
    """It was refused, beside a length or a loss that somebody asked for."""
    _, _, run = ConfigParser("train", "").read(["dpo", *flags.split()])
    assert run.dpo is not None and run.dpo.max_prompt_length == limit


@pytest.mark.parametrize("objective", ["kto", "my_losses:focal", "cpo"])
def test_a_presets_metric_gives_way_to_a_loss_that_lacks_it(objective):
    """`train dpo --training.objective=kto`, as the tutorial says it, was refused."""
    flag = f"--training.objective={objective}"
    _, _, run = ConfigParser("train", "").read(["dpo", flag])
    has_it = objective == "cpo"
    assert (run.loop.metric_for_best_model == "eval_rewards/accuracies") == has_it
    metric = "--training.metric_for_best_model=eval_loss"
    _, _, run = ConfigParser("train", "").read(["dpo", flag, metric])
    assert run.loop.metric_for_best_model == "eval_loss"


def test_a_presets_warm_up_gives_way_to_a_constant_rate():
    flag = "--training.lr_scheduler_type=constant"
    _, _, run = ConfigParser("train", "").read(["sft", flag])
    assert (run.schedule.warmup_steps, run.schedule.warmup_ratio) == (0, 0.0)
    asked = "--training.warmup_ratio=0.1"
    with pytest.raises(ConfigError, match="'constant' has no warm-up"):
        ConfigParser("train", "").read(["sft", flag, asked])


def test_a_presets_sizes_give_way_to_a_model_that_is_named():
    """No flag unsets them, so `train from_scratch --model=...` was always refused."""
    command = ["from_scratch", "--model=owner/model", "--data.max_length=8192"]
    _, config, run = ConfigParser("train", "").read(command)
    sizes = default_config().model.architecture
    assert config.model.architecture == sizes != load("from_scratch").model.architecture
    assert run.training_type == "from_scratch"
    asked = ["--model.architecture.model_type=qwen3"]
    with pytest.raises(
        ConfigError, match=r"model_type = 'qwen3'.*gives the sizes"
    ) as e:
        ConfigParser("train", "").read([*command, *asked])
    assert "head_dim" not in str(e.value)


def test_a_presets_limit_of_prompts_is_named_beside_a_real_model():
    config = load("dpo")
    config.model.name_or_path = "owner/model"
    told = shipped.fit_preset_to_model(config, ())
    assert "training.dpo.max_prompt_length = 96 were kept" in told
