"""How gradients lie in memory where GPUs share weights."""

import jax
import jax.numpy as jnp
from jax.experimental import layout as layouts
from jaxtyping import Array

from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.models.layers import Options
from jaxtrain.types import Params


def shares_weights(options: Options) -> bool:
    """Whether each device keeps a part of every weight, and all parts to use it."""
    layout = options.layout or Layout()
    return layout.count(layout.weights) > 1


def updated_in_place(options: Options, weights: Params) -> Params:
    """The same weights, with gradients that lie as they do, row by row.

    XLA adds up the gradient of a matrix whose columns GPUs share column by column. An
    optimizer that reads it so does not write weights and moments where they lie: these
    are copied (3.6 ms of a step of a 3B on two H200, benchmarks/RESULTS.md). Products
    in fp8 make gradients of their own.
    """
    layout = options.layout or Layout()
    if options.fp8 or not shares_weights(options) or layout.platform != "gpu":
        return weights

    def lay_out(leaf: Array) -> Array:
        is_matrix = leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.floating)
        return _by_rows(leaf) if is_matrix else leaf

    return jax.tree.map(lay_out, weights)


@jax.custom_vjp
def _by_rows(x: Array) -> Array:
    return x


def _gradient_by_rows(_: None, gradient: Array) -> tuple[Array]:
    by_rows = layouts.Layout(tuple(range(gradient.ndim)))
    return (layouts.with_layout_constraint(gradient, by_rows),)


_by_rows.defvjp(lambda x: (x, None), _gradient_by_rows)
