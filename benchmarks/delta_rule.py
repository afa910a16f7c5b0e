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
    """Milliseconds of the Triton kernels for several tiles."""
    inputs = shape.inputs(jnp.bfloat16)
    features = tuple(inputs[name] for name in NAMES[:3])
    gates = tuple(inputs[name] for name in NAMES[3:])
    rows = api._rows(features, gates, api._restarts(shape.segment_ids()))
    state = jnp.zeros((shape.batch, shape.heads, shape.width, shape.width), jnp.float32)
    found = jax.jit(pallas_triton.make_passes().states)(rows, state)

    def told(kernels: Any, *names: str) -> str:
        arguments = {
            "weigh": (rows,),
            "forward": (rows, state),
            "states": (rows, state),
            "backward": (rows, found, rows.v, state),
        }
        words = []
        for name in names:
            measured = functools.partial(
                milliseconds, jax.jit(kernels[name]), *arguments[name]
            )
            words.append(f"{name} {attempt(lambda f=measured: f'{f():.2f}')}")
        return ", ".join(words)

    def kernels_of(**changed: Any) -> dict[str, Callable]:
        settings = pallas_triton.Settings(**changed)
        passes = vars(pallas_triton.make_passes(settings))
        return passes | {"weigh": functools.partial(pallas_triton._weigh, settings)}

    for warps in (2, 4, 8):
        tiles = Tiles(warps=warps)
        print(
            f"weigh {warps} warps:", told(kernels_of(weigh=tiles), "weigh"), flush=True
        )
    for values, warps in ((16, 8), (32, 4), (32, 8), (64, 4), (64, 8), (128, 8)):
        own = kernels_of(gradients=Tiles(values, warps))
        print(f"gradients {values} values {warps} warps:", end=" ", flush=True)
        print(told(own, "backward"), flush=True)
    for values, warps in ((16, 4), (32, 4), (64, 4), (64, 8), (128, 8)):
        own = kernels_of(walk=Tiles(values, warps))
        print(f"walk {values} values {warps} warps:", end=" ", flush=True)
        print(told(own, "forward", "states", "backward"), flush=True)
    one = kernels_of(precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32)
    print("tf32 once:", told(one, "weigh", "forward", "backward"), flush=True)
    own = kernels_of(walk=Tiles(64, 4, 2), gradients=Tiles(32, 8, 2))
    print("2 stages:", told(own, "forward", "states", "backward"), flush=True)


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


def measure_peers(shape: Shape) -> Iterator[str]:
    """flash-linear-attention, and transformers' own chunks compiled, where present."""
    try:
        import torch
    except ImportError as error:
        yield f"time peers: no: {error}"
        return

    def flash_linear_attention() -> Callable:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return chunk_gated_delta_rule

    def transformers_compiled() -> Callable:
        from transformers.models.qwen3_5 import modeling_qwen3_5

        return torch.compile(modeling_qwen3_5.torch_chunk_gated_delta_rule)

    tensors = [
        torch.tensor(np.asarray(x.astype(jnp.float32)), device="cuda")
        .to(torch.float32 if x.ndim == 3 else torch.bfloat16)
        .requires_grad_()
        for x in shape.inputs(jnp.bfloat16).values()
    ]
    group = shape.heads // shape.kv_heads

    def measure_one(load: Callable[[], Callable], backward: bool) -> str:
        function = load()

        def call() -> None:
            q, k, v, g, beta = tensors
            q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
            out = function(
                q, k, v, g=g, beta=beta.bfloat16(), use_qk_l2norm_in_kernel=True
            )[0]
            if backward:
                out.backward(tensors[2])

        call()
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        return f"{(time.perf_counter() - start) * 200:.2f} ms"

    for load in (flash_linear_attention, transformers_compiled):
        for backward in (False, True):
            what = "with backward" if backward else "forward"
            measured = functools.partial(measure_one, load, backward)
            yield f"time {load.__name__} {what}: {attempt(measured)}"


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
        if options.tiles:
            measure_tiles(shape)
        for line in measure_peers(shape):
            print(line, flush=True)


if __name__ == "__main__":
    main()
