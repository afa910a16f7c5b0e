"""One decoder family, driven by the Hugging Face config.

Names are imported when they are asked for: the configuration reads the families' table
(families.py) and must not import jax for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtrain.models.config import ModelConfig
    from jaxtrain.models.layers import LoraShape
    from jaxtrain.models.recompute import REMAT_POLICIES
    from jaxtrain.models.transformer import Decoder

__all__ = ["REMAT_POLICIES", "Decoder", "LoraShape", "ModelConfig"]
_HOMES = {"ModelConfig": "config", "LoraShape": "layers", "REMAT_POLICIES": "recompute"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "transformer")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)
