"""Configuration files, and `ConfigManager`, the Python interface to them."""

import ast
import difflib
import importlib.util
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from jaxtrain import schema
from jaxtrain.config import peer_keys
from jaxtrain.config.renamed import with_current_names
from jaxtrain.config.rules import ConfigError
from jaxtrain.config.run import RunConfig, default_config, resolve, without_provenance
from jaxtrain.config.sections import SCHEMA
from jaxtrain.config.shipped import is_file_name, shipped_config, shipped_configs
from jaxtrain.config.yaml_loader import RefusedYamlError, YamlLoader
from jaxtrain.record.safe_text import shown


class ConfigManager:
    """A configuration to load, change by attribute, and resolve.

    >>> config = ConfigManager()
    >>> config.load_config("run.yaml")
    >>> config.training.deepspeed = {"zero_stage": 2, "offload_optimizer": True}

    Attributes are the sections of the ConfigDict. A dict given for a section may be
    partial: `resolve` lays it over the defaults.
    """

    _config: ConfigDict

    def __init__(self, config: ConfigDict | None = None) -> None:
        config = default_config() if config is None else config
        self.__dict__["_config"] = config.lock()

    @property
    def config_dict(self) -> ConfigDict:
        """The configuration as it stands, unresolved."""
        return self._config

    def load_config(self, path: str | os.PathLike[str]) -> None:
        """Take over a YAML file, or a Python file with `get_config()`; see load_config.

        Raises:
            ConfigError: keys that do not exist or values of a wrong type.
        """
        self.__dict__["_config"] = load_config(path).lock()

    def resolve(self, *, device_count: int | None = None) -> RunConfig:
        """`resolve` of this configuration."""
        return resolve(self._config, device_count=device_count)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask before there is a _config
            raise AttributeError(name)
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def load_config(path: str | os.PathLike[str]) -> ConfigDict:
    """Read a .yaml, .yml, .json or .py file, or one that comes with jaxtrain by name.

    A Python file has a function `get_config()`; in "file.py:argument" it is called with
    the argument.

    Raises:
        ConfigError: see `load_yaml`; or the Python file fails, with the line.
        ValueError: the name says none of these kinds, or none of that name comes along.
        FileNotFoundError: there is no such file.
    """
    text, _, argument = os.fspath(path).partition(":")
    if not is_file_name(text):
        text = str(shipped_config(text))
    suffix = Path(text).suffix
    if suffix not in (".yaml", ".yml", ".json", ".py"):
        raise ValueError(
            f"config = {shown(text)}: unknown kind; give a .yaml or .py file"
        )
    if Path(text).is_dir():
        raise ValueError(f"config = {shown(text)}: a folder; name a file")
    if Path(text).exists() and not Path(text).is_file():
        raise ValueError(f"config = {shown(text)}: a pipe or a device; name a file")
    if not Path(text).is_file():
        hint = _nearest_file(Path(text))
        raise FileNotFoundError(f"config = {shown(text)}: no such file{hint}")
    if suffix != ".py":  # JSON is YAML
        return load_yaml(text)
    return _load_python(text, [argument] if argument else [])


def _nearest_file(path: Path) -> str:
    """A hint at a file beside it with a like name, or at the current folder."""
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    if close := difflib.get_close_matches(path.name, names, n=1, cutoff=0.7):
        return f"; did you mean {shown(str(path.with_name(close[0])))}?"
    if path.stem in shipped_configs():
        return f"; the one that comes with jaxtrain is called {shown(path.stem)}"
    return "" if path.is_absolute() else f" in {os.getcwd()}"


def _load_python(path: str, arguments: list[str]) -> ConfigDict:
    """Call `get_config` of a Python file.

    Raises:
        ConfigError: it is not there, raises, or returns something else; where the
            exception is a ConfigError of its own, that.
    """
    spec = importlib.util.spec_from_file_location("jaxtrain_config_file", path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise ConfigError(
                f"{path}: it has no function get_config(); write one that returns a"
                " ConfigDict, as in `jaxtrain configs sft`"
            )
        config = get_config(*arguments)
    except ConfigError:
        raise
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if os.path.abspath(frame.filename) == os.path.abspath(path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        where = f"{path}, line {line}" if line else path
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ConfigError(f"{where}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{path}: get_config() returned {type(config).__name__}; return a"
            " ConfigDict, such as jaxtrain.config.default_config() with your values"
        )
    return config


def load_yaml(path: str | os.PathLike[str]) -> ConfigDict:
    """The defaults with a YAML file's `training`, `model`, `data`, `mesh` laid over.

    Numbers are YAML 1.2's, so 5e-5 is one (PyYAML alone reads a text).

    Raises:
        ConfigError: no key, one that is unknown or given twice, or a value of a wrong
            type; then every other problem of the file is listed with it.
    """
    with open(path, encoding="utf-8") as file:
        try:
            given = yaml.load(file, YamlLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(_not_yaml(os.fspath(path), error)) from error
    if not isinstance(given, Mapping):
        found = "it holds no key" if given is None else "not sections of keys"
        raise ConfigError(
            f"config = {shown(os.fspath(path))}: {found}; write 'training:' and keys"
            " under it"
        )
    config = default_config()
    given = with_current_names(without_provenance(given))
    problems = schema.overlay(config, SCHEMA, given, peer_keys.suggest)
    if problems:
        # The file will not load, so say all there is to say about it now.
        try:
            resolve(given)
        except ConfigError as error:
            problems = error.problems
        raise ConfigError(problems)
    return config


def _not_yaml(path: str, error: Exception) -> str:
    """Where a file is not YAML, and why, in one line."""
    mark = getattr(error, "problem_mark", None)
    where = f"{path}, line {mark.line + 1}" if mark else path
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "'\\t'" in problem:
        problem += "; indent with spaces, not with tabs"
    elif isinstance(error, UnicodeDecodeError):
        problem += "; save it as UTF-8"
    elif not isinstance(error, RefusedYamlError):
        problem += "; look at this line and the one above: indentation, colons, quotes"
    return f"{where}: not YAML: {problem}"


def parse_value(text: str) -> Any:
    """A number, true or false, null, a list or a mapping, written as in YAML or Python.

    `a,b` is a list too. What is none of these is the text itself. Nothing is evaluated.
    """
    value = _read_yaml(text)
    if not isinstance(value, str):
        return value
    if value.startswith(("(", "[", "{")):
        try:
            return ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            return value  # all that it raises by its documentation
    return _read_yaml(f"[{value}]") if "," in value else value


def _read_yaml(text: str) -> Any:
    """What YAML makes of a text; the text where it can't be read."""
    try:
        return yaml.load(text, YamlLoader)
    except yaml.YAMLError:
        return text
