"""The sizes and options of a decoder, read from and written as Hugging Face configs."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jaxtrain.models.families import FAMILIES, REFUSED_UNLESS, WRAPPERS, Family
from jaxtrain.models.layer_kinds import FULL, SLIDING, VARIETIES, LatentHeads, Variety
from jaxtrain.models.mixtures import (
    ANY_EXPERTS,
    Routing,
    has_experts,
    mixture_problems,
    read_mixture,
    written_mixture,
)
from jaxtrain.models.problems import Problems
from jaxtrain.models.rope import UNTURNED, RopeConfig
from jaxtrain.record.safe_text import shown

# What transformers 4 calls a kind of layer.
_OLD_TYPES = {"attention": FULL}
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh", "gelu")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder, completely: nothing about its maths is left to a default elsewhere.

    `model_type` names the family (families.py), which fixes where norms stand and
    which projections are fused; every size and option is a field. `layer_types` has
    one of "full_attention" and "sliding_attention" for each layer, or a type that
    `variety` knows (layer_kinds.py), which is None where all layers have the same
    weights; `sliding_window` counts the tokens that a sliding layer reads, the query's
    own included.
    `local_rope` is the rotary embedding of sliding layers where it differs (Gemma 3).
    `rotary_layers` says for each layer whether it turns queries and keys; empty: all.
    Embeddings, what a layer adds and logits are multiplied by `embedding_multiplier`,
    `residual_multiplier` and `logit_scale` / `logits_scaling`, and query-key products
    by `attention_multiplier` where that is set.
    A mixture of experts has `num_experts` MLPs in each layer (0: one plain MLP), of
    width `expert_width`; `intermediate_size` then acts only where it is that width, and
    in `dense_layers`, the numbers of layers that have one plain MLP all the same. An
    MLP of `shared_expert_width` runs beside the chosen experts (0: none).

    Raises:
        ValueError: the fields contradict each other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    layer_types: tuple[str, ...]
    variety: Variety | None = None
    local_rope: RopeConfig | None = None
    sliding_window: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    use_qk_norm: bool = True  # where the family has norms of queries and keys
    mlp_bias: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rotary_layers: tuple[bool, ...] = ()
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    logit_scale: float = 1.0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = True
    dense_layers: tuple[int, ...] = ()
    shared_expert_width: int = 0
    routing: Routing = ANY_EXPERTS
    swiglu_alpha: float | None = None  # see moe.clamped_swiglu
    swiglu_limit: float | None = None
    router_aux_loss_coef: float = 0.0
    output_router_logits: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        problems = [*self._wrong_sizes()]
        if not problems:  # the other rules compare sizes
            problems += _wrong_layers(self)
            problems += mixture_problems(self, _MIXTURES)
            problems += _too_large(self)
            problems += self.variety.problems(self) if self.variety else ()
        if problems:
            raise ValueError("\n".join(problems))

    def _wrong_sizes(self) -> Iterator[str]:
        names = (*_SIZES_AND_LENGTH, *(_EXPERT_SIZES if has_experts(self) else ()))
        for name in names:
            size, most = getattr(self, name), _MOST.get(name, 2**31 - 1)
            if type(size) is not int or size < 1:
                yield f"model.{name} = {shown(size, 100)}: must be a positive integer"
            elif size > most:
                yield f"model.{name} = {_count(size)}: must be at most {most:,}"
        for name, (least, may_be_unset) in _NUMBERS.items():
            number = getattr(self, name)
            if number is None and may_be_unset:
                continue
            is_number = type(number) in (int, float) and abs(number) < math.inf
            if not is_number or number < 0 or (number == 0 and least):
                wanted = f"a finite number {'above' if least else 'of at least'} 0"
                yield f"model.{name} = {shown(number, 100)}: must be {wanted}"

    @property
    def family(self) -> Family:
        return family_of(self.model_type)

    @property
    def longest_text(self) -> int:
        """Tokens that a document may have: what positions were trained, or stretch to.

        A dynamic rotary embedding stretches to `factor` times as many.
        """
        stretch = self.rope.factor if self.rope.kind == "dynamic" else None
        return int(self.max_position_embeddings * (stretch or 1.0))

    @property
    def expert_width(self) -> int | None:
        """Inner width of one expert; None without experts."""
        key = self.family.expert_width_key
        return None if key is None else getattr(self, key)

    @property
    def qk_norm(self) -> str:
        """How queries and keys are normalized: see `Family.qk_norm`."""
        return self.family.qk_norm if self.use_qk_norm else "none"

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by."""
        if self.attention_multiplier is not None:
            return self.attention_multiplier
        scale = (self.query_pre_attn_scalar or self.head_dim) ** -0.5
        if isinstance(self.variety, LatentHeads):
            scale *= self.rope.score_factor
        return scale

    @property
    def rotary_head_dim(self) -> int:
        """The features of a head that the rotary embedding is given."""
        if isinstance(self.variety, LatentHeads):
            return self.variety.turned_width
        return self.head_dim

    @property
    def value_head_dim(self) -> int:
        """The width of a head's values; `head_dim` is that of its query and key."""
        if isinstance(self.variety, LatentHeads):
            return self.variety.value_width
        return self.head_dim

    @property
    def logit_multiplier(self) -> float:
        """What the head's products are multiplied by, before any soft cap."""
        return self.logit_scale / self.logits_scaling

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embedding of each layer."""
        ropes = map(self.rope_of, self.layer_types)
        turns = self.rotary_layers or (True,) * self.num_hidden_layers
        pairs = zip(ropes, turns, strict=True)
        return tuple(rope if turned else UNTURNED for rope, turned in pairs)

    def window_of(self, layer_type: str) -> int | None:
        """Tokens that a layer of this type reads at most; None is all of them."""
        return self.sliding_window if layer_type == SLIDING else None

    def rope_of(self, layer_type: str) -> RopeConfig:
        """The rotary embedding of layers of this type."""
        if layer_type == SLIDING and self.local_rope is not None:
            return self.local_rope
        return self.rope

    def num_params(self) -> int:
        """Number of weights; a tied embedding counts once."""
        from jaxtrain.models.flops import weight_shapes  # which imports this module

        return sum(map(math.prod, weight_shapes(self).values()))

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs, forward and backward, a token; see `flops.py`."""
        from jaxtrain.models.flops import training_flops  # which imports this module

        return training_flops(self, seq_len)

    @classmethod
    def from_hf(cls, options: Mapping[str, Any]) -> "ModelConfig":
        """Read a Hugging Face config.json, of transformers 4 or 5.

        A key that is absent has the default that transformers gives it.

        Raises:
            ValueError: the family is unknown, or an option would change the maths in a
                way that this decoder has not; it names all such options.
        """
        family = family_of(options.get("model_type"))
        problems = Problems(refused_options(options, family))
        given = {**family.defaults, **options}
        _check_layers(given)
        variety: Variety | None = None
        changed: dict[str, Any] = {}
        if family.variety is not None:
            variety, changed = VARIETIES[family.variety].read(given)
            given |= changed
        num_heads, head_dim = given["num_attention_heads"], given["head_dim"]
        kv_heads = given["num_key_value_heads"]
        layer_types, window = _attention_kinds(given, family)
        attention_bias = bool(given.get("attention_bias", False))
        eos = given["eos_token_id"]
        own_names = {field.name for field in dataclasses.fields(cls)}
        values = {n: given[n] for n in own_names & {*family.keys, *changed}} | {
            "num_key_value_heads": num_heads if kv_heads is None else kv_heads,
            "head_dim": (
                given["hidden_size"] // (num_heads or 1)
                if head_dim is None
                else head_dim
            ),
            "intermediate_size": given[family.mlp_width_key],
            "rms_norm_eps": given[family.norm_eps_key],
            "rope": RopeConfig(),
            "layer_types": layer_types,
            "rotary_layers": _rotary_layers(given, family, layer_types),
            "variety": variety,
            "sliding_window": window,
            "hidden_act": _activation(given, family),
            "qkv_bias": attention_bias or family.always_qkv_bias,
            "o_bias": bool(given.get(family.o_bias_key or "", False)),
            "mlp_bias": bool(given.get("mlp_bias", False)),
            "eos_token_id": tuple(eos) if isinstance(eos, list | tuple) else eos,
            **read_mixture(options, given, family),
        }
        with problems.noted():
            values["rope"] = RopeConfig.from_hf(given, family, FULL)
        if family.local_rope != "none":
            with problems.noted():
                values["local_rope"] = RopeConfig.from_hf(given, family, SLIDING)
        with problems.noted():
            config = cls(**values)
        problems.check()
        return config

    def with_rope_scaling(self, scaling: Mapping[str, Any]) -> "ModelConfig":
        """This model with another extension of its context, for longer texts.

        Args:
            scaling: as `rope_scaling` in a config.json: {"rope_type": "yarn", "factor":
                4.0, ...}. It takes the place of the model's own; layers with a rotary
                embedding of their own (Gemma 3's sliding ones) keep that.

        `max_position_embeddings` becomes factor times the trained length, if that is
        more. The trained length is `original_max_position_embeddings`, if unset the
        model's own.

        Raises:
            ValueError: the kind or one of its parameters is unknown or missing.
        """
        for name, value in scaling.items():
            if value is None:
                raise ValueError(
                    f"model.rope_scaling: {shown(name)} has no value; write name:"
                    " value, with a space behind the colon"
                )
        trained = (
            self.rope.original_max_position_embeddings or self.max_position_embeddings
        )
        options = {
            "model_type": self.model_type,
            "rope_theta": self.rope.theta,
            "partial_rotary_factor": self.rope.partial_rotary_factor,
            "max_position_embeddings": trained,
            "rope_scaling": dict(scaling),
        }
        rope = RopeConfig.from_hf(options, self.family, FULL)
        rope = rope.with_query_scale_of(self.rope)
        # A dynamic embedding stretches from max_position_embeddings itself.
        factor = 1.0 if rope.kind == "dynamic" else rope.factor or 1.0
        reached = round(factor * (rope.original_max_position_embeddings or trained))
        return dataclasses.replace(
            self,
            rope=rope,
            max_position_embeddings=max(self.max_position_embeddings, reached),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers 5 reads as the same model."""
        return _written(self)


_MIXTURES = [name for name, family in FAMILIES.items() if family.expert_width_key]
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
_SIZES_AND_LENGTH = (*_SIZES, "max_position_embeddings")
# Layers and experts are counted one by one, here and in files; rotary embeddings have
# an angle for each pair of a head's features.
_MOST = {"num_hidden_layers": 10_000, "num_experts": 10_000, "head_dim": 2**20}
_MOST_WEIGHTS = 10**14  # 182 TiB in bfloat16
# Other numbers: whether 0 is too small, and whether they may be unset.
_NUMBERS = {
    "rms_norm_eps": (True, False),
    "initializer_range": (False, False),
    "router_aux_loss_coef": (False, False),
    "sliding_window": (False, True),
    "query_pre_attn_scalar": (True, True),
    "embedding_multiplier": (True, False),
    "residual_multiplier": (True, False),
    "attention_multiplier": (True, True),
    "logits_scaling": (True, False),
    "logit_scale": (True, False),
    "swiglu_alpha": (True, True),
    "swiglu_limit": (True, True),
    "attn_logit_softcapping": (True, True),
    "final_logit_softcapping": (True, True),
}
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "expert_width")


def family_of(model_type: Any) -> Family:
    """The family of this name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type = {shown(model_type)} is not a family that jaxtrain knows; use"
            f" one of {', '.join(FAMILIES)}, or a directory whose config.json has one"
            f" of these in its text_config: {', '.join(WRAPPERS)}"
        )
    return FAMILIES[model_type]


def _written(config: ModelConfig) -> dict[str, Any]:
    """What `ModelConfig.to_hf` gives."""
    family, types = config.family, config.layer_types
    ropes: Any = config.rope.to_hf()
    if config.local_rope is not None:
        ropes = {FULL: ropes, SLIDING: config.local_rope.to_hf()}
    if family.default_rotary_factor != 1.0:
        ropes["partial_rotary_factor"] = config.rope.partial_rotary_factor
    trained_length = config.rope.original_max_position_embeddings
    derived = {
        "attention_bias": config.qkv_bias,
        "attention_out_bias": config.o_bias,
        "no_rope_layers": [int(turned) for turned in config.rotary_layers],
        "position_embedding_type": "rope" if all(config.rotary_layers) else None,
        "use_sliding_window": config.sliding_window is not None,
        "max_window_layers": (*types, SLIDING).index(SLIDING),
        "original_max_position_embeddings": (
            trained_length or config.max_position_embeddings
        ),
    }
    # A mixture's number of experts has one of two names, the activation too.
    own_names = family.keys - {"num_experts", "hidden_act"}
    if not config.num_experts:
        own_names -= {family.expert_width_key}
    values: dict[str, Any] = {
        **{k: v for k, v in vars(config).items() if k in own_names},
        **{k: v for k, v in derived.items() if k in family.keys},
        **family.exported,
        **{k: v[0] for k, v in family.must_be.items() if v[0] is not None},
        # Whoever trains the export applies what was applied here: none.
        **dict.fromkeys(family.unused_dropout, 0.0),
        "architectures": [family.architecture],
        **{k: config.hidden_act for k in family.keys & {family.activation_key}},
        family.norm_eps_key: config.rms_norm_eps,
        family.mlp_width_key: config.intermediate_size,
        "rope_parameters": ropes,
        **(config.variety.to_hf(config) if config.variety else {}),
    }
    scalar = values.get("query_pre_attn_scalar")
    if scalar is not None and float(scalar).is_integer():
        values["query_pre_attn_scalar"] = int(scalar)  # transformers wants an int
    values |= written_mixture(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def refused_options(options: Mapping[str, Any], family: Family) -> list[str]:
    """A line that names every option whose effect this decoder would leave out."""
    refused = []
    for name, value in options.items():
        if name in family.must_be or name in family.unused_dropout:
            continue
        if name in REFUSED_UNLESS and name not in family.keys:
            if value not in REFUSED_UNLESS[name]:
                refused.append(
                    f"{name} = {shown(value, 60)} (only {REFUSED_UNLESS[name][0]!r})"
                )
            continue
        # An option of another family that is off changes nothing.
        if not family.understands(name) and value is not None and value is not False:
            refused.append(f"{name} = {shown(value, 60)}")
    for name, allowed in family.must_be.items():
        value = options.get(name, family.defaults.get(name))
        if value not in allowed:
            refused.append(f"{name} = {shown(value, 60)} (only {allowed[0]!r})")
    if not refused:
        return []
    return [
        f"{options.get('model_type')} config has options that this decoder does not"
        f" implement: {'; '.join(refused)}. Remove each that the weights do not"
        " need, or train another model"
    ]


def _wrong_layers(config: ModelConfig) -> Iterator[str]:
    if config.num_attention_heads % config.num_key_value_heads:
        yield (
            f"model.num_attention_heads = {config.num_attention_heads} is not a"
            f" multiple of num_key_value_heads = {config.num_key_value_heads}"
        )
    width = config.num_attention_heads * config.head_dim
    if config.hidden_act not in _ACTIVATIONS:
        yield (
            f"model.hidden_act = {shown(config.hidden_act)} is unknown; use one of"
            f" {', '.join(_ACTIVATIONS)}"
        )
    if len(config.layer_types) != config.num_hidden_layers:
        yield (
            f"model.layer_types names {len(config.layer_types)} layers, but"
            f" num_hidden_layers = {config.num_hidden_layers}"
        )
    own = config.variety.layer_types if config.variety else frozenset()
    known = (FULL, SLIDING, *sorted(own))
    if unknown := sorted(set(config.layer_types) - {*known}):
        words = " or ".join(map(repr, known))
        yield f"model.layer_types has {shown(unknown)}: use {words}"
    if SLIDING in config.layer_types and not config.sliding_window:
        yield (
            f"model.layer_types has {SLIDING!r}, so sliding_window must be a"
            f" number of tokens, not {shown(config.sliding_window)}"
        )
    if config.family.head_dim_is_share and width != config.hidden_size:
        yield (
            f"model.head_dim = {config.head_dim}: the heads of a {config.model_type}"
            f" always share hidden_size = {config.hidden_size}; leave it unset"
        )
    if config.rotary_layers and len(config.rotary_layers) != config.num_hidden_layers:
        yield (
            f"model.no_rope_layers names {len(config.rotary_layers)} layers, but"
            f" num_hidden_layers = {config.num_hidden_layers}"
        )
    for rope in (config.rope, config.local_rope):
        if rope is not None:
            yield from rope.problems(config.rotary_head_dim)


def _too_large(config: ModelConfig) -> Iterator[str]:
    """A line if no machine holds the matrices, counted without making a shape."""
    width, heads = config.hidden_size, config.num_attention_heads
    attention = 2 * width * config.head_dim * (heads + config.num_key_value_heads)
    mlp = 3 * width * (config.expert_width or config.intermediate_size)
    layer = attention + mlp * (config.num_experts or 1)
    weights = config.vocab_size * width + config.num_hidden_layers * layer
    if weights > _MOST_WEIGHTS:
        sizes = ", ".join(f"{name} = {getattr(config, name):,}" for name in _SIZES)
        yield (
            f"model: {sizes} make {weights / 1e12:,.0f} trillion weights, which"
            f" need {weights * 2 / 2**40:,.0f} TiB in bfloat16: lower the sizes"
        )


def _activation(given: Mapping[str, Any], family: Family) -> Any:
    """The activation's name; some families mean another by it."""
    name = given[family.activation_key]
    renamed = family.activation_names
    return renamed.get(name, name) if isinstance(name, str) else name


def _count(size: int) -> str:
    return f"{size:,}" if size < 10**18 else f"a number above {10**18:,}"


def _check_layers(given: Mapping[str, Any]) -> None:
    """Raise ValueError for a number of layers that no list may be made of."""
    layers, most = given["num_hidden_layers"], _MOST["num_hidden_layers"]
    if type(layers) is not int or not 0 < layers <= most:
        raise ValueError(
            f"model.num_hidden_layers = {shown(layers, 100)}: must be a positive"
            f" integer, at most {most:,}"
        )


def _attention_kinds(
    given: Mapping[str, Any], family: Family
) -> tuple[tuple[str, ...], int | None]:
    """The kind of each layer, and the window of the sliding ones."""
    num_layers, window = given["num_hidden_layers"], given.get("sliding_window")
    if family.window_rule == "none":
        window = None
    if "use_sliding_window" in family.keys and not given["use_sliding_window"]:
        window = None
    if given.get("layer_types") is not None:
        layer_types = tuple(_OLD_TYPES.get(kind, kind) for kind in given["layer_types"])
    elif family.window_rule == "pattern":
        # Every p-th layer is full: Gemma 2 has p = 2, Gemma 3 p = 6.
        pattern = given.get("sliding_window_pattern") or family.window_pattern
        layer_types = tuple(
            SLIDING if (i + 1) % pattern else FULL for i in range(num_layers)
        )
    elif window is None:
        layer_types = (FULL,) * num_layers
    elif family.window_rule == "unturned":
        turns = _rotary_layers(given, family, ())
        layer_types = tuple(FULL if turned else SLIDING for turned in turns)
    elif family.window_rule == "from_layer":
        first = given["max_window_layers"]
        layer_types = tuple(SLIDING if i >= first else FULL for i in range(num_layers))
    elif family.window_rule == "every_other":
        sliding = range(0, min(given["max_window_layers"], num_layers), 2)
        layer_types = tuple(
            SLIDING if i in sliding else FULL for i in range(num_layers)
        )
    else:
        layer_types = (SLIDING,) * num_layers
    return layer_types, window


def _rotary_layers(
    given: Mapping[str, Any], family: Family, layer_types: tuple[str, ...]
) -> tuple[bool, ...]:
    """Whether each layer turns queries and keys; empty where all do in the family.

    Raises:
        ValueError: the interval between layers that do not is no number of layers.
    """
    layers = given["num_hidden_layers"]
    if family.rotary_layers == "sliding":
        return tuple(kind == SLIDING for kind in layer_types)
    if family.rotary_layers == "typed":
        return (given["position_embedding_type"] == "rope",) * layers
    if family.rotary_layers == "all":
        return ()
    if given["no_rope_layers"] is not None:
        return tuple(map(bool, given["no_rope_layers"][:layers]))
    interval = given["no_rope_layer_interval"]
    if interval < 1:
        raise ValueError(
            f"model.no_rope_layer_interval = {interval}: must be a positive integer"
        )
    return tuple((i + 1) % interval != 0 for i in range(layers))
