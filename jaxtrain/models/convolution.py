"""Short causal convolutions in the place of attention (LFM2, arXiv:2511.23404)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32, Key

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
            kept, mixed = None, convolve(inputs, taps, given.segment_ids)
        else:
            is_real = given.segment_ids != 0
            mixed, last = convolve_after(inputs, taps, given.state["inputs"], is_real)
            kept = {"inputs": last}
        if hasattr(self.conv, "bias"):
            mixed += self.conv.bias[...].astype(dtype)
        return self.out_proj(scale * mixed, dropout_key), kept


def convolve(
    inputs: Float[Array, "B T D"],
    taps: Float[Array, "K D"],
    segment_ids: Int32[Array, "B T"],
) -> Float[Array, "B T D"]:
    """sum_j taps[K-1-j] * inputs[t-j], over the tokens of t's own segment.

    The sum is float32, and computed again in the backward pass.
    """
    count, length = taps.shape[0], inputs.shape[1]

    def mix(inputs: Array, taps: Array) -> Array:
        x, weights = inputs.astype(jnp.float32), taps.astype(jnp.float32)
        total = x * weights[-1]
        for back in range(1, min(count, length)):
            before = ((0, 0), (back, 0))
            moved = jnp.pad(x, (*before, (0, 0)))[:, :length]
            segments = jnp.pad(segment_ids, before)[:, :length]
            is_own = (segments == segment_ids) & (segments != 0)
            total += jnp.where(is_own[..., None], moved, 0) * weights[-1 - back]
        return total.astype(inputs.dtype)

    return jax.checkpoint(mix, prevent_cse=False)(inputs, taps)


def convolve_after(
    inputs: Float[Array, "B T D"],
    taps: Float[Array, "K D"],
    last: Float[Array, "B before D"],
    is_real: Int32[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Float[Array, "B before D"]]:
    """The same for documents that go on, one a row, whose `last` inputs are given.

    Padding on either side of the real tokens is passed over.

    Returns:
        The sums, of no meaning at padding, and each row's last inputs now.
    """
    before, length = taps.shape[0] - 1, inputs.shape[1]
    # Real tokens moved to the front, behind the inputs that came before.
    order = jnp.argsort(~is_real, axis=1, stable=True)
    moved = jnp.take_along_axis(inputs, order[..., None], axis=1)
    line = jnp.concatenate([last, moved], axis=1)
    wide, weights = line.astype(jnp.float32), taps.astype(jnp.float32)
    mixed = sum(wide[:, j : j + length] * weights[j] for j in range(before + 1))
    mixed = jnp.asarray(mixed).astype(inputs.dtype)
    places = jnp.argsort(order, axis=1)
    mixed = jnp.take_along_axis(mixed, places[..., None], axis=1)
    ends = is_real.sum(axis=1)[:, None] + jnp.arange(before)
    return mixed, jnp.take_along_axis(line, ends[..., None], axis=1)


def _settings(config: ModelConfig) -> ShortConvolutions:
    assert isinstance(config.variety, ShortConvolutions)
    return config.variety
