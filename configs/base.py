"""Every key at its default, for other files to change.

`jaxtrain/config/sections.py` declares the keys; docs/configuration.md lists them with
their defaults, units and allowed values. Any key is a flag, which always wins over a
file: `--training.learning_rate=1e-4`, a list as `--training.report_to=wandb,jsonl`, a
section as `--training.deepspeed="{'zero_stage': 3}"`. A flag that would not act is
refused.

A key that is None is unset: its default depends on other keys, as its line says there.
"""

from ml_collections import ConfigDict

from jaxtrain.config import default_config


def get_config() -> ConfigDict:
    """The configuration with every key at its default."""
    return default_config()
