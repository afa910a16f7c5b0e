"""Short causal convolutions in the place of attention (LFM2, arXiv:2511.23404)."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

from jaxtrain.kernels.convolution import causal_convolution, continue_convolution
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.layer_kinds import ShortConvolutions
from jaxtrain.models.layers import LayerInputs, LayerOptions, Linear


class Taps(nnx.Module):
    """The weights of a depthwise convolution: K taps of each feature, the last first
    to read, as in the published [D 1 K]."""

    def __init__(self, options: LayerOptions, rngs: nnx.Rngs, taps: int) -> None:
        width, dtype = options.config.hidden_size, jnp.dtype(options.param_dtype)
        # As PyTorch starts one: uniform within 1 / sqrt(K).
        bound = 1 / math.sqrt(taps)
        weight = jax.random.uniform(
            rngs.params(), (taps, 1, width), minval=-bound, maxval=bound
        )
        axes = (None, None, "mlp")
        self.weight = nnx.Param(weight.astype(dtype), logical_axes=axes)
        if _settings(options.config).bias:
            self.bias = nnx.Param(jnp.zeros(width, dtype), logical_axes=("mlp",))


class ShortConvolution(nnx.Module):
    """out(c * convolution(b * x)), where b, c and x are projections of the input.

    The convolution mixes a token with the few before it in its document, each feature
    by itself.
    """

    name = "conv"

    @staticmethod
    def flops(config: ModelConfig, keys_read: int) -> int:
        """None beside those of its weights, which are counted as matrices."""
        del config, keys_read
        return 0

    @staticmethod
    def init_state(options: LayerOptions, batch: int, max_len: int) -> dict[str, Array]:
        """No inputs yet: what the first tokens read is 0."""
        del max_len
        before = _settings(options.config).taps - 1
        sizes = (batch, before, options.config.hidden_size)
        return {"inputs": jnp.zeros(sizes, options.compute_dtype)}

    def __init__(self, options: LayerOptions, rngs: nnx.Rngs) -> None:
        self.options = options
        settings, width = _settings(options.config), options.config.hidden_size

        def project(name: str, sizes: tuple[int, int], axes: tuple[str, str]) -> Linear:
            path, bias = f"{self.name}.{name}", settings.bias
            return Linear(path, sizes, axes, options, rngs, bias=bias)

        self.in_proj = project("in_proj", (width, 3 * width), ("embed", "mlp"))
        self.conv = Taps(options, rngs, settings.taps)
        self.out_proj = project("out_proj", (width, width), ("mlp", "embed"))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        given: LayerInputs,
        dropout_key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array] | None]:
        """What it adds to the stream, and what the next step needs: its last inputs."""
        dtype = self.options.compute_dtype
        taps = self.conv.weight[...].astype(dtype)[:, 0]
        parts = jnp.split(self.in_proj(x, dropout_key), 3, axis=-1)
        gate, scale, inner = (
            self.options.constrain(part, ("batch", "sequence", "mlp")) for part in parts
        )
        inputs = gate * inner
        if given.state is None:
            kept, mixed = None, _convolve(inputs, taps, given.segment_ids)
        else:
            is_token = given.segment_ids != 0
            mixed, last = continue_convolution(
                inputs, taps, is_token, given.state["inputs"]
            )
            kept, mixed = {"inputs": last}, mixed.astype(dtype)
        if hasattr(self.conv, "bias"):
            mixed += self.conv.bias[...].astype(dtype)
        return self.out_proj(scale * mixed, dropout_key), kept


@functools.partial(jax.checkpoint, prevent_cse=False)
def _convolve(
    inputs: Float[Array, "B T D"],
    taps: Float[Array, "K D"],
    segment_ids: Int32[Array, "B T"],
) -> Float[Array, "B T D"]:
    """The convolution of whole rows, computed again in the backward pass."""
    return causal_convolution(inputs, taps, segment_ids).astype(inputs.dtype)


def _settings(config: ModelConfig) -> ShortConvolutions:
    assert isinstance(config.variety, ShortConvolutions)
    return config.variety
