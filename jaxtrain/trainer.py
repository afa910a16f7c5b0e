"""TrainingOrchestrator: the documented Python interface to one run.

It keeps what belongs to the run and calls what does the work; `jaxtrain.build` has the
order of things. `python -m jaxtrain.main` comes through here too.
"""

import copy
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxtrain import build
from jaxtrain.config import (
    ConfigManager,
    RunConfig,
    copy_config,
    resolve,
    to_config_dict,
)
from jaxtrain.data import loading, sources
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.loading import AnyRows as Rows
from jaxtrain.data.loading import prepare_evaluation_rows
from jaxtrain.data.stream.batches import StreamDataset
from jaxtrain.models import load
from jaxtrain.record import writers
from jaxtrain.run import accelerator as accelerate
from jaxtrain.run import (
    compilation_cache,
    distributed,
    lock,
    own_parts,
    preflight,
    trial,
)
from jaxtrain.run.disk_watch import watch_disks
from jaxtrain.run.feed import Prepared
from jaxtrain.run.out_of_memory import explained
from jaxtrain.run.workdir import as_home, open_workdir
from jaxtrain.types import Batch, Objective, TokenLogProbs, WeightedSum

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]
EvalRows = Rows | PreparedDataset | Mapping[str, Any]

# Methods by which others' trainers are changed.
_OTHERS = ("custom_training_step", "training_step", "compute_loss")
_NEVER_RUN = (
    " would never run: a step is compiled as a whole here, backward pass and update"
    " included. Override compute_auxiliary_loss(outputs, batch) and set"
    " training.use_auxiliary_loss = True to add a loss, make_objective() to replace it,"
    " prepare_rows(rows) to preprocess the data"
)


class TrainingOrchestrator:
    """Prepare, train, evaluate and save one run.

    To change the loss, subclass and override `make_objective`; to add to it, override
    `compute_auxiliary_loss` and set `training.use_auxiliary_loss: true`; to preprocess
    rows, override `prepare_rows`.
    """

    auxiliary_loss_weight = 0.1

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a PyTorch training step: it would never be called."""
        super().__init_subclass__(**options)
        if found := [name for name in _OTHERS if name in vars(cls)]:
            raise TypeError(f"{cls.__name__}.{found[0]}{_NEVER_RUN}")

    def __init__(
        self, config: Any, accelerator: Any = None, *, workdir: Path | None = None
    ) -> None:
        """Take a `ConfigManager`, a `ConfigDict` or a `RunConfig`; start nothing.

        `accelerator`: see `run.accelerator.take_over`. `workdir`: folder or address for
        checkpoints, logs and the model; by default `out/<run_name or training_type>`.

        Raises:
            ValueError: `workdir` cannot be written to.
        """
        if workdir is not None:
            preflight.check_workdir(workdir)
        distributed.allow_pinned_memory()
        self.config = config
        self.accelerator = accelerator
        self.run: RunConfig | None = None
        self.model: load.LoadedModel | None = None
        self._workdir = workdir

    def prepare_training(
        self, training_type: str | None = None, model_name: str | None = None
    ) -> bool:
        """`prepare`; where that fails, False and the reason in the log."""
        try:
            self.prepare(training_type, model_name)
        except (ValueError, OSError) as error:
            logger.error("cannot prepare training: %s", error)
            return False
        return True

    def prepare(
        self,
        training_type: str | None = None,
        model_name: str | None = None,
        *,
        model: load.LoadedModel | None = None,
    ) -> None:
        """Resolve the configuration and load the model, or take a loaded one over.

        `training_type` and `model_name` override the configuration's.

        Raises:
            ValueError: the configuration (all its problems at once) or the model.
        """
        config = _to_config_dict(self.config)
        _override(config, training_type, model_name, self.accelerator)
        if type(self).make_objective is not TrainingOrchestrator.make_objective:
            _pad_rows(config)
        count = distributed.count_devices()
        self.run = resolve(config, device_count=count)
        self.run = run = preflight.as_begun(self.run, config, self.workdir, count)
        compilation_cache.set_up(run.compilation_cache)
        with watch_disks(run, self.workdir):
            # These raise on what cannot work, before anything is loaded.
            writers.check_installed(run.loop.report_to)
            if jax.process_index() == 0:
                lock.refuse_if_held(self.workdir)
            preflight.check(run, self.workdir)
            sources.check_sources(run)
            own_parts.check_own_parts(run, loads_model=model is None)
            trial.check_objective(run, _loss_of(self).objective)
            for line in run.explain():
                logger.debug(line)  # the block at the start has the essence
            self.model = load.adopt(model, run) if model else load.load_model(run)

    @property
    def workdir(self) -> Any:
        """Where this run keeps everything it writes: a `pathlib` or an `epath` path."""
        run = self._prepared_run()
        name = run.loop.run_name or run.training_type
        return as_home(self._workdir or pathlib.Path("out") / name)

    def load_training_data(self, path: Path | None = None) -> Rows:
        """Raw rows of `path`, of `data.train`, or the embedded ones."""
        return loading.load_training_rows(self._prepared_run(), path)

    def load_evaluation_data(self, path: Path | None = None) -> EvalRows | None:
        """The same for `data.eval`; None if training data are given and these not."""
        return loading.load_evaluation_rows(self._prepared_run(), path)

    def prepare_rows(self, rows: Rows | Prepared) -> Prepared:
        """Check and tokenize raw rows for this run's objective; see `data.loading`.

        Raises:
            ValueError: bad rows, each by number and reason (`data.on_bad_row: error`).
        """
        if isinstance(rows, PreparedDataset | StreamDataset):
            return rows
        run, model = self._prepared_run(), self.model
        assert model is not None  # loaded as `run` was prepared
        return loading.prepare_rows(run, rows, model.tokenizer, model.config.vocab_size)

    def prepare_data(
        self,
        train_dataset: Rows | Prepared | None = None,
        eval_dataset: EvalRows | None = None,
    ) -> tuple[Prepared, dict[str, PreparedDataset]]:
        """Load, check and tokenize the rows to train on and to evaluate on, by name."""
        if train_dataset is None:
            train_dataset = self.load_training_data()
            if eval_dataset is None:
                eval_dataset = self.load_evaluation_data()
        if eval_dataset is None or eval_dataset == {}:
            sources.check_evaluation_rows(self._prepared_run())
        prepared = self._prepare_rows(train_dataset)
        return prepared, prepare_evaluation_rows(eval_dataset, self._prepare_rows)

    def _prepare_rows(self, rows: Rows | Prepared) -> Any:
        """`prepare_rows`, which a subclass may have overridden without its return."""
        prepared = self.prepare_rows(rows)
        if not isinstance(prepared, PreparedDataset | StreamDataset):
            raise ValueError(
                f"{type(self).__name__}.prepare_rows returned a"
                f" {type(prepared).__name__}: change the rows, and"
                " return super().prepare_rows(rows)"
            )
        return prepared

    def make_objective(self) -> Objective:
        """The loss and its metrics, a pure function of log-probs. Override freely."""
        return build.make_objective(self._prepared_run())

    def compute_auxiliary_loss(
        self, outputs: TokenLogProbs, batch: Batch
    ) -> WeightedSum | jax.Array:
        """Override to add a loss, weighted by `auxiliary_loss_weight`. It is traced.

        `outputs` are the policy's log-probs of `batch` (both sides of preference pairs,
        in turn); gradients flow through `logps`. Return a scalar, or a `WeightedSum` of
        which the mean is added.
        """
        raise ValueError("compute_auxiliary_loss is not overridden")

    def train(
        self,
        train_dataset: Rows | Prepared | None = None,
        eval_dataset: EvalRows | None = None,
    ) -> dict[str, Any]:
        """Run to the end, resuming where an earlier run in this workdir stopped.

        The data sets are rows, prepared or raw; those of the configuration if None.
        Several evaluation sets are given by name, each with metrics of its own.

        Returns:
            `final_loss`, `global_step`, the last metrics by their names,
            `model_path`, `best_model_path` and `best_metric`.
        """
        if self.run is None:
            self.prepare()
        run, model = self._prepared_run(), self.model
        if model is None or model.weights is None:
            raise ValueError("this model is trained already: call prepare() again")
        with watch_disks(run, self.workdir):
            rows = self.prepare_data(train_dataset, eval_dataset)
            if run.loop.eval_steps and not rows[1]:
                told = "training.eval_steps = %s does nothing: there are no evaluation"
                told += " rows; set data.eval to evaluate"
                logger.info(told, run.loop.eval_steps)
            run = trial.choose_best_metric(run, _loss_of(self).objective, rows[1])
            with open_workdir(self.workdir) as work, explained(run, work.folder):
                # No name for the parts here: their first state may be freed on the way.
                return build.run_to_end(
                    build.build(run, model, rows, _loss_of(self), work.folder), work
                )

    def _prepared_run(self) -> RunConfig:
        if self.run is None:
            raise ValueError("nothing is prepared yet: call prepare_training() first")
        return self.run


def _loss_of(orchestrator: TrainingOrchestrator) -> build.Loss:
    """Its objective, and its auxiliary loss if the run uses one."""
    run, own = orchestrator.run, type(orchestrator).compute_auxiliary_loss
    assert run is not None  # `prepare` has set it
    auxiliary, has_own = None, own is not TrainingOrchestrator.compute_auxiliary_loss
    if has_own and not run.loop.use_auxiliary_loss:
        logger.warning(
            "%s.compute_auxiliary_loss does nothing: training.use_auxiliary_loss is"
            " False; set it True",
            type(orchestrator).__name__,
        )
    if run.loop.use_auxiliary_loss:
        if not has_own:
            raise ValueError(
                "training.use_auxiliary_loss = True: there is none to use; override"
                " compute_auxiliary_loss in a subclass of TrainingOrchestrator"
            )
        weight = orchestrator.auxiliary_loss_weight
        auxiliary = (orchestrator.compute_auxiliary_loss, weight)
    return build.Loss(orchestrator.make_objective(), auxiliary)


def _override(
    config: ConfigDict, training_type: str | None, model: str | None, accelerator: Any
) -> None:
    """Set on `config` what was given besides it."""
    with config.unlocked():
        if training_type is not None:
            config.training.training_type = training_type
        if model is not None:
            config.model.name_or_path = model
        if accelerator is not None:
            accelerate.take_over(accelerator, config)


def _pad_rows(config: ConfigDict) -> None:
    """Unless told otherwise, for a loss of one's own may take a row for an example."""
    data = config.get("data", ConfigDict())
    is_new = config.training.training_type == "from_scratch"
    if data.get("packing") is None and not is_new:
        with config.unlocked():
            config.data = ConfigDict({**data, "packing": False})


def _to_config_dict(config: Any) -> ConfigDict:
    """A copy of what the orchestrator was given, as a ConfigDict."""
    if isinstance(config, ConfigManager):
        return copy_config(config.config_dict)
    if isinstance(config, RunConfig):
        return to_config_dict(config)
    return (
        copy_config(config) if isinstance(config, ConfigDict) else copy.deepcopy(config)
    )
