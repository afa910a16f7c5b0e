"""What keys mean together: precedence, values worked out from others, contradictions.

Each rule is a function of typed sections and of a `Resolution`, to which it adds every
problem that it finds; so one run of the command shows them all. `resolve_sections` is
the order in which the rules run.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from jaxtrain.config.rules.data import resolve_data
from jaxtrain.config.rules.dpo import (
    check_dpo,
    check_objective,
    resolve_options,
)
from jaxtrain.config.rules.lengths import (
    check_curriculum,
    check_lengths,
    resolve_lengths,
)
from jaxtrain.config.rules.loop import resolve_generation, resolve_loop
from jaxtrain.config.rules.lora import resolve_lora
from jaxtrain.config.rules.mesh import resolve_devices, resolve_mesh
from jaxtrain.config.rules.model import resolve_model
from jaxtrain.config.rules.optimization import (
    check_optimizer,
    resolve_precision,
    resolve_schedule,
)
from jaxtrain.config.rules.precedence import note_ineffective, take_precedence
from jaxtrain.config.rules.resolution import ConfigError, Resolution
from jaxtrain.config.sections import (
    PLAIN_SECTIONS,
    TRAINING_SECTIONS,
    CurriculumSection,
    DataSection,
    DevicesSection,
    DpoSection,
    GenerationSection,
    LoopSection,
    LoraSection,
    MeshSection,
    ModelSection,
    OptimizerSection,
    PrecisionSection,
    ScheduleSection,
)
from jaxtrain.objectives.options import PreferenceOptions, objective_row
from jaxtrain.schema import build
from jaxtrain.tree import dotted

__all__ = ["ConfigError", "resolve_sections"]


def resolve_sections(
    given: Mapping[str, Any], device_count: int | None
) -> dict[str, Any]:
    """The fields of a RunConfig.

    Raises:
        ConfigError: every problem found.
    """
    found = Resolution(given)
    values, training = found.values, found.values["training"]
    dpo = build(DpoSection, training["dpo"])
    lora = build(LoraSection, training["lora"])
    lora = resolve_lora(lora, dpo.sync_ref_model, found)
    general = take_precedence(found, lora.enabled)
    optimizer = build(OptimizerSection, general)
    schedule = build(ScheduleSection, general)
    schedule = resolve_schedule(schedule, optimizer, found)
    check_optimizer(optimizer, found)
    precision = resolve_precision(build(PrecisionSection, general), found)
    loop = resolve_loop(build(LoopSection, general), found)
    generation = build(GenerationSection, general["generation"])
    generation = resolve_generation(generation, loop, found)
    devices = resolve_devices(build(DevicesSection, general), device_count, found)
    mesh = build(MeshSection, values["mesh"])
    mesh, devices = resolve_mesh(mesh, devices, device_count, found)
    data = build(DataSection, values["data"])
    curriculum = build(CurriculumSection, general["curriculum"])
    data, dpo, curriculum = resolve_lengths(data, dpo, curriculum, found)
    model = build(ModelSection, values["model"])
    check_lengths(data, curriculum, model, found)
    model = resolve_model(model, found)
    row = objective_row(loop.objective, on_pairs=found.training_type == "dpo")
    loop, dpo = resolve_options(loop, dpo, row, found)
    data = resolve_data(data, dpo, loop, curriculum, row, found)
    check_curriculum(curriculum, found)
    check_objective(loop.objective, row, dpo, found)
    reads_all = row is None or row.options is PreferenceOptions
    if found.training_type == "dpo" and reads_all:
        check_dpo(dpo, found)
    if found.problems:
        raise ConfigError(found.problems)
    sections = {
        "model": model,
        "data": data,
        "optimizer": optimizer,
        "schedule": schedule,
        "precision": precision,
        "loop": loop,
        "devices": devices,
        "curriculum": curriculum,
        "generation": generation,
        "mesh": mesh,
        "lora": lora,
        "dpo": dpo,
    }
    note_ineffective(found, _by_full_key(found.training_type, sections))
    return {
        **sections,
        "training_type": found.training_type,
        "lora": lora if lora.enabled else None,
        "dpo": dpo if found.training_type == "dpo" else None,
        "notes": tuple(found.notes),
    }


def _by_full_key(training_type: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    training: dict[str, Any] = {"training_type": training_type}
    for name, section in sections.items():
        if name in TRAINING_SECTIONS:
            training |= asdict(section)
        elif name not in PLAIN_SECTIONS:
            training[name] = asdict(section)
    plain = {name: asdict(sections[name]) for name in PLAIN_SECTIONS}
    return dotted({**plain, "training": training})
