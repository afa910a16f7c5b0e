"""Learning-rate schedules: transformers' values at every step, by hand, refusals."""

import logging

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.optimizers.schedules import SCHEDULES, count_warmup_steps, make_schedule

PEAK = 3e-4
_MOST_STEPS = 128


def curve(name, total_steps, warmup_steps=0, extra_steps=0, **options):
    """Learning rates of the run's steps, and of some after its end."""
    schedule = make_schedule(
        name,
        learning_rate=PEAK,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        **options,
    )
    # One length for all, so that jax compiles each operation once.
    assert total_steps + extra_steps <= _MOST_STEPS
    rates = np.asarray(jax.vmap(schedule)(np.arange(_MOST_STEPS)))
    return rates[: total_steps + extra_steps]


CASES = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.25}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 2e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.75}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("polynomial", {}),
    ("polynomial", {"power": 2.5, "lr_end": 1e-5}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 7}),
    ("warmup_stable_decay", {"num_decay_steps": 11}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "num_stable_steps": 5}),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 8, "warmup_type": "cosine", "decay_type": "linear"},
    ),
    (
        "warmup_stable_decay",
        {
            "num_decay_steps": 8,
            "warmup_type": "1-sqrt",
            "decay_type": "1-sqrt",
            "min_lr_ratio": 0.2,
        },
    ),
    ("warmup_stable_decay", {"num_decay_steps": 8, "num_cycles": 0.7}),
]


@pytest.mark.torch
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_step_has_the_learning_rate_of_transformers(name, options, warmup_steps):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    total_steps, extra_steps = 37, 4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = transformers.get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(options),
    )
    expected = []
    for _ in range(total_steps + extra_steps):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()

    actual = curve(name, total_steps, warmup_steps, extra_steps, **options)

    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-6 * PEAK)


@pytest.mark.torch
@pytest.mark.parametrize("total_steps", [1, 2, 6, 30, 100])
@pytest.mark.parametrize("num_cycles", [1, 2, 3, 5])
def test_restarts_fall_on_the_steps_of_transformers(total_steps, num_cycles):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = transformers.get_scheduler(
        "cosine_with_restarts",
        optimizer,
        num_warmup_steps=0,
        num_training_steps=total_steps,
        scheduler_specific_kwargs={"num_cycles": num_cycles},
    )
    factor = scheduler.lr_lambdas[0]

    actual = curve("cosine_with_restarts", total_steps, num_cycles=num_cycles)

    expected = [PEAK * factor(step) for step in range(total_steps)]
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-6 * PEAK)


def test_linear_rises_over_the_warmup_and_falls_to_zero():
    actual = curve("linear", total_steps=6, warmup_steps=2, extra_steps=1)

    expected = np.array([0, 0.5, 1, 0.75, 0.5, 0.25, 0]) * PEAK
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-12)


def test_wsd_decays_over_the_last_tenth_unless_told_otherwise():
    actual = curve("wsd", total_steps=40, warmup_steps=4, decay_type="linear")

    np.testing.assert_allclose(actual[4:37], PEAK, rtol=1e-6)
    np.testing.assert_allclose(
        actual[36:], np.array([1, 0.75, 0.5, 0.25]) * PEAK, rtol=1e-6
    )


@settings(max_examples=10)
@given(
    name=st.sampled_from(sorted(set(SCHEDULES) - {"cosine_with_min_lr"})),
    total_steps=st.integers(2, 60),
    warmup_fraction=st.floats(0, 0.9),
)
def test_rates_stay_between_zero_and_the_peak(name, total_steps, warmup_fraction):
    warmup_steps = int(warmup_fraction * (total_steps - 1))
    options = {"num_decay_steps": 1} if name in ("wsd", "warmup_stable_decay") else {}

    rates = curve(name, total_steps, warmup_steps, extra_steps=3, **options)

    assert np.all(rates >= 0)
    assert np.all(rates <= PEAK * (1 + 1e-6))
    assert rates.max() == pytest.approx(PEAK, rel=1e-5)


def test_warmup_ratio_is_rounded_up_and_steps_win_over_it():
    assert count_warmup_steps(101, warmup_ratio=0.1) == 11
    assert count_warmup_steps(101, warmup_steps=5, warmup_ratio=0.1) == 5
    assert count_warmup_steps(101) == 0


def test_constant_says_that_its_warmup_does_nothing(caplog):
    with caplog.at_level(logging.WARNING, logger="jaxtrain"):
        rates = curve("constant", 4, warmup_steps=2)

    np.testing.assert_allclose(rates, PEAK, rtol=1e-6)
    assert "constant_with_warmup" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "lr_scheduler_type = 'cosin' is unknown.*cosine"),
        ("linear", {"num_cycles": 2}, "num_cycles.*linear"),
        ("cosine_with_restarts", {"num_cycles": 0.5}, "num_cycles = 0.5"),
        ("cosine_with_min_lr", {}, "min_lr or min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "only one"),
        ("polynomial", {"lr_end": 1.0}, "lr_end = 1.0 must be below"),
        ("wsd", {"num_decay_steps": 30}, "exceed the run's 20 steps"),
        ("wsd", {"decay_type": "sqrt"}, "decay_type = 'sqrt'.*1-sqrt"),
    ],
)
def test_a_wrong_schedule_is_refused_with_its_fix(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(name, learning_rate=PEAK, total_steps=20, **options)
