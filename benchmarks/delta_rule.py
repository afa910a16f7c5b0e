"""The gated delta rule on one GPU: checks first, then times, in one run.

From the root of the repository:

    export PYTHONPATH=.
    python benchmarks/delta_rule.py           # Qwen3.5-4B's heads, 8 rows of 2048
    python benchmarks/delta_rule.py --tiles   # also other tiles of the Triton kernels
    python benchmarks/delta_rule.py --smoke   # tiny shapes, any backend

Errors are the largest of each array, divided by its largest entry, against the
recurrence token by token in float32. flash-linear-attention runs where it is installed
with torch and CUDA. What an implementation cannot do shows as its reason.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.kernels.delta_rule import api, pallas_triton
from jaxtrain.kernels.delta_rule.pallas_triton import Tiles

NAMES = ("q", "k", "v", "log_decay", "beta")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows [B T] of value heads and key heads; Qwen3.5-4B's and 9B's by default."""

    batch: int = 8
    length: int = 2048
    heads: int = 32
    kv_heads: int = 16
    width: int = 128
    documents: int = 4

    def inputs(self, dtype: Any) -> dict[str, jax.Array]:
        """Arguments of `delta_rule`, as layers make them at the start of training."""
        keys = jax.random.split(jax.random.key(0), 5)
        row = (self.batch, self.length)
        sizes = [(self.kv_heads, self.width)] * 2 + [(self.heads, self.width)]
        q, k, v = (
            jax.random.normal(key, row + size, dtype)
            for key, size in zip(keys, sizes, strict=False)
        )
        gates = jax.random.normal(keys[3], (*row, self.heads))
        rates = jnp.linspace(0.01, 16.0, self.heads)
        log_decay = -rates * jax.nn.softplus(gates + 1) / 16
        beta = jax.nn.sigmoid(jax.random.normal(keys[4], (*row, self.heads)))
        return dict(zip(NAMES, (q, k, v, log_decay, beta), strict=True))

    def segment_ids(self) -> jax.Array:
        """Documents of about the same length, none of whole chunks."""
        place = np.arange(self.length) * self.documents // (self.length - 7) + 1
        return jnp.asarray(np.tile(place, (self.batch, 1)), jnp.int32)


def run(name: str, shape: Shape, inputs: dict[str, jax.Array]) -> tuple:
    """What tokens read, and the gradient of each argument for a fixed cotangent."""

    def read(inputs: dict[str, jax.Array]) -> jax.Array:
        return api.delta_rule(
            **inputs, segment_ids=shape.segment_ids(), implementation=name
        )[0]

    weights = jax.random.normal(jax.random.key(1), inputs["v"].shape, jnp.float32)

    def loss(inputs: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(read(inputs).astype(jnp.float32) * weights)

    return read(inputs), jax.grad(loss)(inputs)


def check(shape: Shape, names: list[str]) -> None:
    """One line of errors for each implementation and type."""
    for dtype in (jnp.float32, jnp.bfloat16):
        inputs = shape.inputs(dtype)
        exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
        want = jax.jit(functools.partial(run, "recurrent", shape))(exact)
        for name in names:
            run_it = jax.jit(functools.partial(run, name, shape))
            print(f"error {jnp.dtype(dtype).name} {name}:", end=" ", flush=True)
            measured = functools.partial(compare, run_it, inputs, want)
            print(attempt(measured), flush=True)


def compare(function: Callable, inputs: Any, want: Any) -> str:
    """Largest errors of the output and of each gradient."""
    words, got = [], function(inputs)
    for name, a, b in zip(
        ("out", *sorted(NAMES)), *map(jax.tree.leaves, (got, want)), strict=True
    ):
        a, b = (np.asarray(x.astype(jnp.float32)) for x in (a, b))
        words.append(f"{name} {np.abs(a - b).max() / np.abs(b).max():.1e}")
    return ", ".join(words)


def measure(shape: Shape, names: list[str]) -> None:
    """Milliseconds of each implementation, forward and with its backward pass."""
    inputs = shape.inputs(jnp.bfloat16)
    for name in names:
        forward = jax.jit(lambda x, name=name: run(name, shape, x)[0])
        both = jax.jit(functools.partial(run, name, shape))
        print(f"time {name}:", end=" ", flush=True)
        print(
            attempt(
                lambda f=forward, g=both: (
                    f"forward {milliseconds(f, inputs):.2f} ms, with backward"
                    f" {milliseconds(g, inputs):.2f} ms, {room(g, inputs):.2f} GiB"
                )
            ),
            flush=True,
        )


def measure_tiles(shape: Shape) -> None:
    """Milliseconds of each Triton kernel alone, for several tiles."""
    inputs = shape.inputs(jnp.bfloat16)
    features = tuple(inputs[name] for name in NAMES[:3])
    gates = tuple(inputs[name] for name in NAMES[3:])
    rows = api._rows(features, gates, api._restarts(shape.segment_ids()))
    sizes = (shape.batch, shape.heads, shape.width, shape.width)
    state = jnp.zeros(sizes, jnp.float32)
    states = jnp.zeros((*sizes[:2], shape.length // 64, *sizes[2:]), jnp.float32)
    precisions = {
        "x3": pallas_triton.THREE_PARTS,
        "x1": jax.lax.DotAlgorithmPreset.TF32_TF32_F32,
    }
    for values, warps, name in itertools.product((32, 64, 128), (4, 8), precisions):
        if name == "x1" and (values, warps) != (64, 4):
            continue
        tiles = Tiles(values, warps, 1, precisions[name])
        kernels = pallas_triton.make_passes(forward=tiles, backward=tiles)
        words = [
            f"{what} {attempt(lambda f=f, a=a: f'{milliseconds(jax.jit(f), *a):.2f}')}"
            for what, f, a in (
                ("forward", kernels.forward, (rows, state)),
                ("backward", kernels.backward, (rows, states, rows.v, state)),
            )
        ]
        print(f"tiles {values} warps {warps} {name}: {', '.join(words)}", flush=True)


def milliseconds(function: Callable, *arguments: Any, calls: int = 10) -> float:
    """The median of three rounds, a call."""
    jax.block_until_ready(function(*arguments))
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*arguments)
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / calls * 1e3)
    return sorted(rounds)[1]


def room(function: Any, *arguments: Any) -> float:
    """GiB beside arguments and results."""
    sizes = function.lower(*arguments).compile().memory_analysis()
    return sizes.temp_size_in_bytes / 2**30


def attempt(call: Callable[[], str]) -> str:
    """What the call gives, or why it does not, in one line."""
    try:
        return call()
    except Exception as error:
        return f"no: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def measure_peer(shape: Shape) -> Iterator[str]:
    """flash-linear-attention on the same shape, as transformers calls it."""
    try:
        import torch
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError as error:
        yield f"time fla: no: {error}"
        return
    tensors = [
        torch.tensor(np.asarray(x.astype(jnp.float32)), device="cuda")
        .to(torch.float32 if x.ndim == 3 else torch.bfloat16)
        .requires_grad_()
        for x in shape.inputs(jnp.bfloat16).values()
    ]
    group = shape.heads // shape.kv_heads

    def forward() -> Any:
        q, k, v, g, beta = tensors
        q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
        return chunk_gated_delta_rule(
            q, k, v, g=g, beta=beta.bfloat16(), use_qk_l2norm_in_kernel=True
        )[0]

    def both() -> None:
        forward().sum().backward()

    for name, call in (("forward", forward), ("with backward", both)):
        call()
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10):
            call()
        torch.cuda.synchronize()
        yield f"time fla: {name} {(time.perf_counter() - start) * 100:.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    backend = jax.default_backend()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}", flush=True)
    ours = {"gpu": ["pallas_triton"], "tpu": ["pallas_tpu"]}.get(backend, [])
    names = [*ours, "xla"]
    shape = Shape(2, 128, 2, 1, 16, 2) if options.smoke else Shape()
    check(Shape(2, min(shape.length, 512), 4, 2, shape.width, 3), names)
    measure(shape, names)
    if backend == "gpu":
        print(*measure_peer(shape), sep="\n", flush=True)
        if options.tiles:
            measure_tiles(shape)


if __name__ == "__main__":
    main()
