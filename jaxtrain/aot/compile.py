"""Compile the train step of a configuration for devices that are described."""

import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from jaxtrain import build
from jaxtrain.aot import gpus, search, tpus
from jaxtrain.aot.hlo_cost import analyze
from jaxtrain.aot.jaxpr_cost import count_flops
from jaxtrain.aot.report import CHIPS, Chip, Report
from jaxtrain.batch import rows_of
from jaxtrain.config import RunConfig, copy_config, resolve
from jaxtrain.data.batches.dataset import ROW_MULTIPLE
from jaxtrain.kernels import xla_options
from jaxtrain.models.load import LoadedModel, load_abstract_model
from jaxtrain.models.recompute import leaves_layers
from jaxtrain.models.state import abstract_state, needs_reference
from jaxtrain.optimizers.configured import make_optimizer
from jaxtrain.run import fp8_step
from jaxtrain.run.fitted_step import choose_policy
from jaxtrain.sharding import layouts_of
from jaxtrain.types import Batch, LabeledBatch, PairBatch, TrainState

# The length of the run changes a constant of the schedule, nothing else.
_TOTAL_STEPS = 1000


def compile_for(
    config: Any, devices: Sequence[Any], topology: str, *, chip: Chip | None = None
) -> Report:
    """Compile the train step of `config` for devices that `describe_devices` made.

    Args:
        config: what `TrainingOrchestrator` takes. Its mesh spans the devices. With
            `remat_policy` "auto" the report is of the policy that a run would take.
        topology: their name in the report.

    Raises:
        ValueError: the config; or training.fp8, and a product in more bits.
    """
    run = resolve(config, device_count=len(devices))
    chip = chip or CHIPS[devices[0].device_kind]

    def compile_by(remat: str, layers: int = -1) -> Report:
        precision = run.precision.with_remat(remat, layers)
        chosen = dataclasses.replace(run, precision=precision)
        return _compile_run(chosen, devices, topology, chip)

    if run.precision.remat != "auto":
        report = _compile_run(run, devices, topology, chip)
        if report.fits or not leaves_layers(load_abstract_model(run, devices).decoder):
            return report
        return compile_by("full")
    model = load_abstract_model(run, devices)
    layers = model.config.num_hidden_layers if model.plan.unrolled else None
    return choose_policy(compile_by, layers)[-1].step


def _compile_run(
    run: RunConfig, devices: Sequence[Any], topology: str, chip: Chip
) -> Report:
    model = load_abstract_model(run, devices)
    model = model.for_training(packed=bool(run.data.packing))
    step, state = describe_step(run, model)
    batch = _abstract_batch(model, run)
    tokens = sum(rows.tokens.size for rows in rows_of(batch))
    report = functools.partial(Report, topology, len(devices), chip, tokens, run)
    start = time.perf_counter()
    with jax.sharding.use_abstract_mesh(model.plan.mesh.abstract_mesh):
        # By it kernels in Triton are lowered for the GPUs of the mesh.
        traced = step.trace(state, batch)
        lowered = traced.lower()
    try:
        absent = xla_options.for_absent_gpus() if model.plan.platform == "gpu" else None
        compiled = lowered.compile(absent)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return report(refusal=_first_lines(str(error)))
    text = compiled.as_text()
    if run.precision.fp8 and model.plan.platform != "cpu":
        fp8_step.check_products(text, fp8_step.expected_of(run, model))
    memory = compiled.memory_analysis()
    per_token = build.flops_per_token(run, model.config, run.data.max_length)
    return report(
        compile_secs=time.perf_counter() - start,
        argument_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        host_bytes=memory.host_argument_size_in_bytes
        + memory.host_output_size_in_bytes
        - memory.host_alias_size_in_bytes
        + memory.host_temp_size_in_bytes,
        flops=_count_flops(run, model, traced, (state, batch)) / len(devices),
        model_flops=per_token * tokens / len(devices),
        cost=analyze(text, device_count=len(devices), per_host=chip.per_host),
    )


def _count_flops(
    run: RunConfig, model: LoadedModel, traced: Any, arguments: tuple[TrainState, Any]
) -> float:
    """FLOPs of the traced step; of experts those that they have where none overflows.

    Their buffers have more slots than are filled, and kernels skip the empty ones.
    """
    spread = model.decoder.experts
    if spread is not None:
        decoder = dataclasses.replace(
            model.decoder, experts=dataclasses.replace(spread, even=True)
        )
        step, _ = describe_step(run, dataclasses.replace(model, decoder=decoder))
        traced = step.trace(*arguments)
    # What nothing needs, as the gradients of frozen weights, is in no compiled program.
    needed = [True] * len(traced.jaxpr.jaxpr.outvars)
    return count_flops(partial_eval.dce_jaxpr(traced.jaxpr.jaxpr, needed)[0])


def describe_step(run: RunConfig, model: LoadedModel) -> tuple[Any, TrainState]:
    """The jitted train step of an abstract model, and its first state in shapes."""
    schedule, optimizer = make_optimizer(run, _TOTAL_STEPS)
    state = abstract_state(model, run, optimizer)
    layouts = layouts_of(state)
    scored = build.bind_loss(run, model, build.Loss(build.make_objective(run)))
    step, _ = build.make_steps(run, model.plan, scored, schedule, optimizer, layouts)
    return step, state


def search_settings(
    config: Any,
    devices: Sequence[Any],
    topology: str,
    *,
    chip: Chip | None = None,
    num_slices: int = 1,
    max_compiles: int = 12,
    log: Callable[[str], None] = print,
) -> tuple[list[search.Outcome], search.Outcome | None]:
    """Mesh shapes, rematerialization and rows of a device: what was tried, the best.

    `config`'s own settings of these are not read. The best is the one of the highest
    bound on tokens a second among those that fit. `log` hears of each compilation.

    Raises:
        ValueError: the config cannot run with any of them.
    """
    chip = chip or CHIPS[devices[0].device_kind]
    run = resolve(config, device_count=len(devices))
    model = load_abstract_model(run, devices)
    candidates = search.make_candidates(
        len(devices),
        heads=model.config.num_attention_heads,
        row_tokens=run.data.max_length,
        num_slices=num_slices,
        experts=model.config.num_experts,
    )

    @functools.cache
    def state_bytes(mesh: tuple[tuple[str, int], ...]) -> float:
        smallest = search.Candidate(mesh, "full", 1)
        run = resolve(_with_settings(config, smallest), device_count=len(devices))
        model = load_abstract_model(run, devices)
        _, optimizer = make_optimizer(run, _TOTAL_STEPS)
        return _bytes_on_device(abstract_state(model, run, optimizer))

    def bound(candidate: search.Candidate) -> search.Bound:
        tokens, least = _count_inputs(run, model, candidate)
        return search.Bound(
            state_bytes(candidate.mesh) + least,
            _least_secs(run, model, candidate, tokens, chip) / (tokens * len(devices)),
        )

    def compile_candidate(candidate: search.Candidate) -> Report:
        flags = search.as_flags(candidate)
        log("compiling " + " ".join(f"--{k}={v}" for k, v in flags.items()))
        chosen = _with_settings(config, candidate)
        return compile_for(chosen, devices, topology, chip=chip)

    outcomes = search.search(
        candidates,
        bound,
        compile_candidate,
        memory_bytes=chip.memory_bytes,
        max_compiles=max_compiles,
    )
    return outcomes, search.choose_best(outcomes)


def _with_settings(config: Any, candidate: search.Candidate) -> Any:
    """The config with the candidate's keys in place of its own."""
    config = copy_config(config)
    own = config.training.get(config.training.training_type, {})
    settings: dict[str, Any] = {"mesh.expert": 1}  # unless the candidate has it
    settings |= {f"mesh.{axis}": size for axis, size in candidate.mesh}
    settings |= search.as_flags(candidate)
    with config.unlocked():
        for key, value in settings.items():
            *above, name = key.split(".")
            functools.reduce(operator.getitem, above, config)[name] = value
            # A key of the training type's own section would win.
            if own.get(name) is not None:
                own[name] = value
    return config


def _bytes_on_device(state: Any) -> float:
    """Bytes of the state in each device's memory, what is offloaded left out."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
        if leaf.sharding.memory_kind != "pinned_host"
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _count_inputs(
    run: RunConfig, model: LoadedModel, candidate: search.Candidate
) -> tuple[float, float]:
    """Tokens of a device in a step (its share of a row's), and the least they take.

    The inputs of all layers of one micro-batch: no policy of rematerialization keeps
    less.
    """
    sides = 1 if run.dpo is None else 2
    sizes = dict(candidate.mesh)
    width = jnp.dtype(run.precision.compute_dtype).itemsize
    micro = candidate.rows * sides * run.data.max_length / sizes["context"]
    inputs = micro * model.config.num_hidden_layers * model.config.hidden_size * width
    tokens = micro * run.loop.gradient_accumulation_steps / sizes["tensor"]
    return tokens, inputs


def _count_weights(model: LoadedModel) -> tuple[int, int]:
    """How many weights the model has, and how many of them are experts'."""
    of_experts = sum(
        leaf.size
        for path, leaf in jax.tree.leaves_with_path(model.params)
        if any(getattr(key, "key", None) == "experts" for key in path)
    )
    return model.config.num_params(), of_experts


def _least_secs(
    run: RunConfig,
    model: LoadedModel,
    candidate: search.Candidate,
    tokens: float,
    chip: Chip,
) -> float:
    """The seconds that a step takes at least.

    Its products run at peak, and its links gather all weights twice, but of experts
    only a device's own share, where `expert` gives it one. Under tensor parallelism the
    links also bring four sums of activations a layer.
    """
    sizes, length = dict(candidate.mesh), run.data.max_length
    flops = build.flops_per_token(run, model.config, length)
    if candidate.remat == "full":
        head = 2 * model.config.hidden_size * model.config.vocab_size
        flops += model.config.flops_per_token(length) / 3 - head
    width = jnp.dtype(run.precision.compute_dtype).itemsize
    passes = 2 + needs_reference(run)
    received = 0.0
    spread = sizes.get("expert", 1)
    if sizes["fsdp"] * spread > 1:
        weights, of_experts = _count_weights(model)
        own = of_experts / spread if sizes["fsdp"] > 1 else 0.0
        gathered = (weights - of_experts + own) * width / sizes["tensor"]
        received += passes * gathered * run.loop.gradient_accumulation_steps
    if sizes["tensor"] > 1:
        layers = model.config.num_hidden_layers * model.config.hidden_size
        received += 4 * layers * tokens * sizes["tensor"] * width
    return max(tokens * flops / chip.flops, received / chip.link_rate)


def describe_devices(topology: str, num_slices: int = 1) -> list[Any]:
    """The devices of a topology such as "v5e:4x4", which need not be present.

    Args:
        topology: generation and shape of a slice, v4, v5e, v5p, v6e, tpu7x; or a
            number of GPUs, as h200:8 (gpus.py has their names).
        num_slices: how many of them, joined by the data centre's network.

    Raises:
        ValueError: no such topology is known, or its compiler is not installed.
    """
    if num_slices < 1:
        raise ValueError(f"num_slices = {num_slices}: give 1 or more")
    name = topology.partition(":")[0]
    if name in tpus.PODS:
        return tpus.describe_tpus(topology, num_slices)
    if name not in gpus.NAMES:
        raise ValueError(
            f"topology = {topology!r}: no such chip is known; name GPUs of"
            f" {', '.join(gpus.NAMES)}, as h200:8, or TPUs of {', '.join(tpus.PODS)},"
            " as v5e:4x4"
        )
    if num_slices > 1:
        raise ValueError(
            f"num_slices = {num_slices}: only TPUs have slices; leave it out and"
            " name all GPUs, as h200:16"
        )
    return gpus.describe_gpus(topology)


def _abstract_batch(model: LoadedModel, run: RunConfig) -> Any:
    rows = run.loop.per_device_train_batch_size * model.plan.batch_shards
    length = -(-run.data.max_length // ROW_MULTIPLE) * ROW_MULTIPLE  # as `prepare` pads
    shares = bool(run.data.share_prompts)
    # A pair in one row is at most as long as both sides.
    shape = (run.loop.gradient_accumulation_steps, rows, length * (1 + shares))
    layout = model.plan.batch(1)
    ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout)
    mask: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)
    numbers: Any = jax.ShapeDtypeStruct(shape[:2], jnp.float32, sharding=layout)
    side = Batch(ids, ids, ids, ids, mask, prompt_ids=ids if shares else None)
    if run.objective_row.row_kind == "next_token":
        return side
    if run.objective_row.row_kind == "labeled":
        return LabeledBatch(side, numbers, mismatched=side)
    assert run.dpo is not None  # row_kind says so
    logps = numbers if run.dpo.precompute_ref_log_probs else None
    return PairBatch(side, side, logps, logps, shared=side if shares else None)


def _first_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[:6])
