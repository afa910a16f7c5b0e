"""Objectives on preference pairs: the DPO family, ORPO, CPO and SimPO.

Each takes the policy and the reference as closures and returns loss and metrics as
`WeightedSum`s; `table.py` has them all. The equations of the DPO family stand in
`preference_losses.py`; here completions are scored, summed and measured.

Masked tokens and padding rows count nowhere, whatever values they hold. Metrics are
named and defined as in TRL 1.16. `num_tokens` is a count: read its `total`; its weight
is the number of micro-batches.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtrain.objectives.preference_losses import (
    PAIR_LOSSES,
    LossOptions,
    PairScores,
    alpha_reward,
    f_divergence_scores,
    log_odds_ratio,
    smoothed_sigmoid,
)
from jaxtrain.types import (
    Batch,
    LogProbsFn,
    Metrics,
    PairBatch,
    TokenLogProbs,
    WeightedSum,
)

# --- sums under a mask ------------------------------------------------------------


def weigh(values: Array, weights: Array) -> Array:
    """values * weights; 0 where the weight is 0, even if the value is inf or nan."""
    return jnp.where(weights > 0, values * weights, 0.0)


def row_sums(
    values: Float[Array, "B T"], weights: Float[Array, "B T"]
) -> Float[Array, "B"]:
    """Each row's weighted sum, as of the log-probs of its completion."""
    return weigh(values, weights).sum(-1)


def pair_sums(
    values: Float[Array, "B T"], weights: Float[Array, "B T"], side: Batch, ids: Any
) -> Float[Array, "N"]:
    """Each pair's weighted sum: a row's, or by `PairBatch.pair_ids` [B P] N = B P."""
    if ids is None:
        return row_sums(values, weights)
    # Three segments a pair where prompts are shared.
    shares = side.prompt_ids is not None
    pair_of_token = (side.segment_ids + 2) // 3 if shares else side.segment_ids
    inside = (pair_of_token[:, None, :] == ids[:, :, None]) & (ids[:, :, None] > 0)
    weighed = weigh(values, weights)
    return jnp.where(inside, weighed[:, None, :], 0.0).sum(-1).reshape(-1)


def masked_sum(values: Array, weights: Array) -> WeightedSum:
    """sum of values * weights, and of weights; any shape that the two share."""
    return WeightedSum(weigh(values, weights).sum(), weights.sum())


def real_rows(batch: Batch) -> Float[Array, "B"]:
    """1 where a row trains any token, 0 where it is padding."""
    return (batch.loss_mask > 0).any(-1).astype(jnp.float32)


def count_tokens(real: Float[Array, "B"], *batches: Batch) -> WeightedSum:
    """Tokens of the real rows, prompts included; weight 1, the micro-batch."""
    counts = [((b.segment_ids > 0) * real[:, None]).sum() for b in batches]
    return WeightedSum(jnp.float32(sum(counts)), jnp.float32(1))


# --- pairs ------------------------------------------------------------------------


def score_pairs(
    score: LogProbsFn, batch: PairBatch
) -> tuple[TokenLogProbs, TokenLogProbs]:
    """Score chosen and rejected by one call, on 2B rows, or on B that share prompts.

    The 2B rows alternate, chosen and rejected: a device that holds pairs then holds
    both their rows, and stacking moves nothing between devices.
    """
    if batch.shared is not None:
        scored = score(batch.shared)
        return scored, scored
    rows, width = batch.chosen.tokens.shape

    def interleave(chosen: Array, rejected: Array) -> Array:
        return jnp.stack([chosen, rejected], axis=1).reshape(2 * rows, width)

    scored = score(jax.tree.map(interleave, batch.chosen, batch.rejected))
    pairs = jax.tree.map(lambda x: x.reshape(rows, 2, width), scored)
    chosen, rejected = (jax.tree.map(lambda x, i=i: x[:, i], pairs) for i in (0, 1))
    return chosen, rejected


def _real_rows(batch: PairBatch) -> Float[Array, "B"]:
    return jnp.maximum(real_rows(batch.chosen), real_rows(batch.rejected))


def _real_pairs(batch: PairBatch) -> Float[Array, "N"]:
    """1 where a pair trains any token; a row of packed pairs has several entries."""
    if batch.pair_ids is None:
        return _real_rows(batch)
    tokens = sum(
        pair_sums(jnp.ones_like(side.loss_mask), side.loss_mask, side, batch.pair_ids)
        for side in (batch.chosen, batch.rejected)
    )
    return (jnp.asarray(tokens) > 0).astype(jnp.float32)


def _pair_metrics(
    batch: PairBatch,
    chosen: TokenLogProbs,
    rejected: TokenLogProbs,
    *,
    logps: tuple[Array, Array],
    rewards: tuple[Array, Array],
) -> Metrics:
    """The metrics that every objective on pairs reports."""
    real = _real_pairs(batch)
    chosen_mask, rejected_mask = batch.chosen.loss_mask, batch.rejected.loss_mask
    return {
        "rewards/chosen": masked_sum(rewards[0], real),
        "rewards/rejected": masked_sum(rewards[1], real),
        "rewards/margins": masked_sum(rewards[0] - rewards[1], real),
        "rewards/accuracies": masked_sum(rewards[0] > rewards[1], real),
        "logps/chosen": masked_sum(logps[0], real),
        "logps/rejected": masked_sum(logps[1], real),
        "logits/chosen": masked_sum(chosen.mean_logit, chosen_mask),
        "logits/rejected": masked_sum(rejected.mean_logit, rejected_mask),
        "entropy": masked_sum(chosen.entropy, chosen_mask)
        + masked_sum(rejected.entropy, rejected_mask),
        "mean_token_accuracy": masked_sum(chosen.correct, chosen_mask),
        "num_tokens": count_tokens(_real_rows(batch), batch.chosen, batch.rejected),
    }


def _completion_weights(
    batch: PairBatch, ld_alpha: float | None
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Token weights of a completion's log-prob: the mask, or LD-DPO's.

    LD-DPO (arXiv:2409.06411): log pi(y) = sum_{t <= l} log p_t + alpha sum_{t > l}
    log p_t, where l is the length of the shorter completion of the pair.
    """
    masks = (batch.chosen.loss_mask, batch.rejected.loss_mask)
    if ld_alpha is None:
        return masks
    positions = [jnp.cumsum(mask > 0, axis=-1) for mask in masks]
    shared = jnp.minimum(positions[0][:, -1:], positions[1][:, -1:])
    chosen, rejected = (
        mask * jnp.where(position <= shared, 1.0, ld_alpha)
        for mask, position in zip(masks, positions, strict=True)
    )
    return chosen, rejected


def _wpo_weights(
    scored: TokenLogProbs, mask: Array, side: Batch, ids: Any
) -> Float[Array, "N"]:
    """exp(mean_t (log p_t - log sum_v p_v^2)): WPO, arXiv:2406.11827 eq. 2."""
    if scored.collision is None:
        raise ValueError(
            "use_weighting=True: the policy gave no TokenLogProbs.collision; build it "
            "to compute log sum_v p_v^2"
        )
    aligned = pair_sums(scored.logps - scored.collision, mask, side, ids)
    length = jnp.maximum(pair_sums(jnp.ones_like(mask), mask, side, ids), 1.0)
    return jax.lax.stop_gradient(jnp.exp(aligned / length))


def _kl_from_reference(logratios: Array, mask: Array) -> WeightedSum:
    """Per-token KL(pi_ref || pi) by the estimator k3 = (u - 1) - log u, u = pi/pi_ref.

    Schulman 2020, "Approximating KL divergence", for tokens sampled from pi_ref, as
    DPO takes its completions to be. Never negative; 0 where the models agree.
    """
    logratios = jnp.where(mask > 0, logratios, 0.0)
    return masked_sum(jnp.expm1(logratios) - logratios, mask)


def as_names(loss_type: str | Sequence[str]) -> tuple[str, ...]:
    """One loss or a list of them, as a tuple of names."""
    return (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)


def preference(
    policy: LogProbsFn,
    reference: LogProbsFn | None,
    batch: PairBatch,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    conservative_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    discopop_tau: float = 0.05,
    reference_free: bool = False,
    precompute_ref_log_probs: bool = False,
) -> tuple[WeightedSum, Metrics]:
    """Direct preference optimization: sum_i w_i L_i, a mean over real pairs.

    arXiv:2305.18290 and its successors; each L_i is in `PAIR_LOSSES`, with its
    equation. One call of the policy, one of the reference. Options and defaults are
    TRL's, and so are these scopes: `aot*` sort and `sft` averages tokens within the
    micro-batch (here over all its devices), so they depend on its size.

    Args:
        loss_type: a name of `PAIR_LOSSES` or a list; `loss_weights` are 1 if unset.
        label_smoothing: for robust, exo_pair, aot and aot_unpaired alone.
        conservative_smoothing: the same for sigmoid (TRL has none).
        f_divergence_type: `f_divergence_scores`, with `f_alpha_divergence_coef`.
        ld_alpha: `_completion_weights`; policy and reference alike.
        use_weighting: multiply by both completions' `_wpo_weights`.
        reference_free: a uniform reference: all its log-probs count as 0.
        precompute_ref_log_probs: take the reference's sums from the batch.

    Metrics beyond TRL's: `kl` (`_kl_from_reference`, both completions; from precomputed
    sums, the same divergence by -mean log u, which can be negative; absent without a
    reference), `nll/policy` and `nll/reference` (nats a token of the chosen completion:
    whether the policy still finds it likely), and with several losses each one's mean,
    unweighted, as `loss/<type>`.

    Raises:
        ValueError: the reference, its sums or the policy's `collision` are missing.
    """
    if batch.pair_ids is not None and (
        ld_alpha is not None or precompute_ref_log_probs
    ):
        raise ValueError(
            "ld_alpha and precompute_ref_log_probs take a pair a row, and these rows "
            "are packed: unset them, or set data.packing = false"
        )
    chosen, rejected = score_pairs(policy, batch)
    masks = (batch.chosen.loss_mask, batch.rejected.loss_mask)
    weights = _completion_weights(batch, ld_alpha)
    real = _real_pairs(batch)

    def sums(chosen: Array, rejected: Array, weights: Any) -> tuple[Array, Array]:
        ids = batch.pair_ids
        return (
            pair_sums(chosen, weights[0], batch.chosen, ids),
            pair_sums(rejected, weights[1], batch.rejected, ids),
        )

    logps = sums(chosen.logps, rejected.logps, weights)
    lengths = sums(jnp.ones_like(masks[0]), jnp.ones_like(masks[1]), masks)
    extra_metrics: Metrics = {}

    if reference_free:
        ref_logps = (jnp.zeros_like(real), jnp.zeros_like(real))
    elif precompute_ref_log_probs:
        if batch.ref_chosen_logps is None or batch.ref_rejected_logps is None:
            raise ValueError(
                "precompute_ref_log_probs=True: the batch has no ref_chosen_logps and "
                "ref_rejected_logps; add them to the data, or set it to False"
            )
        ref_logps = (
            weigh(batch.ref_chosen_logps, real),
            weigh(batch.ref_rejected_logps, real),
        )
        logratio_sum = (ref_logps[0] - logps[0] + ref_logps[1] - logps[1]).sum()
        extra_metrics["kl"] = WeightedSum(logratio_sum, masks[0].sum() + masks[1].sum())
        ref_nll = WeightedSum(-ref_logps[0].sum(), masks[0].sum())
        extra_metrics["nll/reference"] = ref_nll
    else:
        if reference is None:
            raise ValueError(
                "reference=None: this loss compares with a reference model; give one, "
                "or set reference_free or precompute_ref_log_probs"
            )
        ref_chosen, ref_rejected = jax.lax.stop_gradient(score_pairs(reference, batch))
        ref_logps = sums(ref_chosen.logps, ref_rejected.logps, weights)
        extra_metrics["kl"] = _kl_from_reference(
            chosen.logps - ref_chosen.logps, masks[0]
        ) + _kl_from_reference(rejected.logps - ref_rejected.logps, masks[1])
        extra_metrics["nll/reference"] = masked_sum(-ref_chosen.logps, masks[0])

    logratios = (logps[0] - ref_logps[0], logps[1] - ref_logps[1])
    nll = masked_sum(-chosen.logps, masks[0])
    extra_metrics["nll/policy"] = nll
    pair = PairScores(
        chosen_logps=logps[0],
        rejected_logps=logps[1],
        ref_chosen_logps=ref_logps[0],
        ref_rejected_logps=ref_logps[1],
        chosen_scores=f_divergence_scores(
            logratios[0], f_divergence_type, f_alpha_divergence_coef
        ),
        rejected_scores=f_divergence_scores(
            logratios[1], f_divergence_type, f_alpha_divergence_coef
        ),
        chosen_tokens=jnp.maximum(lengths[0], 1.0),
        rejected_tokens=jnp.maximum(lengths[1], 1.0),
        chosen_nll=nll.mean(),
        real=real,
    )
    options = LossOptions(beta, label_smoothing, conservative_smoothing, discopop_tau)
    names = as_names(loss_type)
    losses = {name: PAIR_LOSSES[name](pair, options) for name in names}
    if use_weighting:
        ids = batch.pair_ids
        wpo = _wpo_weights(chosen, masks[0], batch.chosen, ids)
        wpo *= _wpo_weights(rejected, masks[1], batch.rejected, ids)
        losses = {name: loss * wpo for name, loss in losses.items()}
    if len(names) > 1:
        extra_metrics |= {
            f"loss/{name}": masked_sum(losses[name], real) for name in names
        }
    factors = loss_weights or [1.0] * len(names)
    loss = sum(w * losses[name] for name, w in zip(names, factors, strict=True))

    rewards = (beta * logratios[0], beta * logratios[1])
    metrics = _pair_metrics(batch, chosen, rejected, logps=logps, rewards=rewards)
    return masked_sum(jnp.asarray(loss), real), metrics | extra_metrics


# --- pairs without a reference ----------------------------------------------------


def _mean_logps(scored: TokenLogProbs, mask: Array) -> Float[Array, "B"]:
    return row_sums(scored.logps, mask) / jnp.maximum(mask.sum(-1), 1.0)


def orpo(
    policy: LogProbsFn,
    reference: LogProbsFn | None,
    batch: PairBatch,
    *,
    beta: float = 0.1,
) -> tuple[WeightedSum, Metrics]:
    """NLL(x, y_c) - beta log sigma(log odds ratio). ORPO, arXiv:2403.07691 eq. 6.

    The odds are of per-token mean probabilities. The NLL is a token mean over the
    micro-batch and, as in the authors' code and TRL's, over prompt and completion.
    """
    del reference
    chosen, rejected = score_pairs(policy, batch)
    real = _real_pairs(batch)
    # All predictions up to the completion's last one: the prompt's come before it.
    to_the_end = jax.lax.cummax(batch.chosen.loss_mask, axis=1, reverse=True) > 0
    sequence = to_the_end & (batch.chosen.segment_ids > 0)
    nll = masked_sum(-chosen.logps, sequence.astype(jnp.float32))
    logps = (
        _mean_logps(chosen, batch.chosen.loss_mask),
        _mean_logps(rejected, batch.rejected.loss_mask),
    )
    log_odds = log_odds_ratio(*logps)
    ratio = jax.nn.log_sigmoid(log_odds)
    metrics = _pair_metrics(
        batch,
        chosen,
        rejected,
        logps=logps,
        rewards=(beta * logps[0], beta * logps[1]),
    )
    metrics |= {
        "nll_loss": nll,
        "log_odds_ratio": masked_sum(ratio, real),
        "log_odds_chosen": masked_sum(log_odds, real),
    }
    return masked_sum(nll.mean() - beta * ratio, real), metrics


CPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo")


def cpo(
    policy: LogProbsFn,
    reference: LogProbsFn | None,
    batch: PairBatch,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    cpo_alpha: float = 1.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
) -> tuple[WeightedSum, Metrics]:
    """L(r_c - r_r) + cpo_alpha NLL(y_c|x). CPO, arXiv:2401.08417 eq. 3, as TRL has it.

    r(y) is log pi(y|x): the sum over tokens for `sigmoid` and `hinge`, their mean for
    `ipo` and `simpo`; with `alpha`, `alpha_reward` of it. L(d) is -log sigma(beta d),
    max(0, 1 - beta d), (d - 1/(2 beta))^2, or SimPO's -log sigma(beta d - gamma);
    `label_smoothing` acts on the two sigmoids. The NLL is a token mean over the
    micro-batch.
    """
    del reference
    chosen, rejected = score_pairs(policy, batch)
    masks = (batch.chosen.loss_mask, batch.rejected.loss_mask)
    reduce = _mean_logps if loss_type in ("ipo", "simpo") else _sum_logps
    logps = (reduce(chosen, masks[0]), reduce(rejected, masks[1]))
    values = (alpha_reward(logps[0], alpha), alpha_reward(logps[1], alpha))
    difference = values[0] - values[1]
    if loss_type == "hinge":
        losses = jax.nn.relu(1.0 - beta * difference)
    elif loss_type == "ipo":
        losses = (difference - 1.0 / (2.0 * beta)) ** 2
    else:
        gamma = simpo_gamma if loss_type == "simpo" else 0.0
        losses = smoothed_sigmoid(beta * difference - gamma, label_smoothing)
    nll = masked_sum(-chosen.logps, masks[0])
    metrics = _pair_metrics(
        batch,
        chosen,
        rejected,
        logps=logps,
        rewards=(beta * values[0], beta * values[1]),
    )
    return (
        masked_sum(losses + cpo_alpha * nll.mean(), _real_pairs(batch)),
        metrics | {"nll_loss": nll},
    )


def _sum_logps(scored: TokenLogProbs, mask: Array) -> Float[Array, "B"]:
    return row_sums(scored.logps, mask)


def simpo(
    policy: LogProbsFn,
    reference: LogProbsFn | None,
    batch: PairBatch,
    *,
    beta: float = 2.0,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
    cpo_alpha: float = 0.0,
    alpha: float = 0.0,
) -> tuple[WeightedSum, Metrics]:
    """-log sigma(beta (mean log pi(y_c) - mean log pi(y_r)) - gamma).

    SimPO, arXiv:2405.14734 eq. 6, with the paper's beta. It is `cpo` with
    `loss_type="simpo"`; `cpo_alpha` > 0 adds its NLL (CPO-SimPO).
    """
    return cpo(
        policy,
        reference,
        batch,
        beta=beta,
        loss_type="simpo",
        label_smoothing=label_smoothing,
        cpo_alpha=cpo_alpha,
        simpo_gamma=simpo_gamma,
        alpha=alpha,
    )
