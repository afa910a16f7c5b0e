"""Configurations: their keys, what keys mean together, and the resolved `RunConfig`."""

from jaxtrain.config.files import ConfigManager, load_config, load_yaml
from jaxtrain.config.rules import ConfigError
from jaxtrain.config.run import RunConfig, default_config, diff, resolve, to_config_dict
from jaxtrain.config.sections import (
    CurriculumSection,
    OptimizerSection,
    ScheduleSection,
)
from jaxtrain.schema import copy_config

__all__ = [
    "ConfigError",
    "ConfigManager",
    "CurriculumSection",
    "OptimizerSection",
    "RunConfig",
    "ScheduleSection",
    "copy_config",
    "default_config",
    "diff",
    "load_config",
    "load_yaml",
    "resolve",
    "to_config_dict",
]
