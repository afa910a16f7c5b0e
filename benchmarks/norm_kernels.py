"""A residual sum with its RMSNorm in one pass each way, Triton by Pallas, against XLA.

    PYTHONPATH=. python benchmarks/norm_kernels.py
    PYTHONPATH=. python benchmarks/norm_kernels.py --smoke    # interpreted, tiny

No part of jaxtrain: it says what a kernel would gain (RESULTS.md). 16,384 tokens in
bfloat16. Forward reads the stream and what is added, and writes their sum and its norm;
backward reads the gradients of both and the sum, and writes one gradient.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxtrain.models.layers import normalize

EPSILON = 1e-6
SHAPES = [(16384, 896), (16384, 2048)]
LAYERS = {896: 24, 2048: 36}


def pieces_of(width: int) -> list[slice]:
    """Parts of a row, each a power of two: Triton has no others."""
    size = math.gcd(width, 2048)
    return [slice(first, first + size) for first in range(0, width, size)]


def call(
    kernel: Callable[..., None],
    arrays: list[jax.Array],
    out: list[jax.ShapeDtypeStruct],
    rows: int,
    *,
    interpret: bool,
) -> Any:
    """`kernel` over blocks of `rows`; what has one row is given whole."""

    def spec(x: Any) -> pl.BlockSpec:
        shared = x.shape[0] == 1
        height = 1 if shared else rows if x.dtype != jnp.float32 else 1
        return pl.BlockSpec(
            (height, x.shape[1]), lambda i, shared=shared: (0 if shared else i, 0)
        )

    return pl.pallas_call(
        kernel,
        grid=(arrays[0].shape[0] // rows,),
        in_specs=[spec(x) for x in arrays],
        out_specs=[spec(x) for x in out],
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(*arrays)


def add_and_norm(x: Any, added: Any, scale: Any, interpret: bool, rows: int) -> Any:
    width = x.shape[1]

    def kernel(x_ref, added_ref, scale_ref, sum_ref, out_ref) -> None:  # type: ignore[no-untyped-def]
        sums, squares = [], 0.0
        for piece in pieces_of(width):
            total = x_ref[:, piece] + added_ref[:, piece]
            sum_ref[:, piece] = total
            total = total.astype(jnp.float32)
            sums.append(total)
            squares += (total * total).sum(axis=1)
        factor = jax.lax.rsqrt(squares / width + EPSILON)[:, None]
        for piece, total in zip(pieces_of(width), sums, strict=True):
            scaled = total * factor * scale_ref[:, piece]
            out_ref[:, piece] = scaled.astype(out_ref.dtype)

    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    arrays = [x, added, scale[None]]
    return call(kernel, arrays, [like, like], rows, interpret=interpret)


def gradient(
    total: Any,
    scale: Any,
    of_total: Any,
    of_out: Any,
    interpret: bool,
    rows: int,
    turns: int,
) -> Any:
    """The gradient of the sum, and of the scale where `turns` of rows are added up."""
    width = total.shape[1]

    def kernel(total_ref, of_total_ref, of_out_ref, scale_ref, out_ref, *parts) -> None:  # type: ignore[no-untyped-def]
        def turn(index: Any, d_scale: Any) -> Any:
            own = pl.ds(index * rows, rows)
            xs, slopes, squares, products = [], [], 0.0, 0.0
            for piece in pieces_of(width):
                x = total_ref[own, piece].astype(jnp.float32)
                slope = of_out_ref[own, piece].astype(jnp.float32)
                xs.append(x)
                slopes.append(slope)
                squares += (x * x).sum(axis=1)
                products += (x * slope * scale_ref[:, piece]).sum(axis=1)
            factor = jax.lax.rsqrt(squares / width + EPSILON)
            pull = (products / width * factor**3)[:, None]
            factor = factor[:, None]
            sums = []
            for place, piece in enumerate(pieces_of(width)):
                x, slope = xs[place], slopes[place]
                d_x = slope * scale_ref[:, piece] * factor - x * pull
                d_x += of_total_ref[own, piece].astype(jnp.float32)
                out_ref[own, piece] = d_x.astype(out_ref.dtype)
                if parts:
                    sums.append(d_scale[place] + (slope * x * factor).sum(axis=0))
            return tuple(sums)

        size = pieces_of(width)[0].stop
        zeros = tuple(jnp.zeros(size, jnp.float32) for _ in pieces_of(width))
        end = jax.lax.fori_loop(0, turns, turn, zeros if parts else ())
        for piece, part in zip(pieces_of(width), end, strict=False):
            parts[0][0, piece] = part

    outputs = [jax.ShapeDtypeStruct(total.shape, total.dtype)]
    if turns > 1:
        count = len(total) // (rows * turns)
        outputs.append(jax.ShapeDtypeStruct((count, width), jnp.float32))
    arrays = [total, of_total, of_out, scale[None]]
    found = call(kernel, arrays, outputs, rows * turns, interpret=interpret)
    return found[0], found[1].sum(axis=0) if turns > 1 else None


def by_xla(x: Any, added: Any, scale: Any) -> Any:
    total = x + added
    return total, normalize(total, scale, EPSILON)


def time_us(run: Callable[[], Any]) -> float:
    jax.block_until_ready(run())
    means = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(50):
            result = run()
        jax.block_until_ready(result)
        means.append((time.perf_counter() - start) / 50 * 1e6)
    return min(means)


def compare(shape: tuple[int, int], interpret: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    x, added, of_total, of_out = (
        jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4]
    )
    scale = jax.random.uniform(keys[4], shape[1:], jnp.float32)
    total, _ = by_xla(x, added, scale)

    # As in a step: the sum is kept, and the norm computed again.
    def pull(total: Any, scale: Any, of_total: Any, of_out: Any, both: bool) -> Any:
        norm = lambda total, scale: normalize(total, scale, EPSILON)  # noqa: E731
        _, transpose = jax.vjp(norm, total, scale)
        d_total, d_scale = transpose(of_out)
        return of_total + d_total, d_scale if both else None

    forward = jax.jit(by_xla)
    expected = jax.tree.map(np.asarray, forward(x, added, scale))
    told = [f"forward XLA {time_us(lambda: forward(x, added, scale)):.0f}"]
    for rows in (1, 2, 4, 8):
        run = jax.jit(lambda *a, rows=rows: add_and_norm(*a, interpret, rows))
        found = run(x, added, scale)
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_allclose(
                np.asarray(b, np.float32), np.asarray(a, np.float32), rtol=2**-7
            )
        told.append(f"{rows} rows {time_us(lambda r=run: r(x, added, scale)):.0f}")  # type: ignore[misc]
    print(shape, "us:", ", ".join(told), flush=True)
    given = (total, scale, of_total, of_out)
    for both in (False, True):
        plain = jax.jit(lambda *a, both=both: pull(*a, both))
        expected = jax.tree.map(np.asarray, plain(*given))
        told = [f"backward XLA {time_us(lambda p=plain: p(*given)):.0f}"]  # type: ignore[misc]
        for rows, turns in (
            [(2, 16), (4, 8), (4, 16)] if both else [(1, 1), (2, 1), (4, 1)]
        ):
            run = jax.jit(
                lambda *a, rows=rows, turns=turns: gradient(*a, interpret, rows, turns)
            )
            found = run(*given)
            for a, b in zip(
                jax.tree.leaves(expected), jax.tree.leaves(found), strict=True
            ):
                a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
                error = np.abs(a - b).max() / np.abs(a).max()
                assert error < 2**-7, error
            told.append(f"{rows} x {turns} {time_us(lambda r=run: r(*given)):.0f}")  # type: ignore[misc]
        print("   ", "with scale's" if both else "", ", ".join(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, interpreted")
    options = parser.parse_args()
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    for shape in [(64, 384)] if options.smoke else SHAPES:
        compare(shape, options.smoke)


if __name__ == "__main__":
    main()
