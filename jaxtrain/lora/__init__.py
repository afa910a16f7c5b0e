"""Adapters beside a frozen base: which modules, their values, PEFT's files."""

from jaxtrain.lora.adapters import init_adapters, merge_into_base, trainable_and_frozen
from jaxtrain.lora.peft_files import load_adapter, read_settings, save_adapter
from jaxtrain.lora.targets import (
    LoraConfig,
    resolve_ranks,
    resolve_targets,
    ties_adapters,
)

__all__ = [
    "LoraConfig",
    "init_adapters",
    "load_adapter",
    "merge_into_base",
    "read_settings",
    "resolve_ranks",
    "resolve_targets",
    "save_adapter",
    "ties_adapters",
    "trainable_and_frozen",
]
