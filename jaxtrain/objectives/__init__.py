"""Training objectives: pure functions of token log-probs, by name or of one's own.

`options.py` says what can be set, without jax; the rest is imported when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxtrain.objectives.options import OBJECTIVES

if TYPE_CHECKING:
    from jaxtrain.objectives.table import load_objective, make_objective, next_token

__all__ = ["OBJECTIVES", "load_objective", "make_objective", "next_token"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("jaxtrain.objectives.table"), name)
