"""Learning rates by parameter: ordered patterns, each with a multiplier; 0 freezes.

A parameter is called as its path in the tree, with the number of its layer:
`embed_tokens/embedding`, `layers/3/self_attn/q_proj/kernel`, `lm_head/kernel`. Layers
are stacked on one axis of an array here, so such an array may have several multipliers.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain.models.stacks import LAYERS, layer_numbers, split_path
from jaxtrain.step import ScoreFn
from jaxtrain.types import Batch, Params, TokenLogProbs

Patterns = Sequence[tuple[Any, ...]]  # of (regular expression, multiplier)
_KEY = "training.lr_multipliers"
_MOST_NAMES = 6  # that a message lists


def make_multipliers(patterns: Patterns, params: Any) -> Any:
    """The multiplier of each parameter, by the first pattern that matches its name.

    Returns:
        The tree of `params` with a float32 array for each leaf, which broadcasts to it:
        [L, 1, ...] for L stacked layers, else a scalar.

    Raises:
        ValueError: a parameter that no pattern matches, or a pattern that matches none.
    """
    missing: list[str] = []

    def of_leaf(path: Any, leaf: Any) -> np.ndarray:
        names = list(_names(path, leaf))
        rates = [_find_rate(patterns, name) for name in names]
        missing.extend(n for n, x in zip(names, rates, strict=True) if x is None)
        shape = (len(rates), *[1] * (leaf.ndim - 1)) if _is_stacked(path) else ()
        return np.reshape(np.array(rates, np.float32), shape)

    tree = jax.tree.map_with_path(of_leaf, params)
    if missing:
        listed = ", ".join(missing[:_MOST_NAMES])
        more = len(missing) - _MOST_NAMES
        rest = f" and {more} more" if more > 0 else ""
        raise ValueError(
            f"{_KEY}: no pattern matches {listed}{rest}; end the list with ['.*', 1] to"
            " train all others as they are"
        )
    all_names = [n for path, leaf in _leaves(params) for n in _names(path, leaf)]
    for text, _ in patterns:
        if not any(re.fullmatch(text, name) for name in all_names):
            raise ValueError(
                f"{_KEY}: {text!r} matches no parameter; names are such as"
                f" {', '.join(all_names[:_MOST_NAMES])}"
            )
    return tree


def with_multipliers(
    optimizer: optax.GradientTransformation, patterns: Patterns
) -> optax.GradientTransformation:
    """The same optimizer with each parameter's update, decay included, multiplied.

    Raises:
        ValueError: from `init`: the patterns do not cover the parameters.
    """

    def init(params: Any) -> Any:
        make_multipliers(patterns, params)
        return optimizer.init(params)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        multipliers = make_multipliers(patterns, grads)
        # A frozen parameter stays as it is, whatever its moments came to be.
        return jax.tree.map(
            lambda u, m: jnp.where(m == 0, 0, u * m).astype(u.dtype),
            updates,
            multipliers,
        ), state

    return optax.GradientTransformation(init, update)


def without_frozen(score: ScoreFn, patterns: Patterns) -> ScoreFn:
    """The same scores, of which no gradient reaches a frozen parameter.

    So these count in no gradient norm, and a matrix that is frozen in all layers costs
    no gradient. The weights that are scored may be more than train, as beside adapters:
    what no pattern matches stays as it is.
    """
    if all(rate > 0 for _, rate in patterns):
        return score

    def stop(path: Any, x: Any) -> Any:
        rates = [_find_rate(patterns, name) for name in _names(path, x)]
        if 0 not in rates:
            return x
        stopped = jax.lax.stop_gradient(x)
        frozen = np.reshape([rate == 0 for rate in rates], (-1, *[1] * (x.ndim - 1)))
        return stopped if np.all(frozen) else jnp.where(frozen, stopped, x)

    def score_without(params: Params, batch: Batch, **options: Any) -> TokenLogProbs:
        return score(jax.tree.map_with_path(stop, params), batch, **options)

    return score_without


def _find_rate(patterns: Patterns, name: str) -> float | None:
    """The multiplier of the first pattern that matches the whole name."""
    for text, rate in patterns:
        if re.fullmatch(text, name):
            return float(rate)
    return None


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _is_stacked(path: Any) -> bool:
    return str(getattr(path[0], "key", "")) == LAYERS


def _names(path: Any, leaf: Any) -> Iterator[str]:
    """The names of the parameters in a leaf: one, or one for each layer."""
    # A kernel in eight bits has parts, which are no names.
    parts = tuple(str(each.key) for each in path if hasattr(each, "key"))
    root, inner = split_path(parts)
    if not root:
        yield "/".join(parts)
        return
    for layer in layer_numbers(root, leaf.shape[0]):
        yield "/".join([LAYERS, str(layer), *inner])
