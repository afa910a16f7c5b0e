"""Models with several kinds of layers: which kinds they have, and where.

A family whose layers all have the same weights needs nothing from this module. Any
other family names a `Variety` in its row of families.py, which reads and writes what
its config.json says about the kinds of its layers. No jax is imported.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from jaxtrain.models.stacks import Segment, plan_segments
from jaxtrain.record.safe_text import shown

if TYPE_CHECKING:
    from jaxtrain.models.config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = "linear_attention"


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The properties that layers must have in common to share a stack.

    `mixer`: how tokens exchange information, a name in `decoder_layer.MIXERS`.
    `layer_type`: their entry in the config's `layer_types`; None if all layers are of
    one kind (their windows and rotary embeddings may still differ).
    `fields`: fields of ModelConfig that have another value in these layers.
    `shares`: whether later layers may use the keys and values of these layers
    ("gives"), or these layers use those of the last earlier layer of their type that
    gives them ("reads").
    """

    mixer: str = "attention"
    layer_type: str | None = None
    fields: tuple[tuple[str, Any], ...] = ()
    shares: Literal["nothing", "gives", "reads"] = "nothing"
    is_dense: bool = False

    @property
    def attends(self) -> bool:
        """Whether the mixer is a kind of attention, with keys and values."""
        return self.mixer.endswith("attention")


ATTENTION = LayerKind()  # the kind of every layer, if all are alike


class Variety(Protocol):
    """A family's options about the kinds of its layers; frozen and hashable."""

    layer_types: ClassVar[frozenset[str]]
    """Known entries of `layer_types`, in addition to full and sliding attention."""

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> tuple["Variety", dict[str, Any]]:
        """Read the options of a config.json, in which defaults are filled in.

        Returns:
            The variety, and options under the names of `ModelConfig` that replace those
            that were given.

        Raises:
            ValueError: the value of an option is not valid.
        """

    def problems(self, config: "ModelConfig") -> Iterator[str]:
        """Yield one line for each reason why such a model is not possible."""

    def kind_of(self, config: "ModelConfig", layer: int) -> LayerKind:
        """The kind of the layer with this number; `layer_type` is filled in later."""

    def to_hf(self, config: "ModelConfig") -> dict[str, Any]:
        """The options as they are written to a config.json."""


@dataclasses.dataclass(frozen=True)
class ShortConvolutions:
    """LFM2: layers of type "conv" mix tokens by a short causal convolution.

    `taps`: how many tokens a convolution reads, including the current one. `bias`:
    whether the convolution and the projections before and after it have biases.
    `width_options`: the options from which the MLP's width was computed, as pairs, so
    that they can be written again.
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
    """Compute the MLP's width: two thirds of the given one, scaled and rounded up.

    If the adjustment is switched off, the width is returned as it is. As transformers
    does, the intermediate results are rounded down.
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

    `taps`: how many tokens their convolution reads, including the current one. They
    have `key_heads` of width `key_width`, and `value_heads` of width `value_width`,
    of which equally many share each key head.
    """

    taps: int = 4
    key_heads: int = 16
    value_heads: int = 32
    key_width: int = 128
    value_width: int = 128
    layer_types: ClassVar[frozenset[str]] = frozenset({LINEAR})

    @property
    def mixed_width(self) -> int:
        """The total width of queries, keys and values, which the convolution reads."""
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
                f"model.linear_num_value_heads = {self.value_heads} is not a multiple"
                f" of linear_num_key_heads = {self.key_heads}"
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
        # Written at the top level too: without it transformers would assume 0.25.
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


@dataclasses.dataclass(frozen=True)
class Gemma4Layers:
    """Gemma 4: full-attention layers differ in size, and the last layers share keys.

    `global_head_dim` and `global_kv_heads` are the sizes of full-attention layers. If
    `keys_are_values`, their values are the keys before the key norm. The last `readers`
    layers compute no keys and values of their own: they use those of the nearest
    earlier layer of their type that does. If `wide_readers`, their MLP is twice as
    wide. Each layer also gets a per-layer embedding of each token, of width
    `per_layer_width` (0: none), from a vocabulary of `per_layer_vocab` tokens.
    `images_read_ahead`: image tokens attend to each other in both directions; it is
    kept for export and has no effect on text.
    """

    global_head_dim: int = 512
    global_kv_heads: int | None = None
    keys_are_values: bool = False
    readers: int = 0
    wide_readers: bool = False
    per_layer_width: int = 256
    per_layer_vocab: int = 262_144
    images_read_ahead: bool = False
    layer_types: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> tuple[Variety, dict[str, Any]]:
        layers, types = given["num_hidden_layers"], given.get("layer_types")
        if types is None:
            types = [FULL if i % 6 == 0 else SLIDING for i in range(1, layers + 1)]
        # transformers makes the last layer a full one, whatever is given.
        types = [*types[:-1], FULL]
        ropes = given.get("rope_parameters")
        if ropes is None:
            theta = given.get("rope_theta") or 1e6
            full = {"rope_type": "proportional", "partial_rotary_factor": 0.25}
            ropes = {
                FULL: full | {"rope_theta": theta},
                SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            }
        changed = {
            "layer_types": types,
            "query_pre_attn_scalar": 1.0,  # scores are not scaled
            "rope_parameters": ropes,
        }
        width, kv_heads = _full_sizes(given, types)
        made = cls(
            global_head_dim=width,
            global_kv_heads=kv_heads,
            keys_are_values=bool(given["attention_k_eq_v"]),
            readers=given["num_kv_shared_layers"],
            wide_readers=bool(given["use_double_wide_mlp"]),
            per_layer_width=given["hidden_size_per_layer_input"] or 0,
            per_layer_vocab=given["vocab_size_per_layer_input"],
            images_read_ahead=given.get("use_bidirectional_attention") == "vision",
        )
        return made, changed

    def problems(self, config: "ModelConfig") -> Iterator[str]:
        sizes = {
            "global_head_dim": (self.global_head_dim, 2, 2**20),
            "num_global_key_value_heads": (self.global_kv_heads or 1, 1, 2**20),
            "num_kv_shared_layers": (self.readers, 0, config.num_hidden_layers - 1),
            "hidden_size_per_layer_input": (self.per_layer_width, 0, 2**20),
            "vocab_size_per_layer_input": (self.per_layer_vocab, 1, 2**24),
        }
        found = False
        for name, (size, least, most) in sizes.items():
            if type(size) is not int or not least <= size <= most:
                found = True
                yield (
                    f"model.{name} = {shown(size, 100)}: must be an integer from"
                    f" {least} to {most:,}"
                )
        if found:
            return
        if self.global_kv_heads and config.num_attention_heads % self.global_kv_heads:
            yield (
                f"model.num_global_key_value_heads = {self.global_kv_heads} does not"
                f" divide num_attention_heads = {config.num_attention_heads}"
            )
        first = config.num_hidden_layers - self.readers
        if missing := {*config.layer_types[first:]} - {*config.layer_types[:first]}:
            yield (
                f"model.num_kv_shared_layers = {self.readers}: no layer before the last"
                f" {self.readers} is of type {min(missing)!r}, whose keys and values"
                " they would read"
            )
        if self.per_layer_width and config.vocab_size > self.per_layer_vocab:
            yield (
                f"model.vocab_size = {config.vocab_size} exceeds"
                f" vocab_size_per_layer_input = {self.per_layer_vocab}: tokens beyond"
                " would have no embedding for each layer"
            )
        yield from config.rope.problems(self.global_head_dim)

    def kind_of(self, config: "ModelConfig", layer: int) -> LayerKind:
        layer_type = config.layer_types[layer]
        fields: dict[str, Any] = {}
        if layer_type == FULL:
            fields["head_dim"] = self.global_head_dim
            if self.keys_are_values and self.global_kv_heads is not None:
                fields["num_key_value_heads"] = self.global_kv_heads
        shares: Literal["nothing", "gives", "reads"] = "nothing"
        if self.readers:
            reads = layer >= config.num_hidden_layers - self.readers
            shares = "reads" if reads else "gives"
            # Considered alone, such a layer is a model without readers.
            fields["variety"] = dataclasses.replace(self, readers=0)
            if reads and self.wide_readers:
                fields["intermediate_size"] = 2 * config.intermediate_size
        own = tuple(fields.items())
        return LayerKind("gemma4_attention", layer_type, own, shares)

    def to_hf(self, config: "ModelConfig") -> dict[str, Any]:
        return {
            "global_head_dim": self.global_head_dim,
            "num_global_key_value_heads": self.global_kv_heads,
            "attention_k_eq_v": self.keys_are_values,
            "num_kv_shared_layers": self.readers,
            "use_double_wide_mlp": self.wide_readers,
            "hidden_size_per_layer_input": self.per_layer_width,
            "vocab_size_per_layer_input": self.per_layer_vocab,
            "use_bidirectional_attention": "vision" if self.images_read_ahead else None,
        }


def _full_sizes(
    given: Mapping[str, Any], types: Sequence[str]
) -> tuple[int, int | None]:
    """The head width of full-attention layers, and their key heads if they differ.

    transformers writes them as `per_layer_config`, {"05": {"head_dim": 512}}, instead
    of the keys in published files.
    """
    by_layer = given.get("per_layer_config")
    if by_layer is None:
        return given["global_head_dim"], given["num_global_key_value_heads"]
    full = {i for i, layer_type in enumerate(types) if layer_type == FULL}
    numbers = {int(n) if str(n).isdecimal() else -1 for n in by_layer}
    sizes = [by_layer[name] for name in sorted(by_layer)]
    known = {"head_dim", "num_key_value_heads"}
    if (
        numbers != full
        or any(each != sizes[0] for each in sizes)
        or not isinstance(sizes[0], Mapping)
        or set(sizes[0]) - known
    ):
        raise ValueError(
            f"per_layer_config = {shown(by_layer, 300)}: only head_dim and"
            " num_key_value_heads, the same for every layer of type 'full_attention',"
            " are implemented"
        )
    width = sizes[0].get("head_dim", given["head_dim"])
    return width, sizes[0].get("num_key_value_heads")


@dataclasses.dataclass(frozen=True)
class LatentHeads:
    """DeepSeek: queries, keys and values are expanded from narrow vectors.

    `query_rank` and `key_rank` are the narrow widths; if `query_rank` is None, queries
    are projected directly. Rotary embeddings apply to `turned_width` features of a
    head's query and key, in pairs of neighbours if `is_interleaved`, and not to the
    other `unturned_width` features.
    """

    query_rank: int | None
    key_rank: int
    unturned_width: int
    turned_width: int
    value_width: int
    is_interleaved: bool = True
    layer_types: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> tuple[Variety, dict[str, Any]]:
        sizes = {field: given[key] for field, key in _LATENT_KEYS.items()}
        for field, key in _LATENT_KEYS.items():
            size = sizes[field]
            if field == "query_rank" and size is None:
                continue
            if type(size) is not int or not 0 < size <= 2**20:
                raise ValueError(
                    f"model.{key} = {shown(size, 100)}: must be an integer from 1 to"
                    f" {2**20:,}"
                )
        # DeepSeek V2 has no such key and always turns neighbours.
        made = cls(**sizes, is_interleaved=bool(given.get("rope_interleave", True)))
        return made, {"head_dim": made.unturned_width + made.turned_width}

    def problems(self, config: "ModelConfig") -> Iterator[str]:
        if config.num_key_value_heads != config.num_attention_heads:
            yield (
                f"model.num_key_value_heads = {config.num_key_value_heads}: a"
                f" {config.model_type} has keys for each of num_attention_heads ="
                f" {config.num_attention_heads}"
            )

    def kind_of(self, config: "ModelConfig", layer: int) -> LayerKind:
        return LayerKind("latent_attention")

    def to_hf(self, config: "ModelConfig") -> dict[str, Any]:
        values = {key: getattr(self, field) for field, key in _LATENT_KEYS.items()}
        if "rope_interleave" in config.family.keys:
            values["rope_interleave"] = self.is_interleaved
        return values


_LATENT_KEYS: Mapping[str, str] = {
    "query_rank": "q_lora_rank",
    "key_rank": "kv_lora_rank",
    "unturned_width": "qk_nope_head_dim",
    "turned_width": "qk_rope_head_dim",
    "value_width": "v_head_dim",
}


# By the names that rows of families.py have for them.
VARIETIES: Mapping[str, type[Variety]] = {
    "short_convolutions": ShortConvolutions,
    "delta_nets": DeltaNets,
    "gemma4_layers": Gemma4Layers,
    "latent_heads": LatentHeads,
}


@functools.lru_cache(maxsize=256)
def kinds_of(config: "ModelConfig") -> tuple[LayerKind, ...]:
    """The kind of each layer, in order."""
    count, variety = config.num_hidden_layers, config.variety
    dense = {*config.dense_layers}
    if variety is None and not dense:
        return (ATTENTION,) * count
    kinds = tuple(
        variety.kind_of(config, layer) if variety else ATTENTION
        for layer in range(count)
    )
    kinds = tuple(
        dataclasses.replace(kind, is_dense=True) if layer in dense else kind
        for layer, kind in enumerate(kinds)
    )
    if len(set(kinds)) == 1:
        return kinds
    # The windows and rotary embeddings of a stack are then known when it is compiled.
    return tuple(
        dataclasses.replace(kind, layer_type=config.layer_types[layer])
        for layer, kind in enumerate(kinds)
    )


@functools.lru_cache(maxsize=256)
def segments_of(config: "ModelConfig") -> tuple[Segment, ...]:
    """The segments into which its layers are divided; one if all layers are alike."""
    return plan_segments(kinds_of(config))


@functools.lru_cache(maxsize=256)
def config_of_kind(config: "ModelConfig", kind: LayerKind) -> "ModelConfig":
    """The configuration from which layers of this kind read their sizes.

    It describes a model that has only this kind of layers. If all layers of the model
    are of one kind, it is `config` with the kind's `fields`.
    """
    changed = dict(kind.fields)
    if kind.layer_type is not None:
        changed |= {"layer_types": (kind.layer_type,), "num_hidden_layers": 1}
        changed["dense_layers"] = (0,) if kind.is_dense else ()
    return dataclasses.replace(config, **changed) if changed else config
