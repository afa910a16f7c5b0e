"""A layer's seven products in bfloat16 and in fp8, with all casts in the time.

    python benchmarks/fp8_products.py [--tokens 16384] [--smoke]

Norms and the gated activation are in the time too, as they stand between the
products; attention is not: what o_proj reads is what q_proj gave. TFLOP/s count the
products alone, forward and both gradients (of `frozen` kernels the inputs' alone).
`xla` is what jaxtrain does: the second order of codes is made of the first. `both`
asks the compiler for both at once, `pallas` makes them by a kernel of our own. First
the passes and the products alone.
"""

import argparse
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from fp8_quantize import quantize_both
from jax import lax

from jaxtrain.kernels.fp8 import api
from jaxtrain.kernels.xla_options import FP8

# hidden, inner, query and key-value widths
WIDTHS = {
    "0.5b": (896, 4864, 896, 128),
    "3b": (2048, 11008, 2048, 256),
    "8b": (4096, 14336, 4096, 1024),
}


def clock(function: Callable[..., Any], *args: Any, calls: int = 20) -> float:
    """The median of seconds a call."""
    for _ in range(3):
        jax.block_until_ready(function(*args))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            made = function(*args)
        jax.block_until_ready(made)
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times))


def compile_for_gpu(
    function: Callable[..., Any], *args: Any, options: Any = FP8
) -> Any:
    on_gpu = jax.default_backend() == "gpu"
    lowered = jax.jit(function).lower(*args)
    return lowered.compile(compiler_options=options if on_gpu else None)


def quantize_by_kernel(x: jax.Array, dtype: Any) -> api.Quantized:
    scale = api.find_scale(x, dtype)
    interpret = jax.default_backend() != "gpu"
    # Both shapes are [rows, columns] here.
    codes, transposed = quantize_both(x, scale, dtype, interpret=interpret)
    return api.Quantized(codes, transposed, 1 / scale)


def quantize_at_once(x: jax.Array, dtype: Any) -> api.Quantized:
    scale = api.find_scale(x, dtype)
    codes = api.cast(x, scale, dtype)
    return api.Quantized(codes, codes.T, 1 / scale)


WAYS = {
    "xla": api.quantize,
    "both": quantize_at_once,
    "pallas": quantize_by_kernel,
}


def norm(x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32 * x32, -1, keepdims=True)
    return (x32 * lax.rsqrt(mean + 1e-6)).astype(x.dtype)


def layer(
    project: Callable[..., jax.Array], share: Callable[..., Any], x: Any, w: Any
) -> jax.Array:
    h = share(norm(x))
    q, k, v = (project(h, w[name]) for name in ("q", "k", "v"))
    x += project(share(q), w["o"]) + jnp.tile(k * v, (1, x.shape[1] // k.shape[1]))
    h = share(norm(x))
    gate, up = project(h, w["gate"]), project(h, w["up"])
    inner = jax.checkpoint(lambda g, u: jax.nn.silu(g) * u, prevent_cse=False)
    return x + project(share(inner(gate, up)), w["down"])


def quantize_weight(kernel: jax.Array, *, frozen: bool) -> api.Weight:
    found = api.quantize(lax.stop_gradient(kernel), api.INPUT)
    return api.Weight(None if frozen else kernel, found.codes, found.unit)


def map_values(function: Any, mapping: Any) -> Any:
    return {name: function(value) for name, value in mapping.items()}


def both_passes(way: str, frozen: bool, x: Any, w: Any, ct: Any) -> Any:
    """Outputs' gradients by x, and by kernels where they are not frozen.

    Frozen kernels come quantized, others are quantized here.
    """

    def run(x: Any, w: Any) -> jax.Array:
        if way == "bf16":
            return layer(lambda h, w: h @ w, lambda h: h, x, w)
        if not frozen:
            w = map_values(functools.partial(quantize_weight, frozen=False), w)
        project = functools.partial(api.project, api.Site())
        return layer(project, api.share, x, w)

    if frozen:
        y, pull = jax.vjp(lambda x: run(x, w), x)
        return pull(ct + y)
    y, pull = jax.vjp(run, x, w)
    return pull(ct + y)


def make_weights(shape: str, smoke: bool) -> dict[str, jax.Array]:
    d, f, q, kv = (128, 384, 128, 128) if smoke else WIDTHS[shape]
    sizes = {
        "q": (d, q), "k": (d, kv), "v": (d, kv), "o": (q, d),
        "gate": (d, f), "up": (d, f), "down": (f, d),
    }  # fmt: skip
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return {
        name: (jax.random.normal(key, size) * size[0] ** -0.5).astype(jnp.bfloat16)
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }


def count_dots(text: str) -> str:
    """How many products the compiled program has in eight bits, and in more."""
    targets = re.findall(r'custom_call_target="(__cublas[^"]*)"', text)
    in_fp8 = targets.count("__cublas$lt$matmul$f8")
    return f"{in_fp8} products in fp8, {len(targets) - in_fp8} others"


def measure_passes(tokens: int, width: int) -> None:
    """Each pass over one matrix alone."""
    x = jax.random.normal(jax.random.key(1), (tokens, width), jnp.bfloat16)
    dtype = api.INPUT
    scale = api.find_scale(x, dtype)
    interpret = jax.default_backend() != "gpu"
    passes: dict[str, tuple[Callable[..., Any], float]] = {
        "largest": (lambda x, s: api.find_scale(x, dtype), 2),
        "cast": (lambda x, s: api.cast(x, s, dtype), 3),
        "cast, turned": (lambda x, s: api.cast(x, s, dtype).T, 3),
        "both by xla": (
            lambda x, s: (api.cast(x, s, dtype), api.cast(x, s, dtype).T), 4,
        ),
        **{
            f"both by pallas, {tile} wide, {warps} warps": (
                functools.partial(
                    quantize_both,
                    dtype=dtype,
                    tile=tile,
                    warps=warps,
                    interpret=interpret,
                ),
                4,
            )
            for tile, warps in ((128, 8), (128, 16), (64, 4), (128, 4))
        },
    }  # fmt: skip
    for name, (function, size) in passes.items():
        try:
            program = compile_for_gpu(function, x, scale)
            secs = clock(program, x, scale)
            rate = size * tokens * width / secs / 1e9
            print(f"{tokens} x {width} {name}: {secs * 1e6:.0f} us, {rate:.0f} GB/s")
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}")


def measure_products(tokens: int, inputs: int, outputs: int) -> None:
    """One product of operands that are there already, without and with eight bits."""
    a = jax.random.normal(jax.random.key(3), (tokens, inputs), jnp.bfloat16)
    b = jax.random.normal(jax.random.key(4), (inputs, outputs), jnp.bfloat16)
    left = api.quantize(a, api.INPUT)
    flops = 2 * tokens * inputs * outputs

    def tell(name: str, function: Callable[..., Any], *args: Any) -> None:
        secs = clock(compile_for_gpu(function, *args), *args)
        rate = flops / secs / 1e12
        print(f"{tokens} x {inputs} x {outputs} {name}: {rate:.0f} TFLOP/s")

    tell("bf16", jnp.matmul, a, b)
    for dtype in (api.INPUT, api.GRADIENT):
        right = api.quantize(b, dtype)
        for precision in (lax.Precision.DEFAULT, lax.Precision.HIGHEST):

            def product(x: Any, y: Any, precision: Any = precision) -> jax.Array:
                return api._multiply(
                    (x.codes, x.unit),
                    (y.transposed, y.unit),
                    ((1,), (1,)),
                    jnp.bfloat16,
                    precision,
                )

            name = f"{jnp.dtype(dtype).name} {precision.name.lower()}"
            tell(name, product, left, right)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--shapes", default="0.5b,3b,8b")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    tokens = 128 if options.smoke else options.tokens
    print(jax.devices()[0].device_kind, jax.__version__)
    measure_passes(tokens, 256 if options.smoke else 11008)
    measure_products(tokens, *((128, 256) if options.smoke else (2048, 11008)))
    measure_products(tokens, *((256, 128) if options.smoke else (11008, 2048)))
    for shape in options.shapes.split(","):
        w = make_weights(shape, options.smoke)
        d = w["q"].shape[0]
        x, ct = jax.random.normal(jax.random.key(2), (2, tokens, d), jnp.bfloat16)
        for frozen in (False, True):
            flops = (4 if frozen else 6) * tokens * sum(k.size for k in w.values())
            exact, base = None, 0.0
            for way in ("bf16", *WAYS):
                api.quantize = WAYS.get(way, api.quantize)  # type: ignore[assignment]
                jax.clear_caches()
                try:
                    run = functools.partial(both_passes, way, frozen)
                    read, settings = w, {"xla_gpu_enable_triton_gemm": False}
                    if way != "bf16":
                        settings = FP8
                        if frozen:
                            cast = functools.partial(quantize_weight, frozen=True)
                            read = jax.jit(functools.partial(map_values, cast))(w)
                    program = compile_for_gpu(run, x, read, ct, options=settings)
                    made = jax.tree.leaves(program(x, read, ct))
                    secs = clock(program, x, read, ct)
                except Exception as error:
                    print(f"{shape} {way}: {type(error).__name__}: {str(error)[:300]}")
                    continue
                made = [leaf.astype(jnp.float32) for leaf in made]
                exact = made if exact is None else exact
                base = base or secs
                off = max(
                    float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
                    for a, b in zip(made, exact, strict=True)
                )
                print(
                    f"{shape}{' frozen' * frozen} {way}: {secs * 1e3:.2f} ms,"
                    f" {flops / secs / 1e12:.1f} TFLOP/s ({base / secs:.3f}), off by"
                    f" {off:.4f}, {count_dots(program.as_text())}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
