"""Preference objectives: hand-derived values, padding, micro-batches, meshes, refusals.

Equality with TRL is in trl_losses_test.py; these run without torch.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.objectives import make_objective
from jaxtrain.objectives.options import PAIR_LOSSES
from jaxtrain.objectives.preference_losses import log_odds_ratio
from jaxtrain.types import Batch, PairBatch, TokenLogProbs

WIDTH = 5
SMOOTHED = {"label_smoothing": 0.2}
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"loss_type": name} for name in PAIR_LOSSES
} | {
    name: {"loss_type": name} | SMOOTHED
    for name, loss in PAIR_LOSSES.items()
    if "label_smoothing" in loss.reads
}
OPTIONS |= {
    "conservative": {"conservative_smoothing": 0.1},
    "ld_alpha": {"ld_alpha": 0.4},
    "weighted": {"use_weighting": True, "loss_type": ["sigmoid", "ipo"]},
    "js": {"f_divergence_type": "js_divergence"},
    "free": {"reference_free": True},
    "listed": {"loss_type": ["aot", "sft", "hinge"], "loss_weights": [1, 2, 3]},
}


def logsigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def make_side(tokens: np.ndarray, mask: np.ndarray) -> Batch:
    ones = np.ones_like(tokens)
    return Batch(tokens, tokens, ones, np.cumsum(ones, -1) - 1, np.float32(mask))


def random_pairs(seed: int, rows: int) -> PairBatch:
    """Pairs of completions of 1 to 4 tokens behind a prompt of one."""
    draw = np.random.default_rng(seed)
    sides = []
    for _ in range(2):
        tokens = draw.integers(0, 1000, (rows, WIDTH)).astype(np.int32)
        lengths = draw.integers(1, WIDTH, (rows, 1))
        steps = np.arange(WIDTH)[None]
        sides.append(make_side(tokens, (steps >= 1) & (steps < 1 + lengths)))
    return PairBatch(*sides)


def hash_model(salt: int) -> Callable[[Batch], TokenLogProbs]:
    """A model whose log-probs depend on nothing but each row's own tokens."""

    def score(batch: Batch) -> TokenLogProbs:
        noise = jnp.sin(batch.tokens * (1.0 + 0.37 * salt) + salt)
        logps = -1.5 + noise
        stats = (jnp.abs(noise), (noise > 0) * 1.0, 3 * noise, logps - 0.2 * noise**2)
        # -1 marks the garbage rows that padding may hold.
        broken = jnp.where(batch.tokens < 0, jnp.nan, 1.0)
        return TokenLogProbs(logps * broken, *(x * broken for x in stats))

    return score


def run(pairs: PairBatch, **settings: Any) -> Any:
    return make_objective("preference", **settings)(hash_model(1), hash_model(2), pairs)


def constant_pairs(
    chosen: list[float], rejected: list[float], mask: list[list[float]] | None = None
) -> tuple[PairBatch, Callable[[Batch], TokenLogProbs]]:
    """One pair, and a model with the given token log-probs for its two rows."""
    masks = mask or [[1.0] * len(chosen), [1.0] * len(rejected)]
    first = np.zeros((1, len(chosen)), np.int32)
    pairs = PairBatch(
        make_side(first, np.array(masks[:1])),
        make_side(first + 1, np.array(masks[1:])),
    )

    def score(batch: Batch) -> TokenLogProbs:
        logps = jnp.where(
            batch.tokens[:, :1] == 0, jnp.float32([chosen]), jnp.float32([rejected])
        )
        return TokenLogProbs(logps, logps, logps, logps, 2 * logps)

    return pairs, score


# --- values by hand ---------------------------------------------------------------

# log-ratios: chosen 0.5 + 0.5 = 1, rejected -1.5 - 0.5 = -2, so the margin is 3.
POLICY = ([-1.0, -2.0], [-3.0, -2.0])
REFERENCE = ([-1.5, -2.5], [-1.5, -1.5])
BETA = 0.5
Z = BETA * 3


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, -logsigmoid(Z)),
        (
            {"conservative_smoothing": 0.1},
            -0.9 * logsigmoid(Z) - 0.1 * logsigmoid(-Z),
        ),
        ({"loss_type": "hinge"}, 0.0),
        ({"loss_type": "ipo"}, (1 / 2 + 2 / 2 - 1 / (2 * BETA)) ** 2),
        ({"loss_type": "sigmoid_norm"}, -logsigmoid(BETA * 1.5)),
        (
            {"loss_type": "robust", "label_smoothing": 0.2},
            (-0.8 * logsigmoid(Z) + 0.2 * logsigmoid(-Z)) / 0.6,
        ),
        ({"loss_type": "sppo_hard"}, (1 - 1.0) ** 2 + (-2 + 1.0) ** 2),
        ({"loss_type": "bco_pair"}, -logsigmoid(0.5) - logsigmoid(1.0)),
        (
            {"loss_type": "nca_pair"},
            -logsigmoid(0.5) - 0.5 * logsigmoid(-0.5) - 0.5 * logsigmoid(1.0),
        ),
        ({"loss_type": "sft"}, 1.5),
        ({"loss_type": ["hinge", "sft"], "loss_weights": [5, 2]}, 3.0),
        (
            {"f_divergence_type": "forward_kl"},
            -logsigmoid(BETA * (-math.exp(-1) + math.exp(2))),
        ),
        (
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0},
            -logsigmoid(BETA * (math.exp(1) - math.exp(-2))),
        ),
        ({"reference_free": True}, -logsigmoid(BETA * (-3 + 5))),
        # mean(logp - 2 logp) = -mean(logp): 1.5 for chosen, 2.5 for rejected
        ({"use_weighting": True}, -logsigmoid(Z) * math.exp(4.0)),
    ],
    ids=str,
)
def test_losses_of_one_pair_by_hand(settings: dict[str, Any], expected: float) -> None:
    pairs, policy = constant_pairs(*POLICY)
    _, reference = constant_pairs(*REFERENCE)
    objective = make_objective("preference", beta=BETA, **settings)
    loss, _ = objective(policy, reference, pairs)
    assert float(loss.weight) == 1
    assert float(loss.mean()) == pytest.approx(expected, rel=1e-6)


def test_metrics_of_one_pair_by_hand() -> None:
    pairs, policy = constant_pairs(*POLICY)
    _, reference = constant_pairs(*REFERENCE)
    _, metrics = make_objective("preference", beta=BETA)(policy, reference, pairs)
    means = {key: float(value.mean()) for key, value in metrics.items()}
    k3 = [math.exp(d) - 1 - d for d in (0.5, 0.5, -1.5, -0.5)]
    assert means == pytest.approx(
        {
            "rewards/chosen": 0.5,
            "rewards/rejected": -1.0,
            "rewards/margins": 1.5,
            "rewards/accuracies": 1.0,
            "logps/chosen": -3.0,
            "logps/rejected": -5.0,
            "logits/chosen": -1.5,
            "logits/rejected": -2.5,
            "entropy": -2.0,
            "mean_token_accuracy": -1.5,
            "num_tokens": 4.0,
            "kl": sum(k3) / 4,
            "nll/policy": 3.0 / 2,  # two tokens of log-probs that sum to -3
            "nll/reference": 4.0 / 2,
        }
    )


def test_ld_alpha_weighs_only_what_the_longer_completion_has_more() -> None:
    mask = [[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]]
    pairs, policy = constant_pairs([-9, -1, -2, -4], [-9, -9, -8, -9], mask)
    _, metrics = make_objective("preference", reference_free=True, ld_alpha=0.5)(
        policy, None, pairs
    )
    assert float(metrics["logps/chosen"].mean()) == -1 - 0.5 * (2 + 4)
    assert float(metrics["logps/rejected"].mean()) == -8


def test_aot_compares_sorted_log_ratios_not_pairs() -> None:
    # chosen log-ratios 3, 1; rejected 0, 2: sorted margins 1 - 0 and 3 - 2.
    tokens = np.array([[0], [1]], np.int32)
    ones = np.ones((2, 1))
    pairs = PairBatch(make_side(tokens, ones), make_side(tokens + 2, ones))
    logps = jnp.float32([3.0, 1.0, 0.0, 2.0])

    def policy(batch: Batch) -> TokenLogProbs:
        x = logps[batch.tokens]
        return TokenLogProbs(x, x, x, x)

    settings = {"reference_free": True, "loss_type": "aot_unpaired", "beta": 1.0}
    loss, _ = make_objective("preference", **settings)(policy, None, pairs)
    assert float(loss.mean()) == pytest.approx(-logsigmoid(1.0))


def test_orpo_and_simpo_of_one_pair_by_hand() -> None:
    chosen, rejected = [-0.1, -0.3], [-1.0, -3.0]
    mask = [[0.0, 1.0], [1.0, 1.0]]
    pairs, policy = constant_pairs(chosen, rejected, mask)
    p, q = math.exp(-0.3), math.exp(-2.0)
    log_odds = math.log(p / (1 - p)) - math.log(q / (1 - q))
    loss, metrics = make_objective("orpo", beta=0.5)(policy, None, pairs)
    # The prompt's prediction, masked out of the odds, is in ORPO's NLL.
    assert float(metrics["nll_loss"].mean()) == pytest.approx(0.2)
    assert float(loss.mean()) == pytest.approx(0.2 - 0.5 * logsigmoid(log_odds))
    loss, _ = make_objective("simpo", beta=2.0, simpo_gamma=0.5)(policy, None, pairs)
    assert float(loss.mean()) == pytest.approx(-logsigmoid(2 * (-0.3 + 2.0) - 0.5))


def test_orpo_stays_finite_where_the_model_is_certain() -> None:
    certain = jnp.float32([0.0, -1e-9, -50.0])
    values, gradients = jax.value_and_grad(
        lambda x: log_odds_ratio(x, jnp.float32([-1.0, -1.0, 0.0])).sum()
    )(certain)
    assert np.isfinite(values) and np.isfinite(gradients).all()


# --- properties -------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16), padding=st.tuples(*[st.integers(0, 4)] * 3))
def test_padding_pairs_change_nothing(
    name: str, seed: int, padding: tuple[int, ...]
) -> None:
    """Three rows with empty masks, anywhere, whose every log-prob is NaN."""
    pairs = random_pairs(seed, rows=4)
    padding = sorted(padding, reverse=True)

    def insert(side: Batch) -> Batch:
        tokens, mask = side.tokens, side.loss_mask
        for at in padding:
            tokens = np.insert(tokens, at, -1, axis=0)
            mask = np.insert(mask, at, 0.0, axis=0)
        return make_side(tokens, mask)

    padded = PairBatch(insert(pairs.chosen), insert(pairs.rejected))
    expected, actual = run(pairs, **OPTIONS[name]), run(padded, **OPTIONS[name])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        actual,
        expected,
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_padding_pairs_have_no_gradient_and_spoil_none(name: str) -> None:
    pairs = random_pairs(3, rows=4)
    tokens = np.where(np.arange(4)[:, None] == 1, -1, pairs.chosen.tokens)
    hole = np.arange(4)[:, None] != 1
    padded = PairBatch(
        make_side(tokens, pairs.chosen.loss_mask * hole),
        make_side(
            np.where(hole, pairs.rejected.tokens, -1), pairs.rejected.loss_mask * hole
        ),
    )
    objective = make_objective("preference", **OPTIONS[name])

    def total(shift: jax.Array) -> jax.Array:
        def policy(batch: Batch) -> TokenLogProbs:
            scored = hash_model(1)(batch)
            logps = scored.logps + shift
            return TokenLogProbs(
                logps,
                scored.entropy,
                scored.correct,
                scored.mean_logit,
                scored.collision,
            )

        return objective(policy, hash_model(2), padded)[0].total

    gradient = np.asarray(jax.grad(total)(jnp.zeros((8, WIDTH))))
    assert np.isfinite(gradient).all()
    assert not gradient[2:4].any()  # the rows alternate: 2 and 3 are pair 1
    assert gradient.any()


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"sft", "listed"}))
def test_micro_batches_add_up_to_one_batch(name: str) -> None:
    if name in PAIR_LOSSES and PAIR_LOSSES[name].sorts:
        pytest.skip("sorts within the micro-batch by definition")
    pairs = random_pairs(5, rows=6)
    whole = run(pairs, **OPTIONS[name])
    thirds = [
        run(jax.tree.map(lambda x, i=i: x[i : i + 2], pairs), **OPTIONS[name])
        for i in (0, 2, 4)
    ]
    total = {k: thirds[0][1][k] + thirds[1][1][k] + thirds[2][1][k] for k in whole[1]}
    loss = thirds[0][0] + thirds[1][0] + thirds[2][0]
    np.testing.assert_allclose(loss.mean(), whole[0].mean(), rtol=1e-5)
    for key in set(total) - {"num_tokens"}:
        np.testing.assert_allclose(
            total[key].mean(), whole[1][key].mean(), rtol=1e-5, atol=1e-6, err_msg=key
        )
    assert total["num_tokens"].total == whole[1]["num_tokens"].total


@pytest.mark.parametrize("name", ["sigmoid", "listed"])
def test_a_mesh_of_eight_devices_gives_the_same_numbers(name: str) -> None:
    pairs = random_pairs(7, rows=8)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    expected = run(pairs, **OPTIONS[name])
    actual = jax.jit(lambda p: run(p, **OPTIONS[name]))(jax.device_put(pairs, rows))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        actual,
        expected,
    )


def test_policy_and_reference_are_called_once_on_twice_the_rows() -> None:
    calls: list[tuple[str, tuple[int, ...]]] = []

    def counting(name: str, salt: int) -> Callable[[Batch], TokenLogProbs]:
        def score(batch: Batch) -> TokenLogProbs:
            calls.append((name, batch.tokens.shape))
            return hash_model(salt)(batch)

        return score

    objective = make_objective("preference", loss_type=["sigmoid", "sft"])
    objective(counting("policy", 1), counting("reference", 2), random_pairs(0, rows=3))
    assert calls == [("policy", (6, WIDTH)), ("reference", (6, WIDTH))]


@given(seed=st.integers(0, 2**16))
def test_kl_is_never_negative_and_zero_for_equal_models(seed: int) -> None:
    pairs = random_pairs(seed, rows=3)
    assert float(run(pairs)[1]["kl"].total) > 0
    objective = make_objective("preference")
    _, metrics = objective(hash_model(1), hash_model(1), pairs)
    assert float(metrics["kl"].total) == 0
    assert float(metrics["rewards/accuracies"].total) == 0  # strict: a tie is no win


def test_the_reference_is_never_differentiated() -> None:
    pairs = random_pairs(0, rows=2)
    objective = make_objective("preference")

    def total(shift: jax.Array) -> jax.Array:
        def reference(batch: Batch) -> TokenLogProbs:
            return jax.tree.map(lambda x: x * shift, hash_model(2)(batch))

        return objective(hash_model(1), reference, pairs)[0].total

    assert float(jax.grad(total)(jnp.float32(1.0))) == 0


def test_precomputed_sums_give_the_loss_of_the_reference_model() -> None:
    pairs = random_pairs(11, rows=4)
    loss, metrics = run(pairs)
    sums = [
        (hash_model(2)(side).logps * side.loss_mask).sum(-1)
        for side in (pairs.chosen, pairs.rejected)
    ]
    precomputed = PairBatch(pairs.chosen, pairs.rejected, *sums)
    objective = make_objective("preference", precompute_ref_log_probs=True)
    same_loss, same_metrics = objective(hash_model(1), None, precomputed)
    np.testing.assert_allclose(same_loss.total, loss.total, rtol=1e-5)
    for key in metrics.keys() - {"kl"}:
        np.testing.assert_allclose(
            same_metrics[key].total, metrics[key].total, rtol=1e-5, atol=1e-5
        )
    logratios = metrics["rewards/chosen"].total + metrics["rewards/rejected"].total
    np.testing.assert_allclose(
        same_metrics["kl"].total, -logratios / 0.1, rtol=1e-5, atol=1e-5
    )
    assert same_metrics["kl"].weight == metrics["kl"].weight


# --- refusals ---------------------------------------------------------------------


def test_a_missing_reference_is_refused() -> None:
    pairs = random_pairs(0, rows=2)
    with pytest.raises(ValueError, match="reference=None"):
        make_objective("preference")(hash_model(1), None, pairs)
    with pytest.raises(ValueError, match="the batch has no ref_chosen_logps"):
        make_objective("preference", precompute_ref_log_probs=True)(
            hash_model(1), hash_model(2), pairs
        )


def test_weighting_without_the_collision_is_refused() -> None:
    def policy(batch: Batch) -> TokenLogProbs:
        scored = hash_model(1)(batch)
        return TokenLogProbs(
            scored.logps, scored.entropy, scored.correct, scored.mean_logit
        )

    objective = make_objective("preference", use_weighting=True)
    with pytest.raises(ValueError, match=r"use_weighting=True: .*collision"):
        objective(policy, hash_model(2), random_pairs(0, rows=2))
