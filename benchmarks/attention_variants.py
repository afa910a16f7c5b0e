"""Sinks, uneven widths, wide heads, tiles in plain XLA: errors and times on one GPU.

From the root of the repository:

    PYTHONPATH=. python benchmarks/attention_variants.py
    PYTHONPATH=. python benchmarks/attention_variants.py --only 512   # by name
    PYTHONPATH=. python benchmarks/attention_variants.py --only 512 --gradients
    PYTHONPATH=. python benchmarks/attention_variants.py --smoke  # tiny, any backend

Each line names a case, its error against float32 (the largest of output and gradients,
as a share of the largest value), the time forward and with gradients of the path that
"auto" takes or that the case names, and the seconds until the first result. The log
before each line says what "auto" took. `--gradients` leaves out the forward pass alone:
XLA takes up to a minute to compile each program, because it times ways to multiply.
"""

import argparse
import dataclasses
import functools
import logging
import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.kernels.attention import attention, plan_attention, xla_blocks
from jaxtrain.kernels.attention.blocked import attention_blocked, plan
from jaxtrain.kernels.attention.masks import Mask
from jaxtrain.kernels.attention.xla import attention_xla

CALLS, ROUNDS = 10, 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One workload: whole rows, or `documents` packed into each."""

    name: str
    heads: int
    kv_heads: int
    width: int
    value_width: int
    batch: int = 4
    length: int = 4096
    sinks: bool = False
    window: int | None = None
    documents: int = 1
    implementation: str = "auto"
    block: int | None = None  # that of "xla_blocks", by default its own choice

    def make(self) -> tuple[list[jax.Array], dict[str, Any]]:
        """q, k, v, the output's gradient and sinks; the options of the call."""
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = (
            (self.heads, self.width),
            (self.kv_heads, self.width),
            (self.kv_heads, self.value_width),
            (self.heads, self.value_width),
        )
        arrays = [
            jax.random.normal(key, (self.batch, self.length, *shape), jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        ]
        if self.sinks:
            arrays.append(jnp.linspace(-1.0, 4.0, self.heads))
        options: dict[str, Any] = {"window": self.window}
        if self.documents > 1:
            place = jnp.arange(self.length) * self.documents // self.length
            ids = jnp.tile(place[None] + 1, (self.batch, 1)).astype(jnp.int32)
            options["segment_ids"] = ids
        return arrays, options


CASES = [
    Case("plain 64", 64, 8, 64, 64),
    Case("sinks 64", 64, 8, 64, 64, sinks=True),
    Case("window 128", 64, 8, 64, 64, window=128),
    Case("window 128, sinks", 64, 8, 64, 64, window=128, sinks=True),
    Case("packed 64", 64, 8, 64, 64, documents=8),
    Case("packed 64, sinks", 64, 8, 64, 64, documents=8, sinks=True),
    Case("plain 128", 16, 16, 128, 128),
    Case("192/128", 16, 16, 192, 128),
    Case("packed 192/128", 16, 16, 192, 128, documents=8),
    Case("plain 256, ours", 16, 4, 256, 256, implementation="pallas_gpu"),
    Case("plain 256, xla", 16, 4, 256, 256, implementation="xla"),
    *(
        Case(f"packed 512, {block}", 8, 2, 512, 512, documents=8, block=block)
        for block in (128, 256, 512)
    ),
    Case("packed 512, xla", 8, 2, 512, 512, documents=8, implementation="xla"),
    Case("plain 512, 256", 8, 2, 512, 512, block=256),
    # As a T4 runs the heads of a 0.5B model.
    *(
        Case(
            f"t4, packed 64, {block}", 14, 2, 64, 64, 8, 2048, documents=6, block=block
        )
        for block in (128, 256)
    ),
    Case(
        "t4, packed 64, xla", 14, 2, 64, 64, 8, 2048, documents=6, implementation="xla"
    ),
]


def call_of(case: Case, options: dict[str, Any]) -> Any:
    """`attend(q, k, v, sinks=None)` as the case wants it, its schedule made before."""
    if case.block is None:
        options = options | {"implementation": case.implementation}
        schedule = plan_attention(
            jax.ShapeDtypeStruct(
                (case.batch, case.length, case.heads, case.width), jnp.bfloat16
            ),
            **options,
            has_sinks=case.sinks,
            value_width=case.value_width,
        )
        return functools.partial(attention, **options, schedule=schedule)
    kernels = xla_blocks.with_blocks(case.block)
    mask = Mask(options.get("segment_ids"), window=options["window"])
    return functools.partial(
        attention_blocked,
        kernels,
        mask=mask,
        softcap=None,
        scale=case.width**-0.5,
        schedule=plan(kernels, mask, case.batch, case.length),
    )


def passes(call: Any) -> tuple[Any, Any]:
    """The forward pass, and the one with all gradients, jitted."""

    def forward(q: Any, k: Any, v: Any, d_out: Any, sinks: Any = None) -> Any:
        return call(q, k, v, sinks=sinks)

    def both(q: Any, k: Any, v: Any, d_out: Any, sinks: Any = None) -> Any:
        of = (q, k, v) if sinks is None else (q, k, v, sinks)
        out, pull = jax.vjp(lambda q, k, v, sinks=None: call(q, k, v, sinks=sinks), *of)
        return out, *pull(d_out)

    return jax.jit(forward), jax.jit(both)


def milliseconds(run: Any, arrays: list[jax.Array]) -> float:
    """The best of several rounds, a call; `run` has been called before."""
    best = math.inf
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            out = run(*arrays)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / CALLS)
    return 1e3 * best


def largest_error(case: Case, ours: Any, arrays: list[jax.Array]) -> float:
    """Of output and gradients of the first row, against the XLA path in float32.

    That runs on the CPU, where nothing is timed before. The gradient of sinks is a sum
    over rows, and so with sinks all rows are compared.
    """
    rows = case.batch if case.sinks else 1
    options = case.make()[1]
    ids = options.get("segment_ids")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):

        def fetch(x: jax.Array) -> jax.Array:
            x = x[:rows] if x.ndim > 1 else x  # but of sinks
            return jnp.asarray(jax.device_get(x), jnp.float32)

        mask = Mask(
            None if ids is None else jnp.asarray(jax.device_get(ids[:rows])),
            window=options["window"],
        )
        exact = functools.partial(
            attention_xla, mask=mask, softcap=None, scale=case.width**-0.5
        )
        wanted = passes(exact)[1](*map(fetch, arrays))
        errors = []
        for have, want in zip(map(fetch, ours), wanted, strict=True):
            errors.append(abs(have - want).max() / jnp.maximum(1.0, abs(want).max()))
    return float(max(errors))


def measure(case: Case, *, forward_too: bool) -> float:
    """Print a case's line; its error."""
    arrays, options = case.make()
    forward, both = passes(call_of(case, options))
    start = time.perf_counter()
    ours = jax.block_until_ready(both(*arrays))
    secs = time.perf_counter() - start
    times = [milliseconds(both, arrays)]
    if forward_too:
        jax.block_until_ready(forward(*arrays))
        times.insert(0, milliseconds(forward, arrays))
    error = largest_error(case, ours, arrays)
    words = " ".join(f"{each:8.3f}" for each in times)
    print(f"{case.name:20} {error:.1e} {words} ms, first {secs:.1f} s", flush=True)
    return error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--gradients", action="store_true", help="both passes only")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("jaxtrain").setLevel(logging.INFO)
    logging.getLogger().setLevel(logging.WARNING)
    worst = 0.0
    for case in CASES:
        if arguments.only not in case.name:
            continue
        if arguments.smoke:
            case = dataclasses.replace(case, batch=1, length=256)
        try:
            error = measure(case, forward_too=not arguments.gradients)
        except Exception as reason:  # what one case cannot do, others may
            print(f"{case.name}: {type(reason).__name__}: {str(reason)[:300]}")
            worst = math.inf
            continue
        worst = max(worst, error)
    # Rounding to bfloat16 (8 bits), as the tests of the kernels allow.
    print("right" if worst < 2e-2 else "WRONG", f"{worst:.1e}")
    return int(worst >= 2e-2)


if __name__ == "__main__":
    sys.exit(main())
