"""One product for several narrow matrices that read the same activations.

Adapters give each projection a matrix A of a few columns, and with fewer heads of keys
than of queries the kernels of keys and values are narrow too. Each alone would have a
product of its own for the gradient of the shared input, and each of these writes, and
adds to, an array as large as the input, which takes far longer than the product. As
one, they write it once. The price is copying what is narrow.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Named = Mapping[str, Array]


def multiply(x: Float[Array, "*B I"], narrow: Named) -> dict[str, Array]:
    """x W [*B O] of each W [I O] of `narrow`, by its name and in the type of x."""
    matrices = {name: matrix.astype(x.dtype) for name, matrix in narrow.items()}
    return _multiply(x, matrices)


@jax.custom_vjp
def _multiply(x: Array, narrow: dict[str, Array]) -> dict[str, Array]:
    widths = [matrix.shape[-1] for matrix in narrow.values()]
    ends = [sum(widths[: place + 1]) for place in range(len(widths) - 1)]
    # On GPUs XLA would join this with the product of a wide kernel too, and then copy
    # the wide result out of the joint one.
    x = jax.lax.optimization_barrier(x)
    products = jnp.split(x @ _joined(narrow), ends, axis=-1)
    return dict(zip(narrow, products, strict=True))


def _forward(
    x: Array, narrow: dict[str, Array]
) -> tuple[dict[str, Array], tuple[Array, dict[str, Array]]]:
    return _multiply(x, narrow), (x, narrow)


def _backward(
    residuals: tuple[Array, dict[str, Array]], gradients: dict[str, Array]
) -> tuple[Array, dict[str, Array]]:
    """The input's gradient by one product; matrices that are frozen get none.

    Theirs are products apart, of which XLA leaves out what nobody asked for, and joins
    the others.
    """
    x, narrow = residuals
    d_x = _joined({name: gradients[name] for name in narrow}) @ _joined(narrow).T
    d_narrow = {
        name: jnp.einsum("...i,...o->io", x, gradient)
        for name, gradient in gradients.items()
    }
    return d_x, d_narrow


_multiply.defvjp(_forward, _backward)


def _joined(arrays: Mapping[str, Array]) -> Array:
    return jnp.concatenate(list(arrays.values()), axis=-1)
