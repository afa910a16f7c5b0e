"""Tokens and pairs a second of whole train steps, and peak memory.

    python benchmarks/train_step.py [--cases sft_0.5b,dpo_0.5b,...] [--steps 10]
    python benchmarks/train_step.py --peer trl.jsonl  # what trl_step.py printed
    python benchmarks/train_step.py --smoke           # tiny shapes, any backend

Each case is the step that `jaxtrain.trainer` runs: bfloat16 compute, float32 master
weights, AdamW, on random weights of Qwen2.5's shapes and rows without padding.
`--peer` sets the peer's rate and memory beside ours: measure both on one machine.
`dpo_0.5b_shared` and its like hold each prompt once (data.share_prompts).
One line of JSON a case, each in its own process; where a case fails, its error. Lines
with a "stage" come before it, so that a run that is cut off has told how far it came:
what making the weights, tracing and compiling took, and the memory by the compiler.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from step_cases import SHAPES, WARMUP, Case, get_case, make_parser, run_cases

from jaxtrain import lora
from jaxtrain.config.sections import REMATS
from jaxtrain.data.batches.scoring import with_scored
from jaxtrain.data.batches.shared_prompt import share_prompts
from jaxtrain.kernels.linear_cross_entropy import fused
from jaxtrain.models import Decoder, ModelConfig, fp8
from jaxtrain.models.load import JOINED_WIDTH
from jaxtrain.models.quantization import Quantization
from jaxtrain.models.recompute_options import room_for_layers
from jaxtrain.models.transformer import for_reference
from jaxtrain.objectives import make_objective
from jaxtrain.optimizers import optim
from jaxtrain.optimizers.moments import MOMENT_DTYPES, with_compact_moments
from jaxtrain.optimizers.schedules import make_schedule
from jaxtrain.record.throughput import peak_flops
from jaxtrain.run import collector
from jaxtrain.run.mosaic_programs import compile_program
from jaxtrain.sharding import ShardingPlan, make_mesh
from jaxtrain.step import StepOptions, make_train_step
from jaxtrain.types import Batch, PairBatch, TrainState

SHARED = "_shared"  # behind a case of pairs: their prompts are computed once
# Every step has the same batch, of random tokens. At the usual 1e-5 a 3B learns it by
# heart within three steps, and the losses of two precisions could not be compared.
LEARNING_RATE = 1e-6


def model_config(shape: str) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "model_type": "qwen2",
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            **SHAPES[shape],
        }
    )


def make_rows(case: Case, seed: int, document: int | None = None) -> Batch:
    """Rows [1, B, T] of documents of one length; the prompt is not counted."""
    rng = np.random.default_rng(seed)
    vocab = SHAPES[case.shape]["vocab_size"]
    shape = (1, case.rows, case.length)
    mask = np.ones(shape, np.float32)
    mask[..., : case.prompt] = 0
    place = np.arange(case.length, dtype=np.int32)
    document = case.length if document is None else document
    positions = np.broadcast_to(place % document, shape)
    segments = np.broadcast_to(place // document + 1, shape)
    return Batch(
        tokens=rng.integers(0, vocab, shape, np.int32),
        targets=rng.integers(0, vocab, shape, np.int32),
        segment_ids=segments.copy(),
        positions=positions.copy(),
        loss_mask=mask,
    )


def make_shared_rows(case: Case) -> Batch:
    """The same pairs in rows that hold the prompt once."""
    response = case.length - case.prompt
    length = case.prompt + 2 * response
    apart = make_rows(dataclasses.replace(case, length=length), 0)
    segments = np.repeat([1, 2, 3], [case.prompt, response, response])
    place = np.arange(length)
    positions = np.where(segments == 3, place - response, place)
    prompts = np.where(segments > 1, 1, 0)
    ids = [
        np.broadcast_to(values, apart.tokens.shape).astype(np.int32)
        for values in (segments, positions, prompts)
    ]
    return dataclasses.replace(
        apart, segment_ids=ids[0], positions=ids[1], prompt_ids=ids[2]
    )


def score_trained(rows: Batch) -> Batch:
    """The loss head leaves prompts out, as in a run whose pairs are packed."""
    trained = (rows.loss_mask > 0).sum(-1)
    return with_scored(rows, int(trained.max()), rows.tokens.shape[-2])


def read_peer(path: str | None) -> dict[str, Any]:
    """The peer's line of each case that it measured."""
    if path is None:
        return {}
    lines = pathlib.Path(path).read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {line["case"]: line for line in found if "rate" in line}


def make_step(name: str, options: argparse.Namespace) -> tuple[Any, TrainState, Any]:
    """The jitted step of a case, its first state and a batch on the device."""
    if options.xla_head:
        fused.choose_tiles = lambda *_: None  # type: ignore[assignment]
    shared = name.endswith(SHARED)
    case = find_case(name, options)
    config = model_config(case.shape)
    settings = lora.LoraConfig(
        r=16, alpha=32, target_modules=("q_proj", "k_proj", "v_proj", "o_proj")
    )
    kind = "fp8" if options.fp8 and case.lora else case.quantization
    decoder = Decoder(
        config,
        compute_dtype="bfloat16",
        param_dtype="bfloat16" if case.lora else case.param_dtype,
        remat=options.remat or ("full" if case.remat else "none"),
        remat_layers=options.remat_layers,
        kept_bytes=0 if case.lora else room_for_layers(config, case.param_dtype, 1, 1),
        attention=options.attention,
        loss_chunk=options.chunk,
        scan_layers=not options.unroll,
        packed=options.document is not None,
        quantization=Quantization(kind) if kind else None,
        fp8=options.fp8,
        joins_products=not (case.lora or kind or options.fp8)
        and config.hidden_size >= JOINED_WIDTH,
    )
    params = jax.jit(decoder.init)(jax.random.key(0))
    frozen: Any = {}
    if case.lora:
        adapters = lora.init_adapters(jax.random.key(1), params, settings)
        trainable, frozen = lora.trainable_and_frozen(params, adapters, settings)
        shape = lora.make_shape(settings, params)
        scorer = dataclasses.replace(decoder, lora=shape)
    else:
        trainable, scorer = params, decoder
        if case.pairs:
            frozen = jax.jit(functools.partial(copy_for_reference, options.fp8))(params)
    # As a run would compile it: unrolled layers on a GPU without Triton's products.
    plan = ShardingPlan(
        make_mesh({}, jax.devices()[:1]), unrolled=options.unroll, fp8=options.fp8
    )
    schedule = make_schedule("constant", learning_rate=LEARNING_RATE, total_steps=1000)
    optimizer = optim.make_optimizer("adamw", schedule)
    moments = options.moments or case.moments
    optimizer = with_compact_moments(optimizer, moments)
    step = plan.jit(
        make_train_step(
            make_objective("preference" if case.pairs else "next_token"),
            functools.partial(scorer.token_log_probs, with_total=not case.pairs),
            optimizer,
            schedule,
            StepOptions(
                max_grad_norm=1.0,
                with_reference=case.pairs,
                score_reference=for_reference(scorer).token_log_probs,
                unrolled=plan.unrolled,
            ),
        ),
        donate_argnums=0,
    )
    state = TrainState(
        step=jnp.int32(0),
        trainable=trainable,
        frozen=frozen,
        opt_state=jax.jit(optimizer.init)(trainable),
        rng=jax.random.key(2),
    )
    del params, trainable, frozen
    batch: Any
    if not case.pairs:
        batch = make_rows(case, 0, options.document)
    elif shared:
        batch = share_prompts(score_trained(make_shared_rows(case)))
    else:
        batch = PairBatch(*(score_trained(make_rows(case, side)) for side in (0, 1)))
    batch = jax.device_put(batch)
    return step, state, batch


def copy_for_reference(in_fp8: bool, params: Any) -> Any:
    """DPO's frozen model, as it is kept beside the one that trains."""
    copied = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    return fp8.freeze_kernels(params, copied) if in_fp8 else copied


def find_case(name: str, options: argparse.Namespace) -> Case:
    """The case of that name, with or without shared prompts, as the options cut it."""
    case = get_case(name.removesuffix(SHARED), options.smoke)
    if case.pairs and options.response:
        case = dataclasses.replace(case, length=case.prompt + options.response)
    return case


def tell(name: str, stage: str, start: float, **found: float) -> None:
    """A line of what is done so far, and the seconds that it took."""
    secs = round(time.perf_counter() - start, 1)
    line = {"case": name, "stage": stage, "secs": secs, **found}
    print(json.dumps(line), flush=True)


def compile_step(name: str, step: Any, arguments: tuple[TrainState, Any]) -> Any:
    """The compiled step; each stage is told of."""
    start = time.perf_counter()
    with collector.paused():
        lowered = step.lower(*arguments)
    tell(name, "lowered", start)
    start = time.perf_counter()
    compiled = compile_program(lowered)
    memory = compiled.memory_analysis()
    gib = {
        "state_gib": round(memory.argument_size_in_bytes / 2**30, 1),
        "temporary_gib": round(memory.temp_size_in_bytes / 2**30, 1),
    }
    tell(name, "compiled", start, **gib)
    return compiled


def run_case(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time the steps after those to warm up."""
    case = find_case(name, options)
    config = model_config(case.shape)
    start = time.perf_counter()
    step, state, batch = make_step(name, options)
    jax.block_until_ready(state)
    tell(name, "state made", start)
    start = time.perf_counter()
    step = compile_step(name, step, (state, batch))
    losses = []
    for _ in range(WARMUP):
        state, metrics = step(state, batch)
        losses.append(round(float(metrics["loss"].mean()), 4))
        tell(name, "step", start, loss=losses[-1])
    warmup_secs = time.perf_counter() - start
    times = []
    for _ in range(options.steps):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - start)
    secs = float(np.median(times))
    device = jax.devices()[0]
    rate = case.amount / secs
    forwards = (2 if case.lora else 3) + case.pairs
    sides = case.rows * case.length * (1 + case.pairs)
    tokens = batch.shared.tokens.size if name.endswith(SHARED) else sides
    flops = config.flops_per_token(case.length) / 3 * forwards * tokens
    peak = peak_flops(device.device_kind)
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    row = {
        "case": name,
        "unit": case.unit,
        "rate": round(rate, 1),
        "step_ms": round(secs * 1e3, 2),
        "mfu": round(flops / secs / peak, 3) if peak else None,
        "peak_gib": round(memory, 1),
        "losses": losses,  # of the first steps
        "warmup_secs": round(warmup_secs, 1),
        "attention": options.attention,
        "chunk": options.chunk,
        "scan_layers": not options.unroll,
        "document": options.document,
        "response": options.response,
        "fp8": options.fp8,
        "xla_head": options.xla_head,
        "remat": options.remat,
        "remat_layers": options.remat_layers,
        "moments": options.moments or case.moments,
        "device": device.device_kind,
        "versions": {"jax": jax.__version__},
    }
    peer = read_peer(options.peer).get(name.removesuffix(SHARED))
    if peer:
        row["peer"] = peer["rate"]
        row["ratio"] = round(rate / peer["rate"], 3)
        row["peer_peak_gib"] = peer["peak_gib"]
    return row


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """What `make_step` reads beside the arguments of every benchmark."""
    parser.add_argument("--chunk", type=int, help="loss_chunk_tokens")
    parser.add_argument("--unroll", action="store_true", help="scan_layers = False")
    parser.add_argument(
        "--document", type=int, help="next-token rows of packed documents this long"
    )
    parser.add_argument("--response", type=int, help="tokens of each, in pairs")
    parser.add_argument("--remat", choices=REMATS, help="in place of the case's own")
    parser.add_argument("--remat_layers", type=int, help="how many it acts on")
    parser.add_argument("--moments", choices=MOMENT_DTYPES)
    parser.add_argument("--fp8", action="store_true", help="training.fp8")
    parser.add_argument(
        "--xla_head", action="store_true", help="no kernels of ours in the loss head"
    )


def main() -> None:
    parser = make_parser(__doc__, attention="auto")
    add_step_arguments(parser)
    parser.add_argument("--peer", help="lines that trl_step.py printed")
    run_cases(__file__, parser.parse_args(), run_case)


if __name__ == "__main__":
    main()
