"""The modules of a decoder, in Flax NNX.

A module declares its weights, their logical axes and how they start; binding.py splits
it into a static definition and a plain dict of arrays. Weights may be of any float
type: each is cast to the compute type where it is used.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32, Key

from jaxtrain.kernels import fp8
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.models.config import ModelConfig
from jaxtrain.models.expert_parallel import ExpertSpread
from jaxtrain.models.layer_kinds import ATTENTION, LayerKind
from jaxtrain.models.lookup import look_up
from jaxtrain.models.quantization import (
    Quantization,
    dequantize,
    is_fp8,
    multiply,
    quantize,
)
from jaxtrain.models.rope import Rotary, rotate
from jaxtrain.types import LogicalAxes

# (query, key, value, sinks where the layer has some) -> (what each query read, [B T N
# H]; whatever must be kept).
Attend = Callable[..., tuple[Array, Any]]
# (function, axes of each argument, axes of the result, axis summed over) -> the same
# function, run on each device's own part; see sharding.ShardingPlan.map_shards.
MapShards = Callable[
    [Callable[..., Array], tuple[LogicalAxes, ...], LogicalAxes, str],
    Callable[..., Array],
]

# What attention keeps of each token in generation.
KEYS_VALUES = ("key", "value")
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class LoraShape:
    """The adapters of a decoder: y += dropout(x) A B * scaling (arXiv:2106.09685).

    `targets` are module paths within a layer, such as "self_attn.q_proj", and
    "embed_tokens" and "lm_head". `dropout` is the share of inputs that an adapter does
    not see in training; embeddings see all. `own` has (path, rank, scaling) of targets
    that differ from `r` and `scaling`. With `use_dora`, columns of W + A B * scaling
    are brought to trained lengths (arXiv:2402.09353). `ties_head`: where the head is
    the embedding, the adapter of embed_tokens is the head's too.
    """

    r: int
    scaling: float
    dropout: float = 0.0
    targets: frozenset[str] = frozenset()
    own: tuple[tuple[str, int, float], ...] = ()
    use_dora: bool = False
    ties_head: bool = False

    def rank_and_scaling(self, path: str) -> tuple[int, float]:
        """Rank and scaling of the adapter of the module at `path`."""
        for own_path, rank, scaling in self.own:
            if own_path == path:
                return rank, scaling
        return self.r, self.scaling

    def renamed(self, name_of: Callable[[str], str | None]) -> "LoraShape":
        """The same with other paths; those that get None have no adapter."""
        names = {path: name_of(path) for path in self.targets}
        return dataclasses.replace(
            self,
            targets=frozenset(name for name in names.values() if name is not None),
            own=tuple(
                (name, rank, scaling)
                for path, rank, scaling in self.own
                if (name := names.get(path)) is not None
            ),
        )

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"lora.r = {self.r}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout = {self.dropout}: must be in [0, 1)")


def on_one_device(function: Callable[..., Array], *_: Any) -> Callable[..., Array]:
    """The MapShards of a single device, which returns the function itself."""
    return function


def unconstrained(x: Array, logical_axes: LogicalAxes) -> Array:
    """The `constrain` of a single device, which returns x unchanged."""
    return x


@dataclasses.dataclass(frozen=True)
class Options:
    """What every module of one decoder shares; static.

    `fp8`: layers' kernels are multiplied in eight bits (models/fp8.py).
    `balances_experts`: the backward pass tells routers' biases of the experts' loads
    (balance.py).
    `reduces_in_float32`: gradients of kernels, and of the head, are never rounded to
    the compute type, so that devices add them up in float32.
    `joins_products`: kernels that multiply the same rows do so side by side, as one,
    where layers are compiled one by one and nothing is computed again.
    """

    config: ModelConfig
    _: dataclasses.KW_ONLY
    compute_dtype: str = "bfloat16"
    param_dtype: str = "float32"
    lora: LoraShape | None = None
    quantization: Quantization | None = None
    fp8: bool = False
    balances_experts: bool = False
    reduces_in_float32: bool = False
    joins_products: bool = False
    constrain: Callable[[Array, LogicalAxes], Array] = unconstrained
    map_shards: MapShards = on_one_device
    layout: Layout | None = None
    experts: ExpertSpread | None = None

    @property
    def device(self) -> jax.Device | None:
        """A device of the mesh, which need not be present; None without a mesh."""
        if self.layout is None or self.layout.mesh is None:
            return None
        return self.layout.mesh.devices.flat[0]


@dataclasses.dataclass(frozen=True)
class LayerOptions(Options):
    """The same for layers of one kind: `config` has the sizes that they have."""

    kind: LayerKind = ATTENTION


class LayerInputs(NamedTuple):
    """The inputs of a layer beside the stream, of which each mixer takes what it needs.

    `segment_ids` tell the documents of a row apart; 0 is padding. `rotary` and `attend`
    are for attention, and None for other mixers. `state` is what the mixer kept at the
    last step of generation, None where whole rows are run. `shared` is what earlier
    layers handed on, by names of their own; `per_layer` what this layer alone is given
    of the tokens (per_layer.py).
    """

    segment_ids: Int32[Array, "B T"]
    rotary: Rotary | None = None
    attend: Any = None
    state: Any = None
    shared: Any = None
    per_layer: Any = None


class HandedOn(NamedTuple):
    """What a mixer keeps, and what it hands on to later layers, by name."""

    kept: Any
    shared: Mapping[str, Any]


def without_quantization(options: Options) -> Options:
    """The same for modules whose kernels stay whole."""
    return dataclasses.replace(options, quantization=None)


class LoraParam(nnx.Param):
    """A weight of an adapter."""


class Adapted(nnx.Module):
    """A module with a matrix, to whose output an adapter may add its own.

    The adapter's weights belong to the module, because files store them there.
    """

    def _init_adapter(
        self,
        path: str,
        matrix: Float[Array, "I O"],
        axes: tuple[str | None, ...],
        options: Options,
        rngs: nnx.Rngs,
    ) -> None:
        """Declare the adapter's weights if `path` is a target."""
        lora, dtype = options.lora, jnp.dtype(options.param_dtype)
        if lora is None or path not in lora.targets:
            return
        inputs, outputs = matrix.shape
        rank, self.scaling = lora.rank_and_scaling(path)
        a, b = jnp.zeros((inputs, rank)), jnp.zeros((rank, outputs))
        if path == "embed_tokens":  # as in PEFT, the other way round than elsewhere
            b = jax.random.normal(rngs.params(), b.shape)
        else:
            # Kaiming-uniform with a = sqrt(5) has the bound 1 / sqrt(inputs).
            bound = 1 / math.sqrt(inputs)
            a = jax.random.uniform(rngs.params(), a.shape, minval=-bound, maxval=bound)
        rank_axis = "lora_rank"
        self.lora_a = LoraParam(a.astype(dtype), logical_axes=(axes[0], rank_axis))
        self.lora_b = LoraParam(b.astype(dtype), logical_axes=(rank_axis, axes[1]))
        if lora.use_dora:
            lengths = jnp.linalg.norm(matrix, axis=0).astype(dtype)
            self.lora_magnitude = LoraParam(lengths, logical_axes=axes[1:])

    def _low_rank(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """What the adapter adds to logits of x, summed and kept in float32."""
        a, b = (leaf[...].astype(x.dtype) for leaf in (self.lora_a, self.lora_b))
        return jnp.matmul(x @ a * self.scaling, b, preferred_element_type=jnp.float32)

    def _dora_gain(self, matrix: Float[Array, "I O"]) -> Float[Array, "O"]:
        a, b, magnitude = self.lora_a[...], self.lora_b[...], self.lora_magnitude[...]
        return dora_gain(matrix, a, b, magnitude, self.scaling)


class Linear(Adapted):
    """y = x kernel + bias, and an adapter's part where it has one.

    The kernel may be kept in few bits, but for that of the head.
    """

    def __init__(
        self,
        path: str,
        sizes: tuple[int, int],
        axes: tuple[str | None, str | None],
        options: Options,
        rngs: nnx.Rngs,
        *,
        bias: bool = False,
    ) -> None:
        self.path, self.axes, self.options = path, axes, options
        dtype = jnp.dtype(options.param_dtype)
        deviation = options.config.initializer_range
        kernel = deviation * jax.random.normal(rngs.params(), sizes)
        if options.quantization is None or path == "lm_head":
            self.kernel = nnx.Param(kernel.astype(dtype), logical_axes=axes)
        else:
            codes, scales = quantize(kernel, options.quantization)
            self.kernel_codes = nnx.Param(codes, logical_axes=axes)
            of_scales = (None, None) if is_fp8(codes) else axes
            self.kernel_scales = nnx.Param(scales, logical_axes=of_scales)
        if bias:
            self.bias = nnx.Param(jnp.zeros(sizes[1:], dtype), logical_axes=axes[1:])
        self._init_adapter(path, kernel, axes, options, rngs)

    def __call__(
        self,
        x: Float[Array, "B T I"] | fp8.Shared,
        dropout_key: Key[Array, ""] | None = None,
        ready: Mapping[str, Array] = MappingProxyType({}),
    ) -> Float[Array, "B T O"]:
        """`ready`: products of x that were taken elsewhere, by the matrix's name."""
        dtype = self.options.compute_dtype
        y = ready["kernel"] if "kernel" in ready else self._multiply(x)
        x = x.value if isinstance(x, fp8.Shared) else x
        lora = self.options.lora
        if lora is not None and hasattr(self, "lora_a"):
            with jax.named_scope("lora"):
                own_key = fold_in_name(dropout_key, self.path)
                seen = drop_inputs(x, lora.dropout, own_key)
                low = ready.get("lora_a")
                low = seen @ self.lora_a[...].astype(dtype) if low is None else low
                added = low * self.scaling @ self.lora_b[...].astype(dtype)
                if not lora.use_dora:
                    y += added
                elif seen is x:
                    y = self._dora_gain(self._matrix()).astype(dtype) * (y + added)
                else:
                    # As in PEFT, the base's change of length sees the dropout too.
                    gain = self._dora_gain(self._matrix()).astype(dtype)
                    y += (gain - 1) * self._multiply(seen) + gain * added
        if hasattr(self, "bias"):
            y += self.bias[...].astype(dtype)
        return y

    def narrow_matrices(self, dropout_key: Key[Array, ""] | None) -> dict[str, Array]:
        """What may share a product with other modules' beside an adapter, by its name.

        The adapter's A, if it sees all of the input, and a kernel of few columns.
        """
        lora, layout = self.options.lora, self.options.layout
        if lora is None or not hasattr(self, "lora_a"):
            return {}
        drops = dropout_key is not None and lora.dropout > 0
        found = {} if drops else {"lora_a": self.lora_a[...]}
        # Columns that devices split stay apart, for so do these devices' results.
        splits = layout is not None and layout.count(layout.heads) > 1
        if hasattr(self, "kernel") and self._fp8_weight() is None and not splits:
            kernel = self.kernel[...]
            if 2 * kernel.shape[1] < kernel.shape[0]:
                found["kernel"] = kernel
        return found

    def _multiply(self, x: Float[Array, "B T I"] | fp8.Shared) -> Float[Array, "B T O"]:
        """x kernel, in the compute type, or by codes of eight bits."""
        weight = self._fp8_weight()
        if weight is not None:
            x = x if isinstance(x, fp8.Shared) else fp8.share(x)
            gather = functools.partial(_gather, self.options, self.axes)
            site = fp8.Site(self.path, gather, of_codes=_is_for_tpus(self.options))
            return fp8.project(site, x, weight)
        x = x.value if isinstance(x, fp8.Shared) else x
        if hasattr(self, "kernel"):
            kernel = self.kernel[...]
            if self.options.reduces_in_float32:
                return _project(x, kernel)
            return x @ kernel.astype(self.options.compute_dtype)
        return multiply(x, self.kernel_codes[...], self.kernel_scales[...])

    def _fp8_weight(self) -> fp8.Weight | None:
        """The kernel in eight bits, where it is given or kept so."""
        if hasattr(self, "kernel"):
            kernel: Any = self.kernel.get_value()
            return kernel if isinstance(kernel, fp8.Weight) else None
        codes, scales = self.kernel_codes[...], self.kernel_scales[...]
        if not is_fp8(codes):
            return None
        return fp8.Weight(None, codes, scales.reshape(()))

    def _matrix(self) -> Float[Array, "I O"]:
        if hasattr(self, "kernel"):
            return self.kernel[...]
        return dequantize(self.kernel_codes[...], self.kernel_scales[...])


@jax.custom_vjp
def _project(
    x: Float[Array, "B T I"], kernel: Float[Array, "I O"]
) -> Float[Array, "B T O"]:
    """x kernel in x's type; the kernel's gradient is float32, not rounded to that."""
    return x @ kernel.astype(x.dtype)


def _project_backward(
    inputs: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, kernel = inputs
    of_kernel = jax.lax.dot_general(
        x, gradient, (((0, 1), (0, 1)), ((), ())), preferred_element_type=jnp.float32
    )
    return gradient @ kernel.astype(x.dtype).T, of_kernel.astype(kernel.dtype)


_project.defvjp(lambda x, kernel: (_project(x, kernel), (x, kernel)), _project_backward)


def _gather(options: Options, axes: LogicalAxes, codes: Array) -> Array:
    """A kernel's codes as products read them, whole where rows are split."""
    return options.constrain(codes, axes)


def _is_for_tpus(options: Options) -> bool:
    return (options.layout or Layout()).platform == "tpu"


def project_all(
    projections: Sequence[Linear], x: Array, dropout_key: Key[Array, ""] | None
) -> list[Array]:
    """What each of the projections makes of the same x [B T I].

    Under fp8 it is quantized once for them all. What is narrow where there are adapters
    is multiplied by `multiply_each`.
    """
    # Few rows, as in generating texts, are not worth a copy of the kernels.
    if projections[0].options.joins_products and x[..., 0].size >= x.shape[-1]:
        kernels = [each.kernel[...].astype(x.dtype) for each in projections]
        product = x @ jnp.concatenate(kernels, axis=-1)
        parts = jax.lax.split(product, [each.shape[1] for each in kernels], axis=-1)
        pairs = zip(projections, parts, strict=True)
        return [project(x, dropout_key, {"kernel": part}) for project, part in pairs]
    read = fp8.share(x) if projections[0].options.fp8 else x
    narrow = [each.narrow_matrices(dropout_key) for each in projections]
    matrices = [matrix for found in narrow for matrix in found.values()]
    if len(matrices) < 2:
        return [project(read, dropout_key) for project in projections]
    products = iter(multiply_each(x, [w.astype(x.dtype) for w in matrices]))
    return [
        project(read, dropout_key, {name: next(products) for name in found})
        for project, found in zip(projections, narrow, strict=True)
    ]


@jax.custom_vjp
def multiply_each(
    x: Float[Array, "*B I"], matrices: list[Array]
) -> list[Float[Array, "*B O"]]:
    """x W of each matrix W [I O], with one product for the gradient of x.

    Each alone would have one of its own, and each of these writes, and is added to, an
    array as large as x, which takes longer than a narrow product (RESULTS.md). The
    price is a copy of what is narrow.
    """
    return [x @ matrix for matrix in matrices]


def _multiply_each_backward(
    inputs: tuple[Array, list[Array]], gradients: list[Array]
) -> tuple[Array, list[Array]]:
    """Gradients of frozen matrices are products apart, which XLA leaves out."""
    x, matrices = inputs
    of_x = jnp.concatenate(gradients, -1) @ jnp.concatenate(matrices, -1).T
    rows = tuple(range(x.ndim - 1))
    return of_x, [jnp.tensordot(x, each, (rows, rows)) for each in gradients]


multiply_each.defvjp(
    lambda x, matrices: (multiply_each(x, matrices), (x, matrices)),
    _multiply_each_backward,
)


def dora_gain(
    weight: Float[Array, "I O"],
    lora_a: Float[Array, "I R"],
    lora_b: Float[Array, "R O"],
    magnitude: Float[Array, "O"],
    scaling: float,
) -> Float[Array, "O"]:
    """The trained lengths divided by the column lengths of W + A B * scaling, float32.

    The gradient treats the column lengths as constants (arXiv:2402.09353, section 4.3).
    """
    w, a, b = (
        jax.lax.stop_gradient(leaf).astype(jnp.float32)
        for leaf in (weight, lora_a, lora_b)
    )
    lengths = jnp.linalg.norm(w + (scaling * a) @ b, axis=0)
    return magnitude.astype(jnp.float32) / lengths


def fold_in_name(key: Key[Array, ""] | None, name: str) -> Key[Array, ""] | None:
    """A key of this module's own, whatever the order in which modules run."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(name.encode()))


def drop_inputs(x: Array, rate: float, key: Key[Array, ""] | None) -> Array:
    """Zero a share `rate` of x and scale the rest up; without a key, x itself."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


def multiplied(x: Array, factor: float | Array) -> Array:
    """x * factor, where the factor is not rounded to the type of x."""
    if isinstance(factor, float | int) and factor == 1.0:
        return x
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (arXiv:1910.07467).

    In a family of LayerNorms (arXiv:1607.06450) the mean is subtracted first.
    """

    def __init__(
        self,
        width: int,
        axis: str | None,
        options: Options,
        *,
        epsilon: float | None = None,
    ) -> None:
        """`epsilon`: of its own, where it is not the config's."""
        self.options = options
        self.epsilon = options.config.rms_norm_eps if epsilon is None else epsilon
        self.offset = float(options.config.family.unit_offset_norm)
        scale = jnp.full(width, 1.0 - self.offset, options.param_dtype)
        self.scale = nnx.Param(scale, logical_axes=(axis,))

    def __call__(self, x: Float[Array, "*dims W"]) -> Float[Array, "*dims W"]:
        scale = self.scale[...].astype(jnp.float32) + self.offset
        config = self.options.config
        centred = config.family.norm_kind == "layer"
        return normalize(x, scale, self.epsilon, centred=centred)


def normalize(
    x: Float[Array, "*dims W"],
    scale: Float[Array, "W"],
    epsilon: float,
    *,
    centred: bool = False,
) -> Float[Array, "*dims W"]:
    """x / rms(x) * scale, in float32 and computed again in the backward pass.

    `centred`: the mean is subtracted first.
    """

    def normalized(x: Array, scale: Array) -> Array:
        x32 = x.astype(jnp.float32)
        if centred:
            x32 -= jnp.mean(x32, axis=-1, keepdims=True)
        mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + epsilon) * scale).astype(x.dtype)

    return _recomputed(normalized)(x, scale)


def _recomputed(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function`, keeping only its inputs for the backward pass.

    For elementwise work: its intermediates, some of them float32, cost far more memory
    than computing them again costs time.
    """
    return jax.checkpoint(function, prevent_cse=False)


class Attention(nnx.Module):
    """Grouped-query self-attention (arXiv:2305.13245) with rotary positions."""

    name = "self_attn"

    @staticmethod
    def flops(config: ModelConfig, keys_read: int) -> int:
        """FLOPs of scores and weighted values, forward, a token."""
        return 4 * config.num_attention_heads * config.head_dim * keys_read

    @staticmethod
    def init_state(options: LayerOptions, batch: int, max_len: int) -> dict[str, Array]:
        """An empty cache of one layer: room for the keys and values of each row."""
        config = options.config
        sizes = (batch, max_len, config.num_key_value_heads, config.head_dim)
        return {name: jnp.zeros(sizes, options.compute_dtype) for name in KEYS_VALUES}

    def __init__(self, options: LayerOptions, rngs: nnx.Rngs) -> None:
        self.options = options
        config = options.config
        width, head_dim = config.hidden_size, config.head_dim
        q_width = config.num_attention_heads * head_dim
        kv_width = config.num_key_value_heads * head_dim

        def project(name: str, outputs: int, axis: str) -> Linear:
            sizes, axes = (width, outputs), ("embed", axis)
            path = f"self_attn.{name}"
            return Linear(path, sizes, axes, options, rngs, bias=config.qkv_bias)

        if config.family.fused == "all":
            self.qkv_proj = project("qkv_proj", q_width + 2 * kv_width, "heads")
        else:
            gates = q_width if config.family.gated_attention else 0
            self.q_proj = project("q_proj", q_width + gates, "heads")
            self.k_proj = project("k_proj", kv_width, "kv_heads")
            self.v_proj = project("v_proj", kv_width, "kv_heads")
        sizes, axes, bias = (q_width, width), ("heads", "embed"), config.o_bias
        self.o_proj = Linear("self_attn.o_proj", sizes, axes, options, rngs, bias=bias)
        if config.qk_norm == "head":
            self.q_norm = RMSNorm(head_dim, None, options)
            self.k_norm = RMSNorm(head_dim, None, options)
        elif config.qk_norm == "width":
            self.q_norm = RMSNorm(q_width, "heads", options)
            self.k_norm = RMSNorm(kv_width, "kv_heads", options)
        if config.family.attention_sinks:
            sinks = jax.random.normal(rngs.params(), (config.num_attention_heads,))
            sinks *= config.initializer_range
            self.sinks = nnx.Param(
                sinks.astype(options.param_dtype), logical_axes=(None,)
            )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        given: LayerInputs,
        dropout_key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        config, constrain = self.options.config, self.options.constrain
        rotary, attend = given.rotary, given.attend
        assert rotary is not None
        if config.family.fused == "all":
            q_width = config.num_attention_heads * config.head_dim
            kv_width = config.num_key_value_heads * config.head_dim
            fused, ends = self.qkv_proj(x, dropout_key), [q_width, q_width + kv_width]
            projected = jnp.split(fused, ends, axis=-1)
        else:
            projections = (self.q_proj, self.k_proj, self.v_proj)
            projected = project_all(projections, x, dropout_key)
        if config.qk_norm == "width":
            q, k, v = projected
            projected = [self.q_norm(q), self.k_norm(k), v]
        heads = (*x.shape[:2], -1, config.head_dim)
        gate = None
        if config.family.gated_attention:
            queries = projected[0].reshape(*heads[:3], 2 * config.head_dim)
            projected[0], gate = jnp.split(queries, 2, axis=-1)
        q, k, v = (y.reshape(heads) for y in projected)
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        pairs = config.family.rotary_pairs
        q, k = (rotate(y, rotary.cos, rotary.sin, pairs) for y in (q, k))
        if rotary.query_scale is not None:
            q = multiplied(q, rotary.query_scale[:, :, None, None])
        q = constrain(q, ("batch", "sequence", "heads", None))
        k = constrain(k, ("batch", "sequence", "kv_heads", None))
        v = constrain(v, ("batch", "sequence", "kv_heads", None))
        q = checkpoint_name(q, "query")
        k, v = checkpoint_name(k, "key"), checkpoint_name(v, "value")
        sinks = (self.sinks[...],) if config.family.attention_sinks else ()
        context, kept = attend(q, k, v, *sinks)
        context = constrain(context, ("batch", "sequence", "heads", None))
        if gate is not None:
            context *= jax.nn.sigmoid(gate)
        return self.o_proj(context.reshape(*x.shape[:2], -1), dropout_key), kept


class Mlp(nnx.Module):
    """down(activation(gate(x)) * up(x)), a gated linear unit (arXiv:2002.05202)."""

    def __init__(
        self,
        options: Options,
        rngs: nnx.Rngs,
        *,
        module: str | None = None,
        inner: int | None = None,
    ) -> None:
        """`module`: its path in a layer, `inner`: its width, unless the usual ones."""
        self.options = options
        config, names = options.config, options.config.family.mlp_names
        width, inner = config.hidden_size, inner or config.intermediate_size

        def project(name: str, sizes: tuple[int, int], axes: tuple[str, str]) -> Linear:
            path = f"{module or names.module}.{name}"
            return Linear(path, sizes, axes, options, rngs, bias=config.mlp_bias)

        inwards = ("embed", "mlp")
        if config.family.fused == "none":
            self.gate_proj = project("gate_proj", (width, inner), inwards)
            self.up_proj = project("up_proj", (width, inner), inwards)
        else:
            gate_up = project(names.gate_up, (width, 2 * inner), inwards)
            setattr(self, names.gate_up, gate_up)
        down = project(names.down, (inner, width), ("mlp", "embed"))
        setattr(self, names.down, down)

    def __call__(
        self, x: Float[Array, "B T D"], dropout_key: Key[Array, ""] | None
    ) -> Float[Array, "B T D"]:
        config, constrain = self.options.config, self.options.constrain
        names = config.family.mlp_names
        if config.family.fused == "none":
            gate, up = project_all((self.gate_proj, self.up_proj), x, dropout_key)
        else:
            fused = getattr(self, names.gate_up)(x, dropout_key)
            gate, up = jnp.split(fused, 2, axis=-1)
        gate, up = checkpoint_name(gate, "mlp_gate"), checkpoint_name(up, "mlp_up")
        activation = ACTIVATIONS[config.hidden_act]
        inner = _recomputed(lambda gate, up: activation(gate) * up)(gate, up)
        inner = constrain(inner, ("batch", "sequence", "mlp"))
        return getattr(self, names.down)(inner, dropout_key)


class Embedding(Adapted):
    """Token vectors, with an adapter's part; Gemma's are scaled by sqrt(width)."""

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        self.options = options
        config, dtype = options.config, jnp.dtype(options.param_dtype)
        sizes = (config.vocab_size, config.hidden_size)
        table = config.initializer_range * jax.random.normal(rngs.params(), sizes)
        self.embedding = nnx.Param(table.astype(dtype), logical_axes=("vocab", "embed"))
        self._init_adapter("embed_tokens", table, ("vocab", "embed"), options, rngs)

    def __call__(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T D"]:
        config, dtype = self.options.config, self.options.compute_dtype
        read = functools.partial(look_up, self.options.layout)
        x = read(self.embedding[...], tokens, dtype)
        lora = self.options.lora
        if lora is not None and hasattr(self, "lora_a"):
            with jax.named_scope("lora"):
                low = read(self.lora_a[...], tokens, dtype)
                x += low * self.scaling @ self.lora_b[...].astype(dtype)
                if lora.use_dora:
                    x *= self._dora_gain(self.embedding[...]).astype(dtype)
        if config.family.scale_embeddings:
            # The factor itself is rounded to the compute type, as transformers does.
            x *= jnp.asarray(math.sqrt(config.hidden_size), dtype)
        return multiplied(x, config.embedding_multiplier)


class TiedHead(Adapted):
    """The LoRA weights of a tied head, whose matrix is the embedding's, E^T [D V].

    head.py applies them.
    """

    def __init__(
        self, table: Float[Array, "V D"], options: Options, rngs: nnx.Rngs
    ) -> None:
        matrix = table.astype(jnp.float32).T
        self._init_adapter("lm_head", matrix, ("embed", "vocab"), options, rngs)


class EmbeddingAndHead(nnx.Module):
    """The parts on either side of the layers: embedding, final norm, unembedding."""

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        config, lora = options.config, options.lora
        self.embed_tokens = Embedding(options, rngs)
        self.norm = RMSNorm(config.hidden_size, "embed", options)
        self.lm_head: Linear | TiedHead
        if not config.tie_word_embeddings:
            sizes = (config.hidden_size, config.vocab_size)
            axes = ("embed", "vocab")
            self.lm_head = Linear("lm_head", sizes, axes, options, rngs)
        elif lora is not None and "lm_head" in lora.targets:
            self.lm_head = TiedHead(self.embed_tokens.embedding[...], options, rngs)
