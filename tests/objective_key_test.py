"""`training.objective`: ORPO, SimPO, KTO and a loss of one's own, by config."""

import pathlib
import sys

import numpy as np
import pytest

from jaxtrain.config import ConfigError, resolve
from jaxtrain.trainer import TrainingOrchestrator

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config, train

MY_LOSSES = """
import jax.numpy as jnp
from jaxtrain.types import WeightedSum


def focal(policy, reference, batch, *, gamma=2.0):
    logps = policy(batch).logps
    losses = -((1 - jnp.exp(logps)) ** gamma) * logps * batch.loss_mask
    return WeightedSum(losses.sum(), batch.loss_mask.sum()), {}


def pair_margin(policy, reference, batch):
    def total(score, side):
        return (score(side).logps * side.loss_mask).sum(-1)

    margin = sum(
        sign * (total(policy, side) - total(reference, side))
        for sign, side in ((1, batch.chosen), (-1, batch.rejected))
    )
    real = batch.chosen.loss_mask.any(-1).astype(jnp.float32)
    return WeightedSum((jnp.exp(-margin) * real).sum(), real.sum()), {}
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my_losses.py").write_text(MY_LOSSES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)


def config_of(training_type, objective, **kwargs):
    config = tiny_config(training_type, max_steps=2, save_steps=0, objective=objective)
    config.training.save_final_model = False
    config.training.objective_kwargs = kwargs or None
    return config


@pytest.mark.slow
def test_an_own_loss_is_named_with_its_arguments(tmp_path):
    plain = train(config_of("sft", "auto"), tmp_path / "plain")
    focal = train(config_of("sft", "my_losses:focal", gamma=0.0), tmp_path / "zero")
    assert focal["final_loss"] == pytest.approx(plain["final_loss"], rel=1e-6)
    assert "perplexity" in plain and "perplexity" not in focal
    focal = train(config_of("sft", "my_losses:focal", gamma=1.0), tmp_path / "one")
    assert 0 < focal["final_loss"] < plain["final_loss"]


@pytest.mark.slow
def test_an_own_loss_of_pairs_gets_the_reference(tmp_path):
    config = config_of("dpo", "my_losses:pair_margin")
    config.training.max_steps = 1
    # Policy and reference are one model at first: exp(-0) a pair.
    assert train(config, tmp_path)["final_loss"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "metric"), [("orpo", "log_odds_ratio"), ("simpo", "nll_loss")]
)
def test_objectives_without_a_reference_train(objective, metric, tmp_path):
    results = train(config_of("dpo", objective), tmp_path)
    assert np.isfinite(results["final_loss"])
    assert metric in results and "rewards/accuracies" in results
    assert "kl" not in results


@pytest.mark.slow
def test_kto_trains_on_labeled_rows(tmp_path):
    rows = [
        {"prompt": f"What is {n} and {n}?", "completion": f" {2 * n}.", "label": True}
        for n in range(6)
    ]
    rows += [
        {"prompt": f"What is {n} and {n}?", "completion": " Why?", "label": False}
        for n in range(6)
    ]
    config = config_of("dpo", "kto")
    results = train(config, tmp_path, train_dataset=rows)
    assert {"rewards/chosen", "rewards/rejected", "kl"} <= set(results)
    # At the reference itself: 1 - sigmoid(0), and one small step away.
    assert results["final_loss"] == pytest.approx(0.5, abs=0.1)


def options_of(config):
    trainer = TrainingOrchestrator(config)
    trainer.run = resolve(config)
    return vars(trainer.make_objective().keywords["options"])


def test_keys_of_dpo_reach_the_objective_where_they_differ_from_their_defaults():
    config = config_of("dpo", "simpo")
    assert options_of(config)["beta"] == 2.0  # SimPO's own
    config.training.dpo.beta = 0.5
    config.training.dpo.label_smoothing = 0.1
    options = options_of(config)
    assert (options["beta"], options["label_smoothing"]) == (0.5, 0.1)
    config = config_of("dpo", "cpo", loss_type="hinge", beta=0.3)
    options = options_of(config)
    assert (options["beta"], options["loss_type"]) == (0.3, "hinge")


@pytest.mark.parametrize("beta", [None, 0.1, 0.5, 2.0])
@pytest.mark.parametrize(
    ("objective", "default"),
    [("auto", 0.1), ("orpo", 0.1), ("cpo", 0.1), ("simpo", 2.0), ("kto", 0.1)],
)
def test_beta_is_what_was_set_or_the_objectives_own_default(objective, default, beta):
    config = config_of("dpo", objective)
    config.training.dpo.beta = beta
    expected = default if beta is None else beta
    assert options_of(config)["beta"] == expected
    assert resolve(config).dpo.beta == expected  # and that is what is recorded


def test_keywords_of_a_preference_loss_act_outside_it_too(tmp_path):
    """WPO weighs pairs by p^2, which the scoring has to be told to compute."""
    by_key = config_of("dpo", "auto")
    by_key.training.dpo.use_weighting = True
    by_keyword = config_of("dpo", "auto", use_weighting=True)
    assert resolve(by_keyword).to_dict() == resolve(by_key).to_dict()
    results = train(by_keyword, tmp_path)
    assert np.isfinite(results["final_loss"])


@pytest.mark.parametrize(
    ("objective", "kwargs", "message"),
    [
        ("auto", {"betta": 0.2}, "objective_kwargs.betta = 0.2.*did you mean beta"),
        ("auto", {"ld_alpha": 2.0}, "objective_kwargs.ld_alpha = 2.0: not"),
        ("kto", {"precompute_ref_log_probs": True}, "has no pass"),
        ("orpo", {"betta": 1.0}, "objective_kwargs.betta = 1.0.*did you mean beta"),
        ("cpo", {"loss_type": "hing"}, "objective_kwargs.loss_type.*mean 'hinge'"),
    ],
)
def test_keywords_that_cannot_work_are_refused_by_the_config(
    objective, kwargs, message
):
    with pytest.raises(ConfigError, match=message):
        resolve(config_of("dpo", objective, **kwargs))


@pytest.mark.parametrize(
    ("training_type", "objective", "dpo", "message"),
    [
        ("sft", "orpo", {}, "set training_type = 'dpo'"),
        ("dpo", "next_token", {}, "set training_type = 'sft'"),
        ("dpo", "simop", {}, "did you mean 'simpo'"),
        ("dpo", "orpo", {"loss_type": ("ipo",)}, "dpo.loss_type = .*does not read"),
        ("dpo", "kto", {"max_prompt_length": 8}, "dpo.max_prompt_length = 8"),
        ("dpo", "cpo", {"sync_ref_model": True}, "dpo.sync_ref_model = True"),
    ],
)
def test_an_objective_that_does_not_fit_is_refused(
    training_type, objective, dpo, message
):
    config = config_of(training_type, objective)
    for key, value in dpo.items():
        setattr(config.training.dpo, key, value)
    with pytest.raises(ConfigError, match=message):
        resolve(config)


@pytest.mark.parametrize(
    ("objective", "kwargs", "message"),
    [
        ("my_losses:nothing", {}, "my_losses has no nothing"),
        ("no_such_module:loss", {}, "PYTHONPATH"),
    ],
)
def test_what_cannot_work_is_said_before_the_model_loads(objective, kwargs, message):
    config = config_of("dpo", objective, **kwargs)
    config.model.name_or_path = "/no/such/model"
    with pytest.raises(ValueError, match=message):
        TrainingOrchestrator(config).prepare()
