"""KTO: learn from single completions that are labeled desirable or undesirable."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxtrain.objectives.options import KtoOptions
from jaxtrain.objectives.preference import (
    Reference,
    count_tokens,
    count_trained,
    example_sums,
    masked_sum,
    real_rows,
    spread,
    weigh,
)
from jaxtrain.types import Batch, LabeledBatch, LogProbsFn, Metrics, WeightedSum


def kto(
    policy: LogProbsFn, reference: Reference, batch: LabeledBatch, options: KtoOptions
) -> tuple[WeightedSum, Metrics]:
    """1 - sigma(beta (rho - z)) where desirable, else 1 - sigma(beta (z - rho)).

    Kahneman-Tversky optimization, arXiv:2402.01306 eq. 7: a mean over real completions,
    with rho = log pi - log pi_ref. `desirable_weight` and `undesirable_weight` multiply
    the losses of their class. The KL term z is max(0, mean rho) over the micro-batch's
    `mismatched` rows, not differentiated. `apo_zero_unpaired` (TRL's, arXiv:2408.06266)
    sets z = 0 instead and needs no such rows.

    The metrics are TRL's: means of rewards, logps and logits for each class, `kl` (z),
    and `rewards/margins`, the difference of the mean rewards of both classes.

    Raises:
        ValueError: mismatched rows are missing, or the reference and its sums are.
    """
    ids, mask = batch.example_ids, batch.completions.loss_mask
    whole_rows = real_rows(batch.completions)
    real = whole_rows if ids is None else _real(batch.completions, ids)
    scored = policy(batch.completions)
    logps = example_sums(scored.logps, mask, batch.completions, ids)
    ref_logps = _reference_sums(
        reference, batch.completions, ids, batch.ref_logps, options
    )
    if options.loss_type == "kto":
        if batch.mismatched is None:
            raise ValueError(
                "loss_type='kto': the batch has no mismatched completions for its KL "
                "term; add them to the data, or use 'apo_zero_unpaired'"
            )
        rows, ref_sums = batch.mismatched, batch.ref_mismatched_logps
        counted = _real(rows, ids)
        sums = example_sums(policy(rows).logps, rows.loss_mask, rows, ids)
        ref_sums = _reference_sums(reference, rows, ids, ref_sums, options)
        kl = jnp.maximum(masked_sum(sums - ref_sums, counted).mean(), 0.0)
    else:
        kl = jnp.float32(0)

    logratios = logps - ref_logps
    desirable = batch.desirable.reshape(-1)
    good, bad = real * desirable, real * (1.0 - desirable)
    value = options.beta * (logratios - jax.lax.stop_gradient(kl))
    losses = 1.0 - jax.nn.sigmoid(jnp.where(desirable > 0, value, -value))
    loss = WeightedSum(
        options.desirable_weight * masked_sum(losses, good).total
        + options.undesirable_weight * masked_sum(losses, bad).total,
        real.sum(),
    )
    per_token = functools.partial(spread, rows=batch.completions, ids=ids)
    rewards = options.beta * logratios
    good_reward, bad_reward = masked_sum(rewards, good), masked_sum(rewards, bad)
    both = ((good_reward.weight > 0) & (bad_reward.weight > 0)).astype(jnp.float32)
    return loss, {
        "rewards/chosen": good_reward,
        "rewards/rejected": bad_reward,
        "rewards/margins": masked_sum(good_reward.mean() - bad_reward.mean(), both),
        "logps/chosen": masked_sum(logps, good),
        "logps/rejected": masked_sum(logps, bad),
        "logits/chosen": masked_sum(scored.mean_logit, mask * per_token(good)),
        "logits/rejected": masked_sum(scored.mean_logit, mask * per_token(bad)),
        "entropy": masked_sum(scored.entropy, mask),
        "kl": WeightedSum(kl * real.sum(), real.sum()),
        "num_tokens": count_tokens(whole_rows, batch.completions),
    }


def _real(rows: Batch, ids: Int32[Array, "B P"] | None) -> Float[Array, "N"]:
    """1 for each example with a trained token, else 0; packed rows hold several."""
    if ids is None:
        return real_rows(rows)
    return (count_trained(rows, ids) > 0).astype(jnp.float32)


def _reference_sums(
    reference: Reference,
    rows: Batch,
    ids: Int32[Array, "B P"] | None,
    precomputed: Float[Array, "*B_P"] | None,
    options: KtoOptions,
) -> Float[Array, "N"]:
    """Summed reference log-probs: those in the batch, or the model's."""
    if options.precompute_ref_log_probs:
        if precomputed is None:
            raise ValueError(
                "precompute_ref_log_probs=True: the batch has no precomputed reference "
                "log-probs; add them to the data, or set it to False"
            )
        return weigh(precomputed.reshape(-1), _real(rows, ids))
    if reference is None:
        raise ValueError(
            "reference=None: this loss compares with a reference model; give one, or "
            "set precompute_ref_log_probs"
        )
    sums = example_sums(reference(rows).logps, rows.loss_mask, rows, ids)
    return jax.lax.stop_gradient(sums)
