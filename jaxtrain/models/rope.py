"""Rotary position embeddings (arXiv:2104.09864) and their context extensions.

A pair of features with frequency f is rotated by the angle f * position. The extensions
divide frequencies by a factor: all frequencies ("linear", arXiv:2306.15595), only the
low ones ("llama3", arXiv:2407.21783), more for lower ones, by a ramp between two
rotation counts ("yarn", arXiv:2309.00071), or each by its own searched factor
("longrope", arXiv:2402.13753). "dynamic" (arXiv:2309.00071, section 3.3) increases the
base for documents that are longer than those the model was trained on.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxtrain.models.families import Family, Pairs
from jaxtrain.record.safe_text import shown

_LENGTH = "original_max_position_embeddings"
# Kinds, the parameters that each one needs, and the others it has; besides theta.
_PARAMETERS: Mapping[str, tuple[str, str]] = {
    "default": ("", ""),
    "linear": ("factor", ""),
    "proportional": ("", "factor"),
    "dynamic": ("factor", _LENGTH),
    "llama3": ("factor low_freq_factor high_freq_factor", _LENGTH),
    "yarn": (
        "factor",
        f"{_LENGTH} attention_factor beta_fast beta_slow mscale mscale_all_dim"
        " truncate",
    ),
    "longrope": ("short_factor long_factor", f"factor {_LENGTH} attention_factor"),
}
_KIND_KEYS = ("rope_type", "type")
# In a family that scales queries, a parameter of every kind that has a trained length,
# and a note beside it that nothing reads.
_QUERY_SCALE, _QUERY_NOTE = "llama_4_scaling_beta", "max_position_embeddings"
_COMMON_KEYS = ("rope_theta", "partial_rotary_factor")
_ABOVE_ZERO = (
    "factor", "attention_factor", "beta_fast", "beta_slow", "high_freq_factor",
    "partial_rotary_factor", "short_factor", "long_factor",
)  # fmt: skip
_BOUNDS = {
    "rope_theta": (1, math.inf),
    _LENGTH: (2, 2**31),
    "partial_rotary_factor": (0, 1),
}
# Kinds whose rotation of a token depends on how long its document is.
KINDS_BY_LENGTH = frozenset({"longrope", "dynamic"})


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """The parameters of one rotary embedding. `kind` decides which of them are used.

    `theta` is the base of the frequencies theta ** (-2 i / rotary width), and
    `partial_rotary_factor` the share of a head's width that is rotated. Queries at
    position p are multiplied by
    1 + `llama_4_scaling_beta` log(1 + floor(p / trained length)).
    """

    kind: str = "default"
    theta: float = 10_000.0
    partial_rotary_factor: float = 1.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    llama_4_scaling_beta: float | None = None

    @classmethod
    def from_hf(
        cls, options: Mapping[str, Any], family: Family, layer_type: str
    ) -> "RopeConfig":
        """Read `rope_parameters` (transformers 5) or `rope_theta`, `rope_scaling` (4).

        Raises:
            ValueError: the kind or one of its parameters is unknown or missing.
        """
        parameters, theta = _find_parameters(options, family, layer_type)
        kind = kind_of(parameters, family)
        unread = {*_KIND_KEYS, *family.ignored_rope_keys}
        parameters = {k: v for k, v in parameters.items() if k not in unread}
        if not isinstance(kind, str) or kind not in _PARAMETERS:
            raise ValueError(
                f"rope_type = {shown(kind)} is not implemented; use a model with one of"
                f" {', '.join(_PARAMETERS)}"
            )
        required, optional = (words.split() for words in _PARAMETERS[kind])
        if family.scales_queries:
            parameters.pop(_QUERY_NOTE, None)
            optional += [_QUERY_SCALE] if _LENGTH in optional else []
        _check_values(parameters, {*required, *optional, *_COMMON_KEYS})
        stored = parameters.pop("rope_theta", None)
        theta = theta if stored is None else stored
        partial = parameters.pop("partial_rotary_factor", None)
        if partial is None:
            partial = options.get("partial_rotary_factor")
        partial = family.default_rotary_factor if partial is None else float(partial)
        if kind == "default":  # a length that nothing is scaled by
            parameters.pop(_LENGTH, None)
        parameters = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in parameters.items()
            if value is not None
        }
        unknown = sorted(parameters.keys() - {*required, *optional})
        missing = [name for name in required if name not in parameters]
        if unknown or missing:
            raise ValueError(
                f"rope_parameters of kind {shown(kind)}: unknown {shown(unknown)},"
                f" missing {missing}"
            )
        if partial != 1.0 and not (family.partial_rotary or kind == "proportional"):
            raise ValueError(
                f"partial_rotary_factor = {partial} is not implemented for"
                f" {options['model_type']}; only 1.0 is, but for rope_type ="
                " 'proportional'"
            )
        if _LENGTH in optional:
            length = options["max_position_embeddings"]
            # Phi-3 keeps the trained length outside of the rope parameters.
            trained = options.get(_LENGTH) or parameters.get(_LENGTH) or length
            if kind == "dynamic":
                trained = length  # transformers goes by no other
            if trained < 1:
                raise ValueError(f"{_LENGTH} = {trained}: not a number of tokens >= 1")
            parameters = {"factor": length / trained, **parameters, _LENGTH: trained}
        return cls(kind, float(theta), partial, **parameters)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` of transformers 5."""
        values: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.partial_rotary_factor != 1.0:
            values["partial_rotary_factor"] = self.partial_rotary_factor
        for name in [*" ".join(_PARAMETERS[self.kind]).split(), _QUERY_SCALE]:
            value = getattr(self, name)
            # Under dynamic the length is max_position_embeddings.
            implied = self.kind == "dynamic" and name == _LENGTH
            if value is not None and not implied:
                values[name] = list(value) if isinstance(value, tuple) else value
        return values

    def with_query_scale_of(self, trained: "RopeConfig") -> "RopeConfig":
        """This one with the scale of queries that the model was trained with.

        Raises:
            ValueError: there is one, and this kind has no trained length to go by.
        """
        beta = trained.llama_4_scaling_beta
        if beta is None or self.llama_4_scaling_beta is not None:
            return self
        if self.original_max_position_embeddings is None:
            raise ValueError(
                f"rope_type = {shown(self.kind)}: this model scales queries by"
                f" {_QUERY_SCALE} = {beta} and their distance from a trained length,"
                " which this kind has not; use yarn"
            )
        return dataclasses.replace(self, llama_4_scaling_beta=beta)

    @property
    def score_factor(self) -> float:
        """An additional factor on the attention scores of DeepSeek's models."""
        if self.factor is None or not self.mscale_all_dim:
            return 1.0
        return _yarn_scale(self.factor, self.mscale_all_dim) ** 2

    def rotary_width(self, head_dim: int) -> int:
        """How many features of a head are rotated; the others stay unchanged.

        For "proportional" all features are counted, though most rotate by 0.
        """
        if self.kind == "proportional":
            return head_dim
        return int(head_dim * self.partial_rotary_factor)

    def problems(self, head_dim: int) -> Iterator[str]:
        """A line for each reason why heads of this width cannot be rotated so."""
        width = self.rotary_width(head_dim)
        least = 4 if self.kind == "dynamic" else 2  # dynamic divides by width - 2
        if width % 2 or width < least:
            yield (
                f"model.head_dim = {head_dim} with partial_rotary_factor ="
                f" {self.partial_rotary_factor} turns {width} features: rotary"
                f" embeddings need an even number, at least {least}"
            )
        elif not self._has_frequencies(head_dim):
            yield (
                f"rope_parameters of kind {shown(self.kind)} give no finite frequencies"
                f" for model.head_dim = {head_dim}: {self.to_hf()!s:.300}"
            )
        for name in ("short_factor", "long_factor"):
            factors = getattr(self, name)
            if factors is not None and len(factors) != width // 2:
                yield (
                    f"rope_parameters.{name} has {len(factors)} numbers; a rotary width"
                    f" of {width} needs {width // 2}"
                )

    def _has_frequencies(self, head_dim: int) -> bool:
        """Whether these parameters give angles that are finite in float32."""
        lists = (self.short_factor, self.long_factor)
        if any(
            each is not None and len(each) != self.rotary_width(head_dim) // 2
            for each in lists
        ):
            return True  # another problem, of its own line
        try:
            with np.errstate(all="ignore"):
                frequencies, scale = inverse_frequencies(self, head_dim)
        except (ArithmeticError, ValueError):  # of logarithms and quotients
            return False
        return bool(np.isfinite(frequencies).all()) and math.isfinite(scale)


# For layers without positions: every angle is 0.
UNTURNED = RopeConfig("none")


def kind_of(parameters: Mapping[str, Any], family: Family) -> Any:
    """The kind that rope parameters name, as transformers 4 or 5 spells it."""
    kind = parameters.get("rope_type", parameters.get("type")) or "default"
    if family.fused == "all" and kind in ("su", "yarn"):
        return "longrope"  # the names that early Phi-3 configs gave it
    return kind


def unread_parameters(parameters: Mapping[str, Any], family: Family) -> list[str]:
    """The rope parameters that their kind does not read, in order.

    The list is empty for an unknown kind, which `RopeConfig.from_hf` refuses.
    """
    kind = kind_of(parameters, family)
    if not isinstance(kind, str) or kind not in _PARAMETERS:
        return []
    read = {
        *family.ignored_rope_keys,
        *_KIND_KEYS,
        *_COMMON_KEYS,
        _LENGTH,
        *" ".join(_PARAMETERS[kind]).split(),
    }
    if family.scales_queries:
        read |= {_QUERY_SCALE, _QUERY_NOTE}
    return [name for name in parameters if name not in read]


def _check_values(parameters: Mapping[str, Any], known: set[str]) -> None:
    """Raise ValueError if a known parameter is not a number or is out of range."""
    wrong = [
        f"{name} = {shown(value, 60)}"
        for name, value in parameters.items()
        if name in known and value is not None and not _is_valid(name, value)
    ]
    if wrong:
        raise ValueError(
            f"rope_parameters has invalid values: {', '.join(wrong)}. Each must be a"
            " finite number of at least 0 (short_factor, long_factor: a list of them;"
            f" truncate: true or false). rope_theta must be at least 1, {_LENGTH} at"
            " least 2, partial_rotary_factor at most 1, and"
            f" {', '.join(_ABOVE_ZERO)} above 0"
        )


def _is_valid(name: str, value: Any) -> bool:
    if name == "truncate":
        return isinstance(value, bool)
    is_list = name in ("short_factor", "long_factor")
    if is_list and not isinstance(value, list | tuple):
        return False
    numbers = value if is_list else [value]
    if any(
        type(number) not in (int, float) or not 0 <= number <= sys.float_info.max
        for number in numbers
    ):
        return False
    if name in _ABOVE_ZERO and not all(number > 0 for number in numbers):
        return False
    least, most = _BOUNDS.get(name, (0, math.inf))
    return all(least <= number <= most for number in numbers)


def _find_parameters(
    options: Mapping[str, Any], family: Family, layer_type: str
) -> tuple[dict[str, Any], float]:
    """The rope parameters of these layers, and the base to use if they give none."""
    parameters = options.get("rope_parameters") or {}
    nested = isinstance(parameters.get(layer_type), Mapping)
    if nested and family.local_rope == "none":
        raise ValueError(
            f"rope_parameters for each layer type are not implemented for"
            f" {options['model_type']}; give one set"
        )
    if nested:
        parameters = parameters[layer_type]
    # Sliding layers are scaled only where they have parameters of their own.
    unscaled = family.local_rope != "none" and layer_type == "sliding_attention"
    if unscaled and not nested:
        parameters = {}
    if unscaled and family.local_rope == "own_base":
        return dict(parameters), _given_theta(options, "rope_local_base_freq", 10_000.0)
    theta = _given_theta(options, "rope_theta", family.default_rope_theta)
    scaling = {} if unscaled else options.get("rope_scaling") or {}
    return {**parameters, **scaling} or {**family.default_rope}, theta


def _given_theta(options: Mapping[str, Any], key: str, default: float) -> float:
    """A base that is given outside the rope parameters."""
    theta = options.get(key)
    if theta is not None and not _is_valid("rope_theta", theta):
        raise ValueError(f"{key} = {shown(theta)}: must be a finite number, at least 1")
    return default if theta is None else theta


def inverse_frequencies(
    rope: RopeConfig, head_dim: int
) -> tuple[Float[np.ndarray, "sets half"], float]:
    """Radians per position for each pair of features, and the factor on cos and sin.

    The frequencies have one row; those of longrope have two, one for documents up to
    the trained length and one for longer documents.
    """
    width = rope.rotary_width(head_dim)
    base = rope.theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    scale = 1.0
    if rope == UNTURNED:
        base = 0 * base
    elif rope.kind == "linear":
        base = base / _given(rope.factor)
    elif rope.kind == "proportional":
        turning = int(rope.partial_rotary_factor * head_dim // 2)
        base = np.where(np.arange(width // 2) < turning, base, 0) / (rope.factor or 1.0)
    elif rope.kind == "llama3":
        base = _llama3(rope, base)
    elif rope.kind == "yarn":
        base, scale = _yarn(rope, base, width)
    elif rope.kind == "longrope":
        scale = _longrope_scale(rope)
        factors = np.asarray([rope.short_factor, rope.long_factor], np.float64)
        return (base / factors).astype(np.float32), scale
    return base.astype(np.float32)[None], scale


def _given(value: Any) -> Any:
    assert value is not None  # from_hf refuses a config without it
    return value


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Keep high frequencies, divide low ones by `factor`, interpolate in between."""
    low, high = _given(rope.low_freq_factor), _given(rope.high_freq_factor)
    turns = _given(rope.original_max_position_embeddings) * base / (2 * math.pi)
    share_kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return base * (share_kept + (1 - share_kept) / _given(rope.factor))


def _yarn(rope: RopeConfig, base: np.ndarray, width: int) -> tuple[np.ndarray, float]:
    """Interpolate by a ramp over feature pairs, from beta_fast to beta_slow turns."""
    factor = _given(rope.factor)
    length = _given(rope.original_max_position_embeddings)

    def pair_that_turns(times: float) -> float:
        ratio = math.log(length / (times * 2 * math.pi)) / math.log(rope.theta)
        return width * ratio / 2

    first = pair_that_turns(rope.beta_fast or 32)
    last = pair_that_turns(rope.beta_slow or 1)
    if rope.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = (last - first) or 0.001
    ramp = np.clip((np.arange(width // 2) - first) / span, 0.0, 1.0)
    scale = rope.attention_factor
    if scale is None:
        weight, whole = rope.mscale, rope.mscale_all_dim
        if not (weight and whole):
            weight, whole = 1.0, 0.0
        scale = _yarn_scale(factor, weight) / _yarn_scale(factor, whole)
    return base * (ramp / factor + (1 - ramp)), float(scale)


def _yarn_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return float(rope.attention_factor)
    factor = _given(rope.factor)
    if factor <= 1:
        return 1.0
    length = _given(rope.original_max_position_embeddings)
    return math.sqrt(1 + math.log(factor) / math.log(length))


class Rotary(NamedTuple):
    """The cosine and sine of every rotary angle, in float32.

    `query_scale`: factors on each token's query, for models that scale queries.
    """

    cos: Float[Array, "*layers B T half"]
    sin: Float[Array, "*layers B T half"]
    query_scale: Float[Array, "*layers B T"] | None = None


def make_rotary(
    rope: RopeConfig,
    head_dim: int,
    positions: Int32[Array, "B T"],
    segment_ids: Int32[Array, "B T"],
) -> Rotary:
    """Make the rotary embedding of tokens at these positions in their documents."""
    tables = rotary_tables(rope, head_dim, positions, segment_ids)
    beta = rope.llama_4_scaling_beta
    if beta is None:
        return Rotary(*tables)
    times = positions // _given(rope.original_max_position_embeddings)
    return Rotary(*tables, 1 + beta * jnp.log(1 + times.astype(jnp.float32)))


def rotary_tables(
    rope: RopeConfig,
    head_dim: int,
    positions: Int32[Array, "B T"],
    segment_ids: Int32[Array, "B T"],
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """The cosines and sines of every angle, in float32.

    For "longrope" the length of a document chooses between the two sets of factors; for
    "dynamic" it increases the base.
    """
    if rope.kind == "dynamic":
        return _dynamic_tables(rope, head_dim, positions, segment_ids)
    frequencies, scale = inverse_frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[..., None] * frequencies[0]
    if len(frequencies) == 2:
        long_angles = positions.astype(jnp.float32)[..., None] * frequencies[1]
        lengths = _document_lengths(positions, segment_ids)
        is_long = lengths > _given(rope.original_max_position_embeddings)
        angles = jnp.where(is_long[..., None], long_angles, angles)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _dynamic_tables(
    rope: RopeConfig,
    head_dim: int,
    positions: Int32[Array, "B T"],
    segment_ids: Int32[Array, "B T"],
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """The base times (factor * length / trained - (factor - 1)) ** (width / (width-2)).

    No document counts as shorter than the trained length, where that is the base as is.
    """
    width, factor = rope.rotary_width(head_dim), _given(rope.factor)
    trained = _given(rope.original_max_position_embeddings)
    lengths = jnp.maximum(_document_lengths(positions, segment_ids), trained)
    stretch = factor * lengths / trained - (factor - 1)
    exponents = np.arange(0, width, 2) / width
    # stretch ** (-exponent * width / (width - 2)), one for each token and pair.
    slowed = stretch[..., None] ** (-exponents * width / (width - 2))
    frequencies, _ = inverse_frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[..., None] * (frequencies[0] * slowed)
    return jnp.cos(angles), jnp.sin(angles)


def _document_lengths(
    positions: Int32[Array, "B T"], segment_ids: Int32[Array, "B T"]
) -> Int32[Array, "B T"]:
    """For each token the length of its document, in tokens."""

    def row(positions: Array, segments: Array) -> Array:
        last = jax.ops.segment_max(positions, segments, positions.shape[0] + 1)
        return last[segments] + 1

    return jax.vmap(row)(positions, segment_ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def rotate(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    pairs: Pairs = "halves",
) -> Float[Array, "B T N H"]:
    """Turn the first 2 * half features of every head, in float32.

    Feature i is paired with feature i + half, or 2 i with 2 i + 1 ("interleaved"), as
    in the published weights. Either way the result has the first features of all pairs
    and then the second ones: queries and keys are only ever multiplied with each other,
    so what matters is that both have one order. Angles get no gradient.
    """
    half = cos.shape[-1]
    places = (slice(half), slice(half, 2 * half))
    if pairs == "interleaved":
        places = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    turned = jnp.concatenate(_turn(x, places, cos, sin), axis=-1).astype(x.dtype)
    return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def _turn(
    x: Array, places: tuple[slice, slice], cos: Array, sin: Array
) -> tuple[Array, Array]:
    """The first and the second features of all pairs, turned, in float32."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    first, second = (x[..., place].astype(jnp.float32) for place in places)
    return first * cos - second * sin, second * cos + first * sin


def _rotate_forward(
    x: Array, cos: Array, sin: Array, pairs: Pairs
) -> tuple[Array, tuple[Array, Array]]:
    return rotate(x, cos, sin, pairs), (cos, sin)


def _rotate_backward(
    pairs: Pairs,
    tables: tuple[Array, Array],
    gradient: Array,
) -> tuple[Array, Array, Array]:
    """A rotation back.

    As jax derives it, it is a sum of padded halves, which takes GPUs twice the time
    (benchmarks/RESULTS.md).
    """
    cos, sin = tables
    half = cos.shape[-1]
    turned = _turn(gradient, (slice(half), slice(half, 2 * half)), cos, -sin)
    if pairs == "interleaved":
        back = jnp.stack(turned, axis=-1).reshape(*gradient.shape[:-1], 2 * half)
    else:
        back = jnp.concatenate(turned, axis=-1)
    rest = gradient[..., 2 * half :]
    of_x = jnp.concatenate([back.astype(gradient.dtype), rest], axis=-1)
    return of_x, jnp.zeros_like(cos), jnp.zeros_like(sin)


rotate.defvjp(_rotate_forward, _rotate_backward)
