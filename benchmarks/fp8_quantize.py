"""Codes of a matrix in both orders by one pass over it, a kernel in Pallas' Triton.

No part of jaxtrain: fp8_products.py times it against what XLA makes (RESULTS.md).
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

TILE = 128  # rows and columns of a program: what it writes are runs of 128 bytes


def quantize_both(
    x: Float[Array, "M N"],
    scale: Float[Array, ""],
    dtype: DTypeLike,
    *,
    tile: int = TILE,
    warps: int = 8,
    interpret: bool = False,
) -> tuple[Float[Array, "M N"], Float[Array, "N M"]]:
    """x times `scale`, clipped to what `dtype` holds and rounded to it; and the same
    transposed.
    """
    rows, columns = x.shape
    limit = float(jnp.finfo(dtype).max)

    def kernel(x_ref, scale_ref, codes_ref, transposed_ref) -> None:  # type: ignore[no-untyped-def]
        scaled = x_ref[...].astype(jnp.float32) * scale_ref[0]
        codes = jnp.clip(scaled, -limit, limit).astype(dtype)
        codes_ref[...] = codes
        transposed_ref[...] = codes.T

    return pl.pallas_call(
        kernel,
        grid=(columns // tile, rows // tile),
        in_specs=[
            pl.BlockSpec((tile, tile), lambda j, i: (i, j)),
            pl.BlockSpec((1,), lambda j, i: (0,)),
        ],
        out_specs=[
            pl.BlockSpec((tile, tile), lambda j, i: (i, j)),
            pl.BlockSpec((tile, tile), lambda j, i: (j, i)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((rows, columns), dtype),
            jax.ShapeDtypeStruct((columns, rows), dtype),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="quantize_both",
    )(x, scale[None])
