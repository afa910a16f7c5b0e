"""An objective's options: one set of rules behind the configuration and Python."""

import dataclasses
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxtrain import config
from jaxtrain.objectives import make_objective, preference_losses
from jaxtrain.objectives.options import (
    OBJECTIVES,
    PAIR_LOSSES,
    CpoOptions,
    PairLoss,
    PreferenceOptions,
    SimpoOptions,
)
from jaxtrain.types import Batch, PairBatch, TokenLogProbs

NUMBERS = st.sampled_from([-1.0, 0, 0.05, 0.1, 0.3, 0.5, 0.6, 1, 1.0, 2.0, "0.1", True])
LOSSES = st.sampled_from([*PAIR_LOSSES, "sigmod", "simpo", "kto"])
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "loss_type": st.one_of(LOSSES, st.lists(LOSSES, max_size=3)),
    "loss_weights": st.one_of(st.none(), st.lists(NUMBERS, max_size=3)),
    "f_divergence_type": st.sampled_from(["reverse_kl", "forward_kl", "js"]),
    **dict.fromkeys(
        ("reference_free", "precompute_ref_log_probs", "use_weighting"),
        st.sampled_from([False, True, 1, "yes"]),
    ),
}


@st.composite
def objective_and_options(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from([*OBJECTIVES, "preference", "preference"]))
    keys = [field.name for field in dataclasses.fields(OBJECTIVES[name].options)]
    if name == "kto":
        # Only Python takes it, with batches that carry the sums: no pass of a
        # configured run computes them, so the configuration refuses it.
        keys.remove("precompute_ref_log_probs")
    chosen = draw(st.sets(st.sampled_from([*keys, "betta"]), max_size=5))
    return name, {key: draw(VALUES.get(key, NUMBERS)) for key in sorted(chosen)}


def keys_refused_in_python(name: str, options: dict[str, Any]) -> list[str]:
    try:
        make_objective(name, **options)
    except ValueError as error:
        return sorted(re.findall(r"^(\w+) = ", str(error), re.MULTILINE))
    return []


def problems_in_yaml(name: str, **training: Any) -> list[str]:
    kind = "sft" if name == "next_token" else "dpo"
    try:
        config.resolve(
            {"training": {"training_type": kind, "objective": name, **training}}
        )
    except config.ConfigError as error:
        return error.problems
    return []


def keys_refused_in_yaml(name: str, **training: Any) -> list[str]:
    lines = problems_in_yaml(name, **training)
    pattern = r"training\.(?:dpo|objective_kwargs)\.(\w+) = "
    matches = [re.match(pattern, line) for line in lines]
    return sorted(match[1] if match else "?" for match in matches)


@settings(max_examples=300, deadline=None)
@given(objective_and_options(), st.sets(st.integers(0, 4)))
@example(("preference", {"loss_type": "exo_pair", "label_smoothing": 0.6}), {0, 1})
@example(("preference", {"loss_type": "aot", "label_smoothing": 0.6}), {0})
@example(("preference", {"loss_type": ["sigmoid", "sigmoid"]}), {0})
@example(("preference", {"discopop_tau": 0.5, "loss_type": ["aot"]}), {1})
def test_yaml_and_python_accept_the_same_options_and_name_the_same_keys(
    drawn: tuple[str, dict[str, Any]], in_dpo: set[int]
) -> None:
    name, options = drawn
    expected = keys_refused_in_python(name, options)
    assert keys_refused_in_yaml(name, objective_kwargs=options) == expected
    # Through both at once, as the configuration allows.
    shared = set(OBJECTIVES[name].keys_of_dpo)
    if name == "orpo":
        shared.remove("beta")  # training.dpo.beta, of all objectives, can't be 0
    split: dict[str, dict[str, Any]] = {"dpo": {}, "objective_kwargs": {}}
    for number, (key, value) in enumerate(options.items()):
        door = "dpo" if key in shared and number in in_dpo else "objective_kwargs"
        split[door][key] = value
    assert keys_refused_in_yaml(name, **split) == expected


@pytest.mark.parametrize(
    ("name", "training", "expected"),
    [
        ("simpo", {}, SimpoOptions()),
        (
            "simpo",
            {"dpo": {"beta": 0.1}, "objective_kwargs": {"simpo_gamma": 1}},
            SimpoOptions(beta=0.1, simpo_gamma=1.0),
        ),
        (
            "cpo",
            {"objective_kwargs": {"beta": 0.3, "loss_type": "ipo"}},
            CpoOptions(beta=0.3, loss_type="ipo"),
        ),
        (
            "preference",
            {"dpo": {"beta": 1}, "objective_kwargs": {"loss_type": "aot"}},
            PreferenceOptions(beta=1.0, loss_type=("aot",)),
        ),
    ],
)
def test_a_resolved_run_has_the_options_and_its_record_gives_them_back(
    name: str, training: dict[str, Any], expected: Any
) -> None:
    given = {"training": {"training_type": "dpo", "objective": name, **training}}
    run = config.resolve(given)
    assert run.objective_options == expected
    assert type(run.objective_options) is type(expected)
    assert run.dpo is not None and run.dpo.beta == expected.beta
    record = run.to_dict()
    assert config.RunConfig.from_dict(record) == run
    # No option is recorded in two places.
    kwargs = record["training"]["objective_kwargs"] or {}
    assert not kwargs.keys() & set(OBJECTIVES[name].keys_of_dpo)


@pytest.mark.parametrize("loss_type", ["exo_pair", "aot", "aot_unpaired"])
def test_only_robust_limits_smoothing_to_half_as_in_trl(loss_type: str) -> None:
    options = {"loss_type": loss_type, "label_smoothing": 0.6}
    assert problems_in_yaml("auto", dpo=options) == []
    options["loss_type"] = "robust"
    assert keys_refused_in_yaml("auto", dpo=options) == ["label_smoothing"]


def test_an_own_function_has_its_arguments_as_they_are() -> None:
    given = {"training_type": "dpo", "objective": "mine:loss"}
    run = config.resolve({"training": {**given, "objective_kwargs": {"a": "b"}}})
    assert run.objective_options is None
    assert run.loop.objective_kwargs == {"a": "b"}
    row = run.objective_row
    assert (row.row_kind, row.has_reference) == ("preference", True)
    assert not row.micro_batch_means


@pytest.mark.parametrize("name", ["preference", "simpo"])
def test_an_option_with_two_values_is_refused(name: str) -> None:
    twice = {"dpo": {"beta": 0.3}, "objective_kwargs": {"beta": 0.5}}
    assert problems_in_yaml(name, **twice) == [
        "training.objective_kwargs.beta = 0.5: training.dpo.beta = 0.3 names the same"
        " option; set one of the two"
    ]
    twice["objective_kwargs"]["beta"] = 0.3
    assert problems_in_yaml(name, **twice) == []


@pytest.mark.parametrize(
    ("name", "training", "key"),
    [
        (
            "auto",
            {"loss_type": ["exo_pair"], "label_smoothing": 1.5},
            "label_smoothing",
        ),
        ("auto", {"loss_type": "robost", "label_smoothing": 0.1}, "loss_type"),
        ("auto", {"loss_type": "sigmod", "loss_weights": [1, 2]}, "loss_type"),
        ("auto", {"use_weighting": True, "loss_type": ["aot", 1]}, "loss_type"),
        ("auto", {"max_length": 1, "max_prompt_length": 2000}, "max_length"),
    ],
)
def test_a_refused_key_is_complained_of_once(
    name: str, training: dict[str, Any], key: str
) -> None:
    assert keys_refused_in_yaml(name, dpo=training) == [key]
    if key != "max_length":
        assert keys_refused_in_yaml(name, objective_kwargs=training) == [key]


def test_a_loss_is_added_by_a_row_and_a_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def doubled(pair: Any, options: PreferenceOptions) -> Any:
        return -2.0 * options.label_smoothing * pair.margin

    row = PairLoss(("label_smoothing",), sorts=True)
    monkeypatch.setitem(PAIR_LOSSES, "doubled", row)
    monkeypatch.setattr(preference_losses, "doubled", doubled, raising=False)
    training = {"dpo": {"loss_type": ["doubled"], "label_smoothing": 0.5}}
    assert problems_in_yaml("auto", **training) == []
    training["dpo"]["use_weighting"] = True
    assert keys_refused_in_yaml("auto", **training) == ["use_weighting"]
    assert any(
        "did you mean 'doubled'" in line
        for line in problems_in_yaml("auto", dpo={"loss_type": "dubled"})
    )

    ones = np.ones((1, 1), np.int32)
    sides = [Batch(ones * n, ones, ones, ones, np.float32(ones)) for n in (1, 3)]

    def policy(batch: Batch) -> TokenLogProbs:
        logps = np.float32(batch.tokens)
        return TokenLogProbs(logps, logps, logps, logps)

    objective = make_objective(
        "preference", loss_type="doubled", label_smoothing=0.5, reference_free=True
    )
    loss, _ = objective(policy, None, PairBatch(*sides))
    assert float(loss.mean()) == pytest.approx(-2.0 * 0.5 * (1 - 3))


@pytest.mark.parametrize(
    "module", ["jaxtrain.objectives.options", "jaxtrain.config", "jaxtrain.objectives"]
)
def test_options_load_first_and_without_jax(module: str) -> None:
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
