"""One `attention` for every platform; "auto" picks the implementation and logs it."""

import functools
import importlib
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int32

from jaxtrain.kernels.attention import blocked, cudnn
from jaxtrain.kernels.attention.masks import Extras, Mask
from jaxtrain.kernels.attention.partition import (
    Layout,
    attend_on_shards,
    parts_of_rows,
)
from jaxtrain.kernels.attention.reference import attention_reference
from jaxtrain.kernels.attention.schedule import Plan, Schedule
from jaxtrain.kernels.attention.xla import attention_xla

_PALLAS = ("pallas_gpu", "pallas_triton", "pallas_tpu")
_BLOCKED = (*_PALLAS, "xla_blocks")  # leave out blocks that a mask leaves empty
IMPLEMENTATIONS = ("auto", "reference", "xla", "cudnn", *_BLOCKED)
# Up to here our Hopper kernels are ahead of cuDNN on plain causal rows, or level.
_MEASURED_ROW, _NARROW_HEAD = 8192, 128
# From here on blocks are left out where XLA alone runs; shorter rows have few of them.
_LEAST_BLOCKED = 512
# GPUs with 99 KiB of shared memory: A10, RTX 30; L4, L40, RTX 40; RTX 50 and PRO.
_SMALL_SHARED_MEMORY = (8.6, 8.9, 12.0, 12.1)
_logger = logging.getLogger(__name__)
_logged: set[tuple[Any, ...]] = set()  # choices that a line told
Queries = Array | jax.ShapeDtypeStruct  # their shape and type


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    prompt_ids: Int32[Array, "B T"] | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    implementation: str = "auto",
    schedule: Plan = None,
    layout: Layout | None = None,
) -> Float[Array, "B T N V"]:
    """Scaled dot-product attention over packed rows (arXiv 1706.03762, GQA 2305.13245).

    Query t reads key s where their segment ids are equal and not 0, s <= t in index
    order (causal) and t - s < window. `prompt_ids[t]` names a second segment that t
    reads besides its own: a prompt that several responses of the row share; 0 names
    none. Query head n reads key-value head n // (N // K). Logits are
    `softcap * tanh(scale * q k / softcap)`; `scale` is H ** -0.5 unless given. `sinks`
    are a logit more in each head's softmax, which no value answers (arXiv 2309.17453):
    they take weight from what a query reads.

    Rows of padding (segment id 0) give zeros, whatever their inputs hold.

    `schedule` is what `plan_attention` gave for the same mask, implementation and
    layout; those that visit blocks make their own where it is None.

    `layout` says how a mesh splits the arrays, where there is one.

    Raises:
        ValueError: shapes or options do not fit together, or the name is unknown.
        NotImplementedError: the named implementation cannot serve this call.
    """
    mask = Mask(segment_ids, prompt_ids, causal, window)
    _check_shapes(q, k, v, mask, sinks)
    _check_options(mask, softcap, implementation)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    device = _device_of(layout)
    extras = Extras(softcap, sinks is not None, v.shape[-1])
    if implementation == "auto":
        implementation = _choose(q, mask, extras, device)
    attend = functools.partial(_attend, implementation, softcap, scale)
    reason = None
    if implementation in _REFUSALS:
        reason = _REFUSALS[implementation](q, mask, extras, device)
    if reason is not None:
        raise NotImplementedError(
            f"attention implementation {implementation!r} refuses: {reason}; "
            "use 'auto' or 'xla'"
        )
    layout = layout or Layout()
    out = attend_on_shards(attend, layout, q, k, v, mask, schedule, sinks)
    if implementation in _BLOCKED and not _cuts_rows(layout, q.shape[1]):
        return out  # the kernel has named it, with what its backward pass reads
    return checkpoint_name(out, "attention")


def _attend(
    implementation: str,
    softcap: float | None,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    schedule: Schedule | None,
    sinks: Array | None,
) -> Array:
    """Run the named implementation on one device."""
    options: dict[str, Any] = {"softcap": softcap, "scale": scale, "sinks": sinks}
    if implementation == "reference":
        return attention_reference(q, k, v, mask, **options)
    if implementation == "xla":
        return attention_xla(q, k, v, mask, **options)
    if implementation == "cudnn":
        return cudnn.attention_cudnn(q, k, v, mask, scale=scale)
    kernels = _load_kernels(implementation)
    return blocked.attention_blocked(
        kernels, q, k, v, mask, **options, schedule=schedule
    )


def plan_attention(
    q: Float[Array, "B T N H"] | jax.ShapeDtypeStruct,
    *,
    segment_ids: Int32[Array, "B T"] | None = None,
    prompt_ids: Int32[Array, "B T"] | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    has_sinks: bool = False,
    value_width: int | None = None,
    implementation: str = "auto",
    layout: Layout | None = None,
) -> Plan:
    """The blocks that the layers of one batch visit, found once for all of them.

    The arguments are `attention`'s, but only the shape and type of `q` matter, whether
    there are sinks, and the width of values (None: that of q). None where the
    implementation visits no blocks. Where the mesh splits rows, one schedule of each
    part. Layers with another window need another schedule.
    """
    mask = Mask(segment_ids, prompt_ids, causal, window)
    if implementation == "auto":
        extras = Extras(softcap, has_sinks, value_width)
        implementation = _choose(q, mask, extras, _device_of(layout))
    if implementation not in _BLOCKED:
        return None
    (batch, length), kernels = q.shape[:2], _load_kernels(implementation)
    if layout is None or not _cuts_rows(layout, length):
        return blocked.plan(kernels, mask, batch, length)
    parts = parts_of_rows(layout, mask, batch, length)
    queries = length // len(parts)
    return tuple(
        blocked.plan(kernels, own, batch, queries, keys) for own, keys in parts
    )


def skips_blocks(
    q: jax.ShapeDtypeStruct,
    *,
    softcap: float | None = None,
    has_sinks: bool = False,
    value_width: int | None = None,
    implementation: str = "auto",
    layout: Layout | None = None,
) -> bool:
    """Whether attention skips the blocks between different documents of a row.

    Then a long row of many documents costs as much as one row for each of them.
    """
    if implementation == "auto":
        ids = jax.ShapeDtypeStruct(q.shape[:2], jnp.int32)
        mask = Mask(ids, None, True, None)  # type: ignore[arg-type]
        extras = Extras(softcap, has_sinks, value_width)
        implementation = _choose(q, mask, extras, _device_of(layout))
    return implementation in _BLOCKED and not _cuts_rows(layout, q.shape[1])


def _cuts_rows(layout: Layout | None, length: int) -> bool:
    return layout is not None and layout.token_shards(length) > 1


def _device_of(layout: Layout | None) -> jax.Device | None:
    """A device of the mesh; it need not be present on this machine."""
    if layout is None or layout.mesh is None:
        return None
    return layout.mesh.devices.flat[0]


def _load_kernels(name: str) -> blocked.Kernels:
    """Import only on demand: JAX has announced the end of its Triton lowering."""
    try:
        module = importlib.import_module(f"jaxtrain.kernels.attention.{name}")
    except ImportError as error:
        raise NotImplementedError(
            f"attention implementation {name!r} refuses: this jax lacks it ({error})"
        ) from error
    return module.KERNELS


def _choose(q: Queries, mask: Mask, extras: Extras, device: jax.Device | None) -> str:
    """The fastest implementation measured on this platform that serves the call.

    On Hopper our kernels win where documents leave blocks out, are ahead or level on
    plain rows as far as was measured, and serve soft caps, sinks, values narrower than
    keys and heads of up to 256; cuDNN takes longer plain rows of narrow heads
    (benchmarks/RESULTS.md). On other NVIDIA GPUs cuDNN takes plain rows, and our Triton
    kernels those with blocks to leave out and what cuDNN refuses, up to a width whose
    tiles fit every card; that is an estimate from a Hopper GPU, where they were
    measured. For TPUs there is one kernel. Where none of these runs, plain XLA leaves
    out blocks of packed rows and computes the whole mask of others; the log says why.
    The mesh, of which `device` is one, need not be present: then cuDNN, which asks the
    GPU that is here, gives way to ours.
    """
    platform = jax.default_backend() if device is None else device.platform
    by_cudnn = cudnn.refusal(q, mask, extras, device)
    packed = mask.segment_ids is not None
    ours = packed or q.shape[1] <= _MEASURED_ROW or by_cudnn is not None
    why = ""
    if platform == "tpu":
        name = "pallas_tpu"
    elif ours and _refuse_pallas_gpu(q, mask, extras, device) is None:
        name = "pallas_gpu"
    elif by_cudnn is None and not packed:
        name = "cudnn"
    elif (reason := _why_not_triton(q, mask, extras, device)) is None:
        name = "pallas_triton"
    elif by_cudnn is None:
        name = "cudnn"
    else:
        name = _without_kernels(q, mask)
        if "gpu" in (platform, jax.default_backend()):
            by_hopper = _refuse_pallas_gpu(q, mask, extras, device)
            slow = "" if name == "xla_blocks" else "which is slow "
            why = (
                f", {slow}(pallas_gpu: {by_hopper}; cudnn: {by_cudnn};"
                f" pallas_triton: {reason})"
            )
    _log_choice(name, q, mask, extras, why)
    return name


def _without_kernels(q: Queries, mask: Mask) -> str:
    """What XLA alone runs: blocks are left out where there are such, and many."""
    leaves_out = mask.segment_ids is not None
    return "xla_blocks" if leaves_out and q.shape[1] >= _LEAST_BLOCKED else "xla"


def _why_not_triton(
    q: Queries, mask: Mask, extras: Extras, device: jax.Device | None
) -> str | None:
    """Why Triton's kernels are not chosen unasked; None where they are."""
    refusal = _refuse_pallas_triton(q, mask, extras, device)
    if refusal is not None:
        return refusal
    if _is_hopper(cudnn.compute_capability(device)):
        return "it is slow on Hopper"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it is slow in {q.dtype.name}"
    try:
        _load_kernels("pallas_triton")
    except NotImplementedError as error:
        return str(error)
    return None


def _refuse_pallas_gpu(
    q: Queries, mask: Mask, extras: Extras, device: jax.Device | None
) -> str | None:
    if not _is_hopper(cudnn.compute_capability(device)):
        return "it needs a Hopper GPU (compute capability 9.0)"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 or float16, not {q.dtype.name}"
    return _refuse_wide_heads(q, extras)


def _refuse_pallas_triton(
    q: Queries, mask: Mask, extras: Extras, device: jax.Device | None
) -> str | None:
    # A GPU that is not here is named to its lowering by `aot`.
    capability = cudnn.compute_capability(device)
    if capability is None or capability < 8.0:
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    if q.shape[-1] > _NARROW_HEAD and capability in _SMALL_SHARED_MEMORY:
        return (
            f"head width {q.shape[-1]} is above {_NARROW_HEAD}, and its tiles exceed"
            f" the 99 KiB of shared memory of compute capability {capability}"
        )
    return _refuse_wide_heads(q, extras)


def _is_hopper(capability: float | None) -> bool:
    return capability is not None and 9.0 <= capability < 10.0


def _refuse_pallas_tpu(
    q: Queries, mask: Mask, extras: Extras, device: jax.Device | None
) -> str | None:
    # The CPU backend passes: it compiles ahead of time for a TPU that is not here.
    if jax.default_backend() == "gpu":
        return "the backend is 'gpu', not a TPU"
    return None


def _refuse_wide_heads(q: Queries, extras: Extras) -> str | None:
    width = max(q.shape[-1], extras.value_width or 0)
    return f"head width {width} is above 256" if width > 256 else None


# Of what kind the devices of these are; the others run on any.
PLATFORM_OF = {
    "cudnn": "gpu", "pallas_gpu": "gpu", "pallas_triton": "gpu", "pallas_tpu": "tpu",
}  # fmt: skip
_Refuse = Callable[[Queries, Mask, Extras, jax.Device | None], str | None]
_REFUSALS: dict[str, _Refuse] = {
    "cudnn": cudnn.refusal,
    "pallas_gpu": _refuse_pallas_gpu,
    "pallas_triton": _refuse_pallas_triton,
    "pallas_tpu": _refuse_pallas_tpu,
}


def _log_choice(name: str, q: Queries, mask: Mask, extras: Extras, why: str) -> None:
    """One line for each new choice, not one for each layer, trace or shape of rows."""
    packed = mask.segment_ids is not None
    choice = (name, q.shape[2:], q.dtype.name, packed, extras)
    if choice in _logged:
        return
    _logged.add(choice)
    words = ["with segments" if packed else "without segments"]
    if extras.has_sinks:
        words.append("with sinks")
    heads, width = q.shape[2:]
    if extras.value_width not in (None, width):
        words.append(f"values of {extras.value_width}")
    told = "attention: auto chose %s for %d heads of %d, %s, %s%s"
    _logger.info(told, name, heads, width, q.dtype.name, ", ".join(words), why)


def _check_shapes(
    q: Array, k: Array, v: Array, mask: Mask, sinks: Array | None
) -> None:
    batch, length, heads, width = q.shape
    if k.shape[:3] != v.shape[:3] or (k.shape[0], k.shape[3]) != (batch, width):
        raise ValueError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not fit: k needs the shape "
            "[B S K H] with q's B and H, and v [B S K V]"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks {sinks.shape} must have shape {(heads,)}: one a head")
    if heads % k.shape[2]:
        raise ValueError(
            f"{heads} query heads are not a multiple of {k.shape[2]} key-value heads"
        )
    if (mask.causal or mask.segment_ids is not None) and k.shape[1] != length:
        raise ValueError(
            f"{length} queries and {k.shape[1]} keys: causal and segment_ids need as "
            "many keys as queries; pass causal=False for cross attention"
        )
    ids = {"segment_ids": mask.segment_ids, "prompt_ids": mask.prompt_ids}
    for name, value in ids.items():
        if value is not None and value.shape != (batch, length):
            raise ValueError(f"{name} {value.shape} must have shape {(batch, length)}")


def _check_options(mask: Mask, softcap: float | None, implementation: str) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention implementation {implementation!r} is unknown; "
            f"use one of {', '.join(IMPLEMENTATIONS)}"
        )
    if mask.window is not None and (mask.window < 1 or not mask.causal):
        raise ValueError(
            f"window={mask.window} needs causal=True and at least 1; "
            "pass None for no window"
        )
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap={softcap} must be above 0; pass None for no cap")
    if mask.prompt_ids is not None and mask.segment_ids is None:
        raise ValueError("prompt_ids need segment_ids: they name segments of the row")
