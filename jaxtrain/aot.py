"""Compile the real train step for a TPU that is not there: what it needs, if it fits.

    python -m jaxtrain.aot --config=configs/dpo.py --topology=v5e:4x4 \\
        --config.model.name_or_path=configs/shapes/qwen2.5-3b

Needs `jax[tpu]` (it brings libtpu, the compiler) and no TPU; of a model its config.json
is enough. Exits with 3 where the step does not fit.
"""

import dataclasses
import os
import sys
import time
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

# Before jax starts: nothing here is a TPU, and nobody is to be asked about it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to quarrel over

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxtrain import model_manager, trainer
from jaxtrain.config import RunConfig, resolve
from jaxtrain.hlo_cost import analyze
from jaxtrain.jaxpr_cost import count_flops
from jaxtrain.types import Batch, PairBatch

_GIB = 2.0**30
DOES_NOT_FIT = 3


@dataclasses.dataclass(frozen=True)
class Chip:
    """Public figures of one jax device of a TPU generation.

    `flops`: dense bfloat16 FLOP/s. `memory_bytes`, `memory_rate`: HBM and bytes/s.
    `link_rate`: bytes/s that all its inter-chip links bring in together.
    """

    name: str
    flops: float
    memory_bytes: float
    memory_rate: float
    link_rate: float


# By the makers' documentation (cloud.google.com/tpu/docs). A v7x chip is two devices.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * _GIB, 1.23e12, 270e9),
    "TPU v5 lite": Chip("v5e", 197e12, 16 * _GIB, 0.82e12, 180e9),
    "TPU v5": Chip("v5p", 459e12, 95 * _GIB, 2.77e12, 540e9),
    "TPU v6 lite": Chip("v6e", 918e12, 32 * _GIB, 1.64e12, 360e9),
    "TPU7x": Chip("v7x core", 1153e12, 96 * _GIB, 3.69e12, 300e9),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """One step of one run on one topology; bytes and FLOPs are of one device.

    `flops` counts what is computed (recomputation too), `model_flops` what the model
    needs. A step that does not fit has no more than `refusal`.
    """

    topology: str
    device_count: int
    chip: Chip
    tokens: int
    run: RunConfig
    compile_secs: float
    refusal: str | None = None
    argument_bytes: float = 0.0
    temporary_bytes: float = 0.0
    code_bytes: float = 0.0
    host_bytes: float = 0.0
    flops: float = 0.0
    model_flops: float = 0.0
    bytes_accessed: float = 0.0
    collectives: dict[str, tuple[float, float]] = dataclasses.field(
        default_factory=dict
    )

    @property
    def device_bytes(self) -> float:
        """Peak of device memory: arguments (outputs take their place) and the rest."""
        return self.argument_bytes + self.temporary_bytes + self.code_bytes

    @property
    def fits(self) -> bool:
        return self.refusal is None and self.device_bytes <= self.chip.memory_bytes

    @property
    def secs(self) -> dict[str, float]:
        """The least time for each resource, were the others free."""
        received = sum(size for _, size in self.collectives.values())
        return {
            "compute": self.flops / self.chip.flops,
            "memory": self.bytes_accessed / self.chip.memory_rate,
            "links": received / self.chip.link_rate,
        }

    @property
    def step_secs(self) -> float:
        """No step is faster: all resources at their peak, fully overlapped."""
        return max(self.secs.values())

    @property
    def mfu(self) -> float:
        """No step has a higher model FLOPs utilization (arXiv:2204.02311)."""
        return self.model_flops / self.chip.flops / self.step_secs


def compile_step(config: Any, topology: str) -> Report:
    """Compile the train step of `config` for `topology`, such as "v5e:4x4".

    Args:
        config: what `TrainingOrchestrator` takes. Its mesh spans the topology.
        topology: generation and shape: v4, v5e, v5p, v6e, tpu7x.

    Raises:
        ValueError: libtpu knows no such topology, or is not installed; the config.
    """
    devices = _describe(topology)
    run = resolve(config, device_count=len(devices))
    model = model_manager.load_abstract_model(run, devices)
    model.decoder = dataclasses.replace(model.decoder, packed=run.data.packing)
    orchestrator = trainer.TrainingOrchestrator(run)
    orchestrator.run, orchestrator.model = run, model
    # The length of the run changes a constant of the schedule, nothing else.
    schedule, optimizer = trainer.make_optimizer(run, total_steps=1000)
    state = model_manager.abstract_state(model, run, optimizer)
    layouts = jax.tree.map(lambda leaf: leaf.sharding, state)
    step: Any  # jitted, hence with `trace`
    step, _ = orchestrator.make_steps(
        orchestrator.make_score(), schedule, optimizer, layouts
    )
    batch = _abstract_batch(model, run)
    report = Report(
        topology=topology,
        device_count=len(devices),
        chip=CHIPS[devices[0].device_kind],
        tokens=sum(
            leaf.size
            for path, leaf in jax.tree.leaves_with_path(batch)
            if path[-1].name == "tokens"
        ),
        run=run,
        compile_secs=0.0,
    )
    start = time.perf_counter()
    traced = step.trace(state, batch)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "CustomSPMDPartitioning" in str(error):
            raise ValueError(
                f"model.attention = {run.model.attention!r} cannot compile here: jax"
                " gives the rule by which a kernel is split over devices to TPUs that"
                " are present only. Set 'xla' to see what fits"
            ) from error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dataclasses.replace(report, refusal=_first_lines(str(error)))
    memory = compiled.memory_analysis()
    cost = analyze(compiled.as_text())
    per_token = trainer.flops_per_token(run, model, run.data.max_length)
    return dataclasses.replace(
        report,
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
        flops=count_flops(traced.jaxpr) / len(devices),
        model_flops=per_token * report.tokens / len(devices),
        bytes_accessed=cost.bytes_accessed,
        collectives=dict(cost.collectives),
    )


def describe(report: Report) -> str:
    """What `main` prints."""
    run, chip = report.run, report.chip
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.sizes.items())
    lines = [
        f"{report.topology}: {report.device_count} devices of {chip.name}, mesh {mesh}",
        f"{run.training_type}, {report.tokens} tokens a step, rematerialization"
        f" {run.precision.remat!r}, attention {run.model.attention!r}",
    ]
    if report.refusal:
        lines += ["DOES NOT FIT:", report.refusal, *advise(run)]
        return "\n".join(lines)
    share = report.device_bytes / chip.memory_bytes
    lines += [
        f"compiled in {report.compile_secs:.0f} s",
        "memory a device:",
        f"  state and batch    {report.argument_bytes / _GIB:9.2f} GiB",
        f"  temporaries        {report.temporary_bytes / _GIB:9.2f} GiB",
        f"  program            {report.code_bytes / _GIB:9.2f} GiB",
        f"  sum                {report.device_bytes / _GIB:9.2f} GiB of"
        f" {chip.memory_bytes / _GIB:.0f} ({share:.0%})",
        f"  pinned host        {report.host_bytes / _GIB:9.2f} GiB",
        "work a device and step:",
        f"  FLOPs              {report.flops / 1e12:9.2f} T"
        f" ({report.model_flops / 1e12:.2f} T without recomputation)",
        f"  device memory      {report.bytes_accessed / 1e9:9.2f} GB read and written",
    ]
    for kind, (count, size) in sorted(report.collectives.items()):
        lines.append(f"  {kind:18s} {size / 1e9:9.2f} GB in {count:.0f} calls")
    times = ", ".join(f"{name} {secs:.3f} s" for name, secs in report.secs.items())
    lines += [
        f"roofline: {times}",
        f"bound: no step under {report.step_secs:.3f} s"
        f" ({report.tokens / report.step_secs:,.0f} tokens/s), MFU at most"
        f" {report.mfu:.0%}",
    ]
    if report.fits:
        return "\n".join([*lines, "FITS"])
    return "\n".join([*lines, "DOES NOT FIT:", *advise(run)])


def advise(run: RunConfig) -> list[str]:
    """What would make a step smaller, the cheapest first; only what is left to do."""
    advice = []
    if not run.precision.gradient_checkpointing:
        advice.append("training.gradient_checkpointing = True")
    elif run.precision.remat_policy != "full":
        advice.append("training.remat_policy = 'full'")
    if run.mesh.fsdp == 1 and run.mesh.data > 1:
        advice.append("training.deepspeed.zero_stage = 3 (splits weights over devices)")
    rows = run.loop.per_device_train_batch_size
    if rows > 1:
        advice.append(
            f"training.per_device_train_batch_size = {rows // 2},"
            " gradient_accumulation_steps doubled: the same update"
        )
    if model_manager.needs_reference(run) and run.lora is None:
        advice.append("training.dpo.precompute_ref_log_probs = True (no second model)")
    if run.lora is None:
        advice.append("training.lora.enabled = True (no optimizer state of the base)")
    if not run.devices.deepspeed.offload_optimizer:
        advice.append("training.deepspeed.offload_optimizer = True (pinned host)")
    advice += ["mesh.tensor = 2 or more, within a host", "a larger topology"]
    return [f"  try {line}" for line in advice]


def _describe(topology: str) -> list[Any]:
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=topology
        )
    except Exception as error:  # libtpu raises several kinds
        raise ValueError(
            f"topology = {topology!r}: {_first_lines(str(error), 2)}. Name it as"
            " v5e:4x4, v5p:2x2x2, v6e:8x8 or tpu7x:2x2x1, with jax[tpu] installed"
        ) from error
    return list(description.devices)


def _abstract_batch(model: model_manager.LoadedModel, run: RunConfig) -> Any:
    rows = run.loop.per_device_train_batch_size * model.plan.batch_shards
    length = -(-run.data.max_length // 64) * 64  # as `prepare` pads
    shape = (run.loop.gradient_accumulation_steps, rows, length)
    layout = model.plan.batch(1)

    def side() -> Batch:
        ids: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout)
        mask: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)
        return Batch(
            tokens=ids, targets=ids, segment_ids=ids, positions=ids, loss_mask=mask
        )

    if run.dpo is None:
        return side()
    if not run.dpo.precompute_ref_log_probs:
        return PairBatch(side(), side())
    logps: Any = jax.ShapeDtypeStruct(shape[:2], jnp.float32, sharding=layout)
    return PairBatch(side(), side(), logps, logps)


def _first_lines(text: str, count: int = 6) -> str:
    return "\n".join(text.strip().splitlines()[:count])


def main(argv: list[str]) -> None:
    """Compile, print, and exit with 0, or with 3 where it does not fit."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config: ConfigDict = _CONFIG.value
    try:
        report = compile_step(config, str(_TOPOLOGY.value))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(describe(report))
    sys.exit(0 if report.fits else DOES_NOT_FIT)


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file(
        "config", None, "Configuration file.", lock_config=True
    )
    _TOPOLOGY = flags.DEFINE_string("topology", None, "Such as v5e:4x4.")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main)
