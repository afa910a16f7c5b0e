"""Next-token loss, the objectives table, its refusals, and objectives of one's own."""

import inspect
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
    next_token,
    preference_losses,
)
from jaxtrain.objectives.options import PAIR_LOSSES, PairLoss
from jaxtrain.objectives.preference_losses import pair_loss
from jaxtrain.types import Batch, TokenLogProbs, WeightedSum


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


def test_every_row_of_the_table_has_its_function_and_takes_its_defaults() -> None:
    for name, row in OBJECTIVES.items():
        objective = make_objective(name)
        assert objective.func.__name__ == name
        assert objective.keywords == {"options": row.options()}
        assert "arXiv" in objective.func.__doc__ or name == "next_token"
        assert (row.row_kind == "labeled") == (name == "kto")
        assert row.has_reference == (name in ("preference", "kto"))


def test_every_pair_loss_states_its_equation_and_source() -> None:
    for name in PAIR_LOSSES:
        loss = pair_loss(name)
        assert loss.__name__ == name
        assert "arXiv:" in loss.__doc__, name


def test_every_function_of_a_pair_and_options_has_a_row_and_the_reverse() -> None:
    functions = {
        name
        for name, function in vars(preference_losses).items()
        if inspect.isfunction(function)
        and tuple(inspect.signature(function).parameters) == ("pair", "options")
    }
    assert functions == PAIR_LOSSES.keys()


def test_a_row_without_a_function_and_the_reverse_are_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PAIR_LOSSES, "no_function", PairLoss())
    monkeypatch.setattr(
        preference_losses, "no_row", lambda pair, options: pair.margin, raising=False
    )
    for name in ("no_function", "no_row"):
        with pytest.raises(ValueError, match=f"loss_type = {name!r}: it needs a row"):
            pair_loss(name)


def test_every_pair_loss_can_be_made() -> None:
    for name in PAIR_LOSSES:
        smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
        make_objective("preference", loss_type=name, **smoothing)


# --- refusals ---------------------------------------------------------------------

REFUSALS = [
    (
        "next_tokens",
        {},
        "objective = 'next_tokens': no objective of that name",
    ),
    ("preference", {"bta": 1.0}, "bta = 1.0: unknown key; did you mean beta?"),
    ("next_token", {"beta": 1.0}, "beta = 1.0: unknown key"),
    ("preference", {"loss_type": "sigmod"}, "did you mean 'sigmoid'?"),
    ("preference", {"loss_type": "none"}, "a list, each item one of sigmoid, hinge"),
    ("preference", {"loss_type": []}, "loss_type = (): no loss; name at least one"),
    ("preference", {"loss_type": ["sft", "sft"]}, "'sft' is listed twice"),
    (
        "preference",
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]},
        "loss_weights = (1.0,): 1 weights for 2 loss_type",
    ),
    ("preference", {"beta": 0}, "beta = 0: not a number > 0"),
    ("preference", {"beta": "0.1"}, "beta = '0.1': a string, not a number > 0"),
    ("preference", {"beta": True}, "beta = True: not a number > 0"),
    ("preference", {"label_smoothing": 1.0}, "not a number in [0, 1)"),
    (
        "preference",
        {"label_smoothing": 0.1},
        "loss_type ['sigmoid'] does not read it; remove it, or add one of aot,",
    ),
    (
        "preference",
        {"loss_type": "robust", "label_smoothing": 0.5},
        "label_smoothing = 0.5: robust divides by 1 - 2 label_smoothing",
    ),
    ("preference", {"loss_type": "exo_pair"}, "label_smoothing = 0.0: exo_pair takes"),
    ("preference", {"conservative_smoothing": 0.5}, "not a number in [0, 0.5)"),
    (
        "preference",
        {"loss_type": "ipo", "conservative_smoothing": 0.1},
        "loss_type ['ipo'] does not read it; remove it, or add one of sigmoid",
    ),
    (
        "preference",
        {"discopop_tau": 0.1},
        "['sigmoid'] does not read it",
    ),
    ("preference", {"f_divergence_type": "js"}, "not one of reverse_kl, forward_kl"),
    (
        "preference",
        {"f_divergence_type": "forward_kl", "loss_type": ["sigmoid", "apo_zero"]},
        "f_divergence_type = 'forward_kl': ['apo_zero'] have only reverse_kl's form",
    ),
    ("preference", {"ld_alpha": 1.5}, "ld_alpha = 1.5: not a number in [0, 1]"),
    ("preference", {"discopop_tau": 0.0}, "discopop_tau = 0.0: not a number > 0"),
    (
        "preference",
        {"loss_type": "aot", "use_weighting": True},
        "use_weighting = True: aot losses sort the batch",
    ),
    (
        "preference",
        {"ld_alpha": 0.5, "precompute_ref_log_probs": True},
        "ld_alpha = 0.5: it weighs the reference's log-prob of each token",
    ),
    (
        "preference",
        {"reference_free": True, "precompute_ref_log_probs": True},
        "precompute_ref_log_probs = True: reference_free is true",
    ),
    ("cpo", {"loss_type": "robust"}, "not one of sigmoid, hinge, ipo, simpo"),
    (
        "cpo",
        {"loss_type": "ipo", "label_smoothing": 0.1},
        "label_smoothing = 0.1: loss_type 'ipo' does not read it",
    ),
    ("simpo", {"simpo_gamma": -1.0}, "simpo_gamma = -1.0: not a number >= 0"),
    ("orpo", {"beta": -0.1}, "beta = -0.1: not a number >= 0"),
    ("kto", {"loss_type": "kot"}, "did you mean 'kto'?"),
    ("kto", {"desirable_weight": -1}, "desirable_weight = -1: not a number >= 0"),
]


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"), REFUSALS, ids=lambda x: str(x)[:40]
)
def test_what_cannot_work_is_refused_with_key_value_and_fix(
    name: str, hyperparameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_objective(name, **hyperparameters)


def test_all_problems_are_named_at_once() -> None:
    wrong = {"beta": 0, "bta": 1, "loss_type": ["sft", "sft"], "use_weighting": "no"}
    with pytest.raises(ValueError) as caught:
        make_objective("preference", **wrong)
    keys = [line.partition(" ")[0] for line in str(caught.value).splitlines()]
    assert keys == ["beta", "bta", "use_weighting", "loss_type"]


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
