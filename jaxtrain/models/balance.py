"""Balancing experts without a loss: each has a bias, which is moved after every step.

Auxiliary-loss-free balancing (arXiv:2408.15664, as in DeepSeek-V3, arXiv:2412.19437):
the bias decides with an expert's score whether a token is sent to it, and does not
weigh what the expert gives. Expert e of E, which got c_e tokens of a step, then has

    bias_e += rate * sign(mean of c - c_e)

by `optimizers.balance`. The counts take the way that gradients take, for they need all
that gradients have: micro-batches and devices are added up, layers are stacked, and a
step that is skipped leaves the bias alone. No loss has a gradient by the bias, since
choosing has none, so `E c_e - sum of c` goes in its place: whole numbers, exact in
float32 below 2^24, and 0 where the load is even, however they are scaled on the way.
"""

import jax
from jaxtyping import Array, Float, Float32


def send_excess(
    weights: Float[Array, "B T K"],
    bias: Float[Array, "E"],
    assigned: Float32[Array, "E"],
) -> Float[Array, "B T K"]:
    """`weights` as they are; in the backward pass `bias` gets each expert's excess.

    Args:
        weights: of the chosen experts; the loss must depend on them.
        assigned: how many tokens each expert was sent.
    """
    excess = assigned.shape[0] * assigned - assigned.sum()
    return _send(weights, bias, jax.lax.stop_gradient(excess).astype(bias.dtype))


@jax.custom_vjp
def _send(weights: Array, bias: Array, excess: Array) -> Array:
    del bias, excess
    return weights


def _forward(weights: Array, bias: Array, excess: Array) -> tuple[Array, Array]:
    return _send(weights, bias, excess), excess


def _backward(excess: Array, gradient: Array) -> tuple[Array, Array, None]:
    return gradient, excess, None


_send.defvjp(_forward, _backward)
