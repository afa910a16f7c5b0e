"""One gated delta rule for every platform; "auto" picks an implementation, logged."""

import functools
import importlib
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int32

from jaxtrain.kernels.attention.cudnn import compute_capability
from jaxtrain.kernels.attention.partition import Layout
from jaxtrain.kernels.delta_rule.chunks import LENGTH, Chunk
from jaxtrain.kernels.delta_rule.passes import run_rows
from jaxtrain.kernels.delta_rule.recurrent import run_tokens
from jaxtrain.kernels.delta_rule.xla import delta_rule_xla

IMPLEMENTATIONS = ("auto", "recurrent", "xla", "pallas_triton", "pallas_tpu")
_EPSILON = 1e-6  # beside the sum of squares that keys and queries are divided by
_logger = logging.getLogger(__name__)


def delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N V"],
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    initial_state: Float32[Array, "B N H V"] | None = None,
    implementation: str = "auto",
    layout: Layout | None = None,
) -> tuple[Float[Array, "B T N V"], Float32[Array, "B N H V"]]:
    """The gated delta rule over packed rows (arXiv:2412.06464), and the last state.

    Value head n has key head n // (N // K). Queries and keys are brought to length 1,
    queries then multiplied by H ** -0.5. Each token multiplies its head's state by
    exp(log_decay), which is at most 1, and overwrites a share `beta` of what its key
    reads there; chunks.py has the equations. States are float32, outputs of v's type.

    A token whose segment id is not that of the last token before it starts with an
    empty state; a row's first token starts with `initial_state`, empty where None.
    Padding (segment id 0) leaves the state as it is and reads zeros, whatever it holds.

    `layout` says how a mesh splits the arrays, where there is one; rows stay whole.

    Raises:
        ValueError: shapes do not fit together, the name is unknown, or the mesh splits
            rows.
        NotImplementedError: the named implementation cannot serve this call.
    """
    _check(q, k, v, implementation)
    batch, length, heads, width = v.shape
    ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, k.shape[3], width), jnp.float32)
    if implementation == "auto":
        implementation = _choose(k, v, _device_of(layout))
    elif reason := _refusal(implementation, k, v, _device_of(layout)):
        raise NotImplementedError(
            f"delta rule implementation {implementation!r} refuses: {reason}; use"
            " 'auto' or 'xla'"
        )
    is_token = ids != 0

    def clean(x: Array) -> Array:
        mask = is_token.reshape(batch, length, *[1] * (x.ndim - 2))
        return jnp.where(mask, x, jnp.zeros((), x.dtype))

    q, k, v, log_decay, beta = map(clean, (q, k, v, log_decay, beta))
    out, state = _on_shards(layout, functools.partial(_run, implementation), heads, k)(
        (_unit_length(q, q.shape[3] ** -0.5), _unit_length(k), v),
        (log_decay.astype(jnp.float32), beta.astype(jnp.float32)),
        _restarts(ids),
        initial_state,
    )
    return checkpoint_name(out, "attention"), state


def _run(
    implementation: str,
    features: tuple[Array, Array, Array],
    gates: tuple[Array, Array],
    restarts: Bool[Array, "B T"],
    state: Array,
) -> tuple[Array, Array]:
    """Run the named implementation on one device."""
    length = restarts.shape[1]
    if implementation == "recurrent":
        out, state = run_tokens(*features, *gates, restarts, state)
        return out.astype(features[2].dtype), state
    rows = _rows(features, gates, restarts)
    if implementation == "xla":
        out, state = delta_rule_xla(rows, state)
    else:
        out, state = run_rows(_load_passes(implementation), rows, state)
    return out[:, :length], state


def _rows(
    features: tuple[Array, Array, Array],
    gates: tuple[Array, Array],
    restarts: Bool[Array, "B T"],
) -> Chunk:
    """Rows filled up to whole chunks, with restarts counted by chunk."""
    tail = -restarts.shape[1] % LENGTH

    def fill(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, tail)] + [(0, 0)] * (x.ndim - 2))

    def by_chunk(x: Array) -> Array:
        """[B T N] -> [B N C L]."""
        x = fill(x).swapaxes(1, 2)
        return x.reshape(*x.shape[:2], -1, LENGTH)

    log_decay, beta = map(by_chunk, gates)
    resets = by_chunk(restarts.astype(jnp.int32)[..., None])
    q, k, v = map(fill, features)
    return Chunk(q, k, v, log_decay, beta, jnp.cumsum(resets, axis=-1, dtype=jnp.int32))


def _restarts(ids: Int32[Array, "B T"]) -> Bool[Array, "B T"]:
    """The tokens of another document than the last token before them."""
    places = jnp.arange(ids.shape[1])
    last = jax.lax.cummax(jnp.where(ids != 0, places, -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    id_before = jnp.take_along_axis(ids, jnp.maximum(before, 0), axis=1)
    return (ids != 0) & (before >= 0) & (id_before != ids)


def _unit_length(x: Array, factor: float = 1.0) -> Array:
    x32 = x.astype(jnp.float32)
    squares = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * (jax.lax.rsqrt(squares + _EPSILON) * factor)).astype(x.dtype)


def _on_shards(layout: Layout | None, run: Any, heads: int, k: Array) -> Any:
    """`run` on each device for its rows and heads: a kernel cannot be cut otherwise.

    Raises:
        ValueError: the mesh splits rows, each of whose tokens needs the one before.
    """
    if layout is None or layout.mesh is None or layout.mesh.size == 1:
        return run
    if layout.count(layout.tokens) > 1:
        raise ValueError(
            f"delta rule: the mesh splits rows over {layout.tokens}, but a token's"
            " state depends on every token before it; set mesh.context = 1"
        )
    rows = layout.fitting(layout.rows, k.shape[0])
    split = layout.fitting(layout.heads, k.shape[2])
    # Axes that a spec does not name cost a sum of gradients, be they of size 1.
    idle = (axis for axis, size in layout.mesh.shape.items() if size == 1)
    rows += tuple(axis for axis in idle if axis not in (*rows, *split))
    of_tokens = PartitionSpec(rows or None, None, split or None)
    of_state = PartitionSpec(rows or None, split or None)
    return jax.shard_map(
        run,
        mesh=layout.mesh,
        in_specs=(of_tokens, of_tokens, PartitionSpec(rows or None), of_state),
        out_specs=(of_tokens, of_state),
        check_vma=False,  # a kernel does not say over which axes its outputs vary
    )


def _device_of(layout: Layout | None) -> jax.Device | None:
    """A device of the mesh; it need not be present on this machine."""
    if layout is None or layout.mesh is None:
        return None
    return layout.mesh.devices.flat[0]


@functools.cache
def _load_passes(name: str) -> Any:
    """Import only on demand: JAX has announced the end of its Triton lowering."""
    return importlib.import_module(f"jaxtrain.kernels.delta_rule.{name}").make_passes()


def _choose(k: Array, v: Array, device: jax.Device | None) -> str:
    """The fastest implementation of this platform that serves the call."""
    platform = jax.default_backend() if device is None else device.platform
    name, reason = "xla", None
    if v.shape[1] == 1:
        name = "recurrent"
    elif platform in ("tpu", "gpu"):
        name = {"tpu": "pallas_tpu", "gpu": "pallas_triton"}[platform]
        reason = _refusal(name, k, v, device)
        name = "xla" if reason else name
    _log_choice(name, v.shape[2:], k.shape[2:], v.dtype.name, reason)
    return name


def _refusal(name: str, k: Array, v: Array, device: jax.Device | None) -> str | None:
    """Why this implementation cannot serve the call; None where it can."""
    if name == "pallas_tpu" and jax.default_backend() == "gpu":
        return "the backend is 'gpu', not a TPU"
    if name != "pallas_triton":
        return None
    # A GPU that is not here is named to its lowering by `aot`.
    capability = compute_capability(device)
    if capability is None or capability < 8.0:
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    try:
        module = importlib.import_module(f"jaxtrain.kernels.delta_rule.{name}")
    except ImportError as error:
        return f"this jax lacks it ({error})"
    return module.refuse_widths(k.shape[3], v.shape[3])


@functools.cache
def _log_choice(
    name: str,
    values: tuple[int, int],
    keys: tuple[int, int],
    dtype: str,
    reason: str | None,
) -> None:
    """One line for each new choice; a warning where it is not the platform's kernel."""
    told = "delta rule: auto chose %s for %d heads of %d, %d of keys of %d, %s"
    _logger.info(told, name, *values, *keys, dtype)
    if reason:
        _logger.warning(
            "delta rule: this platform's kernel refuses (%s), and %s is slower",
            reason,
            name,
        )


def _check(q: Array, k: Array, v: Array, implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"delta rule implementation {implementation!r} is unknown; use one of"
            f" {', '.join(IMPLEMENTATIONS)}"
        )
    if q.shape != k.shape or k.shape[:2] != v.shape[:2] or v.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: q and k need one"
            " shape, v the same rows and a multiple of their heads"
        )
