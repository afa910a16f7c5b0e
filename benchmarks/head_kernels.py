"""The loss head by kernels that keep logits in registers, against XLA's: one H100.

With slopes made in the backward pass ("two walks"), and with both gradients taken up on
the way forward ("one walk"); frozen: only the hidden states' gradient is wanted.

    PYTHONPATH=. python benchmarks/head_kernels.py [--tiles]
    PYTHONPATH=. python benchmarks/head_kernels.py --smoke    # tiny; CPUs: XLA's

Both passes and the forward pass alone, 16,384 tokens in bfloat16, a float32 table, all
statistics. The errors are the largest against XLA's float32 products of the same
numbers, as a share of the largest value. `--tiles` times the two kernels alone, for
several sizes of tiles. `--far`: of every hundredth token another logit is 100 nats and
more above the target's, as of no model that is of use.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.kernels.linear_cross_entropy import linear_log_probs

SHAPES = [(16384, 896, 151936), (16384, 2048, 151936)]
SMOKE = [(512, 64, 640)]
# Columns, buffers.
TILES = [(256, 4), (256, 3), (192, 4), (128, 6)]


def time_ms(run: Callable[[], Any], calls: int = 5) -> float:
    """The least of three means of queued calls, after one to warm up."""
    jax.block_until_ready(run())
    means = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        means.append((time.perf_counter() - start) / calls * 1e3)
    return min(means)


def make_inputs(tokens: int, width: int, vocab: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (tokens, width), jnp.bfloat16),
        jax.random.normal(keys[1], (vocab, width), jnp.float32) * 3 * width**-0.5,
        jax.random.randint(keys[2], (tokens,), 0, vocab, jnp.int32),
        jax.random.uniform(keys[3], (tokens,), jnp.float32),
    )


def put_far_off(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Every hundredth token has a hidden state that points at another entry."""
    hidden, table, targets, shares = inputs
    entries = table[(targets[::100] + 1) % len(table)]
    norms = jnp.linalg.norm(entries, axis=1, keepdims=True)
    hidden = hidden.at[::100].set((200 * entries / norms**2).astype(hidden.dtype))
    return hidden, table, targets, shares


def compare(shape: tuple[int, int, int], *, trained: bool, far: bool) -> None:
    """A line of times for each way, and lines of errors; `trained`: the table is."""
    inputs = make_inputs(*shape)
    inputs = put_far_off(inputs) if far else inputs
    found = {}
    ways = {"XLA": (False, False), "two walks": (True, False), "one walk": (True, True)}
    if not trained:
        del ways["two walks"]  # the kernels' backward pass is then the XLA walk's
    for way, (fuse, once) in ways.items():

        def loss(
            *inputs: Any, fuse: bool = fuse, once: bool = once
        ) -> tuple[Any, tuple[Any, ...]]:
            *scored, shares = inputs
            told = {"shares": shares} if once and trained else {}
            outputs = linear_log_probs(*scored, fuse=fuse, **told)
            total = outputs[-1][0] if told else (outputs[0] * shares).sum()
            return total, outputs[:4]

        forward = jax.jit(functools.partial(linear_log_probs, fuse=fuse))
        of = (0, 1) if trained else (0,)
        both = jax.jit(jax.value_and_grad(loss, of, has_aux=True))
        memory = both.lower(*inputs).compile().memory_analysis()
        found[way] = jax.tree.map(np.asarray, both(*inputs))
        print(
            f"{shape} {'trained' if trained else 'frozen '} {way:9s} forward"
            f" {time_ms(lambda f=forward: f(*inputs[:3])):6.2f} ms, both"  # type: ignore[misc]
            f" {time_ms(lambda b=both: b(*inputs)):6.2f} ms, temporaries"  # type: ignore[misc]
            f" {memory.temp_size_in_bytes / 2**30:.2f} GiB",
            flush=True,
        )
    names = ["logps", "entropy", "correct", "mean", "d hidden", "d table"]
    plain, *others = ([*each[0][1], *each[1]] for each in found.values())
    for way, other in zip([*found][1:], others, strict=True):
        errors = [
            np.abs(a.astype(np.float32) - b.astype(np.float32)).max()
            / max(np.abs(a.astype(np.float32)).max(), 1e-6)
            for a, b in zip(plain, other, strict=True)
        ]
        told = (f"{n} {e:.1e}" for n, e in zip(names, errors, strict=False))
        print(f"  errors of {way}:", *told, flush=True)


def time_tiles(shape: tuple[int, int, int]) -> None:
    """The two kernels alone, in TFLOP/s of their product."""
    from jaxtrain.kernels.linear_cross_entropy import hopper

    hidden, table, targets, weights = make_inputs(*shape)
    tokens, width, _ = shape
    table = table.astype(hidden.dtype)
    part = table[:7680]
    log_total = jnp.full((tokens,), 20.0)
    for columns, stages in TILES:
        tiles = hopper.Tiles(columns=columns, stages=stages)
        told = []
        for name, entries, run in (
            (
                "sums",
                table,
                lambda h, w, tiles=tiles: hopper.sum_logits(
                    hopper.Head(h, w, 0, 1.0), targets, tiles
                ),
            ),
            (
                "slopes",
                part,
                lambda h, w, tiles=tiles: hopper.make_slopes(
                    hopper.Head(h, w, 0, 1.0),
                    hopper.Slope(targets, log_total, weights, weights, jnp.int32(0)),
                    tiles,
                ),
            ),
            (
                "weights",
                part,
                lambda h, w, tiles=tiles: hopper.weigh_logits(
                    hopper.Head(h, w, 0, 1.0), targets % len(part), log_total, tiles
                )[:2],
            ),
            (
                "XLA's product",
                part,
                lambda h, w: jnp.matmul(h, w.T, preferred_element_type=jnp.float32),
            ),
        ):
            jitted = jax.jit(run)
            try:
                ms = time_ms(lambda f=jitted, e=entries: f(hidden, e))  # type: ignore[misc]
                rate = 2 * tokens * width * len(entries) / ms / 1e9
                told.append(f"{name} {ms:.3f} ms {rate:.0f}")
            except Exception as error:
                told.append(f"{name} {str(error).splitlines()[0][:100]}")
        print(f"  {width}: {columns} columns, {stages} buffers:", "; ".join(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--far", action="store_true", help="some tokens far off")
    parser.add_argument("--tiles", action="store_true", help="time the kernels alone")
    options = parser.parse_args()
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    for shape in SMOKE if options.smoke else SHAPES:
        for trained in (True, False):
            compare(shape, trained=trained, far=options.far)
        if options.tiles:
            time_tiles(shape)


if __name__ == "__main__":
    main()
