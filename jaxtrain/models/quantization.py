"""A frozen base in few bits: NF4 or int8 by blocks, as QLoRA keeps it, or fp8.

A kernel W [in out] is cut into blocks of inputs, 64 by default, of each output. A block
is kept as its largest magnitude s (float32) and a code c for each entry, W ~ s v(c)
(arXiv:2305.14314, section 3). NF4: v are the 16 values of that paper's appendix E, two
codes to a byte, 4.5 bits an entry in all. int8: v(c) = c / 127.5, 8.5 bits. fp8: one
scale for the whole kernel of a layer, and the codes are what products read
(kernels/fp8), which does not train by other numbers than it is kept in.

In a parameter tree `kernel_codes` and `kernel_scales` stand in place of `kernel`, and
names of the same form in place of experts' `gate_proj`, `up_proj` and `down_proj`. They
are plain arrays, which scans, checkpoints and meshes take as any other. Qwix chooses
the codes; reading them needs no extra package.
"""

import dataclasses
import importlib.util
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Num

from jaxtrain.kernels import fp8

CODES, SCALES = "kernel_codes", "kernel_scales"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # of experts
# Weights that are float32 whatever type the others have (routers.Float32Router).
STAY_FLOAT32 = frozenset({"router_weight", "e_score_correction_bias"})
KINDS = ("nf4", "int8", "fp8")
BLOCK_SIZE = 64
# Quantiles of a normal distribution, with an exact 0 and symmetric ends.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip

Codes = Num[Array, "*L C O"]  # C: inputs, two to a byte under NF4
Scales = Float32[Array, "*L N O"]  # N blocks of inputs; under fp8 [*L 1 1]


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How kernels are kept: `kind` is one of KINDS, `block_size` inputs share a scale.

    `experts`: whether a mixture's experts are kept so too.

    Raises:
        ValueError: no such kind, or an odd block under NF4.
    """

    kind: str
    block_size: int = BLOCK_SIZE
    experts: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"quantization = {self.kind!r} is unknown: choose {' or '.join(KINDS)}"
            )
        if self.block_size < 2 or self.block_size % 2:
            raise ValueError(
                f"quantization_block_size = {self.block_size} must be even and above 0"
            )


def requested(
    kind: str | None, block_size: int, *, experts: bool = True
) -> Quantization | None:
    """How a base is to be kept: None for `kind` None, else with Qwix at hand.

    Raises:
        ValueError: Qwix is not installed.
    """
    if kind is None:
        return None
    if kind != "fp8" and importlib.util.find_spec("qwix") is None:
        raise ValueError(
            "training.lora.quantization needs the package qwix: pip install"
            " 'jaxtrain[qlora]', or pip install 'qwix>=0.1.5'"
        )
    return Quantization(kind, block_size, experts and kind != "fp8")


def kept_as(name: str) -> tuple[str, str]:
    """What stands in a tree in place of a matrix that is kept in few bits."""
    return f"{name}_codes", f"{name}_scales"


def quantizes(
    path: tuple[str, ...], modules: Collection[str], how: Quantization
) -> bool:
    """Whether the leaf at a path within a layer is a matrix that `how` keeps so.

    `modules`: the paths of linear layers. An expert's router and biases stay whole.
    """
    if path[-2:-1] == ("experts",):
        return how.experts and path[-1] in PROJECTIONS
    return path[-1] == "kernel" and ".".join(path[:-1]) in modules


def quantize(kernel: Float[Array, "*L I O"], how: Quantization) -> tuple[Codes, Scales]:
    """Codes and scales of kernels. Traceable; temporaries are of one layer.

    Raises:
        ValueError: the block does not divide the inputs.
    """
    if how.kind == "fp8":
        kept = fp8.quantize_kernel(kernel)
        return kept.codes, kept.unit[..., None, None]
    import qwix  # an extra; `requested` says how to get it

    width_in = kernel.shape[-2]
    if width_in % how.block_size:
        raise ValueError(
            f"quantization_block_size = {how.block_size} does not divide the"
            f" {width_in} inputs of a kernel: choose a divisor"
        )

    def quantize_one(matrix: Array) -> tuple[Array, Array]:
        quantized = qwix.quantize(
            matrix.astype(jnp.float32),
            "nf4" if how.kind == "nf4" else jnp.int8,
            channelwise_axes=(1,),
            tiled_axes={0: how.block_size},
        )
        codes = quantized.qvalue
        if how.kind == "nf4":
            codes = codes.astype(jnp.uint8)
            codes = codes[0::2] | (codes[1::2] << 4)
        return codes, quantized.scale

    if kernel.ndim == 2:
        return quantize_one(kernel)
    codes, scales = jax.lax.map(quantize_one, kernel.reshape(-1, *kernel.shape[-2:]))
    outer = kernel.shape[:-2]
    return codes.reshape(*outer, *codes.shape[1:]), scales.reshape(
        *outer, *scales.shape[1:]
    )


def dequantize(codes: Codes, scales: Scales) -> Float32[Array, "*L I O"]:
    """The kernels that codes and scales stand for."""
    if codes.dtype == jnp.uint8:
        pairs = jnp.stack([codes & 15, codes >> 4], axis=-2)
        values = _look_up(pairs.reshape(kernel_shape(codes)))
    else:
        values = codes.astype(jnp.float32)
    if is_fp8(codes):
        return values * scales
    *layers, blocks, width_out = scales.shape
    split = values.reshape(*layers, blocks, -1, width_out)
    return (split * scales[..., None, :]).reshape(values.shape)


def is_fp8(codes: Any) -> bool:
    """Whether these codes are numbers of eight bits themselves."""
    return bool(codes.dtype == fp8.INPUT)


def _look_up(codes: Num[Array, "*dims"]) -> Float32[Array, "*dims"]:
    """NF4's values, by halving the table four times: no gather: TPUs are slow at it."""
    values: list[Any] = [jnp.float32(value) for value in NF4_VALUES]
    for bit in range(4):
        is_odd = (codes >> bit) & 1 == 1
        values = [
            jnp.where(is_odd, high, low)
            for low, high in zip(values[::2], values[1::2], strict=True)
        ]
    return values[0]


def kernel_shape(codes: Any) -> tuple[int, ...]:
    """The shape [... in out] of what `codes`, or anything with its shape, stand for."""
    *layers, rows, width_out = codes.shape
    return *layers, rows * (2 if codes.dtype == jnp.uint8 else 1), width_out


def multiply(
    x: Float[Array, "*B I"], codes: Codes, scales: Scales
) -> Float[Array, "*B O"]:
    """x W, in the type of x. W is made anew in the backward pass, never kept."""

    def product(x: Array, codes: Array, scales: Array) -> Array:
        return x @ dequantize(codes, scales).astype(x.dtype)

    return jax.checkpoint(product, prevent_cse=False)(x, codes, scales)


# --- whole trees -------------------------------------------------------------------


def is_quantized(tree: Mapping[str, Any]) -> bool:
    """Whether any kernel of a parameter tree is kept as codes."""
    return any(
        is_quantized(below) if isinstance(below, Mapping) else name.endswith("_codes")
        for name, below in tree.items()
    )


def is_kept(path: Any) -> bool:
    """Whether a leaf has a type of its own: of quantized kernels, float32 routers."""
    return is_part(path[-1].key) or path[-1].key in STAY_FLOAT32


def is_part(name: str) -> bool:
    """Whether a leaf of this name is the codes or the scales of a matrix."""
    return name.endswith(("_codes", "_scales"))


def quantize_tree(
    params: Mapping[str, Any], modules: Collection[str], how: Quantization
) -> dict[str, Any]:
    """The same tree with the kernels of `modules` (paths within a layer) as codes.

    So are experts' matrices, unless `how` excepts them. They leave `params`' own dicts
    one at a time, so that each can be freed.
    """

    def convert(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        made = {}
        for name in list(tree):
            if isinstance(tree[name], dict):
                made[name] = convert(tree[name], (*path, name))
            elif quantizes((*path, name), modules, how):
                parts = quantize_on_device(tree.pop(name), how)
                made |= dict(zip(kept_as(name), parts, strict=True))
            else:
                made[name] = tree[name]
        return made

    return {**params, "layers": convert(params["layers"], ())}


def requantize(
    params: Mapping[str, Any],
    modules: Collection[str],
    kept: Quantization | None,
    wanted: Quantization | None,
) -> Mapping[str, Any]:
    """Return weights of which `modules` may be `kept` as codes, quantized as `wanted`.

    Raises:
        ValueError: they are codes, and other codes or whole weights are wanted.
    """
    found = kept if is_quantized(params) else None
    if found == wanted:
        return params
    if found is not None:
        raise ValueError(
            f"this model's base is kept as {found}, the run asks for"
            f" {wanted or 'whole weights'}: load the model anew by this configuration"
        )
    assert wanted is not None
    return quantize_tree(params, modules, wanted)


quantize_on_device = jax.jit(quantize, static_argnames="how")
dequantize_on_device = jax.jit(dequantize)
