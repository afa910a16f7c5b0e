"""Gated DeltaNet in the place of attention (Qwen3.5, arXiv:2412.06464).

Each head keeps a matrix that every token fades, corrects and reads, instead of the keys
and values of all tokens. What a token is asked for stands in a matrix of fixed size, so
a row costs as much as it has tokens, whatever its length.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from jaxtrain.kernels.convolution import causal_convolution, continue_convolution
from jaxtrain.kernels.delta_rule import delta_rule
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layer_kinds import DeltaNets
from jaxtrain.models.layers import LayerInputs, LayerOptions, Linear


class Taps(nnx.Module):
    """The weights of a depthwise convolution, as the published [C 1 W] but reversed."""

    def __init__(self, width: int, taps: int, options: LayerOptions, rngs: nnx.Rngs):
        deviation = options.config.initializer_range
        weight = deviation * jax.random.normal(rngs.params(), (taps, 1, width))
        weight = weight.astype(options.param_dtype)
        self.weight = nnx.Param(weight, logical_axes=(None, None, "heads"))


class GatedNorm(nnx.Module):
    """x / rms(x) * scale * silu(gate) over the last axis, in float32."""

    def __init__(self, width: int, options: LayerOptions) -> None:
        self.options = options
        scale = jnp.ones(width, options.param_dtype)
        self.scale = nnx.Param(scale, logical_axes=(None,))

    def __call__(
        self, x: Float[Array, "*dims W"], gate: Float[Array, "*dims W"]
    ) -> Float[Array, "*dims W"]:
        epsilon = self.options.config.rms_norm_eps

        # Keeps only its inputs for the backward pass, as norms do.
        @jax.checkpoint
        def normalize(x: Array, gate: Array, scale: Array) -> Array:
            x32, gate32 = x.astype(jnp.float32), gate.astype(jnp.float32)
            mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
            normed = x32 * jax.lax.rsqrt(mean_square + epsilon) * scale
            return (normed * jax.nn.silu(gate32)).astype(x.dtype)

        return normalize(x, gate, self.scale[...].astype(jnp.float32))


class GatedDeltaNet(nnx.Module):
    """out(norm(delta_rule(silu(convolution(qkv(x))), decay(a(x)), beta(b(x))), z(x))).

    Queries, keys and values of a token are mixed with those of the few tokens before it
    in its document, each feature by itself.
    """

    name = "linear_attn"

    @staticmethod
    def flops(config: ModelConfig, keys_read: int) -> int:
        """FLOPs of fading, correcting and reading the states, forward, a token.

        A token multiplies its head's matrix by the key and by the query and adds a
        product: the recurrence, whatever a kernel does beside.
        """
        del keys_read
        nets = _settings(config)
        return 6 * nets.value_heads * nets.key_width * nets.value_width

    @staticmethod
    def init_state(options: LayerOptions, batch: int, max_len: int) -> dict[str, Array]:
        """No inputs yet, and empty matrices in float32."""
        del max_len
        nets = _settings(options.config)
        inputs = (batch, nets.taps - 1, nets.mixed_width)
        state = (batch, nets.value_heads, nets.key_width, nets.value_width)
        return {
            "inputs": jnp.zeros(inputs, options.compute_dtype),
            "state": jnp.zeros(state, jnp.float32),
        }

    def __init__(self, options: LayerOptions, rngs: nnx.Rngs) -> None:
        self.options = options
        config, nets = options.config, _settings(options.config)
        width, dtype = config.hidden_size, jnp.dtype(options.param_dtype)

        def project(name: str, outputs: int) -> Linear:
            sizes, axes = (width, outputs), ("embed", "heads")
            return Linear(f"{self.name}.{name}", sizes, axes, options, rngs)

        values = nets.value_heads * nets.value_width
        if config.family.fused_delta_net:
            self.in_proj_qkvz = project("in_proj_qkvz", nets.mixed_width + values)
            self.in_proj_ba = project("in_proj_ba", 2 * nets.value_heads)
        else:
            self.in_proj_qkv = project("in_proj_qkv", nets.mixed_width)
            self.in_proj_z = project("in_proj_z", values)
            self.in_proj_b = project("in_proj_b", nets.value_heads)
            self.in_proj_a = project("in_proj_a", nets.value_heads)
        self.conv1d = Taps(nets.mixed_width, nets.taps, options, rngs)
        # As published: rates from 0.01 to 16, and a bias of 1.
        rates = jax.random.uniform(
            rngs.params(), (nets.value_heads,), minval=0.01, maxval=16.0
        )
        log_rates, bias = jnp.log(rates).astype(dtype), jnp.ones_like(rates, dtype)
        self.A_log = nnx.Param(log_rates, logical_axes=("heads",))
        self.dt_bias = nnx.Param(bias, logical_axes=("heads",))
        self.norm = GatedNorm(nets.value_width, options)
        self.out_proj = Linear(
            f"{self.name}.out_proj",
            (nets.value_heads * nets.value_width, width),
            ("heads", "embed"),
            options,
            rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        given: LayerInputs,
        dropout_key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None]:
        """What it adds to the stream, and what the next step needs: inputs and states.

        Padding is not read, and what is added there means nothing.
        """
        nets, constrain = _settings(self.options.config), self.options.constrain
        project = self._projections(x, dropout_key)
        (q, k, v), inputs = self._mix_neighbours(project("qkv"), given)
        z = project("z").reshape(v.shape)
        log_decay, beta = self._gates(project)
        q, k, v, z = (
            constrain(y, ("batch", "sequence", "heads", None)) for y in (q, k, v, z)
        )
        out, state = (given.attend or delta_rule)(
            q,
            k,
            v,
            log_decay,
            beta,
            segment_ids=given.segment_ids,
            initial_state=None if given.state is None else given.state["state"],
        )
        out = self.norm(constrain(out, ("batch", "sequence", "heads", None)), z)
        out = out.reshape(*x.shape[:2], nets.value_heads * nets.value_width)
        kept = None if inputs is None else {"inputs": inputs, "state": state}
        return self.out_proj(out, dropout_key), kept

    def _projections(
        self, x: Array, dropout_key: Array | None
    ) -> Callable[[str], Array]:
        """What x is projected to, by the names "qkv", "z", "a" and "b"."""
        if not self.options.config.family.fused_delta_net:
            return lambda name: getattr(self, f"in_proj_{name}")(x, dropout_key)
        nets = _settings(self.options.config)
        each = nets.value_heads // nets.key_heads  # value heads to a key head
        by_key_head = (*x.shape[:2], nets.key_heads, -1)
        qkvz = self.in_proj_qkvz(x, dropout_key).reshape(by_key_head)
        ends = np.cumsum([nets.key_width, nets.key_width, each * nets.value_width])
        ba = self.in_proj_ba(x, dropout_key).reshape(by_key_head)
        parts = [*jnp.split(qkvz, ends, axis=-1), *jnp.split(ba, 2, axis=-1)]
        q, k, v, z, b, a = (part.reshape(*x.shape[:2], -1) for part in parts)
        qkv = jnp.concatenate([q, k, v], axis=-1)
        return {"qkv": qkv, "z": z, "b": b, "a": a}.__getitem__

    def _mix_neighbours(
        self, projected: Array, given: LayerInputs
    ) -> tuple[list[Array], Array | None]:
        """Queries, keys and values by head, and the convolution's last inputs."""
        nets, dtype = _settings(self.options.config), self.options.compute_dtype
        projected = checkpoint_name(projected, "query")
        taps = self.conv1d.weight[...][:, 0]
        inputs = None
        if given.state is None:
            # What lies between is float32, and quickly computed again.
            @jax.checkpoint
            def mix(projected: Array, taps: Array) -> Array:
                mixed = causal_convolution(projected, taps, given.segment_ids)
                return jax.nn.silu(mixed).astype(dtype)

            mixed = mix(projected, taps)
        else:
            is_token = given.segment_ids != 0
            mixed, inputs = continue_convolution(
                projected, taps, is_token, given.state["inputs"]
            )
            mixed = jax.nn.silu(mixed).astype(dtype)
        keys = nets.key_heads * nets.key_width
        parts: Any = jnp.split(mixed, [keys, 2 * keys], axis=-1)
        widths = (nets.key_width, nets.key_width, nets.value_width)
        return [
            part.reshape(*projected.shape[:2], -1, width)
            for part, width in zip(parts, widths, strict=True)
        ], inputs

    def _gates(self, project: Callable[[str], Array]) -> tuple[Array, Array]:
        """Log decays and shares of each token and value head, in float32."""
        a, b = (project(name).astype(jnp.float32) for name in ("a", "b"))
        rates = jnp.exp(self.A_log[...].astype(jnp.float32))
        steps = jax.nn.softplus(a + self.dt_bias[...].astype(jnp.float32))
        return -rates * steps, jax.nn.sigmoid(b)


def _settings(config: ModelConfig) -> DeltaNets:
    assert isinstance(config.variety, DeltaNets)
    return config.variety
