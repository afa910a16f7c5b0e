"""Next-token loss, the objectives table, its refusals, and objectives of one's own."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.objectives import (
    OBJECTIVES,
    load_objective,
    make_objective,
    needs_reference,
    next_token,
)
from jaxtrain.objectives.preference_losses import PAIR_LOSSES
from jaxtrain.types import Batch, LabeledBatch, PairBatch, TokenLogProbs, WeightedSum


def batch_of(mask: list[list[float]]) -> Batch:
    loss_mask = np.float32(mask)
    tokens = np.arange(loss_mask.size, dtype=np.int32).reshape(loss_mask.shape)
    ones = np.ones_like(tokens)
    return Batch(tokens, tokens + 1, ones, np.cumsum(ones, -1) - 1, loss_mask)


def scores_of(logps: Any) -> TokenLogProbs:
    logps = jnp.float32(logps)
    return TokenLogProbs(logps, -2 * logps, (logps > -1) * 1.0, logps + 7, 0.5 * logps)


# --- next token -------------------------------------------------------------------


def test_next_token_is_the_masked_sum_of_negative_log_probs() -> None:
    batch = batch_of([[0, 1, 1], [1, 0, 1]])
    scored = scores_of([[-9.0, -0.5, -2.0], [-0.25, -9.0, -4.0]])
    loss, metrics = next_token(lambda _: scored, None, batch)
    assert float(loss.total) == pytest.approx(0.5 + 2.0 + 0.25 + 4.0)
    assert float(loss.weight) == 4
    assert float(metrics["entropy"].mean()) == pytest.approx(2 * 6.75 / 4)
    assert float(metrics["mean_token_accuracy"].mean()) == 0.5
    assert float(metrics["num_tokens"].total) == 6


def test_next_token_gradient_reaches_only_masked_in_tokens() -> None:
    batch = batch_of([[0, 1, 0.5]])

    def total(logps: jax.Array) -> jax.Array:
        return next_token(lambda _: scores_of(logps), None, batch)[0].total

    gradient = jax.grad(total)(jnp.float32([[-1.0, -1.0, -1.0]]))
    np.testing.assert_array_equal(gradient, [[0, -1, -0.5]])


def test_a_padding_row_of_nans_leaves_next_token_unchanged() -> None:
    short, long = batch_of([[1, 1]]), batch_of([[1, 1], [0, 0]])
    expected = next_token(lambda _: scores_of([[-1.0, -3.0]]), None, short)
    padded = next_token(
        lambda _: scores_of([[-1.0, -3.0], [np.nan, -np.inf]]), None, long
    )
    jax.tree.map(np.testing.assert_array_equal, padded, expected)


def test_two_micro_batches_add_up_to_one_batch() -> None:
    masks, logps = [[1, 0, 1], [1, 1, 1]], [[-1.0, -2.0, -3.0], [-0.5, -0.25, -4.0]]
    whole, _ = next_token(lambda _: scores_of(logps), None, batch_of(masks))
    halves = [
        next_token(lambda _, r=row: scores_of([r]), None, batch_of([mask]))[0]
        for mask, row in zip(masks, logps, strict=True)
    ]
    jax.tree.map(np.testing.assert_allclose, halves[0] + halves[1], whole)


# --- the table --------------------------------------------------------------------


def test_every_row_of_the_table_names_its_function_and_takes_its_defaults() -> None:
    for name, spec in OBJECTIVES.items():
        assert spec.function.__name__ == name
        assert make_objective(name).func is spec.function
        assert "arXiv" in spec.function.__doc__ or name == "next_token"
    batch_types = {name: spec.batch_type for name, spec in OBJECTIVES.items()}
    assert batch_types["preference"] is PairBatch
    assert batch_types["kto"] is LabeledBatch


def test_every_pair_loss_states_its_equation_and_source() -> None:
    for name, loss in PAIR_LOSSES.items():
        assert loss.__name__ == name
        assert "arXiv:" in loss.__doc__, name


def test_every_pair_loss_can_be_made() -> None:
    for name in PAIR_LOSSES:
        smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
        make_objective("preference", loss_type=name, **smoothing)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "expected"),
    [
        ("preference", {}, True),
        ("preference", {"reference_free": True}, False),
        ("preference", {"precompute_ref_log_probs": True}, False),
        ("kto", {}, True),
        ("orpo", {}, False),
        ("next_token", {}, False),
    ],
)
def test_a_reference_is_needed_only_where_log_ratios_are(
    name: str, hyperparameters: dict[str, bool], expected: bool
) -> None:
    assert needs_reference(name, **hyperparameters) is expected


# --- refusals ---------------------------------------------------------------------

REFUSALS = [
    ("next_tokens", {}, "objective='next_tokens': did you mean 'next_token'?"),
    ("preference", {"bta": 1.0}, "bta=1.0: did you mean 'beta'? preference takes:"),
    ("next_token", {"beta": 1.0}, "beta=1.0: next_token takes: none"),
    ("preference", {"loss_type": "sigmod"}, "did you mean 'sigmoid'? use one of"),
    ("preference", {"loss_type": []}, "loss_type=[]: name at least one"),
    ("preference", {"loss_type": ["sft", "sft"]}, "stands twice"),
    (
        "preference",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        "loss_weights=[1.0]: 2 losses need 2 weights",
    ),
    ("preference", {"beta": 0}, "beta=0: must be above 0"),
    ("preference", {"beta": "0.1"}, "beta='0.1': must be a number"),
    ("preference", {"beta": True}, "beta=True: must be a number"),
    ("preference", {"label_smoothing": 0.1}, "or conservative_smoothing for"),
    (
        "preference",
        {"loss_type": "robust", "label_smoothing": 0.5},
        "label_smoothing=0.5: must be below 0.5 for the robust",
    ),
    ("preference", {"loss_type": "exo_pair"}, "above 0 and below 1 for exo_pair"),
    ("preference", {"conservative_smoothing": 0.5}, "must be below 0.5"),
    (
        "preference",
        {"loss_type": "ipo", "conservative_smoothing": 0.1},
        "acts on the sigmoid loss only, not on ipo",
    ),
    ("preference", {"f_divergence_type": "js"}, "use one of reverse_kl"),
    (
        "preference",
        {"f_divergence_type": "forward_kl", "loss_type": ["sigmoid", "apo_zero"]},
        "f_divergence_type='forward_kl': apo_zero has no f-divergence form",
    ),
    ("preference", {"ld_alpha": 1.5}, "ld_alpha=1.5: must be at most 1"),
    ("preference", {"discopop_tau": 0.0}, "discopop_tau=0.0: must be above 0"),
    (
        "preference",
        {"loss_type": "aot", "use_weighting": True},
        "use_weighting=True: aot and aot_unpaired sort",
    ),
    (
        "preference",
        {"ld_alpha": 0.5, "precompute_ref_log_probs": True},
        "ld_alpha=0.5 weighs the reference's log-prob of each token",
    ),
    (
        "preference",
        {"reference_free": True, "precompute_ref_log_probs": True},
        "nothing to precompute",
    ),
    ("cpo", {"loss_type": "robust"}, "use one of sigmoid, hinge, ipo, simpo"),
    (
        "cpo",
        {"loss_type": "ipo", "label_smoothing": 0.1},
        "acts on sigmoid and simpo, not on ipo",
    ),
    ("simpo", {"simpo_gamma": -1.0}, "simpo_gamma=-1.0: must be at least 0"),
    ("orpo", {"beta": -0.1}, "beta=-0.1: must be at least 0"),
    ("kto", {"loss_type": "kot"}, "did you mean 'kto'?"),
    ("kto", {"desirable_weight": -1}, "desirable_weight=-1: must be at least 0"),
]


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"), REFUSALS, ids=lambda x: str(x)[:40]
)
def test_what_cannot_work_is_refused_with_key_value_and_fix(
    name: str, hyperparameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_objective(name, **hyperparameters)


# --- objectives of one's own ------------------------------------------------------


@pytest.fixture
def own_module(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "focal_losses.py").write_text(
        "import jax.numpy as jnp\n"
        "from jaxtrain.types import WeightedSum\n"
        "NOT_A_FUNCTION = 3\n"
        "def focal(policy, reference, batch, *, gamma=2.0):\n"
        "    logps = policy(batch).logps\n"
        "    losses = -((1 - jnp.exp(logps)) ** gamma) * logps * batch.loss_mask\n"
        "    return WeightedSum(losses.sum(), batch.loss_mask.sum()), {}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "focal_losses"


def test_an_objective_of_ones_own_is_loaded_and_bound(own_module: str) -> None:
    objective = make_objective(f"{own_module}:focal", gamma=1.0)
    batch = batch_of([[1, 1]])
    loss, metrics = objective(
        lambda _: scores_of(jnp.log(0.25 * jnp.ones((1, 2)))), None, batch
    )
    assert isinstance(loss, WeightedSum)
    assert float(loss.mean()) == pytest.approx(0.75 * np.log(4))
    assert metrics == {}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:loss", "put its folder on PYTHONPATH"),
        ("focal_losses:focel", "did you mean 'focal'? focal_losses has no focel"),
        ("focal_losses:NOT_A_FUNCTION", "NOT_A_FUNCTION is not a function"),
        ("focal_losses:", "write it as module:function"),
        ("focal_losses", "write it as module:function"),
    ],
)
def test_an_objective_that_cannot_be_loaded_is_refused(
    own_module: str, path: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_objective(path)
