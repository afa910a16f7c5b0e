"""The update of routers' balancing biases, which no optimizer's rule is for."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.types import BALANCING_BIAS


def with_balancing(
    optimizer: optax.GradientTransformation, rate: float
) -> optax.GradientTransformation:
    """The same optimizer, which moves each expert's bias against its excess of tokens.

    bias -= rate * sign(excess): `models.balance` gives the excess as a gradient. The
    optimizer itself sees 0 there, and neither learning rate, moments nor weight decay
    act.

    Args:
        rate: what a bias moves by in a step; scores are between 0 and 1.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        others = jax.tree.map_with_path(
            lambda path, g: jnp.zeros_like(g) if _is_bias(path) else g, grads
        )
        updates, state = optimizer.update(others, state, params)
        return jax.tree.map_with_path(
            lambda path, u, g: -rate * jnp.sign(g) if _is_bias(path) else u,
            updates,
            grads,
        ), state

    return optax.GradientTransformation(optimizer.init, update)


def _is_bias(path: Any) -> bool:
    return bool(path[-1].key == BALANCING_BIAS)
