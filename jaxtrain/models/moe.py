"""Mixture of experts: routing, the experts' MLPs, the load-balancing loss.

Pure functions of arrays. E counts experts, K those that a token is sent to, M = B T K
the copies of tokens that experts see. No token is dropped: copies are sorted by expert,
and each expert multiplies its own run of rows in one grouped product.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int, Int32, Shaped

from jaxtrain.kernels.grouped_matmul import (
    choose_implementation,
    grouped_matmul,
    grouped_matmuls,
)
from jaxtrain.models.expert_adapters import join_factors

# What experts' products are called where checkpoint policies choose what is kept. The
# last one is not among them: no backward pass reads it.
PRODUCTS = ("mlp_gate", "mlp_up")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterLoad:
    """How tokens spread over experts: sums, over layers and rows alike.

    `assigned`: tokens sent to each expert. `probability`: what the router gave each, a
    token's sum being 1. `tokens`: how many were counted; padding is not. `entropy`: of
    each token's probabilities (nats). `squares`: log^2 of each token's softmax's
    denominator.
    """

    assigned: Float32[Array, "*L E"]
    probability: Float32[Array, "*L E"]
    tokens: Float32[Array, "*L"]
    entropy: Float32[Array, "*L"] | None = None
    squares: Float32[Array, "*L"] | None = None


def choose_experts(
    logits: Float[Array, "B T E"], count: int, *, normalize: bool
) -> tuple[Float32[Array, "B T E"], Float32[Array, "B T K"], Int32[Array, "B T K"]]:
    """Router probabilities, and the weights and numbers of the `count` best experts.

    softmax over all experts; with `normalize` the chosen weights sum to 1, as in
    Mixtral (arXiv:2401.04088), else they keep their probabilities.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, count)
    if normalize:
        weights /= weights.sum(axis=-1, keepdims=True)
    return probabilities, weights, experts


def measure_load(
    probabilities: Float32[Array, "B T E"],
    experts: Int32[Array, "B T K"],
    counted: Shaped[Array, "B T"],
    logits: Float[Array, "B T E"],
) -> RouterLoad:
    """One layer's load; each token counts so often, padding 0 times."""
    # Sums, not products of matrices: these would be rounded to bfloat16 on a TPU.
    mask = counted.astype(jnp.float32)
    chosen = jax.nn.one_hot(experts, probabilities.shape[-1], dtype=jnp.float32)
    return RouterLoad(
        assigned=(chosen.sum(axis=2) * mask[..., None]).sum(axis=(0, 1)),
        probability=(probabilities * mask[..., None]).sum(axis=(0, 1)),
        tokens=mask.sum(),
        entropy=(jax.scipy.special.entr(probabilities).sum(axis=-1) * mask).sum(),
        squares=(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * mask).sum(),
    )


def join_loads(loads: list[RouterLoad | None]) -> RouterLoad | None:
    """The loads of several stacks of layers as of one; None where none has a router."""
    found = [load for load in loads if load is not None]
    if len(found) < 2:
        return found[0] if found else None
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)


def load_balancing_loss(load: RouterLoad) -> Float32[Array, ""]:
    """E sum_e f_e P_e (arXiv:2101.03961, equations 4 to 6), as transformers has it.

    f_e is the share of tokens sent to expert e and P_e its mean probability, both over
    all layers' tokens together. f sums to K, so an even router has the loss K, which is
    the least that follows from P = f / K. Gradients flow through P only.

    Args:
        load: of every layer, stacked on the first axis.
    """
    tokens = load.tokens.sum()
    tokens = jnp.where(tokens == 0, 1, tokens)
    shares = jax.lax.stop_gradient(load.assigned.sum(axis=0) / tokens)
    means = load.probability.sum(axis=0) / tokens
    return means.shape[0] * (shares * means).sum()


def apply_experts(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T K"],
    experts: Int[Array, "B T K"],
    gate_proj: Float[Array, "E D F"],
    up_proj: Float[Array, "E D F"],
    down_proj: Float[Array, "E F D"],
    *others: Float[Array, "E ..."],
    combine: Callable[[Array, Array], Array],
    scalings: tuple[float | None, ...] = (None, None),
    device: jax.Device | None = None,
) -> Float[Array, "B T D"]:
    """sum_k weight_k down_k(combine(gate_k(x), up_k(x))) over a token's experts.

    `others` are the factors of adapters that `scalings` tell of, where they have some
    (`expert_adapters.SplitAdapters`), and then the biases of gate and up. `device` is
    one that the program is for, where it is not the first local one.

    Every token is independent of the others, and the result is a sum over F; so rows
    and F may each be split over devices, with every expert's slice at hand.

    Weights are multiplied to what down_k reads, which is narrower than what it gives;
    and so their gradient needs no result of down_k, which would have to be computed
    again where little is kept for the backward pass.
    """
    tokens = x.reshape(-1, x.shape[-1])
    chosen = experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    places = jnp.argsort(order)
    sizes = jnp.bincount(chosen, length=gate_proj.shape[0]).astype(jnp.int32)
    copies = experts.shape[-1]
    rows = _send(tokens, order, places, copies)
    implementation = choose_implementation(rows, gate_proj, device)
    multiply = functools.partial(
        grouped_matmul, sizes=sizes, implementation=implementation, device=device
    )
    gate, up = grouped_matmuls(
        rows, (gate_proj, up_proj), sizes, implementation=implementation, device=device
    )
    inwards, outwards, biases = join_factors(others, scalings)
    if inwards is not None:
        gate, up = inwards.add((gate, up), rows, multiply)
    if biases:
        own = jax.nn.one_hot(chosen[order], gate_proj.shape[0], dtype=rows.dtype)
        gate, up = (y + _pick(own, b) for y, b in zip((gate, up), biases, strict=True))
    gate, up = checkpoint_name(gate, PRODUCTS[0]), checkpoint_name(up, PRODUCTS[1])

    def weigh(gate: Array, up: Array, shares: Array) -> Array:
        return combine(gate, up) * shares[:, None].astype(gate.dtype)

    shares = weights.reshape(-1)[order]
    inner = jax.checkpoint(weigh, prevent_cse=False)(gate, up, shares)
    outputs = multiply(inner, down_proj)
    if outwards is not None:
        (outputs,) = outwards.add((outputs,), inner, multiply)
    return _collect(outputs, order, places, copies).reshape(x.shape)


def mix_biases(
    weights: Float[Array, "B T K"],
    experts: Int[Array, "B T K"],
    biases: Float[Array, "E D"],
) -> Float[Array, "B T D"]:
    """sum_k weight_k bias_k over a token's experts."""
    chosen = jax.nn.one_hot(experts, biases.shape[0], dtype=weights.dtype)
    return _pick((chosen * weights[..., None]).sum(axis=2).astype(biases.dtype), biases)


def clamped_swiglu(
    gate: Float[Array, "M F"], up: Float[Array, "M F"], *, alpha: float, limit: float
) -> Float[Array, "M F"]:
    """(up + 1) * gate * sigmoid(alpha * gate), both clamped: gate from above only."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def _pick(shares: Float[Array, "*M E"], biases: Float[Array, "E F"]) -> Array:
    """Each row's biases, as a product: a gather's gradient would be a scatter."""
    return jnp.matmul(shares, biases, precision=jax.lax.Precision.HIGHEST)


# Each of these two is the other's transpose. Left to itself, jax would transpose the
# first gather into a scatter that adds: slow, and on GPUs in no certain order.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _send(
    tokens: Float[Array, "N D"],
    order: Int[Array, "M"],
    places: Int[Array, "M"],
    copies: int,
) -> Float[Array, "M D"]:
    """`copies` of each token, in the order of their experts."""
    del places
    return tokens[order // copies]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _collect(
    outputs: Float[Array, "M D"],
    order: Int[Array, "M"],
    places: Int[Array, "M"],
    copies: int,
) -> Float[Array, "N D"]:
    """The sum over each token's copies, in float32: they may be many."""
    del order
    own = outputs[places].reshape(-1, copies, outputs.shape[-1])
    return own.sum(axis=1, dtype=jnp.float32).astype(outputs.dtype)


def _forward(
    function: Callable[..., Array], rows: Array, *how: Any
) -> tuple[Array, tuple[Any, ...]]:
    return function(rows, *how), how[:2]


def _backward(
    transpose: Callable[..., Array], copies: int, how: tuple[Any, ...], gradient: Array
) -> tuple[Array, None, None]:
    return transpose(gradient, *how, copies), None, None


_send.defvjp(functools.partial(_forward, _send), functools.partial(_backward, _collect))
_collect.defvjp(
    functools.partial(_forward, _collect), functools.partial(_backward, _send)
)
