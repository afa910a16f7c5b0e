"""Models whose layers are not alike: which kinds of layer they have, and where.

A family whose layers have the same weights needs nothing of this. Any other names a
`Variety` in its row of families.py: what the family's config.json says about its kinds,
read and written here. No jax is imported.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from jaxtrain.models.stacks import Segment, plan_segments
from jaxtrain.record.safe_text import shown

if TYPE_CHECKING:
    from jaxtrain.models.config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = "linear_attention"


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What layers have in common that may share a stack.

    `mixer`: how tokens see each other, by a name of `decoder_layer.MIXERS`.
    `layer_type`: their entry of the config's `layer_types`; None where all layers are
    of one kind, whose windows and rotary embeddings may still differ.
    `fields`: fields of ModelConfig, each with the value that it has in these layers.
    """

    mixer: str = "attention"
    layer_type: str | None = None
    fields: tuple[tuple[str, Any], ...] = ()


ATTENTION = LayerKind()  # of all layers, where these are alike


class Variety(Protocol):
    """What a config.json says about the kinds of its layers; frozen and hashable."""

    layer_types: ClassVar[frozenset[str]]
    """The entries of `layer_types` that it knows beside full and sliding attention."""

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> tuple["Variety", dict[str, Any]]:
        """What the options of a config.json, defaults included, say.

        Returns:
            That, and options to go on with in the place of the given ones: by the names
            that `ModelConfig` has for them.

        Raises:
            ValueError: an option has a value that it cannot have.
        """

    def problems(self, config: "ModelConfig") -> Iterator[str]:
        """A line for each reason why the model can't be."""

    def kind_of(self, config: "ModelConfig", layer: int) -> LayerKind:
        """The kind of a layer, by its number; its `layer_type` is filled in later."""

    def to_hf(self, config: "ModelConfig") -> dict[str, Any]:
        """Its options of a config.json."""


@dataclasses.dataclass(frozen=True)
class ShortConvolutions:
    """LFM2: layers of type "conv" mix tokens by a short causal convolution.

    `taps`: how many tokens a convolution reads, its own included. `bias`: whether it,
    and the projections before and behind it, have biases. `width_options`: the options
    that the MLP's width was computed from, as pairs, to be written again.
    """

    taps: int = 3
    bias: bool = False
    width_options: tuple[tuple[str, Any], ...] = ()
    layer_types: ClassVar[frozenset[str]] = frozenset({"conv"})

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> tuple[Variety, dict[str, Any]]:
        layers, attending = given["num_hidden_layers"], given.get("full_attn_idxs")
        types = given.get("layer_types")
        if types is None:
            full = set(range(layers) if attending is None else attending)
            types = [FULL if i in full else "conv" for i in range(layers)]
        # Older files have other names for two of the options, which win.
        width, tied = given.get("block_ff_dim"), given.get("tie_embedding")
        options = {name: given[name] for name in ("intermediate_size", *_LFM2_WIDTH)}
        if width is not None:
            options["intermediate_size"] = width
        changed = {
            "layer_types": types,
            "rms_norm_eps": given["norm_eps"],
            "hidden_act": "silu",
            "tie_word_embeddings": (
                given["tie_word_embeddings"] if tied is None else tied
            ),
            "intermediate_size": _lfm2_width(options),
        }
        made = cls(
            given["conv_L_cache"], bool(given["conv_bias"]), tuple(options.items())
        )
        return made, changed

    def problems(self, config: "ModelConfig") -> Iterator[str]:
        if type(self.taps) is not int or not 0 < self.taps <= 1024:
            yield (
                f"model.conv_L_cache = {shown(self.taps, 100)}: must be an integer from"
                " 1 to 1024"
            )

    def kind_of(self, config: "ModelConfig", layer: int) -> LayerKind:
        is_convolution = config.layer_types[layer] == "conv"
        return LayerKind("convolution" if is_convolution else "attention")

    def to_hf(self, config: "ModelConfig") -> dict[str, Any]:
        return {
            "conv_L_cache": self.taps,
            "conv_bias": self.bias,
            "norm_eps": config.rms_norm_eps,
            **dict(self.width_options),
        }


_LFM2_WIDTH = (
    "block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of"
)  # fmt: skip


def _lfm2_width(options: Mapping[str, Any]) -> int:
    """The MLP's width: two thirds of what is given, scaled and rounded up, unless off.

    Rounding down at each step is transformers'.
    """
    width = options["intermediate_size"]
    adjusts, multiplier, multiple = (options[name] for name in _LFM2_WIDTH)
    if not adjusts or type(width) is not int:
        return width
    width = int(2 * width / 3)
    if multiplier is None:
        return width
    width = int(multiplier * width)
    if type(multiple) is not int or multiple < 1:
        raise ValueError(
            f"block_multiple_of = {shown(multiple, 100)}: must be a positive integer"
        )
    return multiple * -(-width // multiple)


@dataclasses.dataclass(frozen=True)
class DeltaNets:
    """Qwen3.5: layers of type "linear_attention" are Gated DeltaNets.

    Of these, `taps`: how many tokens a convolution reads, its own included; `key_heads`
    of width `key_width`, each shared by as many of `value_heads` of width
    `value_width`.
    """

    taps: int = 4
    key_heads: int = 16
    value_heads: int = 32
    key_width: int = 128
    value_width: int = 128
    layer_types: ClassVar[frozenset[str]] = frozenset({LINEAR})

    @property
    def mixed_width(self) -> int:
        """Features of queries, keys and values, which the convolution mixes."""
        keys = self.key_heads * self.key_width
        return 2 * keys + self.value_heads * self.value_width

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> tuple[Variety, dict[str, Any]]:
        types = given.get("layer_types")
        if types is None:
            interval = given["full_attention_interval"]
            if type(interval) is not int or interval < 1:
                raise ValueError(
                    f"full_attention_interval = {shown(interval, 100)}: must be a"
                    " positive integer"
                )
            layers = range(1, given["num_hidden_layers"] + 1)
            types = [LINEAR if i % interval else FULL for i in layers]
        sizes = {field: given[key] for field, key in _DELTA_NET_KEYS.items()}
        return cls(**sizes), {"layer_types": types}

    def problems(self, config: "ModelConfig") -> Iterator[str]:
        for field, key in _DELTA_NET_KEYS.items():
            size, most = getattr(self, field), 1024 if field == "taps" else 2**20
            if type(size) is not int or not 0 < size <= most:
                yield (
                    f"model.{key} = {shown(size, 100)}: must be an integer from 1 to"
                    f" {most:,}"
                )
                return
        if self.value_heads % self.key_heads:
            yield (
                f"model.linear_num_value_heads = {self.value_heads} is no multiple of"
                f" linear_num_key_heads = {self.key_heads}"
            )
        if config.hidden_act != "silu":
            yield (
                f"model.hidden_act = {shown(config.hidden_act)}: only 'silu' is"
                " implemented where layers are of type 'linear_attention'"
            )

    def kind_of(self, config: "ModelConfig", layer: int) -> LayerKind:
        is_linear = config.layer_types[layer] == LINEAR
        return LayerKind("delta_net" if is_linear else "attention")

    def to_hf(self, config: "ModelConfig") -> dict[str, Any]:
        # Said outside too: 0.25 is what counts where nothing is said.
        factor = config.rope.partial_rotary_factor
        sizes = {key: getattr(self, field) for field, key in _DELTA_NET_KEYS.items()}
        return {"partial_rotary_factor": factor, **sizes}


_DELTA_NET_KEYS: Mapping[str, str] = {
    "taps": "linear_conv_kernel_dim",
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_width": "linear_key_head_dim",
    "value_width": "linear_value_head_dim",
}


# By the names that rows of families.py have for them.
VARIETIES: Mapping[str, type[Variety]] = {
    "short_convolutions": ShortConvolutions,
    "delta_nets": DeltaNets,
}


@functools.lru_cache(maxsize=256)
def kinds_of(config: "ModelConfig") -> tuple[LayerKind, ...]:
    """The kind of each layer, in order."""
    count, variety = config.num_hidden_layers, config.variety
    if variety is None:
        return (ATTENTION,) * count
    kinds = tuple(variety.kind_of(config, layer) for layer in range(count))
    if len(set(kinds)) == 1:
        return kinds
    # The windows and rotary embeddings of a stack are then known when it is compiled.
    return tuple(
        dataclasses.replace(kind, layer_type=config.layer_types[layer])
        for layer, kind in enumerate(kinds)
    )


@functools.lru_cache(maxsize=256)
def segments_of(config: "ModelConfig") -> tuple[Segment, ...]:
    """The segments that its layers are cut into; one, where they are alike."""
    return plan_segments(kinds_of(config))


@functools.lru_cache(maxsize=256)
def config_of_kind(config: "ModelConfig", kind: LayerKind) -> "ModelConfig":
    """The model of this kind of layers alone: what their modules read sizes from.

    `config` itself where all layers are of one kind, apart from the kind's `fields`.
    """
    changed = dict(kind.fields)
    if kind.layer_type is not None:
        changed |= {"layer_types": (kind.layer_type,), "num_hidden_layers": 1}
    return dataclasses.replace(config, **changed) if changed else config
