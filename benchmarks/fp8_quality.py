"""Loss curves in fp8 beside three of bfloat16: pre-training, SFT and DPO of a 0.5B.

    python benchmarks/fp8_quality.py TEXT.gz [--out DIR] [--steps 1000]
    python benchmarks/fp8_quality.py TEXT.gz --smoke    # tiny shapes, any backend

TEXT.gz has a verse a line, such as the King James Bible's "Ge1:1 In the beginning ...".
First 1,000 steps of 4 x 1024 tokens from random weights of Qwen2.5-0.5B's shapes. Seeds
decide weights and the order of rows, and the fp8 run has the first seed of the three.
Then from the first run's weights 300 steps of SFT, to say the second half of a verse
behind the first, and 300 of DPO, to prefer it to that of another verse. Held-out verses
are the last twentieth of the text.

Prints for each the gap of the smoothed loss and of what is held out, with the largest
gap among the three seeds, and writes all curves to DIR/fp8_quality.json.
"""

import argparse
import dataclasses
import functools
import gzip
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from step_cases import SHAPES
from train_step import copy_for_reference, model_config

from jaxtrain import assets
from jaxtrain.kernels.xla_options import FP8
from jaxtrain.models import Decoder
from jaxtrain.objectives import make_objective
from jaxtrain.optimizers import optim
from jaxtrain.optimizers.schedules import make_schedule
from jaxtrain.run.fp8_step import CheckedStep, Expected
from jaxtrain.step import StepOptions, make_eval_step, make_train_step
from jaxtrain.types import Batch, PairBatch, TrainState

SEEDS = (0, 1, 2)
SMOOTHED = 50  # steps that a smoothed loss is the mean of
LENGTH = 128  # of rows of SFT and DPO


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training: its objective, steps, peak rate, and batches by seed."""

    name: str
    objective: str
    steps: int
    rate: float
    batches: Callable[[int], Iterator[Any]]
    held_out: list[Any]
    metric: str  # of what is held out


class Text:
    """Verses as tokens, the last twentieth held out."""

    def __init__(self, path: str, vocab: int) -> None:
        with gzip.open(path, "rt") as file:
            lines = [line.strip().partition(" ")[2] for line in file]
        lines = [line for line in lines if line]
        path = str(assets.asset_path(assets.TOKENIZER) / "tokenizer.json")
        tokenizer = tokenizers.Tokenizer.from_file(path)
        # Only the smallest of shapes has fewer tokens than the tokenizer.
        codes = tokenizer.encode_batch(lines)
        found = [[token % vocab for token in code.ids] for code in codes]
        cut = len(found) * 19 // 20
        self.train, self.held_out = found[:cut], found[cut:]


def make_batch(rows: np.ndarray, counted: np.ndarray, real: np.ndarray) -> Batch:
    """A batch of rows [B T+1] of which targets are `counted` and tokens `real`."""
    place = np.broadcast_to(np.arange(rows.shape[1] - 1, dtype=np.int32), real.shape)
    return Batch(
        tokens=rows[:, :-1].astype(np.int32),
        targets=rows[:, 1:].astype(np.int32),
        segment_ids=real.astype(np.int32),
        positions=place.copy(),
        loss_mask=(counted & real).astype(np.float32),
    )


def text_batches(
    verses: list[list[int]], length: int, rows: int, seed: int
) -> Iterator[Batch]:
    """Whole rows cut out of the text, in an order by the seed, without end."""
    stream = np.concatenate([np.asarray(verse) for verse in verses])
    count = (len(stream) - 1) // length
    draw = np.random.default_rng(seed)
    everything = np.ones((rows, length), bool)
    while True:
        order = draw.permutation(count)
        for at in range(0, count - rows + 1, rows):
            starts = order[at : at + rows] * length
            cut = np.stack([stream[s : s + length + 1] for s in starts])
            yield make_batch(cut, everything, everything)


def make_answers(
    verses: list[list[int]], others: list[list[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of first halves of verses and second halves of others, each of LENGTH."""
    rows = np.zeros((len(verses), LENGTH + 1), np.int32)
    place = np.arange(LENGTH)
    starts, ends = [], []
    for row, verse, other in zip(rows, verses, others, strict=True):
        half = min(len(verse) // 2, LENGTH // 2)
        both = (verse[:half] + other[len(other) // 2 :])[: LENGTH + 1]
        row[: len(both)] = both
        starts.append(half - 1)  # the prompt's last token has the first target
        ends.append(len(both) - 1)
    start, end = (np.asarray(x)[:, None] for x in (starts, ends))
    return rows, (place >= start) & (place < end), place < end


def answer_batches(
    verses: list[list[int]], rows: int, seed: int, *, pairs: bool
) -> Iterator[Any]:
    """Batches of verses, or of pairs with the end of another verse, without end."""
    draw = np.random.default_rng(seed)
    while True:
        order = draw.permutation(len(verses))
        for at in range(0, len(verses) - 2 * rows + 1, rows):
            own = [verses[i] for i in order[at : at + rows]]
            chosen = make_batch(*make_answers(own, own))
            if not pairs:
                yield chosen
                continue
            others = [verses[i] for i in order[at + rows : at + 2 * rows]]
            yield PairBatch(chosen, make_batch(*make_answers(own, others)))


def make_stages(text: Text, options: argparse.Namespace) -> list[Stage]:
    length, rows = (32, 2) if options.smoke else (1024, 4)
    fine = 4 if options.smoke else 16
    few = max(2, options.steps * 3 // 10)

    def held_out(batches: Iterator[Any], count: int) -> list[Any]:
        return list(itertools.islice(batches, 1 if options.smoke else count))

    of_pairs = functools.partial(answer_batches, rows=fine, pairs=True)
    of_rows = functools.partial(answer_batches, rows=fine, pairs=False)
    texts = functools.partial(text_batches, length=length, rows=rows)
    verses = [verse for verse in text.train if len(verse) >= 16]
    kept = [verse for verse in text.held_out if len(verse) >= 16]
    return [
        Stage(
            "pre-training",
            "next_token",
            options.steps,
            3e-4,
            lambda seed: texts(text.train, seed=seed),
            held_out(texts(text.held_out, seed=0), 16),
            "loss",
        ),
        Stage(
            "sft",
            "next_token",
            few,
            5e-5,
            lambda seed: of_rows(verses, seed=seed),
            held_out(of_rows(kept, seed=0), 32),
            "loss",
        ),
        Stage(
            "dpo",
            "preference",
            few,
            5e-6,
            lambda seed: of_pairs(verses, seed=seed),
            held_out(of_pairs(kept, seed=0), 32),
            "rewards/margins",
        ),
    ]


class Trainer:
    """The steps of one stage in one precision, compiled once for all seeds."""

    def __init__(self, stage: Stage, options: argparse.Namespace, *, fp8: bool) -> None:
        self.stage, self.fp8 = stage, fp8
        self.decoder = Decoder(
            model_config("smoke" if options.smoke else "0.5b"),
            attention=options.attention,
            scan_layers=not options.unroll,
            packed=False,
            fp8=fp8,
        )
        schedule = make_schedule(
            "cosine",
            learning_rate=stage.rate,
            total_steps=stage.steps,
            warmup_steps=stage.steps // 20,
        )
        self.optimizer = optim.make_optimizer("adamw", schedule)
        objective = make_objective(stage.objective)
        score = self.decoder.token_log_probs
        self.pairs = stage.objective == "preference"
        kept = StepOptions(max_grad_norm=1.0, with_reference=self.pairs)
        settings: Any = None
        if jax.default_backend() == "gpu":
            settings = FP8 if fp8 else {"xla_gpu_enable_triton_gemm": False}
        self.step = jax.jit(
            make_train_step(objective, score, self.optimizer, schedule, kept),
            donate_argnums=0,
            compiler_options=settings,
        )
        if fp8 and settings is not None:
            modules = self.decoder.linear_kernels()
            layers = self.decoder.config.num_hidden_layers if options.unroll else 1
            self.step = CheckedStep(self.step, Expected(modules, *[layers] * 3))
        self.evaluate = jax.jit(
            make_eval_step(objective, score, kept), compiler_options=settings
        )

    def run(self, seed: int, start: Any) -> tuple[dict[str, Any], Any]:
        """Train from `start`, random weights where None; curves and the weights."""
        if start is None:
            params = jax.jit(self.decoder.init)(jax.random.key(seed))
        else:
            params = jax.tree.map(jnp.copy, start)
        frozen: Any = {}
        if self.pairs:
            copy = functools.partial(copy_for_reference, self.fp8)
            frozen = jax.jit(copy)(params)
        state = TrainState(
            step=jnp.int32(0),
            trainable=params,
            frozen=frozen,
            opt_state=jax.jit(self.optimizer.init)(params),
            rng=jax.random.key(seed),
        )
        losses: list[Any] = []
        margins: list[Any] = []
        batches = itertools.islice(self.stage.batches(seed), self.stage.steps)
        for batch in batches:
            placed = jax.device_put(jax.tree.map(lambda x: x[None], batch))
            state, metrics = self.step(state, placed)
            losses.append(metrics["loss"].mean())
            if self.pairs:
                margins.append(metrics["rewards/margins"].mean())
        sums = [self.evaluate(state, jax.device_put(b)) for b in self.stage.held_out]
        name = self.stage.metric
        total = sum(float(each[name].total) for each in sums)
        weight = sum(float(each[name].weight) for each in sums)
        curve = [float(loss) for loss in jax.device_get(losses)]
        result = {
            "loss": curve,
            "smoothed": float(np.mean(curve[-SMOOTHED:])),
            "held_out": total / weight,
        }
        if margins:
            result["margins"] = [float(m) for m in jax.device_get(margins)]
        return result, state.trainable


def smoothed_gap(fast: list[float], base: list[float]) -> float:
    """The largest gap of the two smoothed curves in their second half, as a share."""
    width = min(SMOOTHED, len(base) // 4 or 1)
    kernel = np.ones(width) / width
    a, b = (np.convolve(curve, kernel, "valid") for curve in (fast, base))
    half = len(a) // 2
    return float(np.max(np.abs(a[half:] / b[half:] - 1)))


def run_stage(
    stage: Stage, options: argparse.Namespace, start: Any
) -> tuple[dict[str, Any], Any]:
    """All runs of a stage, told in a few lines; the first one's weights."""
    runs: dict[str, Any] = {}
    first: Any = None
    trainers = {fp8: Trainer(stage, options, fp8=fp8) for fp8 in (False, True)}
    for fp8, seed in ((False, 0), (True, 0), *((False, seed) for seed in SEEDS[1:])):
        began = time.perf_counter()
        name = f"{'fp8' if fp8 else 'bf16'} {seed}"
        try:
            runs[name], weights = trainers[fp8].run(seed, start)
        except ValueError as error:  # a product in more bits than it shall have
            print(f"{stage.name} {name}, layers in a scan: {error}", flush=True)
            options.unroll = True
            trainers[fp8] = Trainer(stage, options, fp8=fp8)
            runs[name], weights = trainers[fp8].run(seed, start)
        first = weights if first is None else first
        del weights
        told = runs[name]
        print(
            f"{stage.name} {name}: last {SMOOTHED} steps {told['smoothed']:.4f},"
            f" held-out {stage.metric} {told['held_out']:.4f},"
            f" {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    base = [runs[f"bf16 {seed}"] for seed in SEEDS]
    fast = runs["fp8 0"]
    held = [run["held_out"] for run in base]
    among = max(held) - min(held)
    last = fast["smoothed"] / base[0]["smoothed"] - 1
    widest = smoothed_gap(fast["loss"], base[0]["loss"])
    seeds = max(run["smoothed"] for run in base) - min(run["smoothed"] for run in base)
    print(
        f"{stage.name}: smoothed loss {last:+.3%} at the end, {widest:.3%} at most in"
        f" the second half (seeds {seeds / base[0]['smoothed']:.3%}); held-out"
        f" {stage.metric} {fast['held_out'] - held[0]:+.4f}, among seeds {among:.4f}",
        flush=True,
    )
    return runs, first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", help="a gzipped file, a verse a line")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--unroll", action="store_true", help="layers one by one")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    options = parser.parse_args()
    vocab = SHAPES["smoke" if options.smoke else "0.5b"]["vocab_size"]
    text, curves = Text(options.text, vocab), {}
    start: Any = None
    for stage in make_stages(text, options):
        curves[stage.name], weights = run_stage(stage, options, start)
        # Whatever follows begins with the weights of the first pre-training.
        start = weights if start is None else start
        del weights
        written = options.out / "fp8_quality.json"
        written.write_text(json.dumps(curves))


if __name__ == "__main__":
    main()
