"""How far the first losses of one batch are from float32's, in bfloat16 and in fp8.

    PYTHONPATH=. python benchmarks/fp8_first_steps.py [--rates 3e-3,3e-4] [--steps 6]
        [--random] [--layers 8] [--bits 2,3,4,5,6]

A small model of random weights takes AdamW's steps on one batch of the embedded text,
or of random tokens, at one rate from the first step on, as train_step.py does. Sides:
float32 throughout; bfloat16 in three orders of the batch's rows, which change no more
than roundings; fp8 in the same three orders; and layers whose products read numbers of
2 to 6 bits behind the point, and gradients of one bit less, in place of fp8's 3 and 2.
If fp8 is far for no other reason than its bits, it lies on the line of these.

Prints for each seed of weights the losses of float32, and for all seeds together each
side's mean difference from them step by step, the spread among orders, and the cosine
of the first gradient with float32's. It takes a few minutes of a CPU.
"""

import argparse
import contextlib
import dataclasses
import functools
import gzip
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxtrain import assets
from jaxtrain.kernels.fp8 import api
from jaxtrain.models import Decoder, ModelConfig
from jaxtrain.types import Batch

ROWS, LENGTH, VOCAB = 8, 128, 2048
ORDERS = (0, 1, 2)
CONFIG = {
    "model_type": "qwen2",
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


def make_batch(*, random: bool) -> Batch:
    """The first rows of the embedded text, or tokens and targets at random."""
    path = str(assets.asset_path(assets.TOKENIZER) / "tokenizer.json")
    data = assets.asset_path(assets.DATA["next_token"][0])
    with gzip.open(data, "rt") as file:
        text = "".join(json.loads(next(file))["text"] for _ in range(40))
    tokens = np.asarray(tokenizers.Tokenizer.from_file(path).encode(text).ids)
    rows = np.stack([tokens[i * LENGTH :][: LENGTH + 1] for i in range(ROWS)])
    ones = np.ones((ROWS, LENGTH), np.int32)
    place = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    tokens, targets = (x.astype(np.int32) for x in (rows[:, :-1], rows[:, 1:]))
    if random:
        draw = np.random.default_rng(0)
        tokens, targets = draw.integers(0, VOCAB, (2, ROWS, LENGTH), np.int32)
    return Batch(tokens, targets, ones, place, ones.astype(np.float32))


@contextlib.contextmanager
def products_of(bits: int | None) -> Iterator[None]:
    """Within it, products in eight bits are traced as such of so many; None: as is."""

    def cast(x: Any, scale: Any, dtype: Any) -> Any:
        kept = bits if dtype == api.INPUT else bits - 1
        return lax.reduce_precision(x.astype(jnp.float32) * scale, 8, kept)

    def share(x: Any) -> Any:
        return api.Shared(x, api.quantize(x, api.INPUT))

    with contextlib.ExitStack() as stack:
        if bits is not None:
            stack.enter_context(mock.patch.object(api, "cast", cast))
            stack.enter_context(mock.patch.object(api, "_share", share))
        yield


class Side:
    """A precision: its loss and gradient, compiled once."""

    def __init__(
        self,
        options: argparse.Namespace,
        dtype: str,
        *,
        fp8: bool = False,
        bits: int | None = None,
    ) -> None:
        layers = {"num_hidden_layers": options.layers}
        config = ModelConfig.from_hf(CONFIG | layers)
        self.batch = make_batch(random=options.random)
        decoder = Decoder(
            config, compute_dtype=dtype, attention="xla", packed=False, fp8=fp8
        )
        self.init, self.bits = decoder.init, bits

        def loss(params: Any, batch: Batch) -> Any:
            return -jnp.mean(decoder.token_log_probs(params, batch).logps)

        self.measure = jax.jit(jax.value_and_grad(loss))

    def run(self, seed: int, order: int, rate: float, steps: int) -> Any:
        """Losses as steps begin, and the first gradient as one vector."""
        with products_of(self.bits):
            drawn = np.random.default_rng(order).permutation(ROWS)
            rows = np.arange(ROWS) if order == 0 else drawn
            batch = jax.tree.map(lambda x: x[rows], self.batch)
            params = self.init(jax.random.key(seed))
            state, losses, first = optimizer().init(params), [], None
            for _ in range(steps):
                loss, gradient = self.measure(params, batch)
                first = ravel_pytree(gradient)[0] if first is None else first
                losses.append(float(loss))
                params, state = update(params, state, gradient, rate)
        return np.asarray(losses), np.asarray(first)


def optimizer() -> optax.GradientTransformation:
    """AdamW at a rate of 1, behind the clipping of the benchmark's step."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


@jax.jit
def update(params: Any, state: Any, gradient: Any, rate: Any) -> tuple[Any, Any]:
    steps, state = optimizer().update(gradient, state, params)
    return jax.tree.map(lambda p, s: p - rate * s, params, steps), state


@dataclasses.dataclass
class Found:
    """Of one side: differences from float32 [runs, steps], spreads and cosines."""

    gaps: list[Any] = dataclasses.field(default_factory=list)
    spreads: list[Any] = dataclasses.field(default_factory=list)
    cosines: list[float] = dataclasses.field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", default="3e-3,3e-4")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--random", action="store_true", help="random tokens")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bits", default="2,3,4,5,6")
    options = parser.parse_args()
    make = functools.partial(Side, options)
    exact = make("float32")
    sides = {"bf16": make("bfloat16"), "fp8": make("bfloat16", fp8=True)}
    for bits in map(int, options.bits.split(",")):
        sides[f"{bits} bits"] = make("bfloat16", fp8=True, bits=bits)
    show = functools.partial(np.array2string, precision=4, suppress_small=True)
    for rate in map(float, options.rates.split(",")):
        found = {name: Found() for name in sides}
        for seed in range(options.seeds):
            losses, gradient = exact.run(seed, 0, rate, options.steps)
            print(f"rate {rate} seed {seed} float32: {show(losses)}", flush=True)
            for name, side in sides.items():
                orders = ORDERS if side.bits is None else (0,)
                runs = [side.run(seed, o, rate, options.steps) for o in orders]
                gaps = np.stack([loss - losses for loss, _ in runs])
                found[name].gaps.append(gaps.mean(0))
                found[name].spreads.append(np.ptp(gaps, axis=0))
                for _, first in runs:
                    norms = np.linalg.norm(first) * np.linalg.norm(gradient)
                    found[name].cosines.append(float(first @ gradient / norms))
        for name, side in found.items():
            print(
                f"rate {rate} {name}: {show(np.mean(side.gaps, 0))}, among orders"
                f" {show(np.max(side.spreads, 0))}, 1 - cosine"
                f" {1 - np.mean(side.cosines):.2e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
