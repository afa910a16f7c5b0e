"""Sinks, values narrower than keys and heads 512 wide: errors and times on one GPU.

From the root of the repository:

    PYTHONPATH=. python benchmarks/attention_variants.py
    PYTHONPATH=. python benchmarks/attention_variants.py --only 512   # by name
    PYTHONPATH=. python benchmarks/attention_variants.py --smoke  # tiny, any backend

Each line names a case, its error against float32 (the largest of output and gradients,
as a share of the largest value), the time forward and with gradients of the path that
"auto" takes, and that of the case it is to be compared with. The log before each line
says which path that is.
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

from jaxtrain.kernels.attention import attention, plan_attention

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
    Case("plain 256", 16, 4, 256, 256),
    Case("plain 256, xla", 16, 4, 256, 256, implementation="xla"),
    Case("plain 512", 8, 2, 512, 512),
    Case("packed 512", 8, 2, 512, 512, documents=8),
]


def passes(case: Case, options: dict[str, Any], schedule: Any) -> tuple[Any, Any]:
    """The forward pass, and the one with all gradients, jitted."""
    call = functools.partial(attention, **options, schedule=schedule)

    def forward(q: Any, k: Any, v: Any, d_out: Any, sinks: Any = None) -> Any:
        return call(q, k, v, sinks=sinks)

    def both(q: Any, k: Any, v: Any, d_out: Any, sinks: Any = None) -> Any:
        of = (q, k, v) if sinks is None else (q, k, v, sinks)
        out, pull = jax.vjp(lambda q, k, v, sinks=None: call(q, k, v, sinks=sinks), *of)
        return out, *pull(d_out)

    return jax.jit(forward), jax.jit(both)


def milliseconds(run: Any, arrays: list[jax.Array]) -> float:
    """The best of several rounds, a call."""
    jax.block_until_ready(run(*arrays))
    best = math.inf
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            out = run(*arrays)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / CALLS)
    return 1e3 * best


def largest_error(case: Case, ours: Any, arrays: list[jax.Array]) -> float:
    """Of output and gradients, against the XLA path in float32."""
    exact = [x.astype(jnp.float32) for x in arrays]
    options = case.make()[1] | {"implementation": "xla"}
    with jax.default_matmul_precision("highest"):
        wanted = passes(case, options, None)[1](*exact)
    errors = []
    for have, want in zip(ours, wanted, strict=True):
        have, want = (x.astype(jnp.float32) for x in (have, want))
        errors.append(abs(have - want).max() / jnp.maximum(1.0, abs(want).max()))
    return float(max(errors))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", default="", help="cases whose names hold this")
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
            arrays, options = case.make()
            options["implementation"] = case.implementation
            schedule = plan_attention(
                jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype),
                **options,
                has_sinks=case.sinks,
                value_width=case.value_width,
            )
            forward, both = passes(case, options, schedule)
            error = largest_error(case, both(*arrays), arrays)
            times = [milliseconds(run, arrays) for run in (forward, both)]
        except Exception as reason:  # what one case cannot do, others may
            print(f"{case.name}: {type(reason).__name__}: {str(reason)[:300]}")
            worst = math.inf
            continue
        print(
            f"{case.name:18} {error:.1e} {times[0]:8.3f} {times[1]:8.3f} ms", flush=True
        )
        worst = max(worst, error)
    # Rounding to bfloat16 (8 bits), as the tests of the kernels allow.
    print("right" if worst < 2e-2 else "WRONG", f"{worst:.1e}")
    return int(worst >= 2e-2)


if __name__ == "__main__":
    sys.exit(main())
