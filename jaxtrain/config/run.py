"""ConfigDict -> RunConfig: what keys mean together, and all their problems at once.

`sections` declares every key, and `rules` say what they mean together. A general
training key is looked up in the block of the active training_type, then in `training`,
then in `TYPE_DEFAULTS`.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

from ml_collections import ConfigDict

from jaxtrain import schema
from jaxtrain.config import notes, sections
from jaxtrain.config.notes import Note
from jaxtrain.config.renamed import as_recorded, with_current_names
from jaxtrain.config.rules import ConfigError, resolve_sections
from jaxtrain.config.sections import SCHEMA
from jaxtrain.objectives.options import ObjectiveRow, Options, objective_row
from jaxtrain.record.safe_text import mask_secrets, shown
from jaxtrain.tree import dotted


@dataclass(frozen=True)
class RunConfig:
    """A checked configuration of one run. `resolve` makes it."""

    training_type: sections.TrainingType
    model: sections.ModelSection
    data: sections.DataSection
    optimizer: sections.OptimizerSection
    schedule: sections.ScheduleSection
    precision: sections.PrecisionSection
    loop: sections.LoopSection
    devices: sections.DevicesSection
    curriculum: sections.CurriculumSection
    generation: sections.GenerationSection
    compilation_cache: sections.CompilationCacheSection
    profile: sections.ProfileSection
    mesh: sections.MeshSection
    lora: sections.LoraSection | None  # None: all parameters train
    dpo: sections.DpoSection | None  # None: the objective is next_token
    notes: tuple[Note, ...] = field(default=(), compare=False)

    @property
    def objective(self) -> str:
        """A name of `objectives.OBJECTIVES`, or module:function."""
        if self.loop.objective != "auto":
            return self.loop.objective
        return "next_token" if self.dpo is None else "preference"

    @property
    def objective_row(self) -> ObjectiveRow:
        """The facts about the objective."""
        row = objective_row(self.loop.objective, on_pairs=self.dpo is not None)
        assert row is not None  # the rules see to it
        return row

    @property
    def objective_options(self) -> Options | None:
        """All options of the objective, None for a function of the user's own."""
        row = self.objective_row
        if ":" in self.objective:
            return None
        values = {key: getattr(self.dpo, key) for key in row.keys_of_dpo}
        return row.options(**values, **(self.loop.objective_kwargs or {}))

    def to_dict(self) -> dict[str, Any]:
        """The values this run reads, in the configuration's own layout, for JSON."""
        training: dict[str, Any] = {"training_type": self.training_type}
        for name in sections.TRAINING_SECTIONS:
            training |= asdict(getattr(self, name))
        for name in (*sections.NESTED_SECTIONS, "lora", "dpo"):
            section = getattr(self, name)
            if section and getattr(section, "enabled", True):
                training[name] = asdict(section)
            elif section and type(section)().enabled:  # off, and on by default
                training[name] = {"enabled": False}
        plain = {name: asdict(getattr(self, name)) for name in sections.PLAIN_SECTIONS}
        if self.training_type != "from_scratch":
            del plain["model"]["architecture"]
        return _with_lists(plain | {"training": training})

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "RunConfig":
        """The inverse of `to_dict`, also of what earlier releases saved."""
        return resolve(as_recorded(saved))

    def explain(self) -> list[str]:
        """What the keys named after GPUs, DeepSpeed and PyTorch became, for the log."""
        return [*_explain(self), *notes.lines(self.notes)]


class HasConfigDict(Protocol):
    """What wraps a ConfigDict, as `ConfigManager` does."""

    @property
    def config_dict(self) -> ConfigDict: ...


def default_config() -> ConfigDict:
    """Every key at its default, unlocked."""
    return schema.to_config_dict(SCHEMA)


def resolve(
    config: "ConfigDict | Mapping[str, Any] | HasConfigDict | RunConfig",
    *,
    device_count: int | None = None,
    flags: Collection[str] = (),
) -> RunConfig:
    """Check a configuration, work out what is unset, and freeze it.

    Args:
        config: of any completeness; what is missing has its default. A RunConfig is
            returned as it is.
        device_count: devices present. Known, the mesh has no -1 left and num_gpus is
            checked against it.
        flags: full keys that the command line set. One that another key overrules, or
            that acts nowhere in this run, is a problem and not a note.

    Raises:
        ConfigError: one line for each problem, all of them.
    """
    if isinstance(config, RunConfig):
        return config
    if not isinstance(config, Mapping | ConfigDict):
        config = getattr(config, "config_dict", config)
    given = config.to_dict() if isinstance(config, ConfigDict) else config
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"the configuration is a {type(given).__name__}, {schema.shown(given)}:"
            " give sections of keys, such as {'training': {...}}"
        )
    given = with_current_names(without_provenance(given))
    found = resolve_sections(given, device_count, flags)
    values = {each.name: getattr(found, each.name) for each in fields(RunConfig)}
    values["notes"] = tuple(found.notes)
    values["lora"] = found.lora if found.lora.enabled else None
    values["dpo"] = found.dpo if found.is_dpo else None
    return RunConfig(**values)


def to_config_dict(run: RunConfig) -> ConfigDict:
    """A configuration that resolves to `run`."""
    config = default_config()
    schema.overlay(config, SCHEMA, run.to_dict())
    return config


def diff(
    old: RunConfig | Mapping[str, Any], new: RunConfig | Mapping[str, Any]
) -> list[str]:
    """Keys whose values differ between two `to_dict()`s: "key: old -> new".

    A key that an earlier release did not have stands at its default there. Secrets are
    masked: what is saved lacks them, and the lines are logged.
    """
    flat_old, flat_new = (dotted(mask_secrets(_as_dict(each))) for each in (old, new))
    return [
        f"{key}: {shown(flat_old.get(key))} -> {shown(flat_new.get(key))}"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    ]


def _as_dict(run: RunConfig | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(run, RunConfig):
        return run.to_dict()
    try:
        return RunConfig.from_dict(run).to_dict()
    except ConfigError:  # as it was saved, by a release that had other keys
        saved: dict[str, Any] = _with_lists(run)
        return saved


def without_provenance(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sections alone: a run's config.json tells of its starts beside them."""
    return {name: below for name, below in given.items() if name != "provenance"}


def _with_lists(tree: Any) -> Any:
    """Tuples become lists, as JSON reads them back."""
    if isinstance(tree, Mapping):
        return {name: _with_lists(value) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        return [_with_lists(item) for item in tree]
    return tree


def _explain(run: RunConfig) -> list[str]:
    mesh, devices, loop, precision = run.mesh, run.devices, run.loop, run.precision
    zero, curriculum, state = devices.deepspeed, run.curriculum, "optimizer state"
    split = ("nothing", state, state, "parameters and optimizer")[zero.zero_stage]
    offloaded = {state: zero.offload_optimizer, "parameters": zero.offload_param}
    host = " and ".join(name for name, is_there in offloaded.items() if is_there)
    per_device = loop.per_device_train_batch_size * loop.gradient_accumulation_steps
    rows = f"{per_device} times data-parallel devices"
    if mesh.row_shards > 0:
        rows = str(per_device * mesh.row_shards)
    lines = [
        f"training.distributed = {devices.distributed}: one mesh spans the devices of"
        " every process; the launcher's environment says how many there are",
        f"training.num_gpus = {devices.num_gpus}: {devices.num_gpus or 'all'} devices"
        " in a mesh of"
        f" {' x '.join(f'{axis} {size}' for axis, size in mesh.sizes.items())}"
        " (-1: the rest)",
        f"training.per_device_train_batch_size = {loop.per_device_train_batch_size},"
        f" gradient_accumulation_steps = {loop.gradient_accumulation_steps}:"
        f" {rows} rows an optimizer step",
        f"training.deepspeed.zero_stage = {zero.zero_stage}: {split} split over"
        " devices",
        f"training.cpu_offload = {devices.cpu_offload}, deepspeed.offload_*:"
        f" {host or 'nothing'} in pinned host memory between steps",
        f"training.fp16 = {precision.fp16}, bf16 = {precision.bf16}:"
        f" {precision.compute_dtype} compute{', projections in fp8' * precision.fp8},"
        f" {run.model.param_dtype} parameters",
        f"training.gradient_checkpointing = {precision.gradient_checkpointing}:"
        f" rematerialization policy {shown(precision.remat)}",
        f"training.dataloader_pin_memory = {devices.dataloader_pin_memory}: batches are"
        f"{'' if devices.dataloader_pin_memory else ' not'} copied to the device ahead",
    ]
    if curriculum.enabled:
        lines.append(
            f"training.curriculum: {curriculum.strategy}, {curriculum.start_length} to"
            f" {curriculum.end_length} tokens in {curriculum.steps} steps"
        )
    return lines
