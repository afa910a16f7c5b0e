"""One layer of a decoder: attention and an MLP, plain or a mixture of experts."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, Shaped

from jaxtrain.models import layers, moe
from jaxtrain.models.convolution import ShortConvolution
from jaxtrain.models.delta_net import GatedDeltaNet
from jaxtrain.models.gemma4 import Gemma4Attention
from jaxtrain.models.layer_kinds import Gemma4Layers
from jaxtrain.models.layers import (
    Attention,
    LayerInputs,
    LayerOptions,
    Mlp,
    Options,
    RMSNorm,
)
from jaxtrain.models.moe import RouterLoad
from jaxtrain.models.per_layer import LayerEnd

# How a layer's tokens see each other, by what `LayerKind.mixer` calls it. A mixer is a
# module, `mixer(x, given, dropout_key) -> (what it adds, what it keeps)`, with `name`,
# the path of its weights in a layer; `flops` and `init_state`. What it also hands on to
# later layers it gives as a `HandedOn`.
MIXERS: Mapping[str, Any] = {
    "attention": Attention,
    "convolution": ShortConvolution,
    "delta_net": GatedDeltaNet,
    "gemma4_attention": Gemma4Attention,
}


class Router(nnx.Module):
    """Logits over experts, summed and kept in float32 whatever the compute type."""

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        self.options = options
        config = options.config
        sizes = (config.hidden_size, config.num_experts)
        weight = config.initializer_range * jax.random.normal(rngs.params(), sizes)
        self.weight = nnx.Param(
            weight.astype(options.param_dtype), logical_axes=("embed", None)
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        weight = self.weight[...].astype(x.dtype)
        return jnp.matmul(x, weight, preferred_element_type=jnp.float32)


class Experts(nnx.Module):
    """Gated MLPs of one shape, their weights stacked."""

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        config, width = options.config, options.config.hidden_size
        inner = config.expert_width
        assert inner is not None  # the config has experts

        def stack(sizes: tuple[int, int], axes: tuple[str, str]) -> nnx.Param:
            shape = (config.num_experts, *sizes)
            weight = config.initializer_range * jax.random.normal(rngs.params(), shape)
            weight = weight.astype(options.param_dtype)
            return nnx.Param(weight, logical_axes=("experts", *axes))

        self.gate_proj = stack((width, inner), ("embed", "mlp"))
        self.up_proj = stack((width, inner), ("embed", "mlp"))
        self.down_proj = stack((inner, width), ("mlp", "embed"))


class SparseMlp(nnx.Module):
    """A router and the experts that it sends each token to (arXiv:2401.04088).

    Each device routes its own rows and multiplies them by its slice of F of every
    expert. Where experts rest split over devices, their weights are gathered for the
    layer, as all weights are that fsdp splits: no token travels, none waits for the
    device with the most popular expert.
    """

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        self.options = options
        self.gate = Router(options, rngs)
        self.experts = Experts(options, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], counted: Shaped[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], RouterLoad]:
        config, dtype = self.options.config, self.options.compute_dtype
        with jax.named_scope("router"):
            probabilities, weights, experts = moe.choose_experts(
                self.gate(x),
                config.num_experts_per_tok,
                normalize=config.norm_topk_prob,
            )
            load = moe.measure_load(probabilities, experts, counted)
        choice, rows = ("batch", "sequence", None), ("batch", "sequence", "embed")
        inwards, outwards = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        apply = self.options.map_shards(
            functools.partial(
                moe.apply_experts, activation=layers.ACTIVATIONS[config.hidden_act]
            ),
            (rows, choice, choice, inwards, inwards, outwards),
            rows,
            "mlp",
        )
        with jax.named_scope("experts"):
            projections = (
                getattr(self.experts, name)[...].astype(dtype)
                for name in ("gate_proj", "up_proj", "down_proj")
            )
            return apply(x, weights, experts, *projections), load


class DecoderLayer(nnx.Module):
    """A mixer, then the MLP, each added to the stream that it reads normalized.

    Gemma also normalizes what is added; `post_attention_layernorm` is that norm there,
    and the one before the MLP in every other family, as in the published weights. The
    MLP is one of many in a mixture of experts.
    """

    def __init__(self, options: LayerOptions, rngs: nnx.Rngs) -> None:
        self.options = options
        width = options.config.hidden_size
        self.input_layernorm = RMSNorm(width, "embed", options)
        mixer = MIXERS[options.kind.mixer]
        setattr(self, mixer.name, mixer(options, rngs))
        self.post_attention_layernorm = RMSNorm(width, "embed", options)
        if options.config.family.norms == "around":
            self.pre_feedforward_layernorm = RMSNorm(width, "embed", options)
            self.post_feedforward_layernorm = RMSNorm(width, "embed", options)
        mlp = SparseMlp if options.config.num_experts else Mlp
        self.mlp: Mlp | SparseMlp = mlp(options, rngs)
        if isinstance(options.config.variety, Gemma4Layers):
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
        load = None
        around = self.options.config.family.norms == "around"
        mixer = MIXERS[self.options.kind.mixer]
        with jax.named_scope(self.options.kind.mixer):
            mix = getattr(self, mixer.name)
            added, kept = mix(self.input_layernorm(x), given, dropout_key)
            x += self.post_attention_layernorm(added) if around else added
        with jax.named_scope("mlp"):
            if isinstance(self.mlp, SparseMlp):
                added, load = self.mlp(self.post_attention_layernorm(x), counted)
                x += added
            elif around:
                added = self.mlp(self.pre_feedforward_layernorm(x), dropout_key)
                x += self.post_feedforward_layernorm(added)
            else:
                x += self.mlp(self.post_attention_layernorm(x), dropout_key)
        if hasattr(self, "end"):
            with jax.named_scope("end"):
                x = self.end(x, given.per_layer, dropout_key)
        return self.options.constrain(x, ("batch", "sequence", "embed")), kept, load
