"""Configurations: their keys, what keys mean together, and the resolved `RunConfig`."""

from jaxtrain.config.files import ConfigManager, load_config, load_yaml
from jaxtrain.config.rules import ConfigError
from jaxtrain.config.run import RunConfig, default_config, diff, resolve, to_config_dict
from jaxtrain.config.sections import (
    CurriculumSection,
    OptimizerSection,
    ScheduleSection,
)

__all__ = [
    "ConfigError",
    "ConfigManager",
    "CurriculumSection",
    "OptimizerSection",
    "RunConfig",
    "ScheduleSection",
    "default_config",
    "diff",
    "load_config",
    "load_yaml",
    "resolve",
    "to_config_dict",
]
