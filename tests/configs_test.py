"""The configuration files: base.py is complete, the others run as they stand."""

import pathlib
import runpy
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxtrain.config import default_config, diff, resolve

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
    """What main.py's --config flag makes of a file."""
    values = flags.FlagValues()
    command = ["program", f"--config={path}", *arguments]
    holder = config_flags.DEFINE_config_file(
        "config", None, flag_values=values, lock_config=True, sys_argv=command
    )
    values(command)
    return holder.value


def test_base_lists_every_key_with_the_packages_type_and_default() -> None:
    listed = keys_of(runpy.run_path(str(CONFIGS / "base.py"))["get_config"]())
    known = keys_of(default_config())
    assert listed.keys() == known.keys()
    for key, (listed_type, default) in listed.items():
        assert (listed_type, default) == known[key], key
        assert type(default) is type(known[key][1]), key


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


@pytest.mark.parametrize("name", [*RUNNABLE, "from_yaml"])
def test_a_config_says_how_to_launch_it(name: str) -> None:
    text = (CONFIGS / f"{name}.py").read_text()
    command = f"python -m jaxtrain.main --config=configs/{name}.py"
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
