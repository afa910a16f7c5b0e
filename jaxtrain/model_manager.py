"""From a resolved config to a model on its mesh: weights, tokenizer, train state."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain import assets, lora, sharding
from jaxtrain.batch import map_arrays
from jaxtrain.config import LoraSection, RunConfig, resolve
from jaxtrain.data.rows.tokenize import load_tokenizer
from jaxtrain.evaluation.generate import Generator, generate_texts, make_generate
from jaxtrain.kernels.attention import Layout
from jaxtrain.models import hf
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.quantization import (
    Quantization,
    check_installed,
    is_kept,
    is_quantized,
    quantize_tree,
)
from jaxtrain.models.transformer import Decoder, LoraShape
from jaxtrain.objectives.table import next_token
from jaxtrain.optimizers import optim
from jaxtrain.record import diagnostics
from jaxtrain.tree import overlay, select
from jaxtrain.types import Batch, Metrics, PairBatch, Params, TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class LoadedModel:
    """A decoder, its weights laid out on a mesh, and where they came from.

    `directory` is the local Hugging Face directory, or None for random weights.
    """

    decoder: Decoder
    params: Params
    tokenizer: Any
    plan: sharding.ShardingPlan
    directory: str | None

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text: the tokenizer's, and those of the model."""
        eos = self.config.eos_token_id
        ids = {self.tokenizer.eos_token_id, *(eos if isinstance(eos, tuple) else [eos])}
        return tuple(sorted(ids - {None}))

    def make_generator(self, max_new_tokens: int, **options: Any) -> Generator:
        """`generate.make_generate` for this model, with its end tokens."""
        return make_generate(
            self.decoder,
            max_new_tokens=max_new_tokens,
            eos_ids=self.eos_ids,
            pad_id=self.tokenizer.pad_token_id,
            **options,
        )

    def on_device(self, params: Params) -> Params:
        """The same weights in device memory, where they rest in host memory."""
        if not self.plan.offload_params:
            return params
        layouts = jax.tree.map(lambda leaf: leaf.sharding, params)
        return jax.device_put(params, sharding.on_device(layouts))

    def score(self, batch: Batch | PairBatch | Mapping[str, Any]) -> Metrics:
        """Sums of loss (nats), accuracy and entropy over one batch of numpy [B, T].

        The chosen side of pairs is scored. A mapping has arrays by the names of
        `types.Batch`'s fields. B is filled up with empty rows to a multiple of the
        data-parallel devices.
        """
        if isinstance(batch, Mapping):
            names = [n for n in Batch.__dataclass_fields__ if n in batch]
            batch = Batch(**{n: np.asarray(batch[n]) for n in names})
        rows = batch.chosen if isinstance(batch, PairBatch) else batch
        missing = -len(rows.tokens) % self.plan.batch_shards
        if missing:
            rows = map_arrays(lambda x: np.pad(x, ((0, missing), (0, 0))), rows)
        placed: Any = sharding.place_batch(rows, self.plan.batch())
        return self._score(self._own_params(), placed)

    def generate(
        self,
        prompts: Sequence[str | Sequence[Mapping[str, Any]]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        batch_size: int = 8,
        seed: int = 0,
    ) -> list[str]:
        """Continue strings or conversations; one text each. See `jaxtrain.generate`.

        Raises:
            ValueError: the weights went into a training, or a setting is out of range.
        """
        settings = (max_new_tokens, temperature, top_k, top_p)
        if settings not in self._generators:
            self._generators[settings] = self.make_generator(
                max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p
            )
        return generate_texts(
            self._generators[settings],
            self._own_params(),
            self.tokenizer,
            prompts,
            key=jax.random.key(seed),
            batch_size=_round_up(batch_size, self.plan.batch_shards),
        )

    @functools.cached_property
    def _score(self) -> Callable[[Params, Batch], Metrics]:
        def score(params: Params, batch: Batch) -> Metrics:
            policy = functools.partial(self.decoder.token_log_probs, params)
            loss, metrics = next_token(policy, None, batch)
            return {"loss": loss, **metrics}

        return self.plan.jit(score)

    @functools.cached_property
    def _generators(self) -> dict[Any, Generator]:
        return {}

    def _own_params(self) -> Params:
        if not self.params:
            raise ValueError(
                "this model's weights went into a training: load the model it exported"
                " (results['model_path'])"
            )
        return self.on_device(self.params)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class ModelManager:
    """Load the model and the tokenizer that a configuration names.

    `config` is a `ConfigManager`, a `ConfigDict` or a `RunConfig`.
    """

    def __init__(self, config: Any) -> None:
        if not isinstance(config, RunConfig):
            config = resolve(config, device_count=jax.device_count())
        self.run: RunConfig = config
        self.model: LoadedModel | None = None
        self.tokenizer: Any = None

    def load_model(self) -> LoadedModel:
        """Load `config.model` onto the mesh; afterwards `model` and `tokenizer` serve.

        Raises:
            ValueError: no such model or tokenizer, or one that can't be trained here.
        """
        run = self.run
        plan = make_plan(run)
        directory = _model_directory(run)
        self.tokenizer = _load_tokenizer(run, directory)
        config = (
            _architecture(run, self.tokenizer)
            if directory is None
            else hf.load_config(directory)
        )
        _check_vocabulary(config, self.tokenizer)
        _check_lengths(run, config)
        decoder = make_decoder(run, config, plan)
        # Adapters train; their base is only read, so it needs no master copy.
        dtype = run.precision.compute_dtype if run.lora else run.model.param_dtype
        base = dataclasses.replace(decoder, lora=None)
        shardings = plan.parameters(base.abstract_params(), base.logical_axes())
        # From scratch, a directory gives its sizes and its tokenizer only.
        if directory is None or run.training_type == "from_scratch":
            source = "random initial values"
            key = jax.random.key(run.loop.seed)
            params = jax.jit(base.init, out_shardings=shardings)(key)
        else:
            source = directory
            params = hf.load_params(directory, base, shardings, dtype=dtype)
        logger.info(
            "%s with %.1fM parameters from %s",
            config.model_type,
            config.num_params() / 1e6,
            source,
        )
        if decoder.quantization is not None:
            logger.info(
                "its layers' kernels are kept as %s: the frozen base takes %.1f MiB"
                " instead of %.1f in %s",
                decoder.quantization.kind,
                sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20,
                config.num_params() * jnp.dtype(dtype).itemsize / 2**20,
                dtype,
            )
        self.model = LoadedModel(decoder, params, self.tokenizer, plan, directory)
        return self.model


def adopt(model: LoadedModel, run: RunConfig) -> LoadedModel:
    """A model that another configuration loaded, as `run` lays out and computes it.

    The weights are taken over: where nothing needs to move, they are the same arrays.

    Raises:
        ValueError: its weights were donated to an earlier training.
    """
    if not model.params:
        raise ValueError(
            "this model's weights went into an earlier training: reload it"
        )
    plan = make_plan(run)
    _check_lengths(run, model.config)
    decoder = make_decoder(run, model.config, plan)
    base = dataclasses.replace(decoder, lora=None)
    dtype = run.precision.compute_dtype if run.lora else run.model.param_dtype
    abstract = base.abstract_params()
    taken = _in_few_bits(model.params, model.decoder, decoder.quantization)
    params = jax.device_put(
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if is_kept(path) else leaf.astype(dtype), taken
        ),
        plan.parameters(abstract, base.logical_axes()),
    )
    model.params = {}
    return LoadedModel(decoder, params, model.tokenizer, plan, model.directory)


def _in_few_bits(
    params: Params, decoder: Decoder, wanted: Quantization | None
) -> Params:
    """Weights that `decoder` computes with, their kernels kept as `wanted` says."""
    found = decoder.quantization if is_quantized(params) else None
    if found == wanted:
        return params
    if found is not None:
        raise ValueError(
            f"this model's base is kept as {found}, the run asks for"
            f" {wanted or 'whole weights'}: load the model anew by this configuration"
        )
    assert wanted is not None
    return quantize_tree(params, decoder.linear_kernels(), wanted)


def make_plan(
    run: RunConfig, devices: Sequence[jax.Device] | None = None
) -> sharding.ShardingPlan:
    """The mesh over this run's devices and what is split over it."""
    devices = (jax.devices() if devices is None else devices)[: run.devices.num_gpus]
    zero = run.devices.deepspeed
    return sharding.ShardingPlan(
        sharding.make_mesh(run.mesh.sizes, devices, slices=run.mesh.slices),
        zero_stage=zero.zero_stage,
        offload_optimizer=zero.offload_optimizer,
        offload_params=zero.offload_param,
    )


def load_abstract_model(run: RunConfig, devices: Sequence[jax.Device]) -> LoadedModel:
    """The model that `run` names as shapes on `devices`, which need not be present.

    Of a directory its config.json is enough. There is no tokenizer.
    """
    plan = make_plan(run, devices)
    directory = _model_directory(run)
    config = (
        _architecture(run, _load_tokenizer(run, None))
        if directory is None
        else hf.load_config(directory)
    )
    _check_lengths(run, config)
    decoder = make_decoder(run, config, plan)
    dtype = run.precision.compute_dtype if run.lora else run.model.param_dtype
    base = dataclasses.replace(decoder, lora=None)
    abstract = base.abstract_params()
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf, layout: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype if is_kept(path) else dtype, sharding=layout
        ),
        abstract,
        plan.parameters(abstract, base.logical_axes()),
    )
    return LoadedModel(decoder, params, None, plan, directory)


def make_decoder(
    run: RunConfig, config: ModelConfig, plan: sharding.ShardingPlan
) -> Decoder:
    """The decoder as this run computes it: dtype, remat, kernels, LoRA's shape.

    Raises:
        ValueError: the run asks for what the model has not.
    """
    router_loss_coefficient(run, config)
    decoder = Decoder(
        config,
        compute_dtype=run.precision.compute_dtype,
        param_dtype=run.model.param_dtype,
        remat=run.precision.remat,
        attention=run.model.attention,
        loss_chunk=run.model.loss_chunk_tokens,
        scan_layers=run.model.scan_layers,
        constrain=plan.constrain,
        map_shards=plan.map_shards,
        quantization=_quantization(run),
        layout=Layout(
            plan.mesh,
            rows=sharding.ACTIVATION_RULES["batch"],
            heads=sharding.ACTIVATION_RULES["heads"],
            tokens=sharding.ACTIVATION_RULES["sequence"],
            vocab=sharding.ACTIVATION_RULES["vocab"],
        ),
    )
    if run.lora is None:
        return decoder
    settings = lora_config(run)
    base = decoder.abstract_params()
    ranks = lora.resolve_ranks(settings, base)
    shape = LoraShape(
        r=settings.r,
        scaling=settings.scaling,
        dropout=settings.dropout,
        targets=frozenset(ranks),
        own=tuple((path, *rank) for path, rank in sorted(ranks.items())),
        use_dora=settings.use_dora,
        ties_head=lora.ties_adapters(settings, base),
    )
    if run.lora.ensure_weight_tying and not run.lora.init_from and not shape.ties_head:
        raise ValueError(
            "training.lora.ensure_weight_tying = True: this run gives no adapter to an"
            " embedding that is the head too; unset it, or name embed_tokens in"
            " target_modules of a model with tie_word_embeddings"
        )
    return dataclasses.replace(decoder, lora=shape)


def _quantization(run: RunConfig) -> Quantization | None:
    if run.lora is None or run.lora.quantization is None:
        return None
    check_installed()
    return Quantization(run.lora.quantization, run.lora.quantization_block_size)


def lora_config(run: RunConfig) -> lora.LoraConfig:
    """`training.lora` in the terms of `jaxtrain.lora`.

    Raises:
        ValueError: this run trains no adapters.
    """
    section = run.lora
    if section is None:
        raise ValueError("training.lora.enabled = False: this run has no adapters")
    if section.init_from:
        settings = lora.read_settings(section.init_from)
        return dataclasses.replace(settings, dropout=section.lora_dropout)
    return lora.LoraConfig(
        r=section.r,
        alpha=section.lora_alpha,
        dropout=section.lora_dropout,
        target_modules=section.target_modules,
        bias=section.bias,
        use_rslora=section.use_rslora,
        modules_to_save=section.modules_to_save,
        use_dora=section.use_dora,
        init_lora_weights=section.init_lora_weights,
        rank_pattern=section.rank_pattern or {},
        alpha_pattern=section.alpha_pattern or {},
        ensure_weight_tying=section.ensure_weight_tying,
    )


def router_loss_coefficient(run: RunConfig, config: ModelConfig) -> float:
    """What the router's loss is multiplied by; 0 where there is no router.

    As in TRL, a model's own coefficient acts, whether or not its config has
    `output_router_logits`, unless the run gives another.

    Raises:
        ValueError: the run gives one, and the model has no experts.
    """
    given = run.loop.router_aux_loss_coef
    if not config.num_experts and given:
        raise ValueError(
            f"training.router_aux_loss_coef = {given}: a {config.model_type} has no"
            " experts, so nothing to weigh; unset it, or train a mixture of experts"
        )
    return config.router_aux_loss_coef if given is None else given


def needs_reference(run: RunConfig) -> bool:
    """Whether the step scores batches by the frozen model too."""
    if run.dpo is None or not run.has_reference:
        return False
    return not (run.dpo.reference_free or run.dpo.precompute_ref_log_probs)


def init_state(
    model: LoadedModel, run: RunConfig, optimizer: optax.GradientTransformation
) -> tuple[TrainState, TrainState]:
    """The first train state, and the same tree of shardings.

    What `model.params` holds moves into the state: donate it, use the state's after.
    """
    plan, decoder = model.plan, model.decoder
    if run.lora is None:
        trainable, frozen = model.params, {}
        if needs_reference(run):
            frozen = _reference_copy(model.params, run.precision.compute_dtype)
    else:
        trainable, frozen = _initial_adapters(model.params, run, run.lora)

    axes = select(decoder.logical_axes(), trainable)
    abstract = jax.eval_shape(lambda tree: tree, trainable)
    shardings = plan.parameters(abstract, axes)
    moments = plan.optimizer_moments(abstract, axes)
    opt_shardings = optim.state_shardings(optimizer, abstract, moments, plan.replicated)
    trainable = jax.device_put(trainable, shardings)
    if run.lora is not None and _keeps_first_adapters(run, run.lora):
        frozen = overlay(frozen, jax.device_put(trainable, shardings, may_alias=False))
    # Made where it is kept: moments in host memory may not fit the device at once.
    opt_shardings = plan.store_optimizer(opt_shardings)
    opt_state = jax.jit(optimizer.init, out_shardings=opt_shardings)(
        jax.device_put(trainable, sharding.on_device(shardings))
    )
    scale = optim.init_loss_scale() if run.precision.fp16 else None
    window = None
    if run.loop.spike_threshold is not None:
        window = diagnostics.init_loss_window(run.loop.spike_window)
    state = TrainState(
        step=jax.device_put(jnp.int32(0), plan.replicated),
        trainable=trainable,
        frozen=frozen,
        opt_state=opt_state,
        # device_put refuses keys where a device belongs to another process.
        rng=jax.jit(jax.random.key, out_shardings=plan.replicated)(run.loop.seed),
        loss_scale=jax.device_put(scale, plan.replicated),
        loss_window=jax.device_put(window, plan.replicated),
    )
    return state, jax.tree.map(lambda leaf: leaf.sharding, state)


def abstract_state(
    model: LoadedModel, run: RunConfig, optimizer: optax.GradientTransformation
) -> TrainState:
    """`init_state` of a `load_abstract_model`: shapes, types and layouts, no array."""
    plan = model.plan

    def split(params: Params) -> tuple[Params, Params]:
        if run.lora is None:
            reference = _in_compute_dtype(params, run.precision.compute_dtype)
            return params, reference if needs_reference(run) else {}
        settings = lora_config(run)
        adapters = lora.init_adapters(jax.random.key(0), params, settings)
        return lora.trainable_and_frozen(params, adapters, settings)

    def laid_out(tree: Any, layouts: Any) -> Any:
        return jax.tree.map(
            lambda leaf, layout: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=layout
            ),
            tree,
            layouts,
        )

    trainable, frozen = jax.eval_shape(split, model.params)
    if frozen:
        frozen = laid_out(frozen, jax.tree.map(lambda x: x.sharding, model.params))
    axes = select(model.decoder.logical_axes(), trainable)
    moments = plan.optimizer_moments(trainable, axes)
    opt_layouts = optim.state_shardings(optimizer, trainable, moments, plan.replicated)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    trainable = laid_out(trainable, plan.parameters(trainable, axes))
    if run.lora is not None and _keeps_first_adapters(run, run.lora):
        frozen = overlay(frozen, trainable)

    def rest() -> dict[str, Any]:
        window = run.loop.spike_window if run.loop.spike_threshold is not None else None
        return {
            "step": jnp.int32(0),
            "rng": jax.random.key(0),
            "loss_scale": optim.init_loss_scale() if run.precision.fp16 else None,
            "loss_window": None
            if window is None
            else diagnostics.init_loss_window(window),
        }

    return TrainState(
        trainable=trainable,
        frozen=frozen,
        opt_state=laid_out(opt_state, plan.store_optimizer(opt_layouts)),
        **jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=plan.replicated
            ),
            jax.eval_shape(rest),
        ),
    )


def _initial_adapters(
    base: Params, run: RunConfig, section: LoraSection
) -> tuple[Params, Params]:
    """What trains at first, new or as `init_from` has it, and the frozen base."""
    settings = lora_config(run)
    if section.init_from:
        adapters, _ = lora.load_adapter(section.init_from, base)
        fresh, frozen = lora.trainable_and_frozen(base, {}, settings)
        return overlay(fresh, adapters), frozen
    # A stream of its own: the seed's key itself made the base's random weights.
    key = jax.random.fold_in(jax.random.key(run.loop.seed), 1)
    adapters = lora.init_adapters(key, base, settings)
    return lora.trainable_and_frozen(base, adapters, settings)


def _keeps_first_adapters(run: RunConfig, section: LoraSection) -> bool:
    """Whether the frozen tree holds the first adapters beside the base.

    The DPO reference is then not the base alone: it will move, or started elsewhere.
    Without DPO, what the base lost at the start is needed to save an adapter.
    """
    if lora_config(run).changes_base:
        return True
    return run.dpo is not None and (run.dpo.sync_ref_model or bool(section.init_from))


def _reference_copy(params: Params, compute_dtype: str) -> Params:
    """A frozen copy that gives the policy's own numbers at the start."""
    return jax.jit(
        functools.partial(_in_compute_dtype, compute_dtype=compute_dtype),
        out_shardings=jax.tree.map(lambda x: x.sharding, params),
    )(params)


def _in_compute_dtype(params: Params, compute_dtype: str) -> Params:
    """Copies of the weights as the forward pass reads them.

    Matrices are only ever read in the compute dtype, so they are kept in it; norms are
    read in float32 and kept whole.
    """

    def copy(path: Any, leaf: jax.Array) -> jax.Array:
        is_matrix = path[-1].key not in ("scale", "bias")
        # jnp.array copies; a mere cast to the same dtype would share the buffer, which
        # the train step donates.
        return jnp.array(leaf, dtype=compute_dtype if is_matrix else leaf.dtype)

    return jax.tree_util.tree_map_with_path(copy, params)


def _model_directory(run: RunConfig) -> str | None:
    """The local directory of the model named; None: one of our own sizes."""
    if not run.model.name_or_path:
        if run.training_type == "from_scratch":
            return None
        return str(assets.asset_path(assets.MODEL))
    return str(
        hf.resolve_model_path(run.model.name_or_path, revision=run.model.revision)
    )


def _load_tokenizer(run: RunConfig, directory: str | None) -> Any:
    """The tokenizer named, else the model's own, else the embedded one."""
    source = (
        run.model.tokenizer_name_or_path
        or directory
        or str(assets.asset_path(assets.TOKENIZER))
    )
    return load_tokenizer(
        source,
        revision=run.model.revision,
        trust_remote_code=run.model.trust_remote_code,
        chat_template=run.data.chat_template,
    )


def _architecture(run: RunConfig, tokenizer: Any) -> ModelConfig:
    """The sizes in `config.model.architecture`, as the family's own config has them."""
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(run.model.architecture).items()
        if value is not None
    }
    options.setdefault("vocab_size", len(tokenizer))
    options |= {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        return ModelConfig.from_hf(options)
    except ValueError as error:
        raise ValueError(f"config.model.architecture: {error}") from error


def _check_vocabulary(config: ModelConfig, tokenizer: Any) -> None:
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's vocab_size ="
            f" {config.vocab_size}: use the tokenizer that the model was trained with"
            " (config.model.tokenizer_name_or_path), or for a model from scratch set"
            " config.model.architecture.vocab_size to at least that"
        )


def _check_lengths(run: RunConfig, config: ModelConfig) -> None:
    limit, wanted = config.max_position_embeddings, run.data.max_length
    if wanted > limit:
        raise ValueError(
            f"max_length = {wanted} exceeds the model's max_position_embeddings ="
            f" {limit}: shorten it, or give the model a rope_scaling for that length"
        )
