"""The decoder: pure functions of a plain tree of weights.

Layers are stacked on axis 0 and run under one `lax.scan`, or one for each repeating
pattern of layers that differ (stacks.py), so a deep model compiles as fast as a shallow
one; unrolled, it runs faster. Flax modules exist only within a trace (binding.py).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32, Key

from jaxtrain.kernels.attention.api import attention, plan_attention, skips_blocks
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.kernels.delta_rule import delta_rule
from jaxtrain.kernels.linear_cross_entropy.api import linear_log_probs
from jaxtrain.kernels.linear_cross_entropy.partition import score_on_shards
from jaxtrain.models import head, parts, router_report
from jaxtrain.models.binding import axes_of, init_module, paths_with
from jaxtrain.models.cache import Cache, decode, init_cache
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.decoder_layer import DecoderLayer
from jaxtrain.models.expert_adapters import ADAPTERS, PARAMETERS
from jaxtrain.models.gradient_layout import shares_weights
from jaxtrain.models.layer_kinds import LayerKind, config_of_kind
from jaxtrain.models.layers import Attend, HandedOn, LayerInputs, LoraShape, Options
from jaxtrain.models.moe import RouterLoad, join_loads, load_balancing_loss
from jaxtrain.models.noise import add_embedding_noise
from jaxtrain.models.per_layer import Ends
from jaxtrain.models.recompute import Recompute, check_policy, fit_layers, leaves_layers
from jaxtrain.models.rope import KINDS_BY_LENGTH
from jaxtrain.models.selection import join_rows, make_selection, pick, put_back
from jaxtrain.models.stacks import LAYERS
from jaxtrain.types import Batch, Params, TokenLogProbs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder(Options):
    """A decoder-only language model: static and hashable; it holds no arrays.

    `params` is always the nested dict that `init` makes and `load_params` reads. A
    module applies an adapter only if `params` has its `lora_a` and `lora_b`, so the
    same decoder without these leaves is the base model. Kernels work in the same way:
    with `quantization`, `init` makes quantized codes in their place, and a decoder
    accepts either.

    `compute_dtype` is the type of activations and matrix products; norms, rotary
    angles, softmax and logits are float32. `param_dtype` is the type `init` makes.
    `remat` and the three options behind it: see `_choose_layers`. `attention` names an
    implementation of the kernel.
    `loss_chunk`: how many tokens' logits are in memory at once; None chooses by width.
    `scan_layers`: compile one layer and scan over all, instead of compiling each.
    `packed=False` promises that each row is one document with its padding behind it.
    Causality alone then masks the padding, and attention needs no segments.
    `neftune_alpha`: strength of the noise on embeddings, if there is a `dropout_key`.
    `constrain` fixes an activation's layout by its logical axes, `map_shards` runs a
    function on each device's own rows, `layout` tells how kernels' arrays are split.

    Raises:
        ValueError: an option is unknown, or an adapter's target is no module.
    """

    remat: str = "none"
    remat_layers: int | None = None
    kept_bytes: int = 0
    reshards: bool = True
    attention: str = "auto"
    loss_chunk: int | None = None
    scan_layers: bool = True
    packed: bool = True
    neftune_alpha: float | None = None

    def __post_init__(self) -> None:
        for name in ("compute_dtype", "param_dtype"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)).name)
        check_policy(self.remat)
        if self.lora is not None:
            known = self.linear_kernels() | head.END_TARGETS
            _check_adapters(self.lora, known | _mixture_targets(self._options))

    def describe(self) -> str:
        """Everything besides the weights that affects the results, as one line."""
        words = [repr(self.config), self.compute_dtype]
        if self.lora is not None:
            ranks = sorted(
                (path, *self.lora.rank_and_scaling(path)) for path in self.lora.targets
            )
            words += [repr(ranks), f"use_dora={self.lora.use_dora}"]
            words += ["ties_head"] * self.lora.ties_head
        if self.quantization is not None:
            words.append(repr(self.quantization))
        words += ["fp8"] * self.fp8
        return " ".join(words)

    # --- the tree of weights -----------------------------------------------------

    def init(self, key: Key[Array, ""]) -> Params:
        """Random weights: normal with the config's deviation; norms 1, biases 0.

        Adapters start as in PEFT: A uniform within 1 / sqrt(inputs), B zero.
        """
        ends_key, layers_key = jax.random.split(key)
        layer_keys = jax.random.split(layers_key, self.config.num_hidden_layers)

        def init_stack(stack: parts.Stack) -> Params:
            own = parts.layer_options(self._options, stack)
            keys = layer_keys
            if stack.name is not None:
                keys = layer_keys[jnp.asarray(stack.layers)]
            return jax.vmap(functools.partial(init_module, DecoderLayer, own))(keys)

        return {
            **init_module(Ends, self._options, ends_key),
            LAYERS: parts.by_stack(self.config, init_stack),
        }

    def abstract_params(self) -> Params:
        """The tree of `init` as shapes and types, without using a device."""
        return jax.eval_shape(lambda: self.init(jax.random.key(0)))

    def linear_kernels(self) -> frozenset[str]:
        """Paths of the modules that `quantization` acts on, such as "mlp.up_proj".

        In a model with several kinds of layers the name of the stack comes first.
        """
        plain = dataclasses.replace(self._options, lora=None, quantization=None)
        return paths_with("kernel", _layer_axes(plain))

    def logical_axes(self) -> Params:
        """The tree of `params` with a tuple of axis names (or None) as each leaf.

        Names: "layers", "embed", "vocab", "heads", "kv_heads", "mlp", "experts",
        "lora_rank".
        """
        return {**axes_of(Ends, self._options), LAYERS: _layer_axes(self._options)}

    # --- whole rows --------------------------------------------------------------

    def hidden_states(
        self,
        params: Params,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        segment_ids: Int32[Array, "B T"],
        *,
        prompt_ids: Int32[Array, "B T"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T D"]:
        """The output of the last layer after the final norm, which the head reads.

        A token attends to itself and to earlier tokens of the row that have its segment
        id, and to earlier tokens of the segment that its `prompt_ids` entry names.
        Segment 0 is padding, whose outputs are meaningless. Adapters apply dropout to
        their inputs only if a `dropout_key` is given.

        Raises:
            ValueError: `prompt_ids` were given, and a layer's window or rope does not
                allow shared prompts.
        """
        return self._hidden_states_and_load(
            params, tokens, positions, segment_ids, prompt_ids, dropout_key
        )[0]

    def _hidden_states_and_load(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        segment_ids: Array,
        prompt_ids: Array | None,
        dropout_key: Array | None,
    ) -> tuple[Array, RouterLoad | None]:
        """`hidden_states`, and the load of each layer's router, if it has one."""
        reason = self.why_no_shared_prompts()
        if prompt_ids is not None and reason:
            raise ValueError(f"prompt_ids: {reason}; give each completion a row")
        ends = parts.bind_ends(self._options, params)
        rows = _Rows(tokens, positions, segment_ids, prompt_ids)
        make_step = _layer_steps(self, params, rows, dropout_key)
        with jax.named_scope("embed"):
            x = ends.embed_tokens(tokens)
            if self.neftune_alpha is not None and dropout_key is not None:
                # The noise is added before the embeddings are scaled.
                alpha = self.neftune_alpha * self.config.embedding_multiplier
                x = add_embedding_noise(x, segment_ids, dropout_key, alpha)
            x = self.constrain(x, ("batch", "sequence", "embed"))
            per_layer = ends.embed_for_layers(tokens, x, dropout_key)
        with jax.named_scope("layers"):
            given = (x, parts.init_shared(self, *tokens.shape))
            x, loads = parts.run_layers(
                *(self._options, params, make_step, given),
                per_layer=per_layer,
                unroll=not self.scan_layers,
                recompute=_choose_layers(self, params, make_step, given, per_layer),
            )
        with jax.named_scope("final_norm"):
            return ends.norm(x), join_loads(loads)

    def why_no_shared_prompts(self, longest: int = 0) -> str | None:
        """Return the reason why pairs can't share a prompt, or None if they can.

        A window counts places in the row, where the second completion is further from
        the prompt than its positions say. Some rotary embeddings depend on the length
        of the whole document.

        Args:
            longest: tokens of the longest pair, counting its prompt once.
        """
        for stack in parts.stacks(self.config):
            if not stack.kind.attends:
                return f"its layers of {stack.kind.mixer} read a row from left to right"
        windows = parts.layer_windows(self.config, longest)
        if shorter := [window for window in windows if window is not None]:
            return (
                f"the model's window of {min(shorter)} tokens is shorter than a pair"
                f" of {longest}"
            )
        kinds = {rope.kind for rope in self.config.ropes}
        for kind in sorted(kinds & KINDS_BY_LENGTH):
            return f"under {kind} a token's rotation depends on its document's length"
        return None

    def skips_blocks(self, length: int) -> bool:
        """Whether attention over packed rows of `length` skips masked blocks."""
        heads = (self.config.num_attention_heads, self.config.head_dim)
        return skips_blocks(
            jax.ShapeDtypeStruct((1, length, *heads), self.compute_dtype),
            softcap=self.config.attn_logit_softcapping,
            has_sinks=self.config.family.attention_sinks,
            value_width=self.config.value_head_dim,
            implementation=self.attention,
            layout=self.layout,
        )

    def logits(
        self,
        params: Params,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        segment_ids: Int32[Array, "B T"],
    ) -> Float32[Array, "B T V"]:
        """All logits at once, after the final soft cap; only for short rows."""
        hidden = self.hidden_states(params, tokens, positions, segment_ids)
        return head.unembed(self, params, hidden)

    def token_log_probs(
        self,
        params: Params,
        batch: Batch,
        *,
        dropout_key: Key[Array, ""] | None = None,
        with_collision: bool = False,
        with_router_loss: bool = False,
        with_router: bool = False,
        with_log_total: bool = False,
        with_total: bool = False,
    ) -> TokenLogProbs:
        """Log-probabilities of the batch's targets; never holds B x T x V logits.

        If the batch has `scored`, only the tokens that it lists are scored; all others
        give 0. Only `logps`, `router_loss`, `log_total` and `router`'s z-loss have a
        gradient; `with_total`, where kernels serve, `total` in place of `logps`.

        Raises:
            ValueError: router statistics are asked for, and the model has no router.
        """
        hidden, load = self._hidden_states_and_load(
            params,
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            batch.prompt_ids,
            dropout_key,
        )
        if (with_router_loss or with_router) and load is None:
            raise ValueError(
                f"with_router_loss: a {self.config.model_type} has no router"
            )
        router_loss = load_balancing_loss(load) if with_router_loss and load else None
        router = router_report.summarize(load) if with_router and load else None
        told, chosen = (hidden, batch.targets, *(batch.loss_mask,) * with_total), None
        if batch.scored is not None:
            groups = len(batch.scored)
            chosen = make_selection(batch.scored, batch.targets.size // groups)
            told = tuple(pick(join_rows(x, groups), chosen) for x in told)
        hidden, targets, *shares = told
        outputs = _score_targets(
            self,
            params,
            hidden,
            targets,
            dropout_key,
            _Extras(with_collision, with_log_total, *shares),
        )
        if chosen is not None:
            shape = batch.targets.shape
            outputs = jax.tree.map(
                lambda x: put_back(x, chosen).reshape(shape) if x.ndim else x, outputs
            )
        return dataclasses.replace(outputs, router_loss=router_loss, router=router)

    # --- one step at a time ------------------------------------------------------

    def init_cache(self, batch: int, max_len: int) -> Cache:
        """Return an empty cache for `decode` with room for `max_len` tokens per row."""
        return init_cache(self._options, batch, max_len)

    def decode(
        self,
        params: Params,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        cache: Cache,
        segment_ids: Int32[Array, "B T"] | None = None,
    ) -> tuple[Float32[Array, "B V"], Cache]:
        """Append T tokens to the cache and return the logits of each row's next token.

        The first call takes the prompts, each further call usually one token (T = 1).
        Prompts may be padded on either side: `segment_ids` is 1 for real tokens and 0
        for padding (all 1 if None), and `positions` count real tokens only. Every call
        uses T places of each row, and all calls together may use at most `max_len`;
        beyond that the last places are overwritten.

        Raises:
            ValueError: this call alone has more tokens than the cache has places.
        """
        return decode(self._options, params, tokens, positions, cache, segment_ids)

    @property
    def _options(self) -> Options:
        """The options that its modules need, without those of how a batch is run."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(Options)}
        # In a loop, or where layers are computed again, that reads more and not less.
        joins = self.joins_products and self.remat == "none" and not self.scan_layers
        return Options(**shared | {"joins_products": joins})


def _layer_axes(options: Options) -> Params:
    """The logical axes of all layers' weights."""

    def axes_of_stack(stack: parts.Stack) -> Params:
        own = parts.layer_options(options, stack)
        return axes_of(DecoderLayer, own, ("layers",))

    return parts.by_stack(options.config, axes_of_stack)


def _mixture_targets(options: Options) -> frozenset[str]:
    """Paths within a layer where routers and experts can have adapters."""
    plain = dataclasses.replace(options, lora=None, quantization=None)
    found: set[str] = set()
    for experts in paths_with("gate_proj", _layer_axes(plain)):
        found |= {f"{experts}.{ADAPTERS}.{name}" for name in PARAMETERS}
        found.add(f"{experts.removesuffix('experts')}gate")
    return frozenset(found)


class _Rows(NamedTuple):
    """The rows that were passed to `Decoder.hidden_states`."""

    tokens: Array
    positions: Array
    segment_ids: Array
    prompt_ids: Array | None


def _layer_steps(
    decoder: Decoder, params: Params, rows: _Rows, dropout_key: Array | None
) -> Callable[[parts.Stack], parts.LayerStep]:
    """What `parts.run_layers` runs layers by: the stream, and router loads beside."""
    inputs_of_kind = {
        stack.kind: _inputs_over_rows(decoder, stack.kind, rows)
        for stack in parts.stacks(decoder.config)
    }
    counted: Array = rows.segment_ids != 0
    if rows.prompt_ids is not None:
        # A shared prompt counts twice, as it would in two rows without sharing.
        counted = counted * (1.0 + (rows.segment_ids % 3 == 1))

    def make_step(stack: parts.Stack) -> parts.LayerStep:
        bind_layer = parts.layer_binder(decoder._options, params, stack)
        inputs_of_layer = inputs_of_kind[stack.kind]

        def step(
            passing: parts.Passing, inputs: tuple[Params, Array, Any]
        ) -> tuple[parts.Passing, RouterLoad | None]:
            (x, shared), (layer_params, index, per_layer) = passing, inputs
            x = checkpoint_name(x, "layer_input")
            key = dropout_key
            if key is not None:
                key = jax.random.fold_in(key, index)
            given = inputs_of_layer(index)
            given = given._replace(shared=shared, per_layer=per_layer)
            x, kept, load = bind_layer(layer_params)(x, given, counted, key)
            if isinstance(kept, HandedOn):
                shared = {**shared, **kept.shared}
            return (x, shared), load

        return step

    return make_step


def _choose_layers(
    decoder: Decoder,
    params: Params,
    make_step: Callable[[parts.Stack], parts.LayerStep],
    *given: Any,
) -> Recompute:
    """Which layers compute what again; `given` is what the first one is given.

    `remat` acts on the first `remat_layers` layers (-1: on all). Unset, "full" leaves
    out the last ones where layers are not scanned, as far as what these keep takes no
    more than `kept_bytes`, summed over all devices. With `reshards`, weights that
    devices share are brought together again in the backward pass.
    """
    count = decoder.remat_layers
    if leaves_layers(decoder):
        costs = parts.kept_by_layers(decoder._options, params, make_step, *given)
        count = fit_layers(costs, decoder.kept_bytes)
    count = None if count == -1 else count
    return Recompute(decoder.remat, count, _weights_again(decoder))


def for_reference(decoder: Decoder) -> Decoder:
    """The decoder that scores frozen weights: its layers are one loop where they can.

    Without a backward pass a loop reads matrices where they lie, as unrolled layers do,
    is as fast, and compiles sooner (benchmarks/RESULTS.md).
    """
    if _derives_weights(decoder):
        return decoder
    return dataclasses.replace(decoder, scan_layers=True, remat_layers=None)


def _derives_weights(options: Options) -> bool:
    """Whether a layer makes wide arrays of its weights alone.

    Weights that devices share are such: whole, each device would hold all of them.
    """
    with_dora = options.lora is not None and options.lora.use_dora
    few_bits = options.fp8 or options.quantization is not None
    return shares_weights(options) or with_dora or few_bits


def _weights_again(decoder: Decoder) -> Literal["read", "derive", "keep"]:
    """What `Recompute` does about weights."""
    if not _derives_weights(decoder):
        return "read"
    if shares_weights(decoder) and not decoder.reshards:
        return "keep"
    return "derive"


def _inputs_over_rows(
    decoder: Decoder, kind: LayerKind, rows: _Rows
) -> Callable[[Array], LayerInputs]:
    """A function from a layer's number to what it is given beside the stream."""
    segment_ids = rows.segment_ids
    if kind.mixer == "delta_net":
        run = functools.partial(delta_rule, layout=decoder.layout)
        return lambda index: LayerInputs(segment_ids, attend=run)
    if not kind.attends:
        return lambda index: LayerInputs(segment_ids)
    config = config_of_kind(decoder.config, kind)
    attend_of_layer = _attention_over_rows(decoder, config, rows)
    rotary_of_layer = parts.layer_rotary(config, rows.positions, segment_ids)
    return lambda index: LayerInputs(
        segment_ids, rotary_of_layer(index), attend_of_layer(index)
    )


def _attention_over_rows(
    decoder: Decoder, config: ModelConfig, rows: _Rows
) -> Callable[[Array], Attend]:
    """A function from a layer's number to its attention over whole rows."""
    windows = parts.layer_windows(config, rows.tokens.shape[1])
    choices = tuple(dict.fromkeys(windows))
    by_segments = decoder.packed or rows.prompt_ids is not None
    heads = (config.num_attention_heads, config.head_dim)
    queries = jax.ShapeDtypeStruct((*rows.tokens.shape, *heads), decoder.compute_dtype)

    def within(window: int | None) -> Callable[..., Array]:
        options: dict[str, Any] = {
            "segment_ids": rows.segment_ids if by_segments else None,
            "prompt_ids": rows.prompt_ids,
            "window": window,
            "softcap": config.attn_logit_softcapping,
            "implementation": decoder.attention,
            "layout": decoder.layout,
        }
        has_sinks = decoder.config.family.attention_sinks
        options["schedule"] = plan_attention(
            queries, **options, has_sinks=has_sinks, value_width=config.value_head_dim
        )
        options["scale"] = config.attention_scale

        def run(q: Array, k: Array, v: Array, sinks: Array | None = None) -> Array:
            return attention(q, k, v, sinks=sinks, **options)

        return run

    branches = [within(window) for window in choices]
    choice_of_layer = jnp.asarray([choices.index(w) for w in windows])

    def attend(index: Array, *arrays: Array) -> tuple[Array, None]:
        if len(branches) == 1:
            return branches[0](*arrays), None
        return jax.lax.switch(choice_of_layer[index], branches, *arrays), None

    return lambda index: functools.partial(attend, index)


class _Extras(NamedTuple):
    """What the loss head computes beyond what every objective is told."""

    collision: bool
    log_total: bool
    shares: Float[Array, "B T"] | None = None  # of each log-prob in the total


def _score_targets(
    decoder: Decoder,
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int32[Array, "B T"],
    dropout_key: Array | None,
    extras: _Extras,
) -> TokenLogProbs:
    """What the loss head makes of hidden states; it never holds all logits."""
    config, layout = decoder.config, decoder.layout or Layout()
    table, vocab_axis = head.get_unembedding(config, params)
    with jax.named_scope("loss_head"):
        rows = hidden.reshape(-1, hidden.shape[-1])
        adapter = head.make_head_adapter(decoder, params, rows, dropout_key)
        if adapter is not None:
            low = adapter.low.reshape(*hidden.shape[:2], -1)
            adapter = adapter._replace(low=layout.join_tokens(low))
        score = functools.partial(
            linear_log_probs,
            vocab_axis=vocab_axis,
            scale=config.logit_multiplier,
            softcap=config.final_logit_softcapping,
            chunk=decoder.loss_chunk,
            with_collision=extras.collision,
            with_log_total=extras.log_total,
            device=decoder.device,
        )
        plain = adapter is None and not extras.collision
        shares = extras.shares
        if not plain or extras.log_total or not head.has_kernels(decoder, hidden):
            shares = None
        if plain and head.is_on_shards(decoder, hidden):
            score = functools.partial(score, fuse=True)
            if hidden.dtype == jnp.bfloat16:  # float16's range is too narrow for sums
                exact = decoder.reduces_in_float32
                table = table.astype(jnp.float32 if exact else jnp.bfloat16)
            outputs = score_on_shards(
                score, layout, hidden, table, (targets, shares), vocab_axis
            )
        else:
            outputs = score(
                decoder.constrain(layout.join_tokens(hidden), ("tokens", "embed")),
                table,
                layout.join_tokens(targets),
                adapter=adapter,
                shards=layout.count(layout.fitting(layout.vocab, config.vocab_size)),
                fuse=layout.mesh is None or layout.mesh.size == 1,
                token_shards=head.share_tokens(decoder, targets.shape),
                shares=shares if shares is None else layout.join_tokens(shares),
            )
    total = None
    if shares is not None:
        total, outputs = outputs[-1].sum(), jax.lax.stop_gradient(outputs[:-1])
    scores = [layout.split_tokens(x, targets.shape) for x in outputs]
    log_total = scores.pop() if extras.log_total else None
    return dataclasses.replace(TokenLogProbs(*scores), log_total=log_total, total=total)


def _check_adapters(lora: LoraShape, modules: frozenset[str]) -> None:
    """Refuse adapters that `modules` do not take."""
    unknown = sorted(lora.targets - modules)
    if unknown or not lora.targets:
        raise ValueError(
            f"lora.targets: {unknown or 'none given'}; a layer's modules are"
            f" {', '.join(sorted(modules))}"
        )
    if lora.use_dora and lora.dropout > 0 and "lm_head" in lora.targets:
        raise ValueError(
            "lora.use_dora with lora_dropout on lm_head would compute all logits twice,"
            " with and without dropout: set lora_dropout = 0, or leave lm_head out of"
            " target_modules"
        )
