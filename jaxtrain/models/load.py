"""From a resolved configuration to a model on its mesh: sizes, weights, tokenizer."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain import lora, sharding
from jaxtrain.config import RunConfig
from jaxtrain.evaluation.inference import Inference
from jaxtrain.kernels.attention import Layout
from jaxtrain.kernels.attention.api import PLATFORM_OF
from jaxtrain.models import bucket, ends, fp8, hf, parted, quantization, vocabulary
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.fingerprint import fingerprint_model
from jaxtrain.models.generation_config import GenerationConfig
from jaxtrain.models.layer_kinds import LINEAR
from jaxtrain.models.mixture_options import decoder_options
from jaxtrain.models.recompute_options import remat_options
from jaxtrain.models.source import ModelSource, read_sizes, read_source
from jaxtrain.models.transformer import Decoder
from jaxtrain.record.memory import in_words, memory_limit, sum_bytes
from jaxtrain.types import Params

logger = logging.getLogger(__name__)

# Compiling takes a time in proportion; longer stacks were not measured unrolled.
_MOST_UNROLLED = 48
JOINED_WIDTH = 2048  # at least


@dataclasses.dataclass
class LoadedModel(Inference):
    """A decoder, its weights laid out on a mesh, and where they came from.

    `evaluation.inference` adds scoring and generating. `directory` is the local Hugging
    Face directory, or None for random weights. `weights` are None once a training has
    taken them over (`take_weights`). `generation` holds the default settings for
    generating. `fingerprint` identifies the weights; it is None for random ones.
    """

    decoder: Decoder
    weights: Params | None
    tokenizer: Any
    plan: sharding.ShardingPlan
    directory: str | None
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    fingerprint: str | None = None

    @property
    def params(self) -> Params:
        """The weights.

        Raises:
            ValueError: `take_weights` has already handed them to a training.
        """
        if self.weights is None:
            raise ValueError(
                "this model's weights went into a training: reload it, or load the"
                " model that it exported (results['model_path'])"
            )
        return self.weights

    def take_weights(self) -> Params:
        """Hand the weights to a training, whose step donates them; keep none.

        Raises:
            ValueError: an earlier training has taken them.
        """
        taken, self.weights = self.params, None
        return taken

    def for_training(self, *, packed: bool) -> "LoadedModel":
        """This model for rows of several documents, or of one; takes its weights over.

        Raises:
            ValueError: an earlier training has taken them.
        """
        decoder = dataclasses.replace(self.decoder, packed=packed)
        return dataclasses.replace(self, decoder=decoder, weights=self.take_weights())

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config


def load_model(run: RunConfig) -> LoadedModel:
    """Load `run.model` and its tokenizer onto the mesh.

    Raises:
        ValueError: no such model or tokenizer, or one that can't be trained here.
    """
    source = read_source(run)
    config, directory = source.config, source.directory
    plan = make_plan(run, config)
    decoder = make_decoder(run, config, plan)
    base, described = _describe_weights(run, decoder, plan)
    check_fits(described, plan)
    size = f"{config.num_params() / 1e6:.1f}M"
    fingerprint = None
    # From scratch, a directory gives its sizes and its tokenizer only.
    if directory is None or run.training_type == "from_scratch":
        logger.info("new %s of %s parameters", config.model_type, size)
        key = jax.random.key(run.loop.seed)
        params = jax.jit(base.init, out_shardings=sharding.layouts_of(described))(key)
    else:
        told = "loading %s of %s parameters from %s"
        logger.info(told, config.model_type, size, bucket.shown(directory))
        if run.lora is not None:
            settings, start = lora_config(run, config), run.lora.init_from
            vocabulary.check_new_rows_train(base, source.stored, settings, start)
        stored = ends.as_stored(decoder, source.stored)
        stored, layouts = _describe_weights(run, stored, plan)
        params = hf.load_params(
            directory, stored, sharding.layouts_of(layouts), dtype=_base_dtype(run)
        )
        params = ends.add_head(vocabulary.add_rows(params, described), described)
        fingerprint = fingerprint_model(directory)
    if decoder.quantization is not None:
        logger.info(
            "its layers' kernels are kept as %s: the frozen base takes %.1f MiB"
            " instead of %.1f in %s",
            decoder.quantization.kind,
            sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 2**20,
            config.num_params() * jnp.dtype(_base_dtype(run)).itemsize / 2**20,
            _base_dtype(run),
        )
    return LoadedModel(
        *(decoder, params, source.tokenizer, plan, directory),
        *(source.generation, fingerprint),
    )


def check_fits(described: Params, plan: sharding.ShardingPlan) -> None:
    """Refuse weights that alone are larger than the devices, before any is made.

    Args:
        described: the weights as shapes with their layouts.

    Raises:
        ValueError: a device needs more bytes for them than it has, with both numbers.
    """
    limit = memory_limit(plan.mesh.local_devices[0])
    needed, _ = sum_bytes(described)
    if limit is not None and needed > limit:
        raise ValueError(
            f"the weights alone need {in_words(needed)} a device, which has"
            f" {in_words(limit)}: choose a smaller model (model.name_or_path), split it"
            " over more devices (mesh.fsdp), or quantize a frozen base"
            " (training.lora.quantization)"
        )


def adopt(model: LoadedModel, run: RunConfig) -> LoadedModel:
    """A model that another configuration loaded, as `run` lays out and computes it.

    The weights are taken over: where nothing needs to move, they are the same arrays.

    Raises:
        ValueError: an earlier training has taken its weights.
    """
    if vocabulary.fit_vocabulary(run, model.config, model.tokenizer) != model.config:
        raise ValueError(
            "model.grow_vocabulary = True: this model was loaded without it; load it"
            " anew by this configuration"
        )
    plan = make_plan(run, model.config)
    decoder = make_decoder(run, model.config, plan)
    _, described = _describe_weights(run, decoder, plan)
    converted = jax.tree.map(
        lambda leaf, wanted: leaf.astype(wanted.dtype),
        quantization.requantize(
            model.params,
            decoder.linear_kernels(),
            model.decoder.quantization,
            decoder.quantization,
        ),
        described,
    )
    layouts = sharding.layouts_of(described)
    model.take_weights()
    params = jax.device_put(converted, layouts)
    return dataclasses.replace(model, decoder=decoder, weights=params, plan=plan)


def load_abstract_model(
    run: RunConfig, devices: Sequence[jax.Device], source: ModelSource | None = None
) -> LoadedModel:
    """Describe the model that `run` names on `devices`, which need not be present.

    Its weights are `jax.ShapeDtypeStruct`s. Its tokenizer is that of `source`; without
    one there is none, and `models.source.read_sizes` says what is read.
    """
    source = source or read_sizes(run)
    plan = make_plan(run, source.config, devices)
    decoder = make_decoder(run, source.config, plan)
    _, described = _describe_weights(run, decoder, plan)
    return LoadedModel(
        decoder, described, source.tokenizer, plan, source.directory, source.generation
    )


def make_plan(
    run: RunConfig, config: ModelConfig, devices: Sequence[jax.Device] | None = None
) -> sharding.ShardingPlan:
    """The mesh over this run's devices and what is split over it."""
    devices = (jax.devices() if devices is None else devices)[: run.devices.num_gpus]
    zero = run.devices.deepspeed
    plan = sharding.ShardingPlan(
        sharding.make_mesh(run.mesh.sizes, devices, slices=run.mesh.slices),
        zero_stage=zero.zero_stage,
        offload_optimizer=zero.offload_optimizer,
        offload_params=zero.offload_param,
        deterministic=run.precision.full_determinism,
        adapters=run.lora is not None,
    )
    unrolled, in_fp8 = _unrolls_layers(run, config, plan), run.precision.fp8
    if in_fp8:
        fp8.check(config, plan.mesh.devices.flat[0])
    in_parts = parted.serves(run, plan)
    return dataclasses.replace(plan, unrolled=unrolled, fp8=in_fp8, parted=in_parts)


def _unrolls_layers(
    run: RunConfig, config: ModelConfig, plan: sharding.ShardingPlan
) -> bool:
    """Whether to compile each layer on its own: only where that was measured faster.

    On a GPU this avoids copying in and out of stacked buffers. Weights that are
    offloaded layer by layer, and fp8 on several devices, which compiles slowly
    otherwise, were only measured in a scan.
    """
    if run.model.scan_layers is not None:
        return not run.model.scan_layers
    by_layers = (
        plan.mesh.shape["expert"] > 1
        or (run.precision.fp8 and plan.mesh.size > 1)
        or plan.offload_params
        or run.precision.remat == "offload"
    )
    few = config.num_hidden_layers <= _MOST_UNROLLED
    return plan.platform == "gpu" and few and not by_layers


def _joins_products(
    run: RunConfig, config: ModelConfig, plan: sharding.ShardingPlan
) -> bool:
    """Whether a layer's kernels may act side by side: where that was measured faster.

    A step of 3B takes 1.6% less on an H200, one of 0.5B (width 896) 0.4% more. Where
    devices share weights it takes more memory. Frozen kernels, and those in few bits,
    would be copied for it.
    """
    is_plain = run.lora is None and not plan.fp8
    one_gpu = plan.platform == "gpu" and plan.mesh.size == 1
    own_type = run.precision.reduce_dtype != "float32"
    return is_plain and one_gpu and own_type and config.hidden_size >= JOINED_WIDTH


def make_decoder(
    run: RunConfig, config: ModelConfig, plan: sharding.ShardingPlan
) -> Decoder:
    """The decoder as this run computes it: dtype, remat, kernels, LoRA's shape.

    Raises:
        ValueError: the run asks for something that the model does not have.
    """
    limit, wanted = config.longest_text, run.data.max_length
    if wanted > limit:
        raise ValueError(
            f"max_length = {wanted} exceeds the model's max_position_embeddings ="
            f" {limit}: shorten it, or stretch the model's context by"
            " model.rope_scaling"
        )
    if plan.mesh.shape["context"] > 1 and LINEAR in config.layer_types:
        raise ValueError(
            f"mesh.context = {plan.mesh.shape['context']}: layers of type {LINEAR!r}"
            " read a row from its start, so no device can begin with a later part of"
            " it; set mesh.context = 1, and split rows or weights instead"
        )
    needed = PLATFORM_OF.get(run.model.attention, plan.platform)
    if needed != plan.platform:
        raise ValueError(
            f"model.attention = {run.model.attention!r}: it needs a {needed.upper()}; "
            f"these devices are of the kind {plan.platform}: set it to auto or xla"
        )
    rules, quantized = sharding.ACTIVATION_RULES, None
    if run.lora is not None:
        kind, block = run.lora.quantization, run.lora.quantization_block_size
        experts = run.lora.quantize_experts is not False
        quantized = quantization.requested(kind, block, experts=experts)
    decoder = Decoder(
        config,
        compute_dtype=run.precision.compute_dtype,
        param_dtype=run.model.param_dtype,
        **remat_options(run, config, plan),
        attention=run.model.attention,
        loss_chunk=run.model.loss_chunk_tokens,
        scan_layers=not plan.unrolled,
        neftune_alpha=run.loop.neftune_noise_alpha,
        constrain=plan.constrain,
        map_shards=plan.map_shards,
        **decoder_options(run, config, plan),
        quantization=quantized,
        fp8=run.precision.fp8,
        reduces_in_float32=run.precision.reduce_dtype == "float32",
        joins_products=_joins_products(run, config, plan),
        layout=Layout(
            plan.mesh,
            rows=plan.batch_axes,
            heads=rules["heads"],
            tokens=rules["sequence"],
            vocab=rules["vocab"],
            weights=plan.weight_axes,
            parts=(parted.AXIS,) if plan.parted else (),
        ),
    )
    if run.lora is None:
        return decoder
    with lora.explained(run.lora.init_from):
        shape = lora.make_shape(lora_config(run, config), decoder.abstract_params())
    if run.lora.ensure_weight_tying and not run.lora.init_from and not shape.ties_head:
        raise ValueError(
            "training.lora.ensure_weight_tying = True: this run gives no adapter to an"
            " embedding that is the head too; unset it, or name embed_tokens in"
            " target_modules of a model with tie_word_embeddings"
        )
    return dataclasses.replace(decoder, lora=shape)


def lora_config(run: RunConfig, config: ModelConfig) -> lora.LoraConfig:
    """`training.lora` in the terms of `jaxtrain.lora`.

    Raises:
        ValueError: this run trains no adapters.
    """
    if run.lora is None:
        raise ValueError("training.lora.enabled = False: this run has no adapters")
    return lora.settings_from(run.lora, config.model_type, config.num_hidden_layers)


def _base_dtype(run: RunConfig) -> str:
    """The base's type: under LoRA it is only read, so it needs no master copy."""
    return run.precision.compute_dtype if run.lora else run.model.param_dtype


def _describe_weights(
    run: RunConfig, decoder: Decoder, plan: sharding.ShardingPlan
) -> tuple[Decoder, Params]:
    """The decoder without adapters, and its weights' shapes, types and layouts."""
    base = dataclasses.replace(decoder, lora=None)
    abstract, dtype = base.abstract_params(), _base_dtype(run)
    return base, jax.tree_util.tree_map_with_path(
        lambda path, leaf, layout: leaf.update(
            dtype=leaf.dtype if quantization.is_kept(path) else dtype, sharding=layout
        ),
        abstract,
        plan.parameters(abstract, base.logical_axes()),
    )
