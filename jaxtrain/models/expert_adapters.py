"""Adapters of a mixture's experts: low-rank products of each expert's own rows.

An expert's matrix W [in out] acts as W + s A B, with A [in r] and B [r out], as PEFT's
`target_parameters` have it. The sum is never made: rows that are sorted by expert go
through all A and then through all B, in grouped products of which r is a width.

transformers keeps gate and up as one parameter, `gate_up_proj`, so in PEFT they share
one A. Their B is one array here too, whose columns stand as in that parameter: gate's
before up's, or in turns where the family has biased experts (gpt-oss).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxtrain.models.layers import LoraParam, Options
from jaxtrain.types import LogicalAxes

# The node of experts that holds the adapters, and the parameters that may have one.
ADAPTERS, PARAMETERS = "adapters", ("gate_up_proj", "down_proj")
# A's and B's axes.
_AXES: dict[str, tuple[str, str]] = {
    "gate_up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}


def adapter_path(parameter: str) -> str:
    """Where in a layer the adapter of a parameter of the experts stands."""
    return f"mlp.experts.{ADAPTERS}.{parameter}"


class ExpertAdapter(nnx.Module):
    """A and B of one parameter, for all experts of a layer."""

    def __init__(
        self, parameter: str, sizes: tuple[int, int], options: Options, rngs: nnx.Rngs
    ) -> None:
        """`sizes`: the parameter's inputs and outputs."""
        assert options.lora is not None
        path, experts = adapter_path(parameter), options.config.num_experts
        rank, self.scaling = options.lora.rank_and_scaling(path)
        (inputs, outputs), dtype = sizes, jnp.dtype(options.param_dtype)
        bound, shape = 1 / math.sqrt(inputs), (experts, inputs, rank)
        a = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
        b = jnp.zeros((experts, rank, outputs), dtype)
        first, last = _AXES[parameter]
        self.lora_a = LoraParam(
            a.astype(dtype), logical_axes=("experts", first, "lora_rank")
        )
        self.lora_b = LoraParam(b, logical_axes=("experts", "lora_rank", last))


class ExpertAdapters(nnx.Module):
    """The adapters of a layer's experts: of gate and up, of down, or of both."""

    def __init__(self, options: Options, rngs: nnx.Rngs) -> None:
        self.options = options
        width, inner, lora = (
            options.config.hidden_size,
            options.config.expert_width,
            options.lora,
        )
        assert lora is not None and inner is not None
        sizes = {"gate_up_proj": (width, 2 * inner), "down_proj": (inner, width)}
        for parameter in PARAMETERS:
            if adapter_path(parameter) in lora.targets:
                adapter = ExpertAdapter(parameter, sizes[parameter], options, rngs)
                setattr(self, parameter, adapter)

    def split(self) -> "SplitAdapters":
        """The factors as the grouped products take them, in the compute type."""
        dtype, arrays, axes = self.options.compute_dtype, [], []
        scalings: list[float | None] = []
        for parameter in PARAMETERS:
            adapter: ExpertAdapter | None = getattr(self, parameter, None)
            scalings.append(None if adapter is None else adapter.scaling)
            if adapter is None:
                continue
            a, b = adapter.lora_a[...].astype(dtype), adapter.lora_b[...].astype(dtype)
            parts = [b]
            if parameter == "gate_up_proj":
                in_turns = self.options.config.family.biased_experts
                parts = list(split_columns(b, in_turns=in_turns))
            first, last = _AXES[parameter]
            arrays += [a, *parts]
            axes += [("experts", first, None), *[("experts", None, last)] * len(parts)]
        return SplitAdapters(arrays, axes, tuple(scalings))


def takes_adapters(options: Options) -> bool:
    """Whether the experts of a layer have an adapter at all."""
    targets = frozenset() if options.lora is None else options.lora.targets
    return any(adapter_path(parameter) in targets for parameter in PARAMETERS)


def split_columns(
    joined: Float[Array, "*dims C"], *, in_turns: bool
) -> tuple[Float[Array, "*dims F"], Float[Array, "*dims F"]]:
    """Gate's columns and up's, of an array that has both as gate_up_proj has them."""
    if in_turns:
        return joined[..., ::2], joined[..., 1::2]
    gate, up = jnp.split(joined, 2, axis=-1)
    return gate, up


class SplitAdapters(NamedTuple):
    """Factors in a row, [gate's and up's A, gate's B, up's B], [down's A, down's B].

    `axes` are those of `arrays`. `scalings` are of gate and up, and of down; None where
    there is no adapter, and so none of its arrays.
    """

    arrays: Sequence[Array]
    axes: Sequence[LogicalAxes]
    scalings: tuple[float | None, ...]


NO_ADAPTERS = SplitAdapters((), (), (None, None))


class LowRank(NamedTuple):
    """What adapters add to products with the same rows: s (rows A) B, for each B."""

    a: Float[Array, "E I R"]
    outputs: tuple[Float[Array, "E R O"], ...]
    scaling: float

    def add(
        self,
        products: tuple[Float[Array, "M O"], ...],
        rows: Float[Array, "M I"],
        multiply: Callable[[Array, Array], Array],
    ) -> tuple[Float[Array, "M O"], ...]:
        """The products, each with its adapter's part.

        `multiply(rows, matrices)` takes each row times the matrix of its expert.
        """
        with jax.named_scope("lora"):
            low = multiply(rows, self.a) * self.scaling
            return tuple(
                y + multiply(low, b)
                for y, b in zip(products, self.outputs, strict=True)
            )


def join_factors(
    arrays: Sequence[Array], scalings: tuple[float | None, ...]
) -> tuple[LowRank | None, LowRank | None, Sequence[Array]]:
    """The adapters of gate and up, and of down, and what follows `SplitAdapters`'."""
    found: list[LowRank | None] = []
    for scaling, count in zip(scalings, (2, 1), strict=True):
        if scaling is None:
            found.append(None)
            continue
        a, *outputs = arrays[: count + 1]
        arrays = arrays[count + 1 :]
        found.append(LowRank(a, tuple(outputs), scaling))
    return found[0], found[1], arrays
