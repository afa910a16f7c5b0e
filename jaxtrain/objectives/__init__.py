"""Training objectives: pure functions of token log-probs, by name or of one's own."""

from jaxtrain.objectives.added import with_router_loss
from jaxtrain.objectives.table import (
    OBJECTIVES,
    load_objective,
    make_objective,
    needs_reference,
    next_token,
)

__all__ = [
    "OBJECTIVES",
    "load_objective",
    "make_objective",
    "needs_reference",
    "next_token",
    "with_router_loss",
]
