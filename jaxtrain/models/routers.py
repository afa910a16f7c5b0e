"""How routers choose experts: by softmax or sigmoids, of all experts or of some groups.

E counts experts, K those that a token is sent to. `decoder_layer.Router` is the plain
one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, Key

from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layers import Adapted, Linear, Options, normalize
from jaxtrain.models.mixtures import Routing
from jaxtrain.models.moe import choose_experts

Choice = tuple[Float32[Array, "B T E"], Float32[Array, "B T K"], Int32[Array, "B T K"]]


class Float32Router(Adapted):
    """Logits over experts in float32, its weights too, whatever the others' type.

    Where a router chooses by sigmoids, its `e_score_correction_bias` decides with the
    scores who is chosen, and nothing else (arXiv:2408.15664). It is a buffer in the
    published weights: no gradient reaches it.
    """

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        config = options.config
        sizes = (config.hidden_size, config.num_experts)
        weight = config.initializer_range * jax.random.normal(rngs.params(), sizes)
        self.router_weight = nnx.Param(weight, logical_axes=("embed", None))
        if config.family.router == "sigmoid":
            bias = jnp.zeros(sizes[1:], jnp.float32)
            self.e_score_correction_bias = nnx.Param(bias, logical_axes=(None,))
        self._init_adapter("mlp.gate", weight, ("embed", None), options, rngs)

    def __call__(
        self, x: Float[Array, "B T D"], dropout_key: Key[Array, ""] | None = None
    ) -> Float32[Array, "B T E"]:
        del dropout_key  # an adapter of a parameter drops nothing, as in PEFT
        x, weight = x.astype(jnp.float32), self.router_weight[...].astype(jnp.float32)
        logits = jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)
        return logits + self._low_rank(x) if hasattr(self, "lora_a") else logits


class ScaledRouter(nnx.Module):
    """Logits of x / rms(x) times learned scales, by a projection that takes adapters.

    `per_expert_scale` is multiplied to the weights of the chosen experts.
    """

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        self.options = options
        config, dtype = options.config, options.param_dtype
        sizes, axes = (config.hidden_size, config.num_experts), ("embed", None)
        self.proj = Linear("beside.sparse.gate.proj", sizes, axes, options, rngs)
        scales = (jnp.ones(size, dtype) for size in sizes)
        self.router_scale = nnx.Param(next(scales), logical_axes=("embed",))
        self.per_expert_scale = nnx.Param(next(scales), logical_axes=(None,))

    def __call__(
        self, x: Float[Array, "B T D"], dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "B T E"]:
        config = self.options.config
        scale = self.router_scale[...].astype(jnp.float32) * config.hidden_size**-0.5
        return self.proj(normalize(x, scale, config.rms_norm_eps), dropout_key)


def choose(config: ModelConfig, router: Any, logits: Array) -> Choice:
    """A token's share in each expert; of the chosen ones, their weights and numbers.

    The shares of a token sum to 1; weights are as the model's family has them.
    """
    count, routing = config.num_experts_per_tok, config.routing
    normalize = config.norm_topk_prob
    if config.family.router == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        bias = jax.lax.stop_gradient(router.e_score_correction_bias[...])
        preference = scores + bias.astype(jnp.float32)
        experts = best_of_groups(preference, count, routing, counted=2)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if normalize:
            weights /= weights.sum(axis=-1, keepdims=True) + 1e-20
        shares = scores / (scores.sum(axis=-1, keepdims=True) + 1e-20)
    elif routing.groups > 1:
        shares = jax.nn.softmax(logits, axis=-1)
        experts = best_of_groups(shares, count, routing, counted=1)
        weights = jnp.take_along_axis(shares, experts, axis=-1)
    else:
        shares, weights, experts = choose_experts(logits, count, normalize=normalize)
    if config.family.router == "scaled":
        chosen = jax.nn.one_hot(experts, config.num_experts)
        weights *= (chosen * router.per_expert_scale[...]).sum(axis=-1)
    if routing.factor != 1.0:
        weights *= routing.factor
    return shares, weights, experts


def best_of_groups(
    scores: Float32[Array, "B T E"], count: int, routing: Routing, *, counted: int
) -> Int32[Array, "B T K"]:
    """The `count` experts of the highest scores in the best groups of each token.

    A group is as good as the sum of its `counted` best experts' scores.
    """
    if routing.groups > 1:
        by_group = scores.reshape(*scores.shape[:-1], routing.groups, -1)
        worth = jax.lax.top_k(by_group, counted)[0].sum(axis=-1)
        kept = jax.lax.top_k(worth, routing.kept_groups)[1]
        is_kept = jax.nn.one_hot(kept, routing.groups).sum(axis=-2) > 0
        by_group = jnp.where(is_kept[..., None], by_group, -jnp.inf)
        scores = by_group.reshape(scores.shape)
    return jax.lax.top_k(scores, count)[1]
