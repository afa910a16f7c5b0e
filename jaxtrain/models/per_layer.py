"""Embeddings that each layer is given of its own (Gemma 4 E2B and E4B).

Before the layers, a table has P features of each token for each layer; a projection of
the usual embedding is added. At a layer's end a gate of the stream chooses among them.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from jaxtrain.models import layers
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layer_kinds import Gemma4Layers
from jaxtrain.models.layers import (
    EmbeddingAndHead,
    LayerOptions,
    Linear,
    Options,
    RMSNorm,
    without_quantization,
)
from jaxtrain.models.lookup import look_up


def per_layer_width(config: ModelConfig) -> int:
    """How many features of a token each layer is given; 0 if none."""
    variety = config.variety
    return variety.per_layer_width if isinstance(variety, Gemma4Layers) else 0


class Ends(EmbeddingAndHead):
    """The parts on either side of the layers, with what each layer is given."""

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        super().__init__(options, rngs)
        if per_layer_width(options.config):
            self.per_layer = PerLayerEmbedding(options, rngs)

    def embed_for_layers(
        self,
        tokens: Int32[Array, "B T"],
        x: Float[Array, "B T D"],
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "L B T P"] | None:
        """The features that each layer gets for these tokens; None if none are made.

        `x` holds the tokens' embeddings.
        """
        if not hasattr(self, "per_layer"):
            return None
        with jax.named_scope("per_layer"):
            return self.per_layer(tokens, x, dropout_key)


class PerLayerEmbedding(nnx.Module):
    """(table + norm(projection of the embedding)) / sqrt 2, for each layer."""

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        self.options = options
        config, variety = options.config, options.config.variety
        assert isinstance(variety, Gemma4Layers)
        width = config.num_hidden_layers * variety.per_layer_width
        self.table = Table(options, rngs, (variety.per_layer_vocab, width))
        # It stays whole, for only kernels of layers are kept in few bits.
        self.projection = Linear(
            "per_layer.projection",
            (config.hidden_size, width),
            ("embed", "mlp"),
            without_quantization(options),
            rngs,
        )
        self.norm = RMSNorm(variety.per_layer_width, None, options)

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        x: Float[Array, "B T D"],
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "L B T P"]:
        config, dtype = self.options.config, self.options.compute_dtype
        width = per_layer_width(config)
        each = (*tokens.shape, config.num_hidden_layers, width)
        looked_up = look_up(
            self.options.layout, self.table.embedding[...], tokens, dtype
        )
        looked_up *= jnp.asarray(math.sqrt(width), dtype)
        projected = self.projection(x, dropout_key) * config.hidden_size**-0.5
        both = self.norm(projected.reshape(each)) + looked_up.reshape(each)
        return jnp.moveaxis(both * 2**-0.5, 2, 0)


class Table(nnx.Module):
    """Features of each token, all layers' side by side."""

    def __init__(
        self, options: Options, rngs: nnx.Rngs, sizes: tuple[int, int]
    ) -> None:
        deviation, dtype = options.config.initializer_range, options.param_dtype
        table = deviation * jax.random.normal(rngs.params(), sizes)
        axes = ("vocab", "embed")
        self.embedding = nnx.Param(table.astype(dtype), logical_axes=axes)


class LayerEnd(nnx.Module):
    """(x + norm(projection(activation(gate(x)) * per-layer input))) * scalar.

    The scalar is a buffer in the published weights: it does not train.
    """

    def __init__(self, options: LayerOptions, rngs: nnx.Rngs) -> None:
        self.options = options
        config, width = options.config, per_layer_width(options.config)
        if width:
            inwards, outwards = (config.hidden_size, width), (width, config.hidden_size)
            axes = ("embed", None)
            self.gate = Linear("end.gate", inwards, axes, options, rngs)
            path = "end.projection"
            self.projection = Linear(path, outwards, axes[::-1], options, rngs)
            self.norm = RMSNorm(config.hidden_size, "embed", options)
        self.scalar = Scalar(options)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        per_layer: Float[Array, "B T P"] | None,
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        if per_layer is not None:
            activation = layers.ACTIVATIONS[self.options.config.hidden_act]
            chosen = activation(self.gate(x, dropout_key)) * per_layer
            x += self.norm(self.projection(chosen, dropout_key))
        scalar = jax.lax.stop_gradient(self.scalar.buffer[...])
        return x * scalar.astype(x.dtype)


class Scalar(nnx.Module):
    """One number, 1 at first."""

    def __init__(self, options: Options) -> None:
        one = jnp.ones(1, options.param_dtype)
        self.buffer = nnx.Param(one, logical_axes=(None,))
