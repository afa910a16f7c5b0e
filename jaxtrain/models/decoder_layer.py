"""One layer of a decoder: attention and an MLP, plain or a mixture of experts."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, Shaped

from jaxtrain.models import layers, moe, routers
from jaxtrain.models.balance import send_excess
from jaxtrain.models.convolution import ShortConvolution
from jaxtrain.models.delta_net import GatedDeltaNet
from jaxtrain.models.expert_adapters import NO_ADAPTERS, ExpertAdapters, takes_adapters
from jaxtrain.models.gemma4 import Gemma4Attention
from jaxtrain.models.latent_attention import LatentAttention
from jaxtrain.models.layer_kinds import Gemma4Layers
from jaxtrain.models.layers import (
    Adapted,
    Attention,
    LayerInputs,
    LayerOptions,
    Linear,
    Mlp,
    Options,
    RMSNorm,
)
from jaxtrain.models.moe import RouterLoad
from jaxtrain.models.per_layer import LayerEnd
from jaxtrain.models.quantization import PROJECTIONS, dequantize, kept_as, quantize

# How a layer's tokens see each other, by what `LayerKind.mixer` calls it. A mixer is a
# module, `mixer(x, given, dropout_key) -> (what it adds, what it keeps)`, with `name`,
# the path of its weights in a layer; `flops` and `init_state`. What it also hands on to
# later layers it gives as a `HandedOn`.
MIXERS: Mapping[str, Any] = {
    "attention": Attention,
    "convolution": ShortConvolution,
    "delta_net": GatedDeltaNet,
    "gemma4_attention": Gemma4Attention,
    "latent_attention": LatentAttention,
}


class Router(Adapted):
    """Logits over experts, summed and kept in float32 whatever the compute type."""

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        self.options = options
        config = options.config
        sizes = (config.hidden_size, config.num_experts)
        weight = config.initializer_range * jax.random.normal(rngs.params(), sizes)
        self.weight = nnx.Param(
            weight.astype(options.param_dtype), logical_axes=("embed", None)
        )
        if config.family.biased_experts:
            bias = config.initializer_range * jax.random.normal(
                rngs.params(), sizes[1:]
            )
            self.bias = nnx.Param(
                bias.astype(options.param_dtype), logical_axes=(None,)
            )
        self._init_adapter("mlp.gate", weight, ("embed", None), options, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T E"]:
        del dropout_key  # an adapter of a parameter drops nothing, as in PEFT
        weight = self.weight[...].astype(x.dtype)
        logits = jnp.matmul(x, weight, preferred_element_type=jnp.float32)
        if hasattr(self, "lora_a"):
            logits += self._low_rank(x)
        return logits + self.bias[...] if hasattr(self, "bias") else logits


class Experts(nnx.Module):
    """Gated MLPs of one shape, their weights stacked, whole or in few bits."""

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        config, width = options.config, options.config.hidden_size
        inner = config.expert_width
        assert inner is not None  # the config has experts

        def stack(name: str, sizes: tuple[int, int], axes: tuple[str, str]) -> None:
            shape = (config.num_experts, *sizes)
            weight = config.initializer_range * jax.random.normal(rngs.params(), shape)
            parts = {name: weight.astype(options.param_dtype)}
            if (few := options.quantization) is not None and few.experts:
                parts = dict(zip(kept_as(name), quantize(weight, few), strict=True))
            for own, part in parts.items():
                setattr(self, own, nnx.Param(part, logical_axes=("experts", *axes)))

        stack("gate_proj", (width, inner), ("embed", "mlp"))
        stack("up_proj", (width, inner), ("embed", "mlp"))
        stack("down_proj", (inner, width), ("mlp", "embed"))
        if config.family.biased_experts:

            def zeros(size: int, axis: str) -> nnx.Param:
                bias = jnp.zeros((config.num_experts, size), options.param_dtype)
                return nnx.Param(bias, logical_axes=("experts", axis))

            self.gate_proj_bias = zeros(inner, "mlp")
            self.up_proj_bias = zeros(inner, "mlp")
            self.down_proj_bias = zeros(width, "embed")
        if takes_adapters(options):
            self.adapters = ExpertAdapters(options, rngs)


class SparseMlp(nnx.Module):
    """A router and the experts that it sends each token to (arXiv:2401.04088).

    Each device routes its own rows and multiplies them by its slice of F of every
    expert. Where experts rest split over fsdp, their weights are gathered for the
    layer, as all weights are: no token travels, none waits for the device with the most
    popular expert. Where `mesh.expert` splits them, expert_parallel.py has the choice.
    A shared expert, where there is one, is a plain MLP for every token, in some
    families times the sigmoid of a gate.
    """

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        self.options = options
        config, shared = options.config, options.config.family.shared_expert
        kinds = {"softmax": Router, "scaled": routers.ScaledRouter}
        router: Any = kinds.get(config.family.router, routers.Float32Router)
        self.gate = router(options, rngs)
        self.experts = Experts(options, rngs)
        if shared is not None:
            path, inner = f"mlp.{shared}", config.shared_expert_width
            setattr(self, shared, Mlp(options, rngs, module=path, inner=inner))
        if config.family.gated_shared_expert:
            sizes, axes = (config.hidden_size, 1), ("embed", None)
            path = "mlp.shared_expert_gate"
            self.shared_expert_gate = Linear(path, sizes, axes, options, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        counted: Shaped[Array, "B T"],
        dropout_key: Key[Array, ""] | None = None,
        routed_by: Float[Array, "B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterLoad]:
        """What the experts add, and the load of the router, which may read another."""
        config, biased = self.options.config, self.options.config.family.biased_experts
        with jax.named_scope("router"):
            read = x if routed_by is None else routed_by
            logits = self.gate(read, dropout_key)
            probabilities, weights, experts = routers.choose(config, self.gate, logits)
            load = moe.measure_load(probabilities, experts, counted, logits)
            if self.options.balances_experts:
                bias = self.gate.e_score_correction_bias[...]
                weights = send_excess(weights, bias, load.assigned)
        with jax.named_scope("experts"):
            if hasattr(self.experts, "gate_proj"):
                y = self._run_experts(
                    x, weights, experts, *map(self._cast, PROJECTIONS)
                )
            else:
                y = self._run_few_bits(x, weights, experts)
            if biased:  # not within, where parts are summed over devices
                y += moe.mix_biases(weights, experts, self._cast("down_proj_bias"))
        if config.family.shared_expert is not None:
            y += self._run_shared(x, dropout_key)
        return y, load

    def _run_experts(
        self, x: Array, weights: Array, experts: Array, *projections: Array
    ) -> Float[Array, "B T D"]:
        """The experts' sum without the last biases, each device on its own tokens."""
        choice, rows = ("batch", "sequence", None), ("batch", "sequence", "embed")
        inwards, outwards = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        added = NO_ADAPTERS
        if hasattr(self.experts, "adapters"):
            added = self.experts.adapters.split()
        biases = ["gate_proj_bias", "up_proj_bias"]
        biases = biases if self.options.config.family.biased_experts else []
        multiply: Callable[..., Array] = functools.partial(
            moe.apply_experts,
            combine=self._combine,
            scalings=added.scalings,
            device=self.options.device,
        )
        if self.options.experts is not None:
            multiply = self.options.experts.spread(multiply, x)
        apply = self.options.map_shards(
            multiply,
            (
                *(rows, choice, choice, inwards, inwards, outwards, *added.axes),
                *[("experts", "mlp")] * len(biases),
            ),
            rows,
            "mlp",
        )
        rest = (*added.arrays, *map(self._cast, biases))
        return apply(x, weights, experts, *projections, *rest)

    def _run_few_bits(
        self, x: Array, weights: Array, experts: Array
    ) -> Float[Array, "B T D"]:
        """The same where experts are codes, made whole for this layer alone.

        In the backward pass they are made again, and no product is: only their results
        are kept.
        """
        axes = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        axes_of = dict(zip(PROJECTIONS, (axes[0], *axes), strict=True))

        def run(x: Array, weights: Array, *codes: Array) -> Array:
            whole = []
            for name, *parts in zip(PROJECTIONS, codes[::2], codes[1::2], strict=True):
                # Where devices share experts, it is codes that travel.
                parts = [self.options.constrain(p, axes_of[name]) for p in parts]
                whole.append(dequantize(*parts).astype(self.options.compute_dtype))
            return self._run_experts(x, weights, experts, *whole)

        codes = [
            getattr(self.experts, part)[...]
            for name in PROJECTIONS
            for part in kept_as(name)
        ]
        keep = jax.checkpoint_policies.save_only_these_names(*moe.PRODUCTS)
        remat = jax.checkpoint(run, policy=keep, prevent_cse=False)
        return remat(x, weights, *codes)

    def _run_shared(self, x: Array, dropout_key: Array | None) -> Array:
        """What every token's expert adds."""
        with jax.named_scope("shared_expert"):
            family = self.options.config.family
            y: Array = getattr(self, family.shared_expert or "")(x, dropout_key)
            if family.gated_shared_expert:
                y *= jax.nn.sigmoid(self.shared_expert_gate(x, dropout_key))
            return y

    def _cast(self, name: str) -> Array:
        return getattr(self.experts, name)[...].astype(self.options.compute_dtype)

    def _combine(self, gate: Array, up: Array) -> Array:
        """What the experts' last product reads."""
        config = self.options.config
        if not config.family.biased_experts:
            return layers.ACTIVATIONS[config.hidden_act](gate) * up
        alpha, limit = config.swiglu_alpha, config.swiglu_limit
        assert alpha is not None and limit is not None  # its config has both
        return moe.clamped_swiglu(gate, up, alpha=alpha, limit=limit)


class ExpertsBeside(nnx.Module):
    """Gemma 4's experts: they and the layer's MLP each read and add with own norms.

    The router reads the stream as it is.
    """

    def __init__(self, options: LayerOptions, rngs: nnx.Rngs) -> None:
        width = options.config.hidden_size
        self.norm_of_mlp = RMSNorm(width, "embed", options)
        self.norm_before = RMSNorm(width, "embed", options)
        self.norm_after = RMSNorm(width, "embed", options)
        self.sparse = SparseMlp(options, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        of_mlp: Float[Array, "B T D"],
        counted: Shaped[Array, "B T"],
        dropout_key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], RouterLoad]:
        """What the MLP and the experts add together, and the router's load."""
        read = self.norm_before(x)
        added, load = self.sparse(read, counted, dropout_key, routed_by=x)
        return self.norm_of_mlp(of_mlp) + self.norm_after(added), load


class DecoderLayer(nnx.Module):
    """A mixer, then the MLP, each added to the stream.

    The family says what is normalized: what they read, what they add, or both. Norms
    are called as in the published weights, so that `post_attention_layernorm` is in
    some families what the MLP reads, in others what attention adds. Where one norm
    serves both, both read the stream as it is before the layer. The MLP is one of many
    in a mixture of experts.
    """

    def __init__(self, options: LayerOptions, rngs: nnx.Rngs) -> None:
        self.options = options
        config, family = options.config, options.config.family
        mixer = MIXERS[options.kind.mixer]
        setattr(self, mixer.name, mixer(options, rngs))
        for name in filter(None, vars(family.norm_names).values()):
            setattr(self, name, RMSNorm(config.hidden_size, "embed", options))
        is_sparse = config.num_experts and not options.kind.is_dense
        mlp = SparseMlp if is_sparse and not family.experts_beside else Mlp
        setattr(self, family.mlp_names.module, mlp(options, rngs))
        if is_sparse and family.experts_beside:
            self.beside = ExpertsBeside(options, rngs)
        if isinstance(config.variety, Gemma4Layers):
            self.end = LayerEnd(options, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        given: LayerInputs,
        counted: Shaped[Array, "B T"],
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, RouterLoad | None]:
        """The stream after this layer, what its mixer keeps, and the router's load.

        `counted` says how often a token counts in the load; padding does not. The load
        is None where there is no router.
        """
        config, family = self.options.config, self.options.config.family
        names = family.norm_names
        load, residual = None, config.residual_multiplier
        mixer = MIXERS[self.options.kind.mixer]
        with jax.named_scope(self.options.kind.mixer):
            read = self._normalized(names.before_attention, x)
            added, kept = getattr(self, mixer.name)(read, given, dropout_key)
            added = self._normalized(names.after_attention, added)
            x += layers.multiplied(added, residual)
        with jax.named_scope("mlp"):
            if family.norms != "shared":
                read = self._normalized(names.before_mlp, x)
            mlp: Mlp | SparseMlp = getattr(self, family.mlp_names.module)
            if isinstance(mlp, SparseMlp):
                added, load = mlp(read, counted, dropout_key)
            else:
                added = mlp(read, dropout_key)
            if hasattr(self, "beside"):
                added, load = self.beside(x, added, counted, dropout_key)
            added = self._normalized(names.after_mlp, added)
            x += layers.multiplied(added, residual)
        if hasattr(self, "end"):
            with jax.named_scope("end"):
                x = self.end(x, given.per_layer, dropout_key)
        return self.options.constrain(x, ("batch", "sequence", "embed")), kept, load

    def _normalized(self, name: str | None, x: Array) -> Array:
        """x after the norm of this name; x itself where there is none."""
        return x if name is None else getattr(self, name)(x)
