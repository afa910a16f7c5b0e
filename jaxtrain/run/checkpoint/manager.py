"""The manager of a run's checkpoints: save, restore, retain, set aside."""

import contextlib
import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxtrain import __version__
from jaxtrain.record.safe_text import mask_secrets
from jaxtrain.run import ledger as ledgers
from jaxtrain.run import saved_record
from jaxtrain.run.buffer import beside
from jaxtrain.run.checkpoint import checksums, leaves, s3_arrays, storage
from jaxtrain.run.checkpoint.agreement import all_agree
from jaxtrain.run.checkpoint.place import is_on_s3, place_of
from jaxtrain.run.checkpoint.retention import NewestAndBest, PreserveAll
from jaxtrain.run.checkpoint.values import as_exact_json, as_json, gather
from jaxtrain.run.durable import naming
from jaxtrain.run.saved_record import DamagedCheckpointError
from jaxtrain.storage.address import AnyPath, as_path

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Restored:
    """The content of one checkpoint.

    `data_states` has an entry for each process of the run that saved it. `clock` holds
    the times that process 0 passed to `save`.
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

        A different number of processes may have saved it, if the position was the
        same for all of them.

        Raises:
            ValueError: the positions differ, so that no entry says which rows this
                process has seen.
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
        directory: AnyPath,
        *,
        save_total_limit: int | None = None,
        best_metric: str | None = None,
        greater_is_better: bool = False,
        read_only: bool = False,
        ledger: Any = None,
        before_commit: Callable[[], None] | None = None,
    ) -> None:
        """Open or create `directory`; remains of interrupted saves are removed.

        Args:
            save_total_limit: keep so many of the newest checkpoints, and the best one
                beside them; None keeps all.
            best_metric: the key of `metrics` that ranks checkpoints.
            greater_is_better: whether the best has the greatest metric or the least.
            read_only: change nothing in `directory`, where another process may be
                saving at this moment.
            ledger: a file that tells of the newest saved step (`run.ledger`).
            before_commit: in a bucket, called in the background when a step is written
                and before it counts: for what must not be missing beside it.

        Raises:
            ValueError: `save_total_limit` is below 1.
        """
        if save_total_limit is not None and save_total_limit < 1:
            raise ValueError(
                f"save_total_limit={save_total_limit} would keep no checkpoint: "
                "set 1 or more, or leave it unset to keep all"
            )
        self.directory = as_path(directory)
        self._place = place_of(self.directory, before_commit)
        self._policy = NewestAndBest(
            save_total_limit, best_metric, greater_is_better, self._metrics_of
        )
        self._known_metrics: dict[int, dict[str, float]] = {}
        self._read_only, self._ledger, self._has_saved = read_only, ledger, False
        self._empty_trash()
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": (
                    s3_arrays.PiecesHandler()
                    if is_on_s3(self.directory)
                    else storage.make_array_handler()
                ),
                "record": ocp.JsonCheckpointHandler(),
                "checksums": storage.ChecksumHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._policy
                if self._place.trash
                else PreserveAll(),
                cleanup_tmp_directories=not read_only and bool(self._place.trash),
                read_only=read_only,
                create=not read_only,
                # By default Orbax deletes file by file, in place: killed in the
                # middle, that leaves a broken checkpoint under a valid name.
                todelete_subdir=self._place.trash,
                temporary_path_class=self._place.temporary_path_class,
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
            config: JSON values, which `restore` gives back, secrets masked.
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
        arrays = leaves.named_leaves(state)
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        record = {
            "format": saved_record.FORMAT,
            "jaxtrain": __version__,
            "checksums": jax.process_count(),  # so many files of them
            "step": step,
            "metrics": numbers,
            "layout": {name: leaves.describe(leaf) for name, leaf in arrays.items()},
            "config": as_json("config", mask_secrets(config or {})),
            "data_states": gather(as_exact_json("data_state", data_state)),
            "clock": as_exact_json("clock", dict(clock or {})),
        }
        raw = {name: leaves.to_raw(leaf) for name, leaf in arrays.items()}
        values = {"record": saved_record.digest(record)}
        self._known_metrics[step] = numbers
        if jax.process_index() == 0:
            ledgers.flush_records(self._ledger)
        self._has_saved = True
        pieces = checksums.on_host(raw)
        is_own = is_on_s3(self.directory)
        items = ocp.args.Composite(
            state=s3_arrays.to_write(raw, pieces) if is_own else storage.to_write(raw),
            record=ocp.args.JsonSave(record),
            checksums=storage.SaveChecksums(pieces, values),
        )
        with naming(self.directory):
            self._manager.save(step, args=items, force=True)
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
            DamagedCheckpointError: what is read is not what was saved.
            CheckpointVersionError: another version of jaxtrain must read it.
        """
        self.wait()
        step = self._existing(step)
        at = self.directory / str(step)
        with all_agree(at):
            record = saved_record.read_record(at)
            saved = saved_record.read_checksums(at, record)
            metrics = saved_record.read_metrics(at, record)
        layout = record["layout"]
        wanted = leaves.named_leaves(abstract_state, abstract=True)
        leaves.check_layout(at, layout, wanted, partial=partial)
        targets = {name: leaves.raw_struct(leaf) for name, leaf in wanted.items()}
        with all_agree(at):
            if is_on_s3(at):
                read = s3_arrays.read(at / "state", targets)
            else:
                read = storage.read_arrays(at / "state", targets, partial=partial)
        with all_agree(at):
            _verify(at, {name: read[name] for name in wanted}, saved)
        found = [leaves.from_raw(read[name], layout[name]) for name in wanted]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), found)
        positions, clock = tuple(record["data_states"]), record.get("clock", {})
        return Restored(step, state, record["config"], metrics, positions, clock)

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics saved with `step`; empty if there were none.

        Raises:
            DamagedCheckpointError: they are not what was saved.
        """
        at = self.directory / str(step)
        return saved_record.read_metrics(at, saved_record.read_record(at))

    def all_steps(self) -> list[int]:
        """Saved steps, ascending; the last may still be on its way to the disk."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """The newest saved step, or None."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best `best_metric`, the earliest on ties; None if none."""
        self.wait()
        return self._policy.best(self.all_steps())

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints later than `step`, to train on from an older one."""
        self.wait()
        self._delete([saved for saved in self.all_steps() if saved > step])
        self._empty_trash()

    def set_aside(self, step: int) -> pathlib.Path:
        """Rename a damaged checkpoint out of the way; nothing of it is deleted.

        Returns:
            Its folder's new path.
        """
        self.wait()
        kept = f"damaged-{step}"
        for number in itertools.count(2):
            if not self._place.has(kept):
                break
            kept = f"damaged-{step}-{number}"
        gather(None)  # every process has looked
        if jax.process_index() == 0:
            self._place.rename(str(step), kept)
        gather(None)
        self._manager.reload()
        self._known_metrics.pop(step, None)
        return self.directory / kept

    def strays(self) -> list[int]:
        """Steps whose name in the directory is no folder: the checkpoint is gone."""
        known = set(self.all_steps())
        names = self._place.stray_names()
        steps = {int(name) for name in names if name.isdecimal()}
        return sorted(steps - known)

    def beside(self, name: str) -> pathlib.Path:
        """A folder beside this one, on this machine even if this one is in a bucket."""
        return beside(self.directory, name)

    def wait(self) -> None:
        """Block until every save is on disk; raises the error of one that failed."""
        with naming(self.directory):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._empty_trash()
        if self._has_saved and not self._place.trash:
            self._delete(self._policy.surplus(self.all_steps()))
        steps = self.all_steps()
        is_writer = not self._read_only and jax.process_index() == 0
        if self._ledger is not None and steps and is_writer:
            ledgers.note_saved(self._ledger, steps[-1])

    def close(self) -> None:
        """Wait for every save and release Orbax's threads."""
        self.wait()
        self._manager.close()
        self._place.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _delete(self, steps: list[int]) -> None:
        for step in steps:
            if self._place.trash:
                self._manager.delete(step)
            elif jax.process_index() == 0:
                self._place.remove(step)
            self._known_metrics.pop(step, None)
        if steps and not self._place.trash:
            gather(None)  # for all processes they count no more
            self._manager.reload()

    def _existing(self, step: int | None) -> int:
        steps = self.all_steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        if step not in (None, *steps):
            raise FileNotFoundError(
                f"no checkpoint of step {step} in {self.directory}; there are {steps}"
            )
        return steps[-1] if step is None else step

    def _metrics_of(self, step: int) -> dict[str, float]:
        """The metrics of a step, which may be on its way to the disk."""
        if step not in self._known_metrics:
            try:
                self._known_metrics[step] = self.metrics(step)
            except ValueError as error:
                logger.warning("step %d cannot be the best: %s", step, error)
                self._known_metrics[step] = {}
        return self._known_metrics[step]

    def _empty_trash(self) -> None:
        """Delete what Orbax moved aside, in the background; with no save running."""
        if self._read_only or jax.process_index() != 0:
            return
        self._place.empty_trash()


def _verify(
    at: pathlib.Path,
    found: Mapping[str, jax.Array],
    saved: saved_record.Checksums | None,
) -> None:
    """Compare restored arrays with the checksums of those that were saved.

    Raises:
        DamagedCheckpointError: they differ.
    """
    if saved is None:
        logger.info(
            "%s has no checksums: an earlier version of jaxtrain saved it, and whether"
            " it is whole is not verified",
            at,
        )
        return
    damage = checksums.find_damage(found, saved.blocks)
    if damage is not None:
        raise DamagedCheckpointError(at, damage)
