"""TrainingOrchestrator: the life of one run. It calls what does the work; no maths.

    prepare -> load data -> build state and steps -> restore -> loop -> export

`python -m jaxtrain.main` and the Python interface both come through here.
"""

import contextlib
import copy
import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import datasets
import jax
import optax
from ml_collections import ConfigDict

from jaxtrain import model_manager, objectives, sharding, step
from jaxtrain.checkpoint import CheckpointManager
from jaxtrain.config import ConfigManager, RunConfig, resolve, to_config_dict
from jaxtrain.data import loading
from jaxtrain.data.batches.dataset import PreparedDataset
from jaxtrain.data.batches.mixture import Mixture, parse_mixture
from jaxtrain.data.batches.pipeline import (
    BatchIterator,
    epochs_done,
    make_eval_iterator,
    make_train_iterator,
    steps_per_epoch,
)
from jaxtrain.data.stream.batches import StreamDataset, StreamIterator, StreamRows
from jaxtrain.data.stream.source import HubSource
from jaxtrain.evaluation import samples
from jaxtrain.evaluation.text_metrics import make_text_metric
from jaxtrain.loop import Loop
from jaxtrain.optimizers import offload, optim, schedules
from jaxtrain.passes import difficulty, reference
from jaxtrain.record import diagnostics, writers
from jaxtrain.record.throughput import ThroughputMeter, peak_flops
from jaxtrain.run import distributed, export
from jaxtrain.tree import overlay
from jaxtrain.types import (
    Batch,
    LogProbsFn,
    Metrics,
    Objective,
    TokenLogProbs,
    TrainState,
    WeightedSum,
)

logger = logging.getLogger(__name__)

Rows: TypeAlias = (
    datasets.Dataset
    | datasets.IterableDataset
    | Sequence[Mapping[str, Any]]
    | Mixture
    | StreamRows
)
Prepared: TypeAlias = PreparedDataset | StreamDataset

# Keys of `training.dpo` that act on the data or on the reference model.
_NOT_OF_THE_LOSS = (
    "max_length", "max_prompt_length", "sync_ref_model", "ref_model_mixup_alpha",
    "ref_model_sync_steps",
)  # fmt: skip


class TrainingOrchestrator:
    """Prepare, train, evaluate and save one run.

    To change the loss, subclass and override `make_objective`; to add to it, override
    `compute_auxiliary_loss` and set `training.use_auxiliary_loss: true`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse a PyTorch training step: it would never be called."""
        super().__init_subclass__(**options)
        if "custom_training_step" in vars(cls):
            raise TypeError(
                f"{cls.__name__}.custom_training_step would never run: a step is"
                " compiled as a whole here, backward pass and update included. Override"
                " compute_auxiliary_loss(outputs, batch) and set"
                " training.use_auxiliary_loss = True to add a loss, make_objective() to"
                " replace it, prepare_rows(rows) to preprocess the data"
            )

    def __init__(
        self,
        config: Any,
        accelerator: Any = None,
        *,
        workdir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Take a `ConfigManager`, a `ConfigDict` or a `RunConfig`; start nothing.

        Args:
            accelerator: an `accelerate.Accelerator`: its gradient accumulation, its
                precision and its trackers are taken over; the devices are those of
                jax's mesh.
            workdir: folder for checkpoints, logs and the model; by default
                `out/<run_name, or the training type>`.

        Raises:
            ValueError: `workdir` is the address of a bucket.
        """
        if workdir is not None and "://" in os.fspath(workdir):
            raise ValueError(
                f"workdir = {os.fspath(workdir)!r} is an address, not a folder: mount"
                " the bucket on every host (Cloud Storage FUSE, as launch/tpu_pod.sh"
                " does) and give the folder where it is mounted"
            )
        distributed.allow_pinned_memory()
        self.config = config
        self.accelerator = accelerator
        self.run: RunConfig | None = None
        self.model: model_manager.LoadedModel | None = None
        self._workdir = workdir

    # --- prepare -------------------------------------------------------------------

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
        model: model_manager.LoadedModel | None = None,
    ) -> None:
        """Resolve the configuration and load the model onto the mesh.

        Args:
            training_type: overrides `training.training_type`.
            model_name: overrides `model.name_or_path`.
            model: weights that are loaded already, in place of both names.

        Raises:
            ValueError: the configuration (all its problems at once) or the model.
        """
        config = self._config_dict()
        with config.unlocked():
            if training_type is not None:
                config.training.training_type = training_type
            if model_name is not None:
                config.model.name_or_path = model_name
            self._take_over_accelerator(config)
        run = resolve(config, device_count=jax.device_count())
        overridden = (
            type(self).compute_auxiliary_loss
            is not TrainingOrchestrator.compute_auxiliary_loss
        )
        if run.loop.use_auxiliary_loss and not overridden:
            raise ValueError(
                "training.use_auxiliary_loss = True: there is none to use; override"
                " compute_auxiliary_loss in a subclass of TrainingOrchestrator"
            )
        writers.check_installed(run.loop.report_to)
        for line in run.explain():
            logger.info(line)
        self.run = run
        # These raise on what cannot work, before anything is loaded.
        self.make_objective()
        parse_mixture(run.data.train)
        self.model = (
            model_manager.ModelManager(run).load_model()
            if model is None
            else model_manager.adopt(model, run)
        )

    @property
    def workdir(self) -> pathlib.Path:
        """Where this run keeps everything it writes."""
        run = self._prepared_run()
        name = run.loop.run_name or run.training_type
        return pathlib.Path(self._workdir or pathlib.Path("out") / name)

    def _config_dict(self) -> ConfigDict:
        if isinstance(self.config, ConfigManager):
            return copy.deepcopy(self.config.config_dict)
        if isinstance(self.config, RunConfig):
            return to_config_dict(self.config)
        return copy.deepcopy(self.config)

    def _take_over_accelerator(self, config: ConfigDict) -> None:
        if self.accelerator is None:
            return
        accumulation = self.accelerator.gradient_accumulation_steps
        precision = self.accelerator.mixed_precision
        if accumulation > 1:
            config.training.gradient_accumulation_steps = accumulation
        if precision in ("fp16", "bf16"):
            config.training.fp16 = precision == "fp16"
            config.training.bf16 = precision == "bf16"
        named = [getattr(n, "value", n) for n in self.accelerator.log_with or ()]
        trackers = [name for name in named if name in ("tensorboard", "wandb")]
        if trackers:
            before = config.training.report_to
            before = before.split(",") if isinstance(before, str) else before
            others = [n for n in before if n not in (*trackers, "none")]
            config.training.report_to = (*others, *trackers)
        logger.info(
            "accelerator: gradient_accumulation_steps = %s, mixed_precision = %s and"
            " log_with = %s are taken over; devices and processes are those of the jax"
            " mesh",
            accumulation,
            precision,
            trackers,
        )

    def _prepared_run(self) -> RunConfig:
        if self.run is None:
            raise ValueError("nothing is prepared yet: call prepare_training() first")
        return self.run

    # --- data ------------------------------------------------------------------------

    def load_training_data(self, path: str | os.PathLike[str] | None = None) -> Rows:
        """Raw rows of `path`, of `data.train`, or the embedded ones."""
        return loading.load_training_rows(self._prepared_run(), path)

    def load_evaluation_data(
        self, path: str | os.PathLike[str] | None = None
    ) -> Rows | None:
        """The same for `data.eval`; None if training data are given and these not."""
        return loading.load_evaluation_rows(self._prepared_run(), path)

    def prepare_rows(self, rows: Rows | Prepared) -> Prepared:
        """Check and tokenize raw rows for this run's objective; the log says the rest.

        The rows of a stream are checked and tokenized as they come, in training.

        Raises:
            ValueError: bad rows, each by number and reason (`data.on_bad_row: error`).
        """
        if isinstance(rows, PreparedDataset | StreamDataset):
            return rows
        run = self._prepared_run()
        if isinstance(rows, datasets.IterableDataset):
            if not run.data.streaming:
                raise ValueError(
                    "data.streaming = False: an IterableDataset is a stream; set it"
                    " true, and training.max_steps"
                )
            source = HubSource("train_dataset", rows, run.data.max_train_rows)
            rows = StreamRows((source,))
        return loading.prepare_rows(run, rows, self._loaded_model().tokenizer)

    def _loaded_model(self) -> model_manager.LoadedModel:
        self._prepared_run()
        assert self.model is not None  # set together with `run`
        return self.model

    # --- the loss --------------------------------------------------------------------

    def make_objective(self) -> Objective:
        """The loss and its metrics, a pure function of log-probs. Override freely."""
        run = self._prepared_run()
        options: dict[str, Any] = {}
        if run.objective == "preference" and run.dpo is not None:
            options = dataclasses.asdict(run.dpo)
            options = {k: v for k, v in options.items() if k not in _NOT_OF_THE_LOSS}
        elif run.objective in objectives.OBJECTIVES and run.dpo is not None:
            options["beta"] = run.dpo.beta
            if run.dpo.label_smoothing:  # not every objective knows it
                options["label_smoothing"] = run.dpo.label_smoothing
        options |= run.loop.objective_kwargs or {}
        return objectives.make_objective(run.objective, **options)

    def compute_auxiliary_loss(
        self, outputs: TokenLogProbs, batch: Batch
    ) -> WeightedSum | jax.Array:
        """Override to add a loss, weighted by `auxiliary_loss_weight`. It is traced.

        Args:
            outputs: the policy's log-probs of `batch`; gradients flow through `logps`.
            batch: what the policy scored (both sides of preference pairs, in turn).

        Returns:
            A scalar, or a `WeightedSum` of which the mean is added.
        """
        raise ValueError("compute_auxiliary_loss is not overridden")

    auxiliary_loss_weight = 0.1

    def _objective_with_added_losses(self) -> Objective:
        """`make_objective`'s, the subclass's and the router's losses added to it."""
        objective = self._objective_with_auxiliary_loss()
        coefficient = self._router_loss_coefficient
        if not coefficient:
            return objective
        return objectives.with_router_loss(objective, coefficient)

    @property
    def _router_loss_coefficient(self) -> float:
        config = self._loaded_model().config
        return model_manager.router_loss_coefficient(self._prepared_run(), config)

    @property
    def _added_losses(self) -> dict[str, float]:
        """The weights of what is added to the objective, by the metrics' names."""
        names, added = ["aux_loss", "router_aux_loss"], {}
        if self._prepared_run().loop.use_auxiliary_loss:
            added[names.pop(0)] = self.auxiliary_loss_weight
        if self._router_loss_coefficient:
            added[names[0]] = self._router_loss_coefficient
        return added

    def _objective_with_auxiliary_loss(self) -> Objective:
        objective = self.make_objective()
        if not self._prepared_run().loop.use_auxiliary_loss:
            return objective

        def with_auxiliary_loss(
            policy: LogProbsFn, reference: LogProbsFn | None, batch: Any
        ) -> tuple[WeightedSum, Metrics]:
            seen: list[tuple[TokenLogProbs, Batch]] = []

            def listening(scored: Batch) -> TokenLogProbs:
                outputs = policy(scored)
                seen.append((outputs, scored))
                return outputs

            loss, metrics = objective(listening, reference, batch)
            extra = self.compute_auxiliary_loss(*seen[0])
            mean = extra.mean() if isinstance(extra, WeightedSum) else extra
            # In the loss's own weight, so that micro-batches still add up.
            auxiliary = WeightedSum(mean * loss.weight, loss.weight)
            total = loss.total + self.auxiliary_loss_weight * auxiliary.total
            return WeightedSum(total, loss.weight), metrics | {"aux_loss": auxiliary}

        return with_auxiliary_loss

    # --- train -----------------------------------------------------------------------

    def prepare_data(
        self,
        train_dataset: Rows | Prepared | None = None,
        eval_dataset: Rows | PreparedDataset | None = None,
    ) -> tuple[Prepared, PreparedDataset | None]:
        """Rows to train and to evaluate on, checked and tokenized; see `train`.

        Raises:
            ValueError: no such data, or bad rows.
        """
        if train_dataset is None:
            train_dataset = self.load_training_data()
            if eval_dataset is None:
                eval_dataset = self.load_evaluation_data()
        prepared = self.prepare_rows(train_dataset)
        evaluation = None if eval_dataset is None else self.prepare_rows(eval_dataset)
        if isinstance(evaluation, StreamDataset):
            raise ValueError(
                "the evaluation rows are a stream, which has no end: give a list of"
                " rows, or their path in data.eval"
            )
        return prepared, evaluation

    def train(
        self,
        train_dataset: Rows | Prepared | None = None,
        eval_dataset: Rows | PreparedDataset | None = None,
    ) -> dict[str, Any]:
        """Run to the end, resuming where an earlier run in this workdir stopped.

        Args:
            train_dataset: rows, prepared or raw; `load_training_data()` if None.
            eval_dataset: the same; `load_evaluation_data()` if both are None.

        Returns:
            `final_loss`, `global_step`, the last metrics by their names,
            `model_path`, `best_model_path` and `best_metric`.
        """
        if self.run is None:
            self.prepare()
        run, model = self._prepared_run(), self._loaded_model()
        if not model.params:
            raise ValueError("this model is trained already: call prepare() again")
        train_data, eval_data = self.prepare_data(train_dataset, eval_dataset)
        packed = train_data.packed or (eval_data is not None and eval_data.packed)
        model.decoder = dataclasses.replace(model.decoder, packed=packed)
        if run.data.share_prompts:
            self._check_shared_prompts(train_data, eval_data)

        train_data = self._with_difficulty(train_data)
        train_batches = self._train_batches(train_data)
        total_steps = train_batches.num_steps
        schedule, optimizer = make_optimizer(run, total_steps)
        state, layouts = model_manager.init_state(model, run, optimizer)
        model.params = {}  # they live in the state now, which the step donates
        score = self.make_score()
        if run.dpo and run.dpo.precompute_ref_log_probs:
            assert isinstance(train_data, PreparedDataset)  # config_rules sees to it
            # Nothing has trained yet, so without adapters the policy is the reference.
            start = state.frozen or state.trainable
            scorer = reference.ReferenceScorer(
                score,
                jax.device_put(start, sharding.on_device(_layouts(start))),
                self._place,
                self._eval_rows,
                self.workdir / "reference",
                {
                    "model": model.decoder.describe(),
                    "tokenizer": reference.tokenizer_fingerprint(model.tokenizer),
                },
                model.plan.readers,
                model.plan.jit,
            )
            train_data = scorer.attach(train_data, "train")
            train_batches = self._train_batches(train_data)
            eval_data = None if eval_data is None else scorer.attach(eval_data, "eval")
        train_step, eval_step = self.make_steps(score, schedule, optimizer, layouts)
        config = run.to_dict()
        epoch_steps, epochs = self._epochs(train_data, train_batches)
        with contextlib.ExitStack() as stack:
            checkpoints = stack.enter_context(
                CheckpointManager(
                    self.workdir / "checkpoints",
                    save_total_limit=run.loop.save_total_limit,
                    best_metric=run.loop.best_metric,
                    greater_is_better=run.loop.greater_is_better,
                )
            )
            loop = Loop(
                run=run,
                config=config,
                state=state,
                train_step=train_step,
                eval_step=eval_step,
                train_batches=train_batches,
                eval_batches=self._eval_batches(eval_data),
                place=self._place,
                checkpoints=checkpoints,
                steps_per_epoch=epoch_steps,
                epochs_done=epochs,
                readers=model.plan.readers[1],
                meter=self._meter(train_data),
                sync_reference=self._make_reference_sync(layouts),
                sampler=self._make_sampler(eval_data),
                bad_batches=self.workdir / "bad_batches",
                added_losses=self._added_losses,
            )
            loop.restore()
            loop.writer = stack.enter_context(
                writers.make_writers(
                    run.loop.report_to,
                    self.workdir,
                    run.loop.run_name or self.workdir.name,
                    config,
                    resume_step=loop.step or None,
                    total_steps=total_steps,
                    process_index=jax.process_index(),
                )
            )
            results = loop.run_to_end()
            if run.loop.save_final_model:
                results |= export.export_models(
                    self.workdir, model, run, loop.state, checkpoints
                )
        return results

    def _check_shared_prompts(self, *prepared: Prepared | None) -> None:
        for data in prepared:
            if data is None:
                continue
            why = self._loaded_model().decoder.why_no_shared_prompts(data.row_length)
            if why is not None:
                raise ValueError(
                    f"data.share_prompts = True: {why} ({data.row_length} tokens); set"
                    " it false"
                )

    def _train_batches(self, data: Prepared) -> BatchIterator | StreamIterator:
        loop = self._prepared_run().loop
        by_steps = loop.max_steps > 0
        reader, readers = self._loaded_model().plan.readers
        common: dict[str, Any] = {
            "micro_batch_rows": self._process_rows(loop.per_device_train_batch_size),
            "accumulation_steps": loop.gradient_accumulation_steps,
            "seed": loop.seed,
            "shuffle": self._prepared_run().data.shuffle,
            "process_index": reader,
            "process_count": readers,
            "num_workers": self._prepared_run().devices.dataloader_num_workers,
        }
        if isinstance(data, StreamDataset):
            shards = self._loaded_model().plan.batch_shards
            # By devices, where these divide, so that other processes can resume.
            shares = shards if shards % readers == 0 else readers
            return StreamIterator(
                data, num_steps=loop.max_steps, shares=shares, **common
            )
        return make_train_iterator(
            data,
            num_epochs=None if by_steps else loop.num_train_epochs,
            num_steps=loop.max_steps if by_steps else None,
            curriculum=self._prepared_run().curriculum,
            **common,
        )

    def _epochs(
        self, data: Prepared, batches: BatchIterator | StreamIterator
    ) -> tuple[int, Callable[[int], float]]:
        """Steps of an epoch, all of them for a stream; and epochs done at a step."""
        if isinstance(batches, StreamIterator):
            return batches.num_steps, batches.epochs_done
        assert isinstance(data, PreparedDataset)
        sizes = self._epoch_sizes(data)
        return steps_per_epoch(*sizes), lambda step: epochs_done(step, *sizes)

    def _with_difficulty(self, data: Prepared) -> Prepared:
        """Measured by the model as it is now, where the curriculum wants it."""
        if isinstance(data, StreamDataset):
            return data
        curriculum, model = self._prepared_run().curriculum, self._loaded_model()
        by_difficulty = curriculum.strategy == "difficulty_based"
        if not curriculum.enabled or not by_difficulty or data.difficulty is not None:
            return data
        # New adapters add nothing yet: the base alone tells.
        return difficulty.measure(
            data,
            self.make_score(),
            jax.device_put(model.params, sharding.on_device(_layouts(model.params))),
            self._place,
            process_rows=self._eval_rows,
            readers=model.plan.readers,
            folder=self.workdir,
            jit=model.plan.jit,
        )

    def _eval_batches(
        self, data: PreparedDataset | None
    ) -> Callable[[], BatchIterator] | None:
        if data is None:
            return None
        reader, readers = self._loaded_model().plan.readers
        return functools.partial(
            make_eval_iterator,
            data,
            micro_batch_rows=self._eval_rows,
            process_index=reader,
            process_count=readers,
        )

    @property
    def _eval_rows(self) -> int:
        loop = self._prepared_run().loop
        return self._process_rows(loop.per_device_eval_batch_size)

    def _process_rows(self, per_device: int) -> int:
        """Rows of a micro-batch on this process."""
        plan = self._loaded_model().plan
        return per_device * plan.batch_shards // plan.readers[1]

    def _epoch_sizes(self, data: PreparedDataset) -> tuple[int, int, int]:
        """Rows, rows of a global micro-batch, micro-batches of a step."""
        loop = self._prepared_run().loop
        rows = self._process_rows(loop.per_device_train_batch_size)
        global_rows = rows * self._loaded_model().plan.readers[1]
        return len(data), global_rows, loop.gradient_accumulation_steps

    def _place(self, batch: Any, leading_axes: int = 0) -> Any:
        """A batch of the pipeline over the devices."""
        layout = self._loaded_model().plan.batch(leading_axes)
        return sharding.place_batch(batch, layout)

    def make_score(self) -> step.ScoreFn:
        """How the decoder scores tokens, with what this run's objective needs."""
        run, decoder = self._prepared_run(), self._loaded_model().decoder
        with_collision = run.dpo is not None and run.dpo.use_weighting
        return functools.partial(
            decoder.token_log_probs,
            with_collision=with_collision,
            with_router_loss=self._router_loss_coefficient > 0,
        )

    def make_steps(
        self,
        score: step.ScoreFn,
        schedule: Callable[[Any], jax.Array],
        optimizer: optax.GradientTransformation,
        layouts: TrainState,
    ) -> tuple[step.TrainStep, step.EvalStep]:
        """The jitted steps, laid out over the mesh, with a donated state."""
        run, plan = self._prepared_run(), self._loaded_model().plan
        objective = self._objective_with_added_losses()
        transfers: dict[str, Any] = {}
        if plan.offload_params:
            transfers["fetch_params"] = _fetch(layouts.trainable)
            transfers["fetch_frozen"] = _fetch(layouts.frozen)
        with_reference = model_manager.needs_reference(run)
        eval_step = step.make_eval_step(
            objective, score, with_reference=with_reference, **transfers
        )
        if plan.offload_optimizer or plan.offload_params:
            transfers["update"] = offload.make_streamed_update(
                optimizer, layouts.trainable, layouts.opt_state
            )
        train_step = step.make_train_step(
            objective,
            score,
            optimizer,
            schedule,
            max_grad_norm=run.optimizer.max_grad_norm,
            with_reference=with_reference,
            with_dropout=run.lora is not None and run.lora.lora_dropout > 0,
            skip_nonfinite=run.loop.on_nonfinite == "skip",
            spike_threshold=run.loop.spike_threshold,
            skip_spikes=run.loop.on_spike == "skip",
            group_of=(
                diagnostics.parameter_group if run.loop.log_grad_norm_by_group else None
            ),
            is_micro_batch_mean=functools.partial(_is_micro_batch_mean, run.objective),
            **transfers,
        )
        return (
            plan.jit(
                train_step,
                in_shardings=(layouts, plan.batch(1)),
                out_shardings=(layouts, plan.replicated),
                donate_argnums=0,
            ),
            plan.jit(
                eval_step,
                in_shardings=(layouts, plan.batch()),
                out_shardings=plan.replicated,
            ),
        )

    def _make_reference_sync(
        self, layouts: TrainState
    ) -> Callable[[TrainState], TrainState] | None:
        """TR-DPO's update of the reference, jitted; None where it stays as it is."""
        dpo = self._prepared_run().dpo
        if dpo is None or not dpo.sync_ref_model:
            return None
        return jax.jit(
            step.make_reference_sync(dpo.ref_model_mixup_alpha),
            out_shardings=layouts,
            donate_argnums=0,
        )

    def _make_sampler(
        self, data: PreparedDataset | None
    ) -> Callable[[TrainState], tuple[dict[str, float], dict[str, str]]] | None:
        """What generates held-out texts under the policy; None if nothing asks for it.

        Raises:
            ValueError: the evaluation rows hold no prompt, or a metric can't be had.
        """
        run, model = self._prepared_run(), self._loaded_model()
        settings = run.generation
        if not settings.enabled or data is None:
            return None
        shards = model.plan.batch_shards
        sampler = samples.Sampler(
            model.make_generator(
                settings.max_new_tokens,
                temperature=settings.temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
            ),
            model.tokenizer,
            samples.read_prompts(
                data,
                model.tokenizer,
                settings.num_prompts,
                new_tokens=settings.max_new_tokens,
            ),
            [
                make_text_metric(name, bertscore_model=settings.bertscore_model)
                for name in settings.metrics
            ],
            batch_size=-(-settings.batch_size // shards) * shards,
            num_logged=settings.num_samples_logged,
            seed=run.loop.seed,
        )
        if not sampler.prompts:
            raise ValueError(
                "training.generation.enabled = True: no evaluation row has a prompt"
                " with an answer; set it false, or give other data.eval"
            )

        def sample(state: TrainState) -> tuple[dict[str, float], dict[str, str]]:
            return sampler(model.on_device(overlay(state.frozen, state.trainable)))

        return sample

    def _meter(self, data: Prepared) -> ThroughputMeter:
        model = self._loaded_model()
        devices = list(model.plan.mesh.devices.flat)
        return ThroughputMeter(
            flops_per_token=flops_per_token(
                self._prepared_run(), model, data.row_length
            ),
            device_count=len(devices),
            peak_flops_per_device=peak_flops(devices[0].device_kind),
        )


def make_optimizer(
    run: RunConfig, total_steps: int
) -> tuple[Callable[[Any], jax.Array], optax.GradientTransformation]:
    """The learning-rate schedule of a run of so many steps, and the optimizer on it."""
    schedule = schedules.make_schedule(
        run.schedule.lr_scheduler_type,
        learning_rate=run.optimizer.learning_rate,
        total_steps=total_steps,
        warmup_steps=schedules.count_warmup_steps(
            total_steps,
            warmup_steps=run.schedule.warmup_steps,
            warmup_ratio=run.schedule.warmup_ratio,
        ),
        **run.schedule.options,
    )
    optimizer = optim.make_optimizer(
        run.optimizer.optimizer,
        schedule,
        weight_decay=run.optimizer.weight_decay,
        beta1=run.optimizer.adam_beta1,
        beta2=run.optimizer.adam_beta2,
        epsilon=run.optimizer.adam_epsilon,
        momentum=run.optimizer.momentum,
    )
    return schedule, optimizer


def _is_micro_batch_mean(objective: str, name: str) -> bool:
    """TRL's averages: a preference loss is the mean of its micro-batches' means.

    The next-token loss is a mean over all tokens of the step, and only these two
    metrics beside it are means of means.
    """
    of_pairs = objective in objectives.OBJECTIVES and objective != "next_token"
    return of_pairs or name in ("entropy", "mean_token_accuracy")


def _layouts(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _fetch(layouts: Any) -> Callable[[Any], Any]:
    return sharding.make_transfer(sharding.on_device(layouts))


def flops_per_token(
    run: RunConfig, model: model_manager.LoadedModel, row_length: int
) -> float:
    """FLOPs that a token needs, recomputation not counted.

    A full step is three forward passes' worth: forward, and backward for inputs and
    for weights. Frozen weights under LoRA spare the last; a reference adds a forward.
    """
    full = model.config.flops_per_token(row_length)
    passes = 3 if run.lora is None else 2
    return full / 3 * (passes + model_manager.needs_reference(run))
