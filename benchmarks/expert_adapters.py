"""What adapters of a mixture's experts cost: time and memory of one layer's experts.

    PYTHONPATH=. python benchmarks/expert_adapters.py            # on a GPU or a TPU
    PYTHONPATH=. python benchmarks/expert_adapters.py --smoke    # small, anywhere

Rows of random tokens go through the experts, forward and backward: frozen ones alone;
with adapters by products of r columns, as `models/moe.py` has them; and by W + s A B
made whole for every expert first, as PEFT has it. Each shape's times come first, and
then how far the gradients of A and B of the last two are apart, in float32. The whole
takes about a minute on an H100.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.models.moe import apply_experts

# experts, experts of a token, width, an expert's width, tokens
SHAPES = {
    "moe_4b": (32, 4, 2048, 1024, 8192),
    "qwen3_30b": (128, 8, 2048, 768, 8192),
    "gpt_oss_20b": (32, 4, 2880, 2880, 8192),
}
SMOKE = {"smoke": (4, 2, 64, 32, 128)}
RANK, SCALING = 16, 2.0
Arrays = dict[str, jax.Array]
# The order in which `apply_experts` takes them.
INPUTS, MATRICES = ("x", "weights", "experts"), ("gate", "up", "down")
FACTORS = ("gate_up_a", "gate_b", "up_b", "down_a", "down_b")


def in_order(names: tuple[str, ...], arrays: Arrays) -> list[jax.Array]:
    """A dict that went through jit is sorted by name."""
    return [arrays[name] for name in names]


def make_arrays(shape: tuple[int, ...], dtype: Any) -> tuple[Arrays, Arrays, Arrays]:
    """The inputs, the frozen matrices, and the adapters with no factor at zero.

    They are drawn on the device: a processor would take longer than all the products.
    """
    experts, copies, width, inner, tokens = shape
    keys = iter(jax.random.split(jax.random.key(0), 16))

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, sizes, dtype)

    def normal(*sizes: int, deviation: float = 0.02) -> jax.Array:
        return deviation * draw(next(keys), sizes)

    scores = jax.random.uniform(next(keys), (1, tokens, experts))
    inputs = {
        "x": normal(1, tokens, width, deviation=1.0),
        "weights": jnp.full((1, tokens, copies), 1 / copies, dtype),
        "experts": jax.lax.top_k(scores, copies)[1],
    }
    frozen = {
        "gate": normal(experts, width, inner),
        "up": normal(experts, width, inner),
        "down": normal(experts, inner, width),
    }
    adapters = {
        "gate_up_a": normal(experts, width, RANK),
        "gate_b": normal(experts, RANK, inner),
        "up_b": normal(experts, RANK, inner),
        "down_a": normal(experts, inner, RANK),
        "down_b": normal(experts, RANK, width),
    }
    return inputs, frozen, adapters


def combine(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


def run_frozen(inputs: Arrays, frozen: Arrays, adapters: Arrays) -> jax.Array:
    """Without adapters."""
    del adapters
    given = in_order(INPUTS, inputs) + in_order(MATRICES, frozen)
    return apply_experts(*given, combine=combine)


def run_low_rank(inputs: Arrays, frozen: Arrays, adapters: Arrays) -> jax.Array:
    """Adapters by products of their own."""
    given = in_order(INPUTS, inputs) + in_order(MATRICES, frozen)
    given += in_order(FACTORS, adapters)
    return apply_experts(*given, combine=combine, scalings=(SCALING, SCALING))


def run_whole(inputs: Arrays, frozen: Arrays, adapters: Arrays) -> jax.Array:
    """Every expert's W + s A B made first."""

    def added(a: str, b: str) -> jax.Array:
        return SCALING * jnp.einsum("eir,ero->eio", adapters[a], adapters[b])

    whole = {
        "gate": frozen["gate"] + added("gate_up_a", "gate_b"),
        "up": frozen["up"] + added("gate_up_a", "up_b"),
        "down": frozen["down"] + added("down_a", "down_b"),
    }
    return run_frozen(inputs, whole, {})


def measure(
    run: Callable[..., jax.Array], arrays: Any, repeats: int
) -> tuple[Any, float, float]:
    """Gradients of inputs and adapters, milliseconds, and MiB of temporaries."""
    inputs, frozen, adapters = arrays

    def loss(x: jax.Array, adapters: Arrays, inputs: Arrays, frozen: Arrays) -> Any:
        y = run({**inputs, "x": x}, frozen, adapters)
        return jnp.square(y.astype(jnp.float32)).mean()

    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    program = step.lower(inputs["x"], adapters, inputs, frozen).compile()
    call = functools.partial(program, inputs["x"], adapters, inputs, frozen)
    gradients = jax.block_until_ready(call())
    begin = time.perf_counter()
    for _ in range(repeats):
        last = call()
    jax.block_until_ready(last)
    took = 1e3 * (time.perf_counter() - begin) / repeats
    return gradients, took, program.memory_analysis().temp_size_in_bytes / 2**20


def compare(shape: tuple[int, ...]) -> str:
    """How far the gradients of the two ways are apart, in float32."""
    arrays = make_arrays((*shape[:4], 256), jnp.float32)
    with jax.default_matmul_precision("highest"):
        runs = (run_low_rank, run_whole)
        ours, theirs = (measure(run, arrays, repeats=1)[0][1] for run in runs)
    worst = max(
        float(jnp.abs(ours[name] - theirs[name]).max() / jnp.abs(theirs[name]).max())
        for name in theirs
    )
    return f"gradients differ by {worst:.1e} of their largest entry"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="small shapes only")
    shapes = SMOKE if parser.parse_args().smoke else SHAPES
    kind = jax.devices()[0].device_kind
    print(kind, f"rank {RANK}, bfloat16, forward and backward", flush=True)
    for name, shape in shapes.items():
        try:
            print(name, flush=True)
            arrays = make_arrays(shape, jnp.bfloat16)
            for run in (run_frozen, run_low_rank, run_whole):
                _, took, memory = measure(run, arrays, repeats=10)
                line = f"  {run.__name__[4:]:9} {took:8.2f} ms {memory:8.0f} MiB"
                print(line, flush=True)
            del arrays
            print(f"  {compare(shape)}", flush=True)
        except Exception as error:  # the other shapes may still fit the device
            print(f"  {type(error).__name__}: {str(error).splitlines()[0][:200]}")


if __name__ == "__main__":
    main()
