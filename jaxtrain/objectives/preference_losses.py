"""Preference losses: pure functions of the log-probs of whole completions.

Notation, for a pair (x, y_c, y_r) of prompt, chosen and rejected completion:

    rho(y) = log pi(y|x) - log pi_ref(y|x)    the log-ratio; rho_c is that of y_c
    s(y)   = f'(pi / pi_ref)                  its f-divergence score; rho by default
    Delta  = s(y_c) - s(y_r)                  the margin
    |y|    = number of trained tokens of y

`rho` times beta is the implicit reward of DPO (arXiv:2305.18290). All is in nats and
float32. Values and gradients are those of TRL 1.16; the tests run it live.

To add a loss of pairs, write its function here, and give it a row of the same name in
`options.PAIR_LOSSES`. Options of its own are fields of `options.PreferenceOptions`.
"""

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxtrain.objectives.options import PAIR_LOSSES, FDivergence, PreferenceOptions

PerPair: TypeAlias = Float[Array, "B"]
T = TypeVar("T")
U = TypeVar("U")


class Sides(NamedTuple, Generic[T]):
    """A value for the chosen and one for the rejected completions of pairs."""

    chosen: T
    rejected: T

    def map(self, function: Callable[..., U], *others: "Sides[Any]") -> "Sides[U]":
        """Apply `function` to each side, together with the same side of `others`."""
        return Sides(*map(function, self, *others))


@dataclasses.dataclass(frozen=True)
class PairScores:
    """The inputs of a preference loss, for B pairs.

    `logps`: completions' summed log-probs under the policy, `ref_logps` under the
    reference, `logratios` their difference rho. `scores`: f-divergence scores s.
    `tokens`: |y|, at least 1. `chosen_nll`: -log pi per token, averaged over all
    chosen tokens of the batch. `real`: 1 for a pair and 0 for padding, whose loss the
    caller ignores.
    """

    logps: Sides[PerPair]
    ref_logps: Sides[PerPair]
    logratios: Sides[PerPair]
    scores: Sides[PerPair]
    tokens: Sides[PerPair]
    chosen_nll: Float[Array, ""]
    real: PerPair

    @property
    def margin(self) -> PerPair:
        return self.scores.chosen - self.scores.rejected

    @property
    def margin_per_token(self) -> PerPair:
        chosen, rejected = self.scores.map(operator.truediv, self.tokens)
        return chosen - rejected

    def rewards(self, options: PreferenceOptions) -> Sides[PerPair]:
        """DPO's implicit rewards, beta rho."""
        return self.logratios.map(lambda logratio: options.beta * logratio)


LossFunction = Callable[[PairScores, PreferenceOptions], PerPair]


def pair_loss(name: str) -> LossFunction:
    """Look up the function of a loss in `PAIR_LOSSES`.

    Raises:
        ValueError: this module has no function of that name.
    """
    function: LossFunction | None = globals().get(name)
    if name in PAIR_LOSSES and function:
        return function
    raise ValueError(
        f"loss_type = {name!r}: it needs a row in objectives/options.py and a function"
        " of that name in objectives/preference_losses.py; add what is missing"
    )


# --- f-divergence scores ----------------------------------------------------------


def f_divergence_scores(logratios: PerPair, kind: str, alpha: float) -> PerPair:
    """s = f'(u), u = exp(rho), up to a constant that the margin cancels.

    f-DPO, arXiv:2309.16240. reverse_kl: log u. forward_kl: 1 - 1/u. js_divergence:
    log(2u / (1 + u)). alpha_divergence: (u^(alpha-1) - 1) / (alpha - 1), whose limit at
    alpha = 1 is log u; its exponent is cut off at 80.

    Raises:
        ValueError: `kind` is none of these.
    """
    if kind == "reverse_kl":
        return logratios
    if kind == "forward_kl":
        return 1.0 - jnp.exp(-logratios)
    if kind == "js_divergence":
        return jnp.log(2.0) + jax.nn.log_sigmoid(logratios)
    if kind == "alpha_divergence":
        order = alpha - 1.0
        if abs(order) < 1e-6:
            return logratios
        # TRL's bound: exp(80) leaves float32 room to add many of them.
        exponent = jnp.minimum(order * logratios, 80.0)
        return (jnp.exp(exponent) - 1.0) / order
    kinds = ", ".join(get_args(FDivergence))
    raise ValueError(f"f_divergence_type = {kind!r}: unknown; use one of {kinds}")


# --- losses of a pair, named as in TRL --------------------------------------------


def smoothed_sigmoid(logits: PerPair, smoothing: float) -> PerPair:
    """-(1 - e) log sigma(z) - e log sigma(-z): cross-entropy with labels flipped by e.

    Conservative DPO: Mitchell 2023, "A note on DPO with noisy preferences"; compared
    with robust DPO in arXiv:2403.00409.
    """
    loss = -jax.nn.log_sigmoid(logits)
    if smoothing:
        loss = (1 - smoothing) * loss - smoothing * jax.nn.log_sigmoid(-logits)
    return loss


def sigmoid(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """-log sigma(beta Delta). DPO, arXiv:2305.18290 eq. 7.

    With `conservative_smoothing` e > 0 (ours, not TRL's): `smoothed_sigmoid`.
    """
    return smoothed_sigmoid(options.beta * pair.margin, options.conservative_smoothing)


def sigmoid_norm(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """-log sigma(beta (s_c/|y_c| - s_r/|y_r|)). arXiv:2411.15124."""
    return -jax.nn.log_sigmoid(options.beta * pair.margin_per_token)


def hinge(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """max(0, 1 - beta Delta). SLiC, arXiv:2305.10425; RSO, arXiv:2309.06657."""
    return jax.nn.relu(1.0 - options.beta * pair.margin)


def ipo(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """(s_c/|y_c| - s_r/|y_r| - 1/(2 beta))^2. arXiv:2310.12036 eq. 17.

    Per token, as the paper's authors ran it; beta is the paper's tau.
    """
    return (pair.margin_per_token - 1.0 / (2.0 * options.beta)) ** 2


def exo_pair(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """KL(q || p), q = (sigma(z), sigma(-z)), p = (1-e, e). arXiv:2402.00856 eq. 16.

    z = beta Delta; e is `label_smoothing`, which must be positive.
    """
    logits = options.beta * pair.margin
    log_win, log_lose = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    smoothing = jnp.float32(options.label_smoothing)
    win = jnp.exp(log_win) * (log_win - jnp.log1p(-smoothing))
    return win + jnp.exp(log_lose) * (log_lose - jnp.log(smoothing))


def robust(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """[-(1-e) log sigma(z) + e log sigma(-z)] / (1 - 2e). arXiv:2403.00409.

    z = beta Delta; unbiased where labels are flipped with probability e < 1/2.
    """
    logits = options.beta * pair.margin
    smoothing = options.label_smoothing
    kept = -(1 - smoothing) * jax.nn.log_sigmoid(logits)
    flipped = -smoothing * jax.nn.log_sigmoid(-logits)
    return (kept - flipped) / (1 - 2 * smoothing)


def discopop(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """(1-g)(-log sigma(z)) + g exp(-z), g = sigma(z/tau). arXiv:2406.08414 eq. 5.

    z = beta Delta; tau is `discopop_tau`.
    """
    logits = options.beta * pair.margin
    gate = jax.nn.sigmoid(logits / options.discopop_tau)
    return -jax.nn.log_sigmoid(logits) * (1 - gate) + jnp.exp(-logits) * gate


def nca_pair(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """-log sigma(r_c) - (log sigma(-r_c) + log sigma(-r_r))/2, r = beta rho.

    NCA for two completions, arXiv:2402.05369.
    """
    chosen, rejected = pair.rewards(options)
    pull_back = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * pull_back


def bco_pair(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """-log sigma(beta rho_c) - log sigma(-beta rho_r). arXiv:2404.04656.

    As in TRL's pairwise form, without the paper's running reward shift.
    """
    chosen, rejected = pair.rewards(options)
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


def sppo_hard(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """(rho_c - 1/(2 beta))^2 + (rho_r + 1/(2 beta))^2. arXiv:2405.00675 eq. 4.7.

    The win probabilities are taken to be exactly 1 and 0.
    """
    (chosen, rejected), target = pair.logratios, 0.5 / options.beta
    return (chosen - target) ** 2 + (rejected + target) ** 2


def apo_zero(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """1 - sigma(beta rho_c) + sigma(beta rho_r). arXiv:2408.06266 eq. 7."""
    chosen, rejected = pair.rewards(options)
    return 1.0 - jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected)


def apo_down(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """sigma(beta rho_c) + 1 - sigma(beta (rho_c - rho_r)). arXiv:2408.06266 eq. 8."""
    chosen, rejected = pair.logratios
    difference = options.beta * (chosen - rejected)
    return jax.nn.sigmoid(options.beta * chosen) + 1.0 - jax.nn.sigmoid(difference)


def _match_quantiles(
    high: PerPair, low: PerPair, pair: PairScores, options: PreferenceOptions
) -> PerPair:
    """AOT: first-order stochastic dominance of `high` over `low`, by sorted pairing.

    Entry i of a sorted array is a quantile and does not belong to any one pair, so the
    loss of every row is the mean over all quantiles.
    """
    # Sorting gathers the real pairs' values at the front; padding goes last and is 0.
    front = jnp.arange(pair.real.shape[0]) < pair.real.sum()

    def sort_real(values: PerPair) -> PerPair:
        ordered = jnp.sort(jnp.where(pair.real > 0, values, jnp.inf))
        return jnp.where(front, ordered, 0.0)

    logits = options.beta * (sort_real(high) - sort_real(low))
    losses = smoothed_sigmoid(logits, options.label_smoothing)
    mean = jnp.where(front, losses, 0.0).sum() / jnp.maximum(pair.real.sum(), 1.0)
    return jnp.broadcast_to(mean, losses.shape)


def aot(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """Smoothed -log sigma(beta d), d: sorted policy minus sorted reference log-ratio.

    Paired AOT, arXiv:2406.05882: the distribution over the micro-batch of
    log pi(y_c) - log pi(y_r) should dominate the reference's; see `_match_quantiles`.
    """
    policy, reference = (x.chosen - x.rejected for x in (pair.logps, pair.ref_logps))
    return _match_quantiles(policy, reference, pair, options)


def aot_unpaired(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """Smoothed -log sigma(beta d), d: sorted rho_c minus sorted rho_r.

    Unpaired AOT, arXiv:2406.05882, within the micro-batch: every row gets the mean.
    """
    return _match_quantiles(*pair.logratios, pair, options)


def sft(pair: PairScores, options: PreferenceOptions) -> PerPair:
    """-log pi per chosen token, averaged over the micro-batch's tokens.

    RPO's regularizer, arXiv:2404.19733: `loss_type=["sigmoid", "sft"]`.
    """
    return jnp.broadcast_to(pair.chosen_nll, pair.real.shape)


# --- odds -------------------------------------------------------------------------


def log_odds_ratio(chosen_logps: PerPair, rejected_logps: PerPair) -> PerPair:
    """log(odds(y_c) / odds(y_r)), odds(p) = p / (1 - p). ORPO, arXiv:2403.07691.

    Takes log-probs per token. A log-prob of 0, with infinite odds, counts as -2^-24.
    """

    def log_odds(logps: PerPair) -> PerPair:
        # 1 - 2^-24 is the largest float32 below 1.
        logps = jnp.minimum(logps, -(2.0**-24))
        # log(1 - exp(x)) in the form that keeps its digits on either side of log 1/2.
        likely = logps > -jnp.log(2.0)
        near = jnp.log(-jnp.expm1(jnp.where(likely, logps, -1.0)))
        far = jnp.log1p(-jnp.exp(jnp.where(likely, -1.0, logps)))
        return logps - jnp.where(likely, near, far)

    return log_odds(chosen_logps) - log_odds(rejected_logps)
