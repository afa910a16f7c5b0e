"""Objectives on preference pairs: the DPO family, ORPO, CPO and SimPO.

Each takes the policy and the reference as closures and returns loss and metrics as
`WeightedSum`s; `table.py` has them all. The equations of the DPO family stand in
`preference_losses.py`, the options in `options.py`; here completions are scored,
summed and measured.

Masked tokens and padding rows count nowhere, whatever values they hold. Metrics are
named and defined as in TRL 1.16. `num_tokens` is a count: read its `total`; its weight
is the number of micro-batches.
"""

import dataclasses
import functools
import operator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxtrain.objectives import preference_losses as equations
from jaxtrain.objectives.options import (
    CpoOptions,
    OrpoOptions,
    PreferenceOptions,
    SimpoOptions,
)
from jaxtrain.objectives.preference_losses import PairScores, Sides, pair_loss
from jaxtrain.types import (
    Batch,
    LogProbsFn,
    Metrics,
    PairBatch,
    TokenLogProbs,
    WeightedSum,
)

# The frozen model's score function, or None where an objective needs none.
Reference: TypeAlias = LogProbsFn | None

# --- sums under a mask ------------------------------------------------------------


def weigh(values: Array, weights: Array) -> Array:
    """values * weights; 0 where the weight is 0, even if the value is inf or nan."""
    return jnp.where(weights > 0, values * weights, 0.0)


def row_sums(
    values: Float[Array, "B T"], weights: Float[Array, "B T"]
) -> Float[Array, "B"]:
    """Each row's weighted sum, as of the log-probs of its completion."""
    return weigh(values, weights).sum(-1)


def _inside(rows: Batch, ids: Int32[Array, "B P"]) -> Bool[Array, "B P T"]:
    """Which tokens of a packed row belong to each of its examples."""
    # Three segments a pair where prompts are shared.
    shares = rows.prompt_ids is not None
    example = (rows.segment_ids + 2) // 3 if shares else rows.segment_ids
    return (example[:, None, :] == ids[:, :, None]) & (ids[:, :, None] > 0)


def example_sums(
    values: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    rows: Batch,
    ids: Int32[Array, "B P"] | None,
) -> Float[Array, "N"]:
    """Each example's weighted sum: a row's, or of packed ones by number, N = B P."""
    if ids is None:
        return row_sums(values, weights)
    inside, weighed = _inside(rows, ids), weigh(values, weights)
    return jnp.where(inside, weighed[:, None, :], 0.0).sum(-1).reshape(-1)


def count_trained(rows: Batch, ids: Int32[Array, "B P"] | None) -> Float[Array, "N"]:
    """The weight of each example's trained tokens."""
    mask = rows.loss_mask
    if ids is None:
        return mask.sum(-1)
    return example_sums(jnp.ones_like(mask), mask, rows, ids)


def spread(
    values: Float[Array, "N"], rows: Batch, ids: Int32[Array, "B P"] | None
) -> Float[Array, "B T"]:
    """For each token its example's value; shape [B 1] where a row is an example."""
    if ids is None:
        return values[:, None]
    return (_inside(rows, ids) * values.reshape(*ids.shape, 1)).sum(1)


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


def score_pairs(score: LogProbsFn, batch: PairBatch) -> Sides[TokenLogProbs]:
    """Score chosen and rejected by one call, on 2B rows, or on B that share prompts.

    The 2B rows alternate, chosen and rejected: a device that holds pairs then holds
    both their rows, and stacking moves nothing between devices.
    """
    if batch.shared is not None:
        scored = score(batch.shared)
        return Sides(scored, scored)
    rows = batch.chosen.tokens.shape[0]

    def interleave(chosen: Array, rejected: Array) -> Array:
        return jnp.stack([chosen, rejected], axis=1).reshape(2 * rows, -1)

    scored = score(jax.tree.map(interleave, batch.chosen, batch.rejected))
    pairs = jax.tree.map(lambda x: x.reshape(rows, 2, -1), scored)
    return Sides(*(jax.tree.map(lambda x, i=i: x[:, i], pairs) for i in (0, 1)))


def _sides(batch: PairBatch) -> Sides[Batch]:
    return Sides(batch.chosen, batch.rejected)


def _masks(batch: PairBatch) -> Sides[Array]:
    return Sides(batch.chosen.loss_mask, batch.rejected.loss_mask)


def _sum_pairs(batch: PairBatch, values: Sides[Any], weights: Sides[Any]) -> Sides[Any]:
    ids = Sides(batch.pair_ids, batch.pair_ids)
    return values.map(example_sums, weights, _sides(batch), ids)


def _real_rows(batch: PairBatch) -> Float[Array, "B"]:
    return jnp.maximum(*_sides(batch).map(real_rows))


def _real_pairs(batch: PairBatch) -> Float[Array, "N"]:
    """1 where a pair trains any token; a row of packed pairs has several entries."""
    if batch.pair_ids is None:
        return _real_rows(batch)
    trained = sum(count_trained(side, batch.pair_ids) for side in _sides(batch))
    return (jnp.asarray(trained) > 0).astype(jnp.float32)


def _pair_metrics(
    batch: PairBatch,
    scored: Sides[TokenLogProbs],
    *,
    logps: Sides[Array],
    rewards: Sides[Array],
) -> Metrics:
    """The metrics that every objective on pairs reports."""
    real, masks = _real_pairs(batch), _masks(batch)
    chosen, rejected = scored
    return {
        "rewards/chosen": masked_sum(rewards.chosen, real),
        "rewards/rejected": masked_sum(rewards.rejected, real),
        "rewards/margins": masked_sum(rewards.chosen - rewards.rejected, real),
        "rewards/accuracies": masked_sum(rewards.chosen > rewards.rejected, real),
        "logps/chosen": masked_sum(logps.chosen, real),
        "logps/rejected": masked_sum(logps.rejected, real),
        "logits/chosen": masked_sum(chosen.mean_logit, masks.chosen),
        "logits/rejected": masked_sum(rejected.mean_logit, masks.rejected),
        "entropy": masked_sum(chosen.entropy, masks.chosen)
        + masked_sum(rejected.entropy, masks.rejected),
        "mean_token_accuracy": masked_sum(chosen.correct, masks.chosen),
        "num_tokens": count_tokens(_real_rows(batch), *_sides(batch)),
    }


def _token_weights(batch: PairBatch, ld_alpha: float | None) -> Sides[Array]:
    """Token weights of a completion's log-prob: the mask, or LD-DPO's.

    LD-DPO (arXiv:2409.06411): log pi(y) = sum_{t <= l} log p_t + alpha sum_{t > l}
    log p_t, where l is the length of the shorter completion of the pair.
    """
    masks = _masks(batch)
    if ld_alpha is None:
        return masks
    if batch.pair_ids is not None:
        inside = _sides(batch).map(functools.partial(_inside, ids=batch.pair_ids))
        trained = inside.map(lambda own, mask: own & (mask > 0)[:, None], masks)
        positions = trained.map(lambda own: jnp.cumsum(own, axis=-1))
    else:
        positions = masks.map(lambda mask: jnp.cumsum(mask > 0, axis=-1))
    shared = jnp.minimum(positions.chosen[..., -1:], positions.rejected[..., -1:])
    factors = positions.map(lambda index: jnp.where(index <= shared, 1.0, ld_alpha))
    if batch.pair_ids is not None:
        factors = factors.map(lambda of_pairs, own: (of_pairs * own).sum(1), inside)
    return masks.map(operator.mul, factors)


def _wpo_weights(
    batch: PairBatch, scored: Sides[TokenLogProbs], tokens: Sides[Array]
) -> Float[Array, "N"]:
    """exp(mean_t (log p_t - log sum_v p_v^2)), the product over both completions.

    WPO, arXiv:2406.11827 eq. 2; `tokens` are their lengths.
    """

    def aligned(side: TokenLogProbs) -> Array:
        if side.collision is None:
            raise ValueError(
                "use_weighting=True: the policy gave no TokenLogProbs.collision; build"
                " it to compute log sum_v p_v^2"
            )
        return side.logps - side.collision

    means = _sum_pairs(batch, scored.map(aligned), _masks(batch))
    likelihoods = means.map(operator.truediv, tokens).map(jnp.exp)
    return jax.lax.stop_gradient(likelihoods.chosen * likelihoods.rejected)


def _kl_from_reference(
    policy: TokenLogProbs, reference: TokenLogProbs, mask: Array
) -> WeightedSum:
    """Per-token KL(pi_ref || pi) by the estimator k3 = (u - 1) - log u, u = pi/pi_ref.

    Schulman 2020, "Approximating KL divergence", for tokens sampled from pi_ref, as
    DPO takes its completions to be. Never negative; 0 where the models agree.
    """
    logratios = policy.logps - reference.logps
    logratios = jnp.where(mask > 0, logratios, 0.0)
    return masked_sum(jnp.expm1(logratios) - logratios, mask)


@dataclasses.dataclass(frozen=True)
class _ScoredPairs:
    """What the policy says of a batch of pairs.

    `weights`: of the tokens in `logps`, the summed log-prob of each completion.
    `real`: 1, or 0 for a padding pair.
    """

    tokens: Sides[TokenLogProbs]
    weights: Sides[Array]
    real: Array
    logps: Sides[Array]


def _reference_sums(
    reference: Reference,
    batch: PairBatch,
    pairs: _ScoredPairs,
    options: PreferenceOptions,
) -> tuple[Sides[Array], Metrics]:
    """The reference's log-probs of completions, and the metrics that compare with it.

    Raises:
        ValueError: the reference is needed and missing, or its sums are.
    """
    masks = _masks(batch)
    if options.reference_free:
        return pairs.logps.map(jnp.zeros_like), {}
    if options.precompute_ref_log_probs:
        if batch.ref_chosen_logps is None or batch.ref_rejected_logps is None:
            raise ValueError(
                "precompute_ref_log_probs=True: the batch has no ref_chosen_logps and "
                "ref_rejected_logps; add them to the data, or set it to False"
            )
        given = Sides(batch.ref_chosen_logps, batch.ref_rejected_logps)
        sums = given.map(lambda logps: weigh(logps.reshape(-1), pairs.real))
        (ref_chosen, ref_rejected), (chosen, rejected) = sums, pairs.logps
        total = (ref_chosen - chosen + ref_rejected - rejected).sum()
        return sums, {
            "kl": WeightedSum(total, masks.chosen.sum() + masks.rejected.sum()),
            "nll/reference": WeightedSum(-ref_chosen.sum(), masks.chosen.sum()),
        }
    if reference is None:
        raise ValueError(
            "reference=None: this loss compares with a reference model; give one, "
            "or set reference_free or precompute_ref_log_probs"
        )
    tokens = jax.lax.stop_gradient(score_pairs(reference, batch))
    sums = _sum_pairs(batch, tokens.map(lambda side: side.logps), pairs.weights)
    kl = pairs.tokens.map(_kl_from_reference, tokens, masks)
    return sums, {
        "kl": kl.chosen + kl.rejected,
        "nll/reference": masked_sum(-tokens.chosen.logps, masks.chosen),
    }


def preference(
    policy: LogProbsFn,
    reference: Reference,
    batch: PairBatch,
    options: PreferenceOptions,
) -> tuple[WeightedSum, Metrics]:
    """Direct preference optimization: sum_i w_i L_i, a mean over real pairs.

    arXiv:2305.18290 and its successors; each L_i stands in `preference_losses`, with
    its equation. One call of the policy, one of the reference. Options and defaults are
    TRL's, and so are these scopes: `aot*` sort and `sft` averages tokens within the
    micro-batch (here over all its devices), so they depend on its size.

    Metrics beyond TRL's: `kl` (`_kl_from_reference`, both completions; from precomputed
    sums, the same divergence by -mean log u, which can be negative; absent without a
    reference), `nll/policy` and `nll/reference` (nats a token of the chosen completion:
    whether the policy still finds it likely), and with several losses each one's mean,
    unweighted, as `loss/<type>`.

    Raises:
        ValueError: the reference, its sums or the policy's `collision` are missing.
    """
    tokens, masks = score_pairs(policy, batch), _masks(batch)
    weights, real = _token_weights(batch, options.ld_alpha), _real_pairs(batch)
    logps = _sum_pairs(batch, tokens.map(lambda side: side.logps), weights)
    trained = _sum_pairs(batch, masks.map(jnp.ones_like), masks)
    pairs = _ScoredPairs(tokens, weights, real, logps)
    ref_logps, extra_metrics = _reference_sums(reference, batch, pairs, options)
    logratios = logps.map(operator.sub, ref_logps)
    nll = masked_sum(-tokens.chosen.logps, masks.chosen)
    extra_metrics["nll/policy"] = nll
    divergence = options.f_divergence_type, options.f_alpha_divergence_coef
    scores = logratios.map(lambda rho: equations.f_divergence_scores(rho, *divergence))
    lengths = trained.map(lambda count: jnp.maximum(count, 1.0))
    pair = PairScores(logps, ref_logps, logratios, scores, lengths, nll.mean(), real)
    losses = {name: pair_loss(name)(pair, options) for name in options.loss_type}
    if options.use_weighting:
        likelihood = _wpo_weights(batch, tokens, lengths)
        losses = {name: loss * likelihood for name, loss in losses.items()}
    if len(losses) > 1:
        for name, loss in losses.items():
            extra_metrics[f"loss/{name}"] = masked_sum(loss, real)
    factors = options.loss_weights or [1.0] * len(losses)
    total = sum(w * loss for w, loss in zip(factors, losses.values(), strict=True))
    metrics = _pair_metrics(batch, tokens, logps=logps, rewards=pair.rewards(options))
    return masked_sum(jnp.asarray(total), real), metrics | extra_metrics


# --- pairs without a reference ----------------------------------------------------


def _sum_logps(batch: PairBatch, scored: Sides[TokenLogProbs]) -> Sides[Array]:
    return _sum_pairs(batch, scored.map(lambda side: side.logps), _masks(batch))


def _mean_logps(batch: PairBatch, scored: Sides[TokenLogProbs]) -> Sides[Array]:
    ids = Sides(batch.pair_ids, batch.pair_ids)
    counts = _sides(batch).map(count_trained, ids)
    counts = counts.map(lambda count: jnp.maximum(count, 1.0))
    return _sum_logps(batch, scored).map(operator.truediv, counts)


def _to_the_end(rows: Batch, ids: Array | None) -> Float[Array, "B T"]:
    """1 for all predictions up to the completion's last one, the prompt's included."""
    if ids is None:
        to_the_end = jax.lax.cummax(rows.loss_mask, axis=1, reverse=True) > 0
    else:
        inside = _inside(rows, ids)
        trained = (inside & (rows.loss_mask > 0)[:, None]).astype(jnp.float32)
        later = jax.lax.cummax(trained, axis=2, reverse=True) > 0
        to_the_end = (later & inside).any(1)
    return (to_the_end & (rows.segment_ids > 0)).astype(jnp.float32)


def orpo(
    policy: LogProbsFn, reference: Reference, batch: PairBatch, options: OrpoOptions
) -> tuple[WeightedSum, Metrics]:
    """NLL(x, y_c) - beta log sigma(log odds ratio). ORPO, arXiv:2403.07691 eq. 6.

    The odds are of per-token mean probabilities. The NLL is a token mean over the
    micro-batch and, as in the authors' code and TRL's, over prompt and completion.
    """
    del reference
    scored = score_pairs(policy, batch)
    real = _real_pairs(batch)
    sequence = _to_the_end(batch.chosen, batch.pair_ids)
    nll = masked_sum(-scored.chosen.logps, sequence)
    logps = _mean_logps(batch, scored)
    log_odds = equations.log_odds_ratio(*logps)
    ratio = jax.nn.log_sigmoid(log_odds)
    rewards = logps.map(lambda x: options.beta * x)
    metrics = _pair_metrics(batch, scored, logps=logps, rewards=rewards)
    metrics |= {
        "nll_loss": nll,
        "log_odds_ratio": masked_sum(ratio, real),
        "log_odds_chosen": masked_sum(log_odds, real),
    }
    return masked_sum(nll.mean() - options.beta * ratio, real), metrics


def cpo(
    policy: LogProbsFn, reference: Reference, batch: PairBatch, options: CpoOptions
) -> tuple[WeightedSum, Metrics]:
    """L(r_c - r_r) + cpo_alpha NLL(y_c|x). CPO, arXiv:2401.08417 eq. 3, as TRL has it.

    r(y) is log pi(y|x): the sum over tokens for `sigmoid` and `hinge`, the mean for
    `ipo` and `simpo`. If `alpha` = a is not 0, r(y) is AlphaPO's (1 - p^-a) / a
    instead, where log p is that sum or mean (arXiv:2501.03884). L(d) by loss type:
    sigmoid -log sigma(beta d), hinge max(0, 1 - beta d), ipo (d - 1/(2 beta))^2,
    simpo -log sigma(beta d - gamma); `label_smoothing` acts on the first and the last.
    The NLL is a token mean over the micro-batch.
    """
    del reference
    alpha, beta, loss_type = options.alpha, options.beta, options.loss_type
    scored, masks = score_pairs(policy, batch), _masks(batch)
    of_side = _mean_logps if loss_type in ("ipo", "simpo") else _sum_logps
    logps = of_side(batch, scored)
    values = logps.map(lambda x: -jnp.expm1(-alpha * x) / alpha) if alpha else logps
    difference = values.chosen - values.rejected
    if loss_type == "hinge":
        losses = jax.nn.relu(1.0 - beta * difference)
    elif loss_type == "ipo":
        losses = (difference - 1.0 / (2.0 * beta)) ** 2
    else:
        gamma = options.simpo_gamma if loss_type == "simpo" else 0.0
        logits = beta * difference - gamma
        losses = equations.smoothed_sigmoid(logits, options.label_smoothing)
    nll = masked_sum(-scored.chosen.logps, masks.chosen)
    rewards = values.map(lambda x: beta * x)
    metrics = _pair_metrics(batch, scored, logps=logps, rewards=rewards)
    loss = masked_sum(losses + options.cpo_alpha * nll.mean(), _real_pairs(batch))
    return loss, metrics | {"nll_loss": nll}


def simpo(
    policy: LogProbsFn, reference: Reference, batch: PairBatch, options: SimpoOptions
) -> tuple[WeightedSum, Metrics]:
    """-log sigma(beta (mean log pi(y_c) - mean log pi(y_r)) - gamma).

    SimPO, arXiv:2405.14734 eq. 6, with the paper's beta. It is `cpo` with
    `loss_type="simpo"`; `cpo_alpha` > 0 adds its NLL (CPO-SimPO).
    """
    as_cpo = CpoOptions(loss_type="simpo", **dataclasses.asdict(options))
    return cpo(policy, reference, batch, as_cpo)
