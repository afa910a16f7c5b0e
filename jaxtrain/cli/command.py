"""What the commands that take a configuration share: their parser and their flags."""

import argparse
import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from jaxtrain.config import RunConfig, load_config, peer_keys, resolve
from jaxtrain.config.flags import Flag, keys_by_last_part, override, split_flags
from jaxtrain.config.shipped import (
    config_stem,
    fit_preset_to_model,
    give_way,
    is_preset,
)
from jaxtrain.storage.address import as_path, is_remote
from jaxtrain.storage.checks import find_obstacle

logger = logging.getLogger(__name__)

_KEYS = """\
Any key of the configuration is a flag too, which wins over the file:
--training.learning_rate=5e-4, --data.train=train.jsonl. `jaxtrain recipes` lists the
configurations for published models, `jaxtrain configs` all that come along."""


def path_argument(text: str) -> Any:
    """A flag's value as a `Path`, or as an `epath.Path` where it is an address.

    Raises:
        argparse.ArgumentTypeError: an address that cannot be used.
    """
    try:
        return as_path(text) if is_remote(text) else Path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def file_argument(text: str) -> Any:
    """The same of a file that is to be written, in a folder that may be made.

    Raises:
        argparse.ArgumentTypeError: nothing can be written there.
    """
    path = path_argument(text)
    if not is_remote(text):
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a directory; name a file")
        if path.name in ("config.json", "metrics.jsonl") and path.exists():
            raise argparse.ArgumentTypeError(f"{path} is a run's record; name another")
        if obstacle := find_obstacle(path.absolute().parent):
            raise argparse.ArgumentTypeError(f"{obstacle[0]} is no folder to write to")
    return path


class Once(argparse.Action):
    """Store a value; refuse an empty one, and a second that would replace the first."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if not values:
            parser.error(f"{option_string} is empty: give it a value, or leave it out")
        earlier = getattr(namespace, self.dest, None)
        if earlier not in (None, values):
            parser.error(
                f"{option_string} is given twice, as {earlier!r} and {values!r}: give"
                " it once"
            )
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """argparse with errors that are ValueErrors, which commands report like others."""

    def __init__(self, name: str, description: str, **options: Any) -> None:
        """`name`: the command's, as in "jaxtrain train"."""
        super().__init__(
            prog=f"jaxtrain {name}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self.add_argument(
            "--debug", action="store_true", help="show the traceback of an error"
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse all arguments.

        Raises:
            ValueError: one of them is unknown, with the nearest that is known.
        """
        # Intermixed: a positional argument may stand behind flags.
        options, unknown = self.parse_known_intermixed_args(arguments)
        if unknown:
            names = [name.partition("=")[0] for name in unknown]
            flags = [name for name in names if name.startswith("-")] or names
            told = [f"unknown argument {name}{self._fix(name)}" for name in flags]
            self.error("; ".join(told))
        self._check_output(options)
        return options

    def _check_output(self, options: argparse.Namespace) -> None:
        """Refuse an output that is a file which the command reads."""
        output = getattr(options, "output", None)
        if not isinstance(output, Path) or not output.is_file():
            return
        for name, value in vars(options).items():
            is_path = name != "output" and isinstance(value, str | Path)
            # Of os.path: what cannot be a path, such as a long text, is no file there.
            if is_path and os.path.isfile(value) and output.samefile(value):
                self.error(f"--output={output} is read by this command; name another")

    def _fix(self, name: str) -> str:
        """What to do about an unknown argument, with "; " before it, or nothing."""
        if advice := self.advice(name):
            return f"; {advice}"
        keys = {f"--{last}": f"--{key}" for last, key in self.keys().items()}
        flags = {flag: flag for flag in self._option_string_actions if flag[1] == "-"}
        for meant, cutoff in ((keys, 0.8), (flags, 0.6)):
            if close := difflib.get_close_matches(name, meant, n=1, cutoff=cutoff):
                return f"; did you mean {meant[close[0]]}?"
        return ""

    def keys(self) -> Mapping[str, str]:
        """Keys that are flags too, by the last part of each."""
        return {}

    def advice(self, name: str) -> str:
        """What takes the place of an unknown flag; "" where that is not known."""
        del name
        return ""


class ConfigParser(Parser):
    """The parser of a command that takes a configuration, by position or `--config`."""

    or_data = ""  # " or data file", where a command takes that as well

    def __init__(self, name: str, description: str) -> None:
        super().__init__(name, description, epilog=_KEYS)
        self.add_argument(
            "config",
            nargs="?",
            help="a name such as dpo or qwen3-4b-dpo-lora, a .yaml file, or a .py file"
            " with get_config()",
        )
        self.add_argument(
            "--config",
            dest="config_flag",
            metavar="CONFIG",
            action=Once,
            help="the same as a flag",
        )
        self.add_argument(
            "--model",
            action=Once,
            help="a local Hugging Face directory or a hub name; sets"
            " model.name_or_path",
        )

    def advice(self, name: str) -> str:
        """The key of the configuration that ends in this name, or that replaces it."""
        key = self.keys().get(name.removeprefix("--").replace("-", "_"))
        return f"did you mean --{key}?" if key else peer_keys.advice(name)

    def keys(self) -> Mapping[str, str]:
        return keys_by_last_part()

    def split(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Flag]]:
        """The command's own options, and the flags that set keys: `--model` is one."""
        flags, rest = split_flags(arguments)
        options = self.parse(rest)
        if options.model is not None:
            flags.append(Flag("model.name_or_path", options.model))
        return options, flags

    def read(
        self, arguments: Sequence[str]
    ) -> tuple[argparse.Namespace, ConfigDict, RunConfig]:
        """The command's own options, and the configuration with its flags set.

        Raises:
            ValueError: a flag, the file or the configuration; all of its problems.
        """
        options, flags = self.split(arguments)
        named = [each for each in (options.config, options.config_flag) if each]
        if len(named) != 1:
            self.error(
                f"no configuration{self.or_data} is named"
                if not named
                else f"two configurations are named, {named[0]} and {named[1]}"
            )
        options.config = named[0]
        config = load_config(options.config)
        keys = override(config, flags)
        if is_preset(options.config):
            give_way(config, keys)
            if line := fit_preset_to_model(config, keys):
                logger.warning("%s", line)
        return options, config, resolve(config, flags=keys)


def default_workdir(config: str) -> Path:
    """The work directory of a run that names none: `out/dpo` for dpo and dpo.yaml."""
    return Path("out") / config_stem(config.partition(":")[0])
