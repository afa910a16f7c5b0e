"""Training objectives: pure functions of token log-probs, by name or of one's own.

`options.py` says what can be set, without jax; the rest is imported when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtrain.objectives.added import with_router_loss
    from jaxtrain.objectives.table import (
        OBJECTIVES,
        load_objective,
        make_objective,
        next_token,
    )

__all__ = [
    "OBJECTIVES",
    "load_objective",
    "make_objective",
    "next_token",
    "with_router_loss",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        home = "added" if name == "with_router_loss" else "table"
        return getattr(importlib.import_module(f"jaxtrain.objectives.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
