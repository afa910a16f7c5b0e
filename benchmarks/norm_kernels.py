"""A residual sum with its RMSNorm in one pass each way, against XLA and float64.

    PYTHONPATH=. python benchmarks/norm_kernels.py
    PYTHONPATH=. python benchmarks/norm_kernels.py --smoke    # interpreted, tiny

16,384 tokens in bfloat16, microseconds. Forward reads the stream and what is added, and
writes their sum and its norm; backward reads the gradients of both and the sum, and
writes one gradient, and where it is trained that of the scale. Behind each time is the
share of the GPU's bandwidth that four arrays make of it.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.aot.report import CHIPS
from jaxtrain.kernels.norm import pallas_triton
from jaxtrain.kernels.norm.pallas_triton import Tiles
from jaxtrain.models.layers import normalize

Call = Callable[..., Any]
EPSILON = 1e-6
SHAPES = [(16384, 896), (16384, 2048)]
# Rows at once, warps, and turns of a program where the scale is trained.
FORWARD = [(1, 4, 1), (1, 2, 1)]
BACKWARD = [(1, 4, 16), (1, 8, 16), (2, 8, 8)]
FROZEN = [(1, 4, 1), (1, 2, 1)]


def by_xla(x: Any, added: Any, scale: Any) -> Any:
    total = x + added
    return total, normalize(total, scale, EPSILON)


def gradient_by_xla(
    total: Any, scale: Any, of_total: Any, of_out: Any, with_scale: bool
) -> Any:
    """As in a step: the sum is kept, and the norm computed again."""
    norm = lambda total, scale: normalize(total, scale, EPSILON)  # noqa: E731
    of_norm, of_scale = jax.vjp(norm, total, scale)[1](of_out)
    return of_total + of_norm, of_scale if with_scale else None


def exact(total: Any, scale: Any, of_total: Any, of_out: Any) -> list[Any]:
    """The norm, the gradient of the sum and that of the scale in float64."""
    t, s, g, d = (
        np.asarray(x.astype(jnp.float32), np.float64)
        for x in (total, scale, of_total, of_out)
    )
    factor = 1 / np.sqrt((t * t).mean(axis=1, keepdims=True) + EPSILON)
    normal, slope = t * factor, d * s
    pull = (normal * slope).mean(axis=1, keepdims=True)
    return [normal * s, g + (slope - normal * pull) * factor, (d * normal).sum(axis=0)]


def time_us(call: Call, given: tuple[Any, ...], interpret: bool) -> float:
    """Of one call, among many in a program, each of which reads what the last wrote."""
    calls = 1 if interpret else 16

    def chain(*given: Any) -> Any:
        # Nothing may be left out, nor computed once for two calls: every call reads
        # new arrays, and all that is written is a result.
        kept = []
        for _ in range(calls):
            found = jax.lax.optimization_barrier(call(*given))
            kept.append(found)
            if len(given) == 3:
                given = (*found, given[2])
            else:
                total, scale, of_total, _ = given
                given = (found[0], scale, total, of_total)
        return kept

    run = jax.jit(chain)
    jax.block_until_ready(run(*given))
    times = []
    for _ in range(1 if interpret else 6):
        start = time.perf_counter()
        jax.block_until_ready(run(*given))
        times.append((time.perf_counter() - start) / calls * 1e6)
    return min(times)


def tell(
    name: str,
    call: Call,
    given: tuple[Any, ...],
    expected: list[Any],
    interpret: bool,
) -> None:
    """The time of `call(*given)`, and its errors, as shares of the largest value."""
    start = time.perf_counter()
    results = jax.block_until_ready(jax.jit(call)(*given))
    compile_secs = time.perf_counter() - start
    errors = []
    for found, right in zip(jax.tree.leaves(results), expected, strict=True):
        found = np.asarray(found.astype(jnp.float32))
        errors.append(np.abs(found - right).max() / np.abs(right).max())
    micros = time_us(call, given, interpret)
    chip = CHIPS.get(jax.devices()[0].device_kind)
    share = 4 * given[0].nbytes / chip.memory_rate / micros * 1e6 if chip else 0.0
    worst = " ".join(f"{error:.0e}" for error in errors)
    print(f"{name:19}{micros:7.1f} {share:.2f} {worst} c{compile_secs:.1f}", flush=True)
    assert max(errors) < 2**-7, errors


def compare(shape: tuple[int, int], interpret: bool) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    x, added, of_total, of_out = (
        jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4]
    )
    scale = jax.random.uniform(keys[4], shape[1:], jnp.float32)
    total = x + added
    norm, of_sum, of_scale = exact(total, scale, of_total, of_out)
    right = [np.asarray(total.astype(jnp.float32)), norm]
    print(shape, "forward", flush=True)

    def run(name: str, call: Any, given: Any, expected: Any) -> None:
        tell(name, call, given, expected, interpret)

    run("XLA", by_xla, (x, added, scale), right)
    for own in FORWARD:
        tiles = Tiles(*own, interpret)
        run(
            str(own),
            lambda *a, t=tiles: pallas_triton.forward(*a, EPSILON, t),
            (x, added, scale),
            right,
        )
    given = (total, scale, of_total, of_out)
    for with_scale, variants in ((True, BACKWARD), (False, FROZEN)):
        print("backward", "with scale" if with_scale else "frozen", flush=True)
        right = [of_sum, of_scale] if with_scale else [of_sum]
        run("XLA", lambda *a, w=with_scale: gradient_by_xla(*a, w), given, right)
        for own in variants:
            tiles = Tiles(*own, interpret)
            run(
                str(own),
                lambda *a, t=tiles, w=with_scale: pallas_triton.backward(
                    *a[:3], [a[3]], EPSILON, t, with_scale=w
                ),
                given,
                right,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny, interpreted")
    options = parser.parse_args()
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    for shape in [(37, 96)] if options.smoke else SHAPES:
        compare(shape, options.smoke)


if __name__ == "__main__":
    main()
