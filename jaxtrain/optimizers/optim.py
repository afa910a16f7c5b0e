"""Optimizers, weight-decay mask, gradient clipping, float16 loss scaling.

Weight decay follows transformers' Trainer, AdamW, SGD and Muon follow torch.optim, so
a recipe carries over number for number. Kernels arrive stacked over layers, `[L in
out]`, and those of experts over these too, `[L E in out]`; every optimizer treats them
as L or L E separate matrices.

State is float32, so with float32 master parameters the optimizer adds, per trainable
parameter: adamw 8 bytes; lion, muon and sgd with momentum 4; adafactor and plain sgd
nearly 0. moments.py keeps them in fewer bits.
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxtrain.optimizers.paths import Path, matrix_rank, names_of, parameter_of
from jaxtrain.optimizers.schedules import Schedule

# --- weight decay and tree paths ---------------------------------------------------

# What transformers' Trainer leaves undecayed, matched against dotted lower-case names.
# A buffer is no parameter there: it never changes (Gemma 4's `layer_scalar`).
_UNDECAYED = re.compile(
    r"bias|layernorm|rmsnorm|(^|\.)norm($|\.)|_norm($|\.)|\.buffer$"
)


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: everywhere but norms, biases and buffers.

    Trainer's rule, which decays embeddings and LoRA's matrices too.
    """
    return jax.tree.map_with_path(
        lambda path, _: not _UNDECAYED.search(".".join(names_of(path)).lower()), params
    )


# --- optimizers --------------------------------------------------------------------

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "sgd")


def make_optimizer(
    name: str,
    schedule: Schedule,
    *,
    weight_decay: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    momentum: float | None = None,
) -> optax.GradientTransformation:
    """Build the optimizer: float32 state, learning rate from `schedule`.

    Args:
        name: one of `OPTIMIZERS`.
        schedule: learning rate by optimizer step.
        weight_decay: decoupled, times the learning rate; for sgd added to the gradient.
        beta1, beta2: adamw, lion, and what muon leaves to AdamW.
        epsilon: adamw, and what muon leaves to AdamW.
        momentum: sgd (default 0) and muon (default 0.95).

    Raises:
        ValueError: unknown name, or momentum for an optimizer that has none.
    """
    if name not in OPTIMIZERS:
        raise ValueError(
            f"optimizer = {name!r} is unknown: choose from {list(OPTIMIZERS)}"
        )
    if momentum is not None and name not in ("sgd", "muon"):
        raise ValueError(
            f"momentum = {momentum} has no effect with optimizer = {name!r}: remove it"
            " (only sgd and muon have one)"
        )
    make_direction = {
        # Adam's (arXiv:1412.6980), with the decay decoupled (arXiv:1711.05101).
        "adamw": lambda: optax.scale_by_adam(beta1, beta2, epsilon),
        "adafactor": _adafactor,
        # The sign of an interpolated momentum (arXiv:2302.06675).
        "lion": lambda: optax.scale_by_lion(beta1, beta2),
        "muon": lambda: _muon(beta1, beta2, epsilon, momentum),
        "sgd": lambda: optax.trace(momentum) if momentum else optax.identity(),
    }
    direction = make_direction[name]()
    decay = optax.add_decayed_weights(weight_decay, decay_mask)
    # torch.optim.SGD's decay is an L2 penalty: part of the gradient, hence of momentum.
    steps = (decay, direction) if name == "sgd" else (direction, decay)
    return in_float32(optax.chain(*steps, optax.scale_by_learning_rate(schedule)))


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep `tx`'s state and arithmetic float32 even where parameters are narrower."""

    def widen(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: Any) -> Any:
        return tx.init(widen(params))

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(widen(grads), state, widen(params))

    return optax.GradientTransformation(init, update)


class FactoredMoment(NamedTuple):
    """A matrix's mean squared gradients, over its columns and over its rows."""

    row: Float[Array, "*L I"]
    column: Float[Array, "*L O"]


class AdafactorState(NamedTuple):
    """Steps taken, and what is known of squared gradients."""

    steps: Int[Array, ""]
    moments: Any  # the parameters' tree of FactoredMoment, or full arrays for vectors


def _adafactor() -> optax.GradientTransformation:
    """Adafactor's direction (arXiv:1804.04235), as Trainer sets it.

    No momentum, no scaling by the parameter, clip threshold 1, decay exponent 0.8.
    optax's own factors the two longest axes of a leaf, which may include the layers'.
    """
    tiny = 1e-30

    def init(params: Any) -> AdafactorState:
        def moment(path: Path, p: Array) -> Any:
            if matrix_rank(names_of(path), p) < 2:
                return jnp.zeros_like(p)
            return FactoredMoment(
                jnp.zeros(p.shape[:-1], p.dtype),
                jnp.zeros((*p.shape[:-2], p.shape[-1]), p.dtype),
            )

        return AdafactorState(
            jnp.zeros((), jnp.int32), jax.tree.map_with_path(moment, params)
        )

    def update(
        grads: Any, state: AdafactorState, params: Any = None
    ) -> tuple[Any, AdafactorState]:
        steps = state.steps + 1
        beta = 1.0 - steps.astype(jnp.float32) ** -0.8

        def blend(old: Array, new: Array) -> Array:
            return beta * old + (1 - beta) * new

        def next_moment(g: Array, moment: Any) -> Any:
            squared = g * g + tiny
            if not isinstance(moment, FactoredMoment):
                return blend(moment, squared)
            return FactoredMoment(
                blend(moment.row, squared.mean(-1)),
                blend(moment.column, squared.mean(-2)),
            )

        def direction(path: Path, g: Array, moment: Any) -> Array:
            if isinstance(moment, FactoredMoment):
                row = moment.row / moment.row.mean(-1, keepdims=True)
                u = g * jax.lax.rsqrt(row)[..., None]
                u = u * jax.lax.rsqrt(moment.column)[..., None, :]
            else:
                u = g * jax.lax.rsqrt(moment)
            axes = tuple(range(-min(matrix_rank(names_of(path), g), 2), 0))
            rms = jnp.sqrt(jnp.mean(u * u, axes, keepdims=True))
            return u / jnp.maximum(1.0, rms)

        moments = jax.tree.map(next_moment, grads, state.moments)
        updates = jax.tree.map_with_path(direction, grads, moments)
        return updates, AdafactorState(steps, moments)

    return optax.GradientTransformation(init, update)


def _muon(
    b1: float, b2: float, eps: float, momentum: float | None
) -> optax.GradientTransformation:
    """Orthogonalized momentum for matrices, AdamW for embeddings, head and vectors.

    Updates are scaled by 0.2 sqrt(max(in, out)) so that their RMS is AdamW's and one
    learning rate serves both (arXiv:2502.16982); torch's `match_rms_adamw`.
    """

    def label(path: Path, leaf: Array) -> str:
        names = names_of(path)
        is_table = "embed_tokens" in names or "lm_head" in names
        rank = matrix_rank(names, leaf)
        # Filters of a depthwise convolution, [K 1 D], are D vectors.
        is_vector = rank < 2 or (rank == 3 and leaf.shape[-2] == 1)
        return "adamw" if is_table or is_vector else "muon"

    def orthogonalize(m: Array) -> Array:
        return orthogonal_factor(m) * (0.2 * math.sqrt(max(m.shape[-2:])))

    muon = optax.chain(
        optax.trace(0.95 if momentum is None else momentum, nesterov=True),
        optax.stateless(lambda updates, _: jax.tree.map(orthogonalize, updates)),
    )
    return optax.partition(
        {"muon": muon, "adamw": optax.scale_by_adam(b1, b2, eps)},
        lambda params: jax.tree.map_with_path(label, params),
    )


def orthogonal_factor(matrices: Float[Array, "*L I O"]) -> Float[Array, "*L I O"]:
    """Bring each matrix's singular values to about 1 (0.7 to 1.2), keep its vectors.

    Five quintic Newton-Schulz steps, X <- aX + b(XX')X + c(XX')^2X, with the usual
    coefficients of Muon, which trade exact ones for speed.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = jnp.swapaxes(matrices, -1, -2) if tall else matrices
    # The Frobenius norm bounds the largest singular value.
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x


def state_shardings(
    tx: optax.GradientTransformation,
    abstract_params: Any,
    moment_shardings: Any,
    replicated: NamedSharding,
) -> Any:
    """Shardings of `tx`'s state, leaf by leaf from those of the parameters.

    Args:
        abstract_params: trainable parameters or their `jax.ShapeDtypeStruct`s.
        moment_shardings: the same tree of NamedSharding, for arrays of the parameters'
            shapes (the parameters' own, or finer ones under ZeRO 1).
        replicated: for what no parameter gives a layout, such as step counts.

    Returns:
        `jax.eval_shape(tx.init, abstract_params)` with a NamedSharding at each leaf. A
        factored moment takes its parameter's, less the axis it averages over; so does
        the scale of a moment in 8 bits.
    """
    leaves = jax.tree.leaves_with_path(abstract_params)
    layouts = jax.tree.leaves(moment_shardings)
    by_names = {
        names_of(path): (leaf.shape, layout)
        for (path, leaf), layout in zip(leaves, layouts, strict=True)
    }

    def shard(path: Path, leaf: Any) -> NamedSharding:
        shape, sharding = by_names.get(parameter_of(path), (None, replicated))
        if shape == leaf.shape:
            return sharding
        field = getattr(path[-1], "name", None)
        if shape is None or field not in (*FactoredMoment._fields, "scale"):
            return replicated
        spec = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
        if field == "scale":  # of EightBits: one number along one of the axes
            spec = [
                axes if size == leaf.shape[axis] else None
                for axis, (axes, size) in enumerate(zip(spec, shape, strict=True))
            ]
        else:
            del spec[-1 if field == "row" else -2]
        return NamedSharding(
            sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind
        )

    state = jax.eval_shape(tx.init, abstract_params)
    return jax.tree.map_with_path(shard, state)


# --- loss scaling ------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling for float16 (arXiv:1710.03740), as torch.amp.GradScaler.

    `scale` multiplies the loss; `good_steps` counts finite steps since it last changed.
    """

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]
    growth_interval: int = dataclasses.field(default=2000, metadata={"static": True})

    def update(self, finite: Bool[Array, ""]) -> "LossScale":
        """The scale of the next step, by whether this step's gradients were finite."""
        good_steps = self.good_steps + 1
        grows = good_steps >= self.growth_interval
        grown = self.scale * 2.0
        # Growing past float32's range would stop training for good.
        grown = jnp.where(jnp.isfinite(grown), grown, self.scale)
        scale = jnp.where(grows, grown, self.scale)
        return dataclasses.replace(
            self,
            scale=jnp.where(finite, scale, self.scale * 0.5),
            good_steps=jnp.where(finite & ~grows, good_steps, 0),
        )


def init_loss_scale() -> LossScale:
    """The scale at the start of a run."""
    return LossScale(jnp.float32(2.0**16), jnp.int32(0))
