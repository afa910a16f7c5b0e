"""Which layers compute their activations again in the backward pass, and which do not.

The last layers go first through the backward pass. What they keep is gone before the
gradients of the earlier ones are there, so a step may keep about as much of them as
gradients take, and its peak of memory is hardly higher.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from jaxtrain.kernels.fp8 import RESIDUALS

_policies = jax.checkpoint_policies
# What a layer keeps for the backward pass; everything else is computed again. "full"
# keeps only the layer's input, and "offload" keeps it in pinned host memory. "dots"
# keeps every matrix product, "dots_no_batch" all but those of attention.
# "save_attention" keeps the output of attention. "minimal" keeps that, the inputs of
# attention, the MLP's gate and up projections, and under fp8 the codes that products
# read. Our kernels name what their own backward passes need "attention_residuals", so
# that they need not run again; cuDNN and the XLA path do run again.
REMAT_POLICIES: Mapping[str, Callable[..., bool] | None] = {
    "none": None,
    "full": _policies.nothing_saveable,
    "auto": _policies.nothing_saveable,  # until run/fitted_step.py has chosen
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["layer_input"],
        offload_src="device", offload_dst="pinned_host",
    ),
    "dots": _policies.dots_saveable,
    "dots_no_batch": _policies.dots_with_no_batch_dims_saveable,
    "save_attention": _policies.save_only_these_names(
        "attention", "attention_residuals"
    ),
    "minimal": _policies.save_only_these_names(
        "query", "key", "value", "attention", "attention_residuals", "mlp_gate",
        "mlp_up", RESIDUALS,
    ),
}  # fmt: skip
LATER = "minimal"  # the policy of layers behind those that `Recompute.layers` counts


def check_policy(name: str) -> None:
    """Refuse a policy that there is not.

    Raises:
        ValueError: with those that there are.
    """
    if name not in REMAT_POLICIES:
        known = ", ".join(REMAT_POLICIES)
        raise ValueError(f"remat = {name!r} is unknown; use one of {known}")


@dataclasses.dataclass(frozen=True)
class Recompute:
    """The policy of the first `layers` layers (None: of all); later ones' is `LATER`.

    `weights`: what the backward pass does about weights, outside of a loop. "read": it
    reads them again, else a copy in the compute type would be kept from the forward
    pass on. "derive": from such a copy, as of a device's own part, it makes again what
    is wider, such as all parts together. "keep": it keeps both.
    """

    policy: str = "none"
    layers: int | None = None
    weights: Literal["read", "derive", "keep"] = "read"

    def cut(self, first: int, period: int, repeats: int) -> list[tuple[slice, str]]:
        """A segment's repeats in one or two parts, and the policy of each.

        Args:
            first: the segment's first layer, of `period * repeats`.
        """
        if self.layers is None:
            return [(slice(0, repeats), self.policy)]
        early = min(max(0, -(-(self.layers - first) // period)), repeats)
        parts = [(slice(0, early), self.policy), (slice(early, repeats), LATER)]
        return [part for part in parts if part[0].start < part[0].stop]

    def wrap(
        self, step: Callable, read: Callable, policy: str, *, apart: bool
    ) -> Callable:
        """A layer's step that reads its weights and keeps what the policy says.

        Args:
            step: `step(passing, (weights, index, per_layer))`.
            read: what makes the weights of `(stack, own, place)`, which the new step is
                given in their place.
            apart: the compiler sees each layer by itself, outside of a loop, where it
                would merge the recomputation with what was computed. What keeps both
                apart would also copy weights out of their stack, so it is a layer's
                place that keeps the reading of them apart.
        """
        keep = REMAT_POLICIES[policy]

        def reading(passing: Any, inputs: Any, step: Callable = step) -> Any:
            return step(passing, (read(*inputs[0]), *inputs[1:]))

        if keep is None:
            return reading
        again: Any = self.weights == "derive"
        if self.weights == "read":
            again = (False, False, True)
        flags: Any = apart and (True, (again, True, True))
        remat = functools.partial(jax.checkpoint, policy=keep, prevent_cse=flags)
        if self.weights == "read":
            return remat(reading)
        return functools.partial(reading, step=remat(step))


def leaves_layers(decoder: Any) -> bool:
    """Whether a `Decoder` leaves out its last layers by itself, by its `kept_bytes`."""
    is_set = decoder.remat_layers is not None or decoder.scan_layers
    return bool(decoder.remat == "full" and decoder.kept_bytes > 0 and not is_set)


def count_kept_bytes(step: Callable, *args: Any) -> int:
    """Bytes that `step(*args)` keeps under `LATER` beside its own arguments.

    `args` may be shapes. Nothing is computed.
    """
    kept = jax.checkpoint(step, policy=REMAT_POLICIES[LATER])
    jaxpr = jax.make_jaxpr(lambda *given: jax.vjp(kept, *given)[1])(*args).jaxpr
    given = {*jaxpr.invars, *jaxpr.constvars}
    return sum(
        var.aval.size * var.aval.dtype.itemsize
        for var in dict.fromkeys(jaxpr.outvars)
        if not hasattr(var, "val") and var not in given
    )


def fit_layers(costs: Sequence[tuple[int, int, int, float]], allowed: float) -> int:
    """How many layers, from the first, to compute again.

    Args:
        costs: of each segment its first layer, period, repeats, and the bytes that one
            repeat keeps under `LATER`.
        allowed: bytes that all later layers may keep.
    """
    for first, period, repeats, cost in reversed(costs):
        keeping = repeats if cost * repeats <= allowed else int(allowed // cost)
        if keeping < repeats:
            return first + (repeats - keeping) * period
        allowed -= cost * repeats
    return 0


def layers_that_fit(layers: int, most: float, least: float, room: float) -> int:
    """How many layers to compute again, so that a step fits `room` bytes.

    Args:
        most: what it takes if the policy of all is `LATER`, which does not fit;
            infinite where that is not known.
        least: what it takes if all are computed again. In between it begins to rise
            where its peak is no longer elsewhere, so that a straight line lies above.
    """
    if not math.isfinite(most):
        return layers
    return max(1, min(layers, math.ceil(layers * (most - room) / (most - least))))
