"""How a run begins: the block that the log shows, and what config.json is to hold."""

import dataclasses
import logging
import os
import textwrap
from collections.abc import Iterable
from typing import Any

import jax

from jaxtrain import __version__, loop
from jaxtrain.config import RunConfig, eval_sets
from jaxtrain.config.notes import Note
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.batches.layout import RowShape
from jaxtrain.data.batches.pipeline import BatchIterator
from jaxtrain.record import memory, provenance
from jaxtrain.record.console import one_line
from jaxtrain.record.logs import COLUMNS
from jaxtrain.run.buffer import local_folder
from jaxtrain.run.feed import Prepared
from jaxtrain.tree import dotted, select

logger = logging.getLogger(__name__)

_LABEL = 11  # columns
_WIDTH = COLUMNS - len("00:00:00 ")
_MOST_LINES = 2  # of one entry
_LONGEST_PATH = 60


def announce(
    parts: loop.Parts, progress: loop.Progress, workdir: Any
) -> dict[str, Any]:
    """Log what is about to run, and return the configuration with its provenance.

    Process 0 does this; the others have nothing to write.
    """
    config = parts.run.to_dict()
    if jax.process_index() != 0:
        return config
    logger.info("%s", "\n".join(describe(parts, progress, workdir)))
    named = parts.run.data.eval_paths
    data = {"train": _describe_rows(parts.train_data, parts.run.data.train)}
    for name, rows in parts.eval_data.items():
        key = eval_sets.key_of(name).removeprefix("data.")
        data[key] = _describe_rows(rows, named.get(name))
    start = provenance.describe_start(
        progress.step, parts.model.plan.mesh, data, parts.run.explain()
    )
    return provenance.with_history(config, start, local_folder(workdir))


def describe(parts: loop.Parts, progress: loop.Progress, workdir: Any) -> list[str]:
    """The block: a title, and an aligned entry for each thing one wants to know."""
    run = parts.run
    entries = {
        "model": _model(parts),
        "data": _data(parts),
        "batch": _batch(parts),
        "steps": _steps(parts),
        "devices": _devices(parts),
        "precision": _precision(run),
        "memory": _memory(parts),
        "writes": _writes(run, workdir),
        "resumes": _resumes(parts, progress, workdir),
        **_notes(run.notes),
    }
    name = run.loop.run_name or workdir.resolve().name
    title = f"jaxtrain {__version__}: {run.training_type} run {name!r}"
    title = one_line(title, _WIDTH)
    return [title, *(line for e in entries.items() if e[1] for line in _lines(*e))]


def count_parameters(parts: loop.Parts) -> tuple[int, int]:
    """All parameters of the policy, adapters included, and those that are trained.

    A matrix that is kept quantized counts as the numbers that it stands for.
    """
    trained = dotted(parts.state.trainable)
    whole = dataclasses.replace(parts.model.decoder, lora=None, quantization=None)
    base = dotted(whole.abstract_params())
    added = sum(leaf.size for name, leaf in trained.items() if name not in base)
    total = parts.model.config.num_params() + added
    return total, sum(leaf.size for leaf in trained.values())


def estimate_memory(parts: loop.Parts) -> memory.Estimate:
    """What a device holds at the least while it trains.

    Parameters, the optimizer's state and the reference are those of the train state.
    A gradient is kept for each trained parameter, in float32 where micro-batches are
    added up, and of each layer its input.
    """
    state, plan = parts.state, parts.model.plan
    frozen = "reference" if parts.run.lora is None else "base"
    found = {
        "parameters": memory.sum_bytes(state.trainable),
        frozen: memory.sum_bytes(state.frozen),
        "optimizer": memory.sum_bytes(state.opt_state),
    }
    if plan.parted:  # as it is updated, in parts
        layouts = jax.tree.map(lambda leaf: leaf.sharding, state.trainable)
    else:
        axes = select(parts.model.decoder.logical_axes(), state.trainable)
        layouts = plan.optimizer_moments(state.trainable, axes)
    adds_up = parts.run.loop.gradient_accumulation_steps > 1
    gradients = sum(
        memory.shard_size(leaf.shape, layout) * (4 if adds_up else leaf.dtype.itemsize)
        for leaf, layout in zip(
            jax.tree.leaves(state.trainable), jax.tree.leaves(layouts), strict=True
        )
    )
    device = {name: own for name, (own, _) in found.items() if own}
    device |= {"gradients": gradients, "layer inputs": _layer_inputs(parts)}
    if gathered := _count_in_parts(parts):
        width = jax.numpy.dtype(parts.run.precision.compute_dtype).itemsize
        device["gathered weights"] = gathered * width
    return memory.Estimate(device, sum(host for _, host in found.values()))


def _count_in_parts(parts: loop.Parts) -> int:
    """Weights that devices keep in parts; axes that do not divide leave some whole."""
    if not parts.model.plan.parted:
        return 0
    leaves = jax.tree.leaves(parts.state.trainable)
    return sum(x.size for x in leaves if not x.sharding.is_fully_replicated)


def _layer_inputs(parts: loop.Parts) -> int:
    """Bytes of a micro-batch's layer inputs [B T D], which the backward pass reads."""
    run, config, data = parts.run, parts.model.config, parts.train_data
    tokens = run.loop.per_device_train_batch_size * data.row_length
    if shapes := _row_shapes(parts):
        tokens = shapes[-1].tokens
    tokens = tokens * _sides(data) // run.mesh.context
    width = jax.numpy.dtype(run.precision.compute_dtype).itemsize * config.hidden_size
    return tokens * width * config.num_hidden_layers


# --- the entries ------------------------------------------------------------------


def _model(parts: loop.Parts) -> str:
    total, trained = count_parameters(parts)
    share = "all trained"
    if trained != total:
        share = f"{short(trained)} ({trained / total:.2%}) trained"
    if (lora := parts.run.lora) is not None:
        share += f" by LoRA of rank {lora.r}"
        share += f", base in {lora.quantization}" if lora.quantization else ""
    is_new = parts.run.training_type == "from_scratch" or not parts.model.directory
    named = parts.run.model.name_or_path or "the embedded model"
    source = "random weights" if is_new else short_path(named)
    family = parts.model.config.model_type
    return f"{family}, {short(total)} parameters, {share}; {source}"


def _data(parts: loop.Parts) -> str:
    data, named = parts.train_data, parts.run.data.train
    packing = "packed" if data.packed else "not packed"
    if isinstance(data, PreparedDataset):
        stats = data.stats
        unit = _unit(data, stats.rows)
        lost = {
            "bad": stats.bad_rows,
            "dropped": stats.dropped,
            "truncated": stats.truncated,
        }
        told = "".join(f", {n:,} {what}" for what, n in lost.items() if n)
        once = " (shared prompts once)" if data.shares_prompts else ""
        held = f"{stats.rows:,} {unit}, {short(stats.tokens)} tokens{once}{told}"
        packing = f"rows of {data.row_length:,} tokens, {packing},"
        packing += f" {stats.packing_efficiency:.0%} filled"
    else:
        packing = f"rows of {data.row_length:,} tokens, {packing}"
        count = len(data.rows.sources)
        held = f"a stream of {count} source{'s' * (count > 1)}"
    if parts.feed.packs_batches:
        packing = "packed by micro-batch"
    if isinstance(named, str):
        held += f"; {short_path(named) if named else 'data.train is not set'}"
    text = f"{held}; {packing}"
    held_out = [
        f"{rows.stats.rows:,} {_unit(rows, rows.stats.rows)}{name and f' of {name}'}"
        for name, rows in parts.eval_data.items()
    ]
    return f"{text}; {' and '.join(held_out)} to evaluate" if held_out else text


def _row_shapes(parts: loop.Parts) -> tuple[RowShape, ...]:
    """What rows may look like where a micro-batch's examples share them; else none."""
    batches = parts.train_batches
    if not isinstance(batches, BatchIterator) or batches.reader.packing is None:
        return ()
    return batches.reader.packing.shapes


def _batch(parts: loop.Parts) -> str:
    loop_, plan, data = parts.run.loop, parts.model.plan, parts.train_data
    each, times = loop_.per_device_train_batch_size, loop_.gradient_accumulation_steps
    rows = each * plan.batch_shards * times
    text = f"{rows:,} rows a step = {each} a device"
    text += f" x {plan.batch_shards} data-parallel" if plan.batch_shards > 1 else ""
    text += f" x {times} micro-batches" if times > 1 else ""
    most = rows * data.row_length * _sides(data)
    if isinstance(data, PreparedDataset):
        if rows > len(data):
            text += f", of which an epoch has {len(data):,}"
            text += " (set gradient_accumulation_steps lower)" if times > 1 else ""
        rows = min(rows, len(data))
        held = data.stats.tokens / max(data.stats.packed_rows, 1) * rows
        if shapes := _row_shapes(parts):
            sizes = [f"{n} x {length:,}" for n, length, _ in (shapes[0], shapes[-1])]
            kinds = f"{len(shapes)} shapes, {' to '.join(sizes)}"
            rows_of = kinds if shapes[1:] else sizes[0]
            text += f"; about {short(held)} tokens in rows of {rows_of}"
        else:
            text += f"; about {short(held)} tokens, at most {short(most)}"
        return text + _scored(parts)
    return f"{text}; at most {short(most)} tokens"


def _scored(parts: loop.Parts) -> str:
    """Says so where the loss head leaves out what is not trained."""
    batches = parts.train_batches
    if not isinstance(batches, BatchIterator):
        return ""
    packing, scoring = batches.reader.packing, batches.reader.scoring
    if scoring is None and (packing is None or not packing.selects):
        return ""
    return "; the loss head scores trained predictions only"


def _steps(parts: loop.Parts) -> str:
    settings = parts.run.loop
    text = f"{parts.total_steps:,}"
    if isinstance(parts.train_data, PreparedDataset):
        epochs = parts.epochs_done(parts.total_steps)
        s = "" if epochs == 1 else "s"
        text += f", {epochs:.3g} epoch{s} of {parts.steps_per_epoch:,}"
    every = {"log": settings.logging_steps, "save": settings.save_steps}
    if parts.eval_data:
        every["evaluate"] = settings.eval_steps
    cadence = ", ".join(f"{what} {_often(steps)}" for what, steps in every.items())
    return f"{text}; {cadence}"


def _often(steps: int | None) -> str:
    if steps is None:
        return "after each epoch"
    return f"every {steps:,}" if steps else "never"


def _devices(parts: loop.Parts) -> str:
    plan = parts.model.plan
    devices, processes = plan.mesh.devices, jax.process_count()
    text = f"{devices.size} x {devices.flat[0].device_kind}"
    text += f" in {processes} processes" if processes > 1 else ""
    sizes = [f"{axis} {size}" for axis, size in plan.mesh.shape.items() if size > 1]
    text += f"; mesh {' x '.join(sizes) or 'of one'}"
    split = {1: "optimizer state", 2: "optimizer state", 3: "parameters and optimizer"}
    if _count_in_parts(parts):
        text += "; weights and optimizer state kept in parts"
    elif plan.batch_shards > 1 and plan.zero_stage in split:
        text += f"; {split[plan.zero_stage]} split (stage {plan.zero_stage})"
    return text


def _precision(run: RunConfig) -> str:
    text = f"{run.precision.compute_dtype} compute, {run.model.param_dtype} parameters"
    remat, layers = run.precision.remat, run.precision.remat_layers
    text += f"; rematerialization {remat if remat != 'none' else 'off'}"
    if layers is None:
        return text
    return f"{text}, {'all' if layers == -1 else f'the first {layers}'} layers"


def _memory(parts: loop.Parts) -> str:
    device = parts.model.plan.mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return estimate_memory(parts).describe(limit)


def _writes(run: RunConfig, workdir: Any) -> str:
    trackers = [name for name in run.loop.report_to if name != "jsonl"]
    return f"{short_path(workdir)}; {', '.join(('metrics.jsonl', *trackers))}"


def _resumes(parts: loop.Parts, progress: loop.Progress, workdir: Any) -> str:
    if not progress.step:
        return ""
    path = short_path(workdir / "checkpoints" / str(progress.step))
    return f"from step {progress.step:,} of {parts.total_steps:,}; {path}"


def _notes(notes: Iterable[Note]) -> dict[str, str]:
    """Keys without effect and keys that give way, an entry each; and remarks."""
    entries: dict[str, list[str]] = {"no effect": [], "gives way": [], "notes": []}
    for note in notes:
        if note.kind == "remark":
            entries["notes"].append(str(note))
        elif note.kind == "overruled":
            winner = note.reason.partition(" = ")[0]
            entries["gives way"].append(f"{note.key} to {winner}")
        else:
            entries["no effect"].append(note.key)
    return {name: ", ".join(keys) for name, keys in entries.items() if keys}


# --- words and numbers --------------------------------------------------------------


def short(number: float) -> str:
    """`812`, `9.2k`, `1.0M`, `7.6B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def short_path(path: str | os.PathLike[str]) -> str:
    """A path that fits the block: cut in the middle where it is long."""
    text = os.fspath(path)
    if len(text) <= _LONGEST_PATH:
        return text
    head, tail = _LONGEST_PATH // 3, _LONGEST_PATH - _LONGEST_PATH // 3 - 3
    return f"{text[:head]}...{text[-tail:]}"


def _lines(label: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(
        text,
        _WIDTH - _LABEL - 2,
        max_lines=_MOST_LINES,
        placeholder=" ...",
        break_on_hyphens=False,
    )
    labels = [label, *[""] * (len(wrapped) - 1)]
    return [
        f"  {name:<{_LABEL}}{part}" for name, part in zip(labels, wrapped, strict=True)
    ]


def _unit(data: PreparedDataset, count: int) -> str:
    word = "pair" if data.objective == "preference" else "row"
    return word if count == 1 else f"{word}s"


def _sides(data: Prepared) -> int:
    """Sequences of a batch for each row: two for a pair that shares no prompt."""
    if isinstance(data, PreparedDataset):
        objective, shares = data.objective, data.shares_prompts
    else:
        objective, shares = data.options.objective, data.options.share_prompts
    return 2 if objective == "preference" and not shares else 1


def _describe_rows(data: Prepared, named: Any) -> dict[str, Any]:
    """What provenance keeps of rows: where they are from, how many, a fingerprint.

    Args:
        named: the path that the configuration names, "" where it names none: the rows
            are then those of the package, or were given in Python.
    """
    if isinstance(data, PreparedDataset):
        return {
            "path": named or None,
            "rows": data.stats.rows,
            "tokens": data.stats.tokens,
            "fingerprint": data.fingerprint,
        }
    sources = [source.name for source in data.rows.sources]
    return {"sources": sources, "fingerprint": data.fingerprint}
