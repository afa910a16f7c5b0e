"""TFLOP/s of a mixture's grouped products: XLA's ragged_dot and ours, by tiles.

    PYTHONPATH=. python benchmarks/grouped_matmul.py            # on a Hopper GPU
    PYTHONPATH=. python benchmarks/grouped_matmul.py --smoke    # interpreted, on a CPU

The shapes of benchmarks/step_cases.py's moe_4b: 8192 tokens, each to 4 of 32 experts,
2048 wide, 1024 within, gate and up in one product. Groups of uneven sizes, one of them
empty, do not begin where tiles do. Numbers are checked first, against float64 for some
rows and groups and against ragged_dot for all: the script fails where they are wrong.
One line a product and choice of tiles; the best of each is told at the end.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.kernels.grouped_matmul import grouped_matmul, hopper
from jaxtrain.kernels.grouped_matmul.api import multiply_groups
from jaxtrain.kernels.grouped_matmul.plan import Plan, make_plan

TILES = [
    hopper.Tiles(columns=columns, stages=stages, leaving=leaving)
    for columns, stages, leaving in (
        (256, 4, 128), (256, 4, 64), (256, 3, 128), (256, 3, 256), (192, 4, 64),
        (128, 4, 128),
    )
]  # fmt: skip
PRODUCTS = ("forward", "d_rows", "d_weights")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows, groups, and the widths of the weights."""

    rows: int
    groups: int
    depth: int
    width: int

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.depth * self.width

    def __str__(self) -> str:
        return f"{self.rows}x{self.depth}x{self.width}/{self.groups}"


def make_sizes(shape: Shape, *, even: bool) -> np.ndarray:
    """Sizes of groups; uneven ones as a router's, the second of them empty."""
    if even:
        return np.full(shape.groups, shape.rows // shape.groups, np.int32)
    shares = np.random.default_rng(0).dirichlet(np.full(shape.groups, 4.0))
    shares[1] = 0
    sizes = (shares / shares.sum() * shape.rows).astype(np.int32)
    sizes[0] += shape.rows - sizes.sum()
    return sizes


def make_arrays(shape: Shape) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows, weights, and the gradient of the result."""
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (
        (shape.rows, shape.depth),
        (shape.groups, shape.depth, shape.width),
        (shape.rows, shape.width),
    )
    rows, weights, d_out = (
        jax.random.normal(key, size, jnp.bfloat16)
        for key, size in zip(keys, sizes, strict=True)
    )
    return rows, weights, d_out


def run_all(multiply: Callable[..., Any], arrays: Any, sizes: Any) -> list[jax.Array]:
    """The product and both gradients."""
    rows, weights, d_out = arrays
    out, transpose = jax.vjp(lambda *x: multiply(*x, sizes), rows, weights)
    return [out, *transpose(d_out)]


def check(shape: Shape, sizes: np.ndarray, interpret: bool) -> None:
    """Compare with float64 in places, and with ragged_dot everywhere."""
    arrays = make_arrays(shape)
    tiles = hopper.Tiles(interpret=interpret)
    if interpret:
        tiles = dataclasses.replace(tiles, columns=128, stages=2, leaving=64)
    kernels = hopper.make_kernels(tiles, tiles, tiles)
    groups = jnp.asarray(sizes)
    got = run_all(
        lambda x, w, s: multiply_groups(kernels, x, (w,), s)[0], arrays, groups
    )
    if not interpret:
        theirs = run_all(
            lambda *x: grouped_matmul(*x, implementation="xla"), arrays, groups
        )
        for name, x, y in zip(PRODUCTS, got, theirs, strict=True):
            apart = float(jnp.abs(x.astype(jnp.float32) - y).max())
            most = float(jnp.abs(y).max())
            print(f"check {shape} {name}: {apart:.3g} of {most:.3g} from ragged_dot")
            assert apart <= most / 64, name  # both are rounded to bfloat16
    rows, weights, d_out = arrays
    own = np.repeat(np.arange(shape.groups), sizes)
    ends = np.cumsum(sizes)
    edges = [0, *(end + i for end in ends[:6] for i in (-1, 0)), len(own) - 1]
    for row in sorted({int(x) for x in edges if x < len(own)}):
        matrix = np.asarray(weights[own[row]], np.float64)
        compare(got[0][row], np.asarray(rows[row], np.float64) @ matrix)
        compare(got[1][row], matrix @ np.asarray(d_out[row], np.float64))
    for group in (0, 1, 2, shape.groups - 1):
        some = slice(int(ends[group] - sizes[group]), int(ends[group]))
        left, right = (np.asarray(x[some], np.float64) for x in (rows, d_out))
        compare(got[2][group], left.T @ right)
    for x in got[:2]:
        assert not np.any(np.asarray(x[len(own) :], np.float32)), "rows behind all"
    print(f"check {shape}: equal to float64")


def compare(got: jax.Array, want: np.ndarray) -> None:
    """Within bfloat16's rounding of the result, sums being float32."""
    apart = np.abs(np.asarray(got, np.float64) - want)
    limit = 2.0**-8 * np.abs(want) + 1e-4 * np.abs(want).max()
    assert (apart <= limit).all(), (apart - limit).max()


def measure(run: Callable[..., Any], *arrays: Any) -> float:
    """Seconds of one call, of many without a pause between."""
    compiled = jax.jit(run)
    jax.block_until_ready(compiled(*arrays))
    times, calls = [], 10
    for _ in range(3):
        start = time.perf_counter()
        results = [compiled(*arrays) for _ in range(calls)]
        jax.block_until_ready(results)
        del results
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def kernel_of(product: str, tiles: hopper.Tiles) -> Callable[..., Any]:
    """(rows, weights, d_out, plan) -> the product, by tiles of this size."""

    def run(rows: Any, weights: Any, d_out: Any, plan: Plan) -> Any:
        if product == "forward":
            return hopper.multiply(rows, (weights,), plan, tiles)
        if product == "d_rows":
            return hopper.multiply_transposed((d_out,), (weights,), plan, tiles)
        return hopper.multiply_rows(rows, (d_out,), plan, tiles)

    return run


def ragged_dot_of(product: str) -> Callable[..., Any]:
    """(rows, weights, d_out, sizes) -> the same by ragged_dot and its derivatives."""

    def run(rows: Any, weights: Any, d_out: Any, sizes: Any) -> Any:
        if product == "forward":
            return jax.lax.ragged_dot(rows, weights, sizes)
        if product == "d_rows":
            of_rows = lambda x: jax.lax.ragged_dot(x, weights, sizes)  # noqa: E731
            return jax.vjp(of_rows, rows)[1](d_out)
        of_weights = lambda x: jax.lax.ragged_dot(rows, x, sizes)  # noqa: E731
        return jax.vjp(of_weights, weights)[1](d_out)

    return run


def time_shape(shape: Shape, even: bool, options: argparse.Namespace) -> None:
    """A line a product and choice of tiles."""
    arrays = make_arrays(shape)
    sizes = jnp.asarray(make_sizes(shape, even=even))
    plan = jax.jit(lambda x: make_plan(x, shape.rows))(sizes)
    kind = "even" if even else "uneven"
    for product in PRODUCTS:
        found = {}
        for tiles in TILES[: 1 if options.quick else None]:
            name = f"{tiles.columns}/{tiles.stages}/{tiles.leaving}"
            try:
                secs = measure(kernel_of(product, tiles), *arrays, plan)
                found[name] = shape.flops / secs / 1e12
            except Exception as error:  # too much shared memory, for one
                print(f"{shape} {product} {name}: {type(error).__name__}", flush=True)
        told = ", ".join(f"{name} {rate:.0f}" for name, rate in found.items())
        print(f"{shape} {kind} {product} TFLOP/s: {told}", flush=True)
        if options.ragged_dot:
            secs = measure(ragged_dot_of(product), *arrays, sizes)
            print(f"    ragged_dot {shape.flops / secs / 1e12:.1f}", flush=True)
    secs = measure(lambda x: make_plan(x, shape.rows), sizes)
    print(f"    the plan takes {secs * 1e6:.0f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="interpreted, checks only")
    parser.add_argument("--ragged_dot", action="store_true", help="time it as well")
    parser.add_argument("--quick", action="store_true", help="the default tiles only")
    options = parser.parse_args()
    if options.smoke:
        shape = Shape(392, 6, 128, 192)
        sizes = np.array([100, 0, 61, 150, 3, 20], np.int32)  # of 392 rows
        check(shape, sizes, interpret=True)
        return
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    shapes = [Shape(32768, 32, 2048, 2048), Shape(32768, 32, 1024, 2048)]
    small = Shape(4096, 8, 1024, 576)
    sizes = make_sizes(small, even=False)
    sizes[2] -= 100
    check(small, sizes, interpret=False)
    check(shapes[1], make_sizes(shapes[1], even=False), interpret=False)
    for shape in shapes:
        time_shape(shape, False, options)
    time_shape(shapes[0], True, options)


if __name__ == "__main__":
    main()
