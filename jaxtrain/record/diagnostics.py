"""What tells a sick step: gradient norms by group, loss spikes, the batch to look at.

The first two are pure and traced inside the train step; `save_batch` is host code.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxtrain.batch import AnyBatch, PairBatch
from jaxtrain.models.stacks import LAYERS
from jaxtrain.types import BALANCING_BIAS, Params

# A spread smaller than this share of the mean is rounding, not the batches'.
_LEAST_SPREAD = 1e-3

GroupOf = Callable[[tuple[str, ...]], str]


def parameter_group(path: tuple[str, ...]) -> str:
    """The group of a parameter: embed, attention, mlp, conv, norm, head, lora or other.

    Adapters always count as lora, and norms as norm, whatever module they belong to.
    """
    if any(name.startswith("lora_") for name in path):
        return "lora"
    for group, words in (
        ("norm", ("norm",)),
        ("embed", ("embed",)),
        ("head", ("lm_head",)),
        ("attention", ("attn",)),
        ("mlp", ("mlp", "moe", "experts", "feed_forward")),
        ("conv", ("conv",)),
    ):
        if any(word in name for name in path for word in words):
            return group
    return "other"


def sum_squares_by_group(
    grads: Params, group_of: GroupOf, *, unrolled: bool = False
) -> dict[str, Array]:
    """Each group's sum of squared gradients; their sum is the squared global norm.

    Args:
        unrolled: layers are compiled one by one. XLA puts their gradients together
            where they are read, and a kernel that finds out for each number which
            array has it takes four times as long as one that reads all arrays side
            by side (RESULTS.md). So squares are added up over layers first.
    """
    sums: dict[str, Array] = {}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        names = tuple(str(getattr(key, "key", key)) for key in path)
        if names[-1] != BALANCING_BIAS:  # what stands there is none: models/balance.py
            group = group_of(names)
            apart = unrolled and names[0] == LAYERS and grad.ndim > 2
            squares = sum(map(jnp.square, grad)) if apart else grad * grad
            sums[group] = sums.get(group, jnp.float32(0)) + jnp.sum(squares)
    return sums


def init_loss_window(size: int) -> Float[Array, "W"]:
    """The last `size` losses before any is known: NaN."""
    return jnp.full((size,), jnp.nan, jnp.float32)


def detect_spike(
    window: Float[Array, "W"], loss: Float[Array, ""], threshold: float
) -> tuple[Bool[Array, ""], Float[Array, "W"]]:
    """Whether loss > mean + threshold * standard deviation of a full `window`.

    Returns:
        That, and the window with this loss in. A spike enters it cut to the limit: one
        outlier then hides no other, and a level that has risen for good is soon normal.
        A loss that is not finite does not enter.
    """
    mean = window.mean()
    spread = jnp.maximum(window.std(), _LEAST_SPREAD * jnp.abs(mean))
    limit = mean + threshold * spread
    full = jnp.isfinite(window).all()
    is_spike = full & (loss > limit)
    entry = jnp.where(is_spike, limit, loss)
    moved = jnp.roll(window, -1).at[-1].set(entry)
    return is_spike, jnp.where(jnp.isfinite(loss), moved, window)


def named_arrays(batch: AnyBatch) -> dict[str, Any]:
    """The arrays of a batch by name: `tokens`, `chosen/tokens`, `pair_ids`.

    Of pairs that share prompts `chosen` and `rejected` are left out, for `shared` has
    all that they have.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(batch)
    named = {"/".join(key.name for key in path): array for path, array in leaves}
    if not isinstance(batch, PairBatch) or batch.shared is None:
        return named
    sides = ("chosen/", "rejected/")
    return {name: x for name, x in named.items() if not name.startswith(sides)}


def save_batch(
    folder: pathlib.Path, step: int, batch: AnyBatch, process: str = ""
) -> pathlib.Path:
    """Write a step's rows on this process as step_N.npz; returns its path.

    Arrays have the names that `named_arrays` gives them, and shapes [A, B, T].
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step}{process}.npz"
    with open(path, "wb") as file:  # a file object: savez would mend the name
        np.savez_compressed(file, **named_arrays(batch))
    return path
