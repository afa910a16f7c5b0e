"""Adapters beside a frozen base: which modules, their values, PEFT's files."""

from jaxtrain.lora.adapters import init_adapters, merge_into_base, trainable_and_frozen
from jaxtrain.lora.patterns import explained
from jaxtrain.lora.peft_config import has_own_ends, settings_from
from jaxtrain.lora.peft_files import load_adapter, save_adapter
from jaxtrain.lora.targets import LoraConfig, make_shape, resolve_targets

__all__ = [
    "LoraConfig",
    "explained",
    "has_own_ends",
    "init_adapters",
    "load_adapter",
    "make_shape",
    "merge_into_base",
    "resolve_targets",
    "save_adapter",
    "settings_from",
    "trainable_and_frozen",
]
