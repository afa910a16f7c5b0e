"""The loss head on one GPU: time and memory against Liger's fused kernel and naive JAX.

From the root of the repository:

    PYTHONPATH=. python benchmarks/linear_cross_entropy.py
    PYTHONPATH=. python benchmarks/linear_cross_entropy.py --smoke  # any backend

Both passes, with gradients of the hidden states and of the unembedding, bfloat16, tied
table. Memory is what the compiled step needs beside its inputs (JAX), or the peak above
them (torch), as a multiple of the inputs. Writes linear_cross_entropy.json to $OUT.
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.kernels.linear_cross_entropy import linear_log_probs

SHAPES = [  # tokens, width, vocabulary
    (8192, 896, 151936),
    (8192, 2048, 151936),
    (8192, 2304, 262144),
    (8192, 4096, 262144),
]
SMOKE = [(256, 64, 2048)]
ROUNDS, CALLS = 5, 5


def make_inputs(tokens: int, width: int, vocab: int) -> tuple[jax.Array, ...]:
    """Hidden states, table, targets and the weight of each token."""
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (tokens, width), jnp.bfloat16),
        jax.random.normal(keys[1], (vocab, width), jnp.bfloat16) * width**-0.5,
        jax.random.randint(keys[2], (tokens,), 0, vocab, jnp.int32),
        jax.random.uniform(keys[3], (tokens,), jnp.float32),
    )


def naive_log_probs(hidden: jax.Array, table: jax.Array, targets: jax.Array):  # type: ignore[no-untyped-def]
    """All logits in memory, float32."""
    logits = jnp.einsum("md,vd->mv", hidden, table, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets]


def time_ms(step: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Median over rounds of the mean time of queued calls."""
    wait(step())
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            result = step()
        wait(result)
        rounds.append((time.perf_counter() - start) / CALLS * 1e3)
    return statistics.median(rounds)


def measure_jax(name: str, log_probs: Callable, inputs: tuple) -> dict[str, Any]:
    def loss(hidden: Any, table: Any, targets: Any, weights: Any) -> jax.Array:
        return -(log_probs(hidden, table, targets) * weights).sum()

    row: dict[str, Any] = {"name": name}
    try:
        step = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*inputs).compile()
        sizes = step.memory_analysis()
        needed = sizes.temp_size_in_bytes + sizes.output_size_in_bytes
        row["extra_memory"] = needed / sum(x.nbytes for x in inputs[:2])
        row["ms"] = time_ms(lambda: step(*inputs), jax.block_until_ready)
    except Exception as error:  # out of memory is a result here
        row["reason"] = str(error).splitlines()[0][:120]
    return row


def measure_liger(inputs: tuple) -> dict[str, Any]:
    """Liger sums unweighted losses: less work than ours, which weighs every token."""
    row: dict[str, Any] = {"name": "torch liger"}
    try:
        import torch
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Liger,
        )
    except ImportError as error:
        return row | {"reason": str(error)}
    if not torch.cuda.is_available():
        return row | {"reason": "no CUDA"}

    def to_torch(x: jax.Array) -> Any:
        value = torch.tensor(np.asarray(x.astype(jnp.float32)), device="cuda")
        return value.to(torch.bfloat16).requires_grad_()

    hidden, table = to_torch(inputs[0]), to_torch(inputs[1])
    targets = torch.tensor(np.asarray(inputs[2]), device="cuda").long()

    def step() -> None:
        hidden.grad = table.grad = None
        loss = Liger.apply(hidden, table, targets)
        (loss[0] if isinstance(loss, tuple) else loss).backward()

    try:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        row["ms"] = time_ms(step, lambda _: torch.cuda.synchronize())
        peak = torch.cuda.max_memory_allocated() - before
        row["extra_memory"] = peak / sum(x.nbytes for x in inputs[:2])
    except Exception as error:
        row["reason"] = str(error).splitlines()[0][:120]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--chunks", default="256,1024,2048", help="of ours")
    arguments = parser.parse_args()
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    rows = []
    for shape in SMOKE if arguments.smoke else SHAPES:
        inputs = make_inputs(*shape)

        def ours(chunk: int) -> Callable:
            return lambda h, w, t: linear_log_probs(h, w, t, chunk=chunk)[0]

        chunks = map(int, arguments.chunks.split(","))
        found = [measure_jax(f"ours, chunk {c}", ours(c), inputs) for c in chunks]
        found.append(measure_jax("naive", naive_log_probs, inputs))
        found.append(measure_liger(inputs))
        for row in found:
            rows.append({"shape": shape} | row)
            print(json.dumps(rows[-1]), flush=True)
    print("\n| tokens, width, vocabulary | head | ms | extra memory | note |")
    print("|---|---|---|---|---|")
    for row in rows:
        ms, extra = (
            f"{row[x]:.2f}" if x in row else "" for x in ("ms", "extra_memory")
        )
        note = row.get("reason", "")
        print(f"| {row['shape']} | {row['name']} | {ms} | {extra} | {note} |")
    if "OUT" in os.environ:
        path = pathlib.Path(os.environ["OUT"]) / "linear_cross_entropy.json"
        path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
