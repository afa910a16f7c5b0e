"""What MODEL_OR_RUN names, and the configuration that it is used with.

A run is told by the `config.json` that training wrote, which has the sections of a
configuration; a model's names its `model_type`; an adapter has `adapter_config.json`.
This module imports nothing large, so that a wrong name is refused at once.
"""

import argparse
import dataclasses
import json
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ml_collections import ConfigDict

from jaxtrain.cli.command import Parser
from jaxtrain.config import (
    ConfigError,
    RunConfig,
    default_config,
    load_config,
    to_config_dict,
)
from jaxtrain.config.flags import Flag, split_flags
from jaxtrain.config.renamed import is_recorded
from jaxtrain.config.sections import (
    DEFAULT_MAX_LENGTH,
    GENERAL_KEYS,
    SCHEMA,
    TrainingType,
)
from jaxtrain.config.shipped import shipped_configs
from jaxtrain.record.safe_text import MASK
from jaxtrain.storage.address import as_path, is_remote
from jaxtrain.storage.checks import check_readable

logger = logging.getLogger(__name__)

KEYS = """\
Keys of the configuration that act here are flags too: --mesh.fsdp=2,
--training.bf16=false, --data.chat_template=FILE (docs/configuration.md)."""
# What decides where and in which type a model is computed.
COMPUTING = (
    "mesh",
    "model",
    "training.bf16",
    "training.cpu_offload",
    "training.deepspeed",
    "training.fp16",
    "training.fp8",
    "training.lora.quantization",
    "training.lora.quantization_block_size",
    "training.num_gpus",
)
_MESH = ("data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Source:
    """A run's work directory, a model or an adapter.

    `name` is a path, or for a model the hub's name. `saved` are the sections of a run's
    configuration. `base` is what an adapter says it was trained on.
    """

    name: str
    kind: Literal["run", "model", "adapter"]
    saved: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base: str | None = None

    @property
    def path(self) -> Any:
        """A `Path`, or an `epath.Path` of an address."""
        return path_of(self.name)

    @property
    def checkpoints(self) -> Any:
        """A run's folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def exported(self) -> Any:
        """The path of the model that a run exported, or None."""
        model = self.path / "model"
        return model if (model / "config.json").is_file() else None

    def run(self) -> RunConfig:
        """A run's configuration as it was resolved.

        Raises:
            ConfigError: this version of jaxtrain does not accept it.
        """
        try:
            return RunConfig.from_dict(self.saved)
        except ConfigError as error:
            file = self.path / "config.json"
            raise ConfigError([f"{file}: {line}" for line in error.problems]) from error


def find(name: str) -> Source:
    """Tell what `name` is. A name that is no path is taken for one of the hub.

    Raises:
        ValueError: it is a configuration, or a path with nothing that can be loaded.
    """
    check_readable(name, "MODEL_OR_RUN")
    path = path_of(name)
    if path.is_dir():
        return _look_into(name, path)
    suffix = path.suffix in (".yaml", ".yml", ".py")
    if name in shipped_configs() or suffix:
        raise ValueError(
            f"{name!r} is a configuration, not a model: name the work directory of a"
            f" run (such as out/{path.stem}), a model's directory or a hub name"
        )
    if path.exists():
        raise ValueError(f"{name!r} is a file: name the directory of a model or a run")
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local or ("/" in name and path.parent.is_dir()):
        raise ValueError(f"{name!r}: there is no such directory{_beside(path)}")
    return Source(name, "model")


def path_of(name: str) -> Any:
    """The `Path` of a name, or of the address of a bucket its `epath.Path`."""
    return as_path(name) if is_remote(name) else Path(name).expanduser()


def _look_into(name: str, path: Any) -> Source:
    adapter, config = path / "adapter_config.json", path / "config.json"
    if adapter.is_file():
        base = _read(adapter).get("base_model_name_or_path")
        return Source(name, "adapter", base=base)
    content = _read(config) if config.is_file() else {}
    if is_recorded(content):
        return Source(
            name, "run", {key: content[key] for key in SCHEMA if key in content}
        )
    if "model_type" in content:
        return Source(name, "model")
    above = path.parent if path.name == "checkpoints" else path.parent.parent
    if path.resolve().parent.name == "checkpoints" or path.name == "checkpoints":
        step = f" --step={path.name}" if path.name.isdecimal() else ""
        raise ValueError(
            f"{name!r} holds checkpoints: name the run's work directory, {above}{step}"
        )
    lacks = "neither an adapter_config.json nor the config.json of a run or a model"
    if content:
        lacks = "no model_type in its config.json"
    raise ValueError(
        f"{name!r} is not a run, a model or an adapter: it has {lacks}; name a"
        " directory that has one"
    )


def _read(file: Any) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON; {error}") from error
    return content if isinstance(content, dict) else {}


def _beside(path: Path) -> str:
    """List the directories beside a missing one, of which one may have been meant."""
    if not path.parent.is_dir():
        return ""
    names = sorted(each.name for each in path.parent.iterdir() if each.is_dir())
    more = ", ..." if len(names) > 8 else ""
    return f"; {path.parent} contains {', '.join(names[:8])}{more}" if names else ""


class SourceParser(Parser):
    """The parser of a command whose first argument is a model, an adapter or a run."""

    def __init__(self, name: str, description: str, *, only_runs: bool = False) -> None:
        """`only_runs`: nothing but a work directory of a run will do."""
        super().__init__(name, description, epilog=KEYS)
        self._only_runs = only_runs
        what = "the work directory of a run"
        if not only_runs:
            what += ", a model's directory, a PEFT adapter's, or a hub name; or the"
            what += " address of one in a bucket (gs://, s3://)"
        self.add_argument(
            "source", metavar="RUN" if only_runs else "MODEL_OR_RUN", help=what
        )
        self.add_argument(
            "--step", help="of a run's checkpoints: a number, best or last"
        )
        self.add_argument(
            "--model",
            metavar="BASE",
            help="the base of an adapter or of a run, if it is elsewhere now",
        )

    def read(
        self, arguments: Sequence[str]
    ) -> tuple[argparse.Namespace, Source, list[Flag]]:
        """The command's own options, what it is about, and the flags that set keys.

        Raises:
            ValueError: an argument is unknown, the source does not exist, or an option
                does not go with this kind of source.
        """
        flags, rest = split_flags(arguments)
        options = self.parse(rest)
        source = find(options.source)
        if self._only_runs and source.kind != "run":
            what = _article(source.kind) if source.path.is_dir() else "no folder here"
            self.error(f"{source.name!r} is {what}, not a run")
        if options.step is not None:
            if source.kind != "run":
                self.error(
                    f"--step={options.step}: {source.name!r} is"
                    f" {_article(source.kind)}; only a run has checkpoints"
                )
            if not options.step.isdecimal() and options.step not in ("best", "last"):
                self.error(f"--step={options.step}: give a number, best or last")
        if options.model is not None and source.kind == "model":
            self.error(
                f"--model={options.model}: {source.name!r} is a whole model; only an"
                " adapter or a run has a base"
            )
        return options, source, flags


def check_acting(
    keys: Collection[str],
    acting: Collection[str],
    command: str,
    but: Collection[str] = (),
) -> None:
    """Refuse flags that set keys which do not act in a command.

    Args:
        keys: full keys that flags have set.
        acting: full keys, or sections with all their keys.
        but: keys of these sections that do not act.

    Raises:
        ConfigError: one line for each.
    """
    idle = [
        key for key in sorted(keys) if key in but or not _acts(_general(key), acting)
    ]
    if idle:
        raise ConfigError(
            f"--{key} has no effect on {command}; remove the flag" for key in idle
        )


def _acts(key: str, acting: Collection[str]) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in acting)


def _general(key: str) -> str:
    """training.bf16 for training.sft.bf16, and any other key as it is."""
    section, _, name = key.partition(".")
    block, _, rest = name.partition(".")
    is_twin = block in get_args(TrainingType) and rest in GENERAL_KEYS
    return f"{section}.{rest}" if is_twin else key


def configure(
    source: Source,
    *,
    config: str | None = None,
    base: str | None = None,
    flags: Sequence[Flag] = (),
) -> ConfigDict:
    """The configuration that a source is used with, before any flag is set on it.

    A run has its own. A model or an adapter uses `config`, a name or a file, or else
    the defaults with the type in which its weights are stored.

    Args:
        base: the base of a run or an adapter, in place of the one that it names.
        flags: they are not set here; if one is of the mesh, a run's own is dropped.

    Raises:
        ValueError: the adapter names no base, or the configuration or the model's
            directory is not valid.
    """
    if source.kind == "run":
        made = to_config_dict(source.run())
        _warn_of_masked(source, flags)
        if base is not None:
            made.model.name_or_path = base
        _fit_mesh(made, any(flag.key.startswith("mesh.") for flag in flags))
        return made
    made = default_config() if config is None else load_config(config)
    if made.training.training_type == "lora":
        made.training.training_type = "sft"
    made.training.lora = default_config().training.lora
    made.model.architecture = default_config().model.architecture
    made.model.name_or_path = source.name
    if source.kind == "adapter":
        take_adapter(made, source.path)
        made.model.name_or_path = base or source.base or ""
        if not made.model.name_or_path:
            raise ValueError(
                f"{source.name}: its adapter_config.json names no base model; give one"
                " by --model"
            )
        if base is None:
            _check_base(made.model.name_or_path, source.name)
    if config is None:
        _compute_as_stored(made)
    return made


def _warn_of_masked(source: Source, flags: Sequence[Flag]) -> None:
    """Warn that some arguments of a run's own loss were secrets and are not saved."""
    key = "training.objective_kwargs"
    training = source.saved.get("training", {})
    is_given = any(flag.key.startswith(key) for flag in flags)
    if MASK in json.dumps(training.get("objective_kwargs")) and not is_given:
        logger.warning(
            "%s: %s holds secrets, which config.json has as %s: give it by --%s=... if"
            " the loss needs them",
            source.name, key, MASK, key,
        )  # fmt: skip


def _check_base(base: str, adapter: str) -> None:
    """Refuse an adapter whose base is not at the place that it names.

    Raises:
        ValueError: it is not there; the text says how to name the new place.
    """
    from jaxtrain.models import hf

    try:
        hf.resolve_model_path(base)
    except ValueError as error:
        raise ValueError(
            f"{adapter}: its base model {base!r} was not found; give its new"
            f" place with --model ({error})"
        ) from error


def take_adapter(config: ConfigDict, adapter: Any) -> None:
    """Let the policy be the base with an adapter of PEFT's; a quantized base stays so.

    Args:
        adapter: the path of its directory.
    """
    lora = default_config().training.lora
    for key in ("quantization", "quantization_block_size"):
        lora[key] = config.training.lora[key]
    lora.enabled, lora.init_from = True, str(adapter)
    config.training.lora = lora


def prepare_devices() -> None:
    """Start jax, and join the other processes of this command if there are any."""
    from jaxtrain.run import distributed

    distributed.initialize()


def _article(kind: str) -> str:
    return "an adapter" if kind == "adapter" else f"a {kind}"


def _compute_as_stored(config: ConfigDict) -> None:
    """Take precision and the longest row from the model's own config.json."""
    from jaxtrain.models import hf

    name = config.model.name_or_path
    directory = hf.resolve_model_path(name, revision=config.model.revision)
    dtype = hf.stored_dtype(directory)
    limit = hf.load_config(directory).longest_text
    config.data.max_length = min(DEFAULT_MAX_LENGTH, limit)
    config.model.param_dtype = "bfloat16" if dtype == "bfloat16" else "float32"
    config.training.bf16 = dtype == "bfloat16"
    config.training.fp16 = dtype == "float16"


def _fit_mesh(config: ConfigDict, is_given: bool) -> None:
    """Keep the mesh that a run was trained on only if it fits the present devices.

    Otherwise split the weights over all devices if they were split, or else copy them.
    If a flag sets the mesh (`is_given`), start from the default mesh.
    """
    import jax

    mesh, training, count = config.mesh, config.training, jax.device_count()
    if training.num_gpus and (is_given or training.num_gpus > count):
        training.num_gpus = None
    used = training.num_gpus or count
    if not is_given and math.prod(mesh[axis] for axis in _MESH) == used:
        return
    was_split = max(mesh.fsdp, mesh.expert) > 1 and not is_given
    config.mesh = default_config().mesh
    training.deepspeed.zero_stage = None
    if was_split:
        config.mesh.fsdp = -1
