"""Checkpoints: train state, data position, config and metrics, through Orbax.

A step's directory appears under its final name by one atomic rename, after all of it
is written, and leaves by one atomic rename before any of it is deleted. So a process
killed at any moment leaves only whole checkpoints. On disk: arrays as Orbax's Zarr,
everything else as JSON; never pickle.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import checkpoint_managers as managers

_T = TypeVar("_T")
_TRASH = ".trash"
_FORMAT = 1
_SHOWN_DIFFERENCES = 4


class CheckpointMismatchError(ValueError):
    """The checkpoint's leaves are not those of the state it should fill."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What one checkpoint held. `data_states` has an entry for each process of then.

    `clock` is what `save` was given by process 0.
    """

    step: int
    state: Any
    config: dict[str, Any]
    metrics: dict[str, float]
    data_states: tuple[dict[str, Any] | None, ...]
    clock: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def data_state(self) -> dict[str, Any] | None:
        """This process's data-iterator state.

        Another number of processes may have saved it, where the position is one and
        the same for all of them.

        Raises:
            ValueError: it is not, so that no entry says which rows this process has
                seen.
        """
        saved, present = len(self.data_states), jax.process_count()
        if saved == present:
            return self.data_states[jax.process_index()]
        first, *others = self.data_states
        if any(state != first for state in others):
            raise ValueError(
                f"the checkpoint of step {self.step} holds the data position of "
                f"{saved} processes, but {present} run now, and the positions differ: "
                f"start {saved} processes, or use the restored weights and begin the "
                "data anew"
            )
        return first


class CheckpointManager(contextlib.AbstractContextManager["CheckpointManager"]):
    """Save asynchronously, restore onto any shardings, keep the newest and the best.

    Every process of a run makes one, on the same directory, and calls it alike.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        save_total_limit: int | None = None,
        best_metric: str | None = None,
        greater_is_better: bool = False,
        read_only: bool = False,
    ) -> None:
        """Open or create `directory`; remains of interrupted saves are removed.

        Args:
            save_total_limit: keep so many of the newest checkpoints, and the best one
                beside them; None keeps all.
            best_metric: the key of `metrics` that ranks checkpoints.
            greater_is_better: whether the best has the greatest metric or the least.
            read_only: change nothing in `directory`, where another process may be
                saving at this moment.

        Raises:
            ValueError: `save_total_limit` is below 1.
        """
        if save_total_limit is not None and save_total_limit < 1:
            raise ValueError(
                f"save_total_limit={save_total_limit} would keep no checkpoint: "
                "set 1 or more, or leave it unset to keep all"
            )
        self.directory = pathlib.Path(directory).absolute()
        self._policy = _NewestAndBest(save_total_limit, best_metric, greater_is_better)
        self._deleter = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-delete")
        self._read_only = read_only
        self._empty_trash()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy,
                # Makes Orbax store the metrics; `preservation_policy` decides.
                best_fn=lambda metrics: metrics.get(best_metric, math.nan),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=not read_only,
                # By default Orbax deletes file by file, in place: killed in the
                # middle, that leaves a broken checkpoint under a valid name.
                todelete_subdir=_TRASH,
            ),
        )

    def save(
        self,
        step: int,
        state: Any,
        *,
        data_state: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        clock: Mapping[str, float] | None = None,
    ) -> bool:
        """Start to save; returns once `state` is copied, so it may be donated then.

        Writing goes on in the background; an error in it is raised by the next `save`
        or `wait`. An earlier save that is still running is awaited first.

        Args:
            step: the number of updates behind `state`.
            state: any tree of `jax.Array`s, PRNG keys included.
            data_state: JSON values; each process gives its own.
            config: JSON values, which `restore` gives back.
            metrics: numbers; `best_metric` among them makes the checkpoint eligible.
            clock: times, which may differ between processes: those of process 0 count.

        Returns:
            False, with nothing written, if `step` is saved already.

        Raises:
            ValueError: a leaf is no `jax.Array`, a value has no exact JSON form, or a
                later step is saved already.
        """
        self.wait()
        steps = self.all_steps()
        if step in steps:
            return False
        if steps and step < steps[-1]:
            raise ValueError(
                f"cannot save step {step} in {self.directory}: it holds step "
                f"{steps[-1]} already. Call delete_after({step}) to continue from an "
                "older checkpoint, or use a new directory"
            )
        arrays = _named_leaves(state)
        record = {
            "format": _FORMAT,
            "step": step,
            "layout": {name: _describe(leaf) for name, leaf in arrays.items()},
            "config": _as_json("config", config or {}),
            "data_states": _gather(_as_exact_json("data_state", data_state)),
            "clock": _as_exact_json("clock", dict(clock or {})),
        }
        raw = {name: _to_raw(leaf) for name, leaf in arrays.items()}
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(raw), record=ocp.args.JsonSave(record)
            ),
            metrics=numbers,
            force=True,
        )
        return True

    def restore(
        self, abstract_state: Any, step: int | None = None, *, partial: bool = False
    ) -> Restored:
        """Read a checkpoint into the structure and the shardings of `abstract_state`.

        Args:
            abstract_state: a tree of `jax.ShapeDtypeStruct`s with shardings, or of
                arrays to take these from; a leaf with no sharding goes to the first
                device. The mesh may differ from the one that saved.
            step: the checkpoint's step; the latest if None.
            partial: leave out what `abstract_state` lacks, such as the optimizer's
                state, instead of refusing.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            CheckpointMismatchError: leaves differ; names the first with their shapes.
        """
        self.wait()
        step = self._existing(step)
        record = self._read_record(step)
        layout = record["layout"]
        wanted = _named_leaves(abstract_state, abstract=True)
        self._check_layout(step, layout, wanted, partial=partial)
        targets = {name: _raw_struct(leaf) for name, leaf in wanted.items()}
        to_read = ocp.args.PyTreeRestore(
            item=targets,
            restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
            partial_restore=partial,
        )
        read = self._manager.restore(step, args=ocp.args.Composite(state=to_read)).state
        leaves = [_from_raw(read[name], layout[name]) for name in wanted]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        positions, clock = tuple(record["data_states"]), record.get("clock", {})
        config, metrics = record["config"], self.metrics(step)
        return Restored(step, state, config, metrics, positions, clock)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics saved with `step`; empty if there were none."""
        return dict(self._manager.metrics(step) or {})

    def all_steps(self) -> list[int]:
        """Saved steps, ascending; the last may still be on its way to the disk."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest saved step, or None."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best `best_metric`, the earliest on ties; None if none."""
        self.wait()
        return self._policy.best([(s, self.metrics(s)) for s in self.all_steps()])

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints later than `step`, to train on from an older one."""
        self.wait()
        for later in [saved for saved in self.all_steps() if saved > step]:
            self._manager.delete(later)
        self._empty_trash()

    def wait(self) -> None:
        """Block until every save is on disk; raises the error of one that failed."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._empty_trash()

    def close(self) -> None:
        """Wait for every save and release Orbax's threads."""
        self.wait()
        self._manager.close()
        self._deleter.shutdown()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _existing(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        if step not in (None, *steps):
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self.directory}; there are {steps}"
            )
        return steps[-1] if step is None else step

    def _read_record(self, step: int) -> dict[str, Any]:
        record = self._manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        ).record
        if record["format"] != _FORMAT:
            raise ValueError(
                f"{self.directory / str(step)} has checkpoint format "
                f"{record['format']}, this version reads {_FORMAT}: restore it with "
                "the version of jaxtrain that saved it"
            )
        return record

    def _check_layout(
        self,
        step: int,
        saved: Mapping[str, Mapping[str, Any]],
        wanted: Mapping[str, Any],
        *,
        partial: bool,
    ) -> None:
        # A key's implementation is free to differ only if its dtype does not.
        then = {name: _show(description) for name, description in saved.items()}
        now = {name: _show(_describe(leaf)) for name, leaf in wanted.items()}
        lines = [
            f"{name}: {then[name]} in the checkpoint, the model has {shown}"
            if name in then
            else f"{name}: not in the checkpoint, the model has {shown}"
            for name, shown in now.items()
            if then.get(name) != shown
        ]
        if not partial:
            lines += [
                f"{name}: {shown} in the checkpoint, not in the model"
                for name, shown in then.items()
                if name not in now
            ]
        if lines:
            more = len(lines) - _SHOWN_DIFFERENCES
            raise CheckpointMismatchError(
                f"{self.directory / str(step)} does not fit the model; "
                f"{len(lines)} leaves differ: {'; '.join(lines[:_SHOWN_DIFFERENCES])}"
                + (f"; and {more} more" if more > 0 else "")
                + ". Use the model and optimizer that saved it, or another workdir"
            )

    def _empty_trash(self) -> None:
        """Delete in the background what Orbax moved aside; call with no save running.

        What an interrupted process left goes too.
        """
        if self._read_only or jax.process_index() != 0:
            return
        trash = self.directory / _TRASH
        if trash.exists():
            # Orbax may fill a new trash while this one is being deleted.
            trash.rename(trash.with_name(f"{_TRASH}-{time.time_ns()}"))
        for remains in self.directory.glob(f"{_TRASH}-*"):
            self._deleter.submit(shutil.rmtree, remains, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _NewestAndBest(managers.PreservationPolicy):
    """Retention: the newest `save_total_limit` checkpoints, and the best."""

    save_total_limit: int | None
    best_metric: str | None
    greater_is_better: bool

    def should_preserve(
        self, checkpoints: Sequence[managers.PolicyCheckpointInfo], **_: Any
    ) -> Sequence[bool]:
        """Whether to keep each of `checkpoints`, which ascend by step."""
        newest = checkpoints[-(self.save_total_limit or 0) :]  # no limit: all of them
        kept = {info.step for info in newest}
        kept.add(self.best([(info.step, info.metrics or {}) for info in checkpoints]))
        return [info.step in kept for info in checkpoints]

    def best(
        self, checkpoints: Sequence[tuple[int, Mapping[str, float]]]
    ) -> int | None:
        """The step with the best metric, the earliest on ties; None if none has it."""
        if self.best_metric is None:
            return None
        sign = 1 if self.greater_is_better else -1
        scores = {step: m.get(self.best_metric, math.nan) for step, m in checkpoints}
        # A diverged evaluation (NaN, infinite) is never the best.
        ranked = [(sign * x, -step) for step, x in scores.items() if math.isfinite(x)]
        return -max(ranked)[1] if ranked else None


def _named_leaves(tree: Any, *, abstract: bool = False) -> dict[str, Any]:
    """Leaves by dotted path, in tree order.

    A flat dict needs no knowledge of optax's or our own node types to be read back.
    """
    kinds = (jax.Array, jax.ShapeDtypeStruct) if abstract else (jax.Array,)
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        if not isinstance(leaf, kinds):
            raise ValueError(
                f"{name} is a {type(leaf).__name__}; a state holds jax.Arrays only: "
                "convert it with jnp.asarray"
            )
        if name in named:
            raise ValueError(f"two leaves of the state are named {name}: rename one")
        named[name] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: Any) -> dict[str, Any]:
    description = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if _is_key(leaf) and isinstance(leaf, jax.Array):
        description["key_impl"] = str(jax.random.key_impl(leaf))
    return description


def _show(description: Mapping[str, Any]) -> str:
    return f"{description['dtype']}{description['shape']}"


def _to_raw(leaf: jax.Array) -> jax.Array:
    """What Orbax may hold while it writes: key data for keys, copies of host arrays.

    Orbax copies from device to host before `save` returns, but of an array in host
    memory (offloading) it takes a view, and jax refuses to donate what is viewed.
    """
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    if leaf.sharding.memory_kind not in ("pinned_host", "unpinned_host"):
        return leaf
    copies = [
        jax.device_put(shard.data, shard.data.sharding, may_alias=False)
        for shard in leaf.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, copies)


def _from_raw(array: jax.Array, description: Mapping[str, Any]) -> jax.Array:
    if "key_impl" not in description:
        return array
    return jax.random.wrap_key_data(array, impl=description["key_impl"])


def _raw_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding under which a leaf is stored."""
    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
    struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if _is_key(leaf):
        struct = jax.eval_shape(jax.random.key_data, struct)
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)


def _as_json(name: str, value: _T) -> _T:
    """`value` as JSON gives it back (tuples become lists)."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} has no JSON form ({error}): use dicts, lists, strings, numbers, "
            "booleans and None"
        ) from error


def _as_exact_json(name: str, value: _T) -> _T:
    """`value`, refused if JSON would give back something else, such as a list."""
    if _as_json(name, value) != value:
        raise ValueError(
            f"{name} changes when it is written as JSON (tuples become lists, integer "
            "keys strings): use lists and string keys"
        )
    return value


def _gather(value: Any) -> list[Any]:
    """The JSON value of every process, in process order."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value).encode()
    longest = int(multihost_utils.process_allgather(np.array(len(text))).max())
    padded = np.frombuffer(text.ljust(longest), np.uint8)  # JSON ends in no space
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row.tobytes()) for row in rows]
