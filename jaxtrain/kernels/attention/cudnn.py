"""cuDNN's fused attention through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtrain.kernels.attention.masks import Extras, Mask, whole_mask
from jaxtrain.kernels.attention.reference import zero_padding


def refusal(
    q: Array | jax.ShapeDtypeStruct,
    mask: Mask,
    extras: Extras,
    device: jax.Device | None,
) -> str | None:
    """Why cuDNN cannot serve this call, or None where it can.

    `device` does not matter: jax asks the library and the GPU that are here.
    """
    _, length, _, width = q.shape
    if jax.default_backend() != "gpu":
        return f"the backend is {jax.default_backend()!r}, not a GPU"
    if (compute_capability() or 0) < 8.0:
        return "the GPU is older than Ampere, or not NVIDIA's"
    if extras.softcap is not None:
        return "cuDNN has no logit soft cap"
    if extras.has_sinks:
        return "jax gives no exact log-sum-exp of cuDNN's, which sinks need"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 or float16, not {q.dtype.name}"
    if width % 8 or width > 128:
        return f"head width {width} is not a multiple of 8 up to 128"
    if extras.value_width not in (None, width):
        return f"jax passes it no values of width {extras.value_width} for {width}"
    if mask.segment_ids is not None and length % 2:
        return f"segments in a row of {length}: the length must be even"
    if length < 2:
        return "a row of one token"
    return None


def compute_capability(device: jax.Device | None = None) -> float | None:
    """The compute capability of an NVIDIA GPU, such as 9.0; None for other devices.

    `device` is the first local device by default.
    """
    if device is None and jax.default_backend() != "gpu":
        return None
    value = getattr(device or jax.local_devices()[0], "compute_capability", None)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # AMD names an architecture there
        return None


def attention_cudnn(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Fused attention; segments become one mask [B 1 T S] in device memory."""
    if mask.segment_ids is None and not mask.offset:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=mask.causal,
            scale=scale,
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
            implementation="cudnn",
        )
    (q,) = zero_padding(mask.segment_ids, q)
    k, v = zero_padding(mask.keys, k, v)
    allowed = whole_mask(mask, q.shape[1], k.shape[1])
    assert allowed is not None
    out = jax.nn.dot_product_attention(
        q, k, v, mask=allowed[:, None], scale=scale, implementation="cudnn"
    )
    # A row that may read no key averages them all there; ours gives zeros.
    return zero_padding(mask.segment_ids, out)[0]
