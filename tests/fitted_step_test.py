"""remat_policy auto: which policy is taken, by what account, and what the log says."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import records, tiny_config, train

from jaxtrain import aot
from jaxtrain.aot import compile as aot_compile
from jaxtrain.aot.report import Chip
from jaxtrain.config.sections import REMATS
from jaxtrain.run import fitted_step
from jaxtrain.run.fitted_step import FittedStep, SparingStep

# Temporaries of the fake steps, bytes for each token.
NEEDS = dict(zip(REMATS, (100, 60, 40, 20), strict=True))


class FakeStep:
    """A jitted step that says what its program takes, and counts compilations."""

    def __init__(self, remat, compiled, exhausts, needs=NEEDS):
        self.remat, self.compiled, self.exhausts = remat, compiled, exhausts
        self.needs = needs

    def lower(self, state, batch):
        size = batch.size

        def compile_():
            self.compiled.append((self.remat, size))
            if self.remat in self.exhausts:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no space")
            program = lambda state, batch: (self.remat, batch.size)  # noqa: E731
            program.memory_analysis = lambda: types.SimpleNamespace(
                argument_size_in_bytes=200,
                output_size_in_bytes=150,
                alias_size_in_bytes=150,
                temp_size_in_bytes=self.needs[self.remat] * size,
                generated_code_size_in_bytes=0,
            )
            return program

        return types.SimpleNamespace(compile=compile_)


def make(limit, *, in_use=200, exhausts=()):
    device = types.SimpleNamespace(
        platform="gpu",
        memory_stats=lambda: {"bytes_limit": limit, "bytes_in_use": in_use},
    )
    compiled = []
    step = FittedStep(lambda remat: FakeStep(remat, compiled, exhausts), device)
    return step, compiled


@pytest.mark.parametrize(
    ("limit", "taken"),
    # Ten tokens need 200 and 1000, 600, 400 or 200 bytes, of which 97% may be used.
    [(1300, "none"), (1220, "minimal"), (830, "minimal"), (640, "save_attention")],
)
def test_the_fastest_policy_that_fits_is_taken_and_said(limit, taken, caplog):
    step, compiled = make(limit)
    with caplog.at_level(logging.INFO):
        assert step(None, np.zeros(10)) == (taken, 10)
        assert step(None, np.zeros(10)) == (taken, 10)
    tried = list(REMATS[: REMATS.index(taken) + 1])
    assert compiled == [(remat, 10) for remat in tried]  # each once
    (line,) = caplog.messages
    assert f"auto took {taken!r}: " in line
    assert line.count("would take") == len(tried) - 1


def test_what_lies_in_memory_beside_the_step_counts():
    assert make(1300, in_use=200)[0](None, np.zeros(10))[0] == "none"
    assert make(1300, in_use=400)[0](None, np.zeros(10))[0] == "minimal"


def test_a_larger_batch_begins_where_a_smaller_one_ended():
    step, compiled = make(1300)
    programs = [step.lower(None, np.zeros(size)).compile() for size in (12, 20, 5)]
    taken = [program(None, np.zeros(1))[0] for program in programs]
    assert taken == ["minimal", "save_attention", "none"]
    assert compiled == [
        ("none", 12), ("minimal", 12), ("minimal", 20), ("save_attention", 20),
        ("none", 5),
    ]  # fmt: skip


def test_a_compiler_that_runs_out_and_a_device_that_fits_none(caplog):
    step, _ = make(1300, exhausts=("none", "minimal"))
    assert step(None, np.zeros(10))[0] == "save_attention"
    step, _ = make(300)
    assert step(None, np.zeros(10))[0] == "full"
    assert "no policy fits the device" in caplog.text
    step, _ = make(300, exhausts=REMATS)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        step(None, np.zeros(10))


LAYERS = 10


def make_unrolled(limit, *, exhausts=(), flat=0):
    """Of the layers behind the `flat` last ones each takes 4 bytes a token."""
    compiled = []
    needs = NEEDS | {("full", n): 20 + 4 * max(0, LAYERS - n - flat) for n in range(11)}

    def make_step(remat, layers=-1):
        name = remat if layers == -1 else (remat, layers)
        return FakeStep(name, compiled, exhausts, needs)

    device = types.SimpleNamespace(
        platform="gpu",
        memory_stats=lambda: {"bytes_limit": limit, "bytes_in_use": 200},
    )
    return FittedStep(make_step, device, LAYERS), compiled


@pytest.mark.parametrize(
    ("limit", "taken"),
    # Of it 97%: 388 (which fits nothing), 407, 577, 776, 805 and 1261 bytes.
    [
        (400, "full"), (420, "full"), (595, ("full", 6)),
        (800, ("full", 1)), (830, "minimal"), (1300, "none"),
    ],
)  # fmt: skip
def test_of_unrolled_layers_as_few_as_must_be_are_computed_again(limit, taken, caplog):
    step, compiled = make_unrolled(limit)
    with caplog.at_level(logging.INFO):
        found = step(None, np.zeros(10))[0]
    assert found == taken and found == compiled[-1][0]
    (line,) = caplog.messages[:1]
    if isinstance(taken, tuple):
        assert f"took 'full' of the first {taken[1]} layers: " in line
        least = NEEDS["full"] + 4 * (LAYERS - taken[1])
        assert 200 + 10 * least <= 0.97 * limit < 200 + 10 * (least + 4)
    assert "save_attention" not in str(compiled)


def test_what_a_straight_line_leaves_and_what_is_not_known():
    """The peak of four layers is elsewhere; a compiler that ran out told no number."""
    step, _ = make_unrolled(600, flat=4)
    remat, layers = step(None, np.zeros(10))[0]
    assert remat == "full" and layers <= 6
    step, compiled = make_unrolled(600, exhausts=("none", "minimal"))
    assert step(None, np.zeros(10))[0] == "full"
    # What must be more than is there is not taken; what needs least is.
    step, compiled = make_unrolled(600, exhausts=("none", ("full", 6)))
    assert step(None, np.zeros(10))[0] == "full"
    assert compiled[-1][0] == ("full", 6)


def test_a_larger_batch_of_unrolled_layers_is_compared_too():
    step, compiled = make_unrolled(600)
    step.lower(None, np.zeros(10)).compile()
    compiled.clear()
    program = step.lower(None, np.zeros(12)).compile()
    assert program(None, np.zeros(1))[0] == ("full", 8)
    assert [remat for remat, _ in compiled] == ["minimal", "full", ("full", 8)]


@pytest.mark.parametrize(
    ("limit", "exhausts", "taken"),
    [(640, (), "all"), (820, (), "some"), (820, ("some",), "all")],
)
def test_what_last_layers_keep_is_left_out_where_it_does_not_fit(
    limit, exhausts, taken, caplog
):
    """Fakes stand for both steps: ten tokens take 200 and 590 bytes, or 200 and 400."""
    needs, compiled = {"some": 59, "all": 40}, []
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit})
    steps = [FakeStep(name, compiled, exhausts, needs) for name in ("some", "all")]
    step = SparingStep(steps[0], lambda: steps[1], device)
    with caplog.at_level(logging.INFO):
        assert step(None, np.zeros(10)) == (taken, 10)
        assert step(None, np.zeros(10)) == (taken, 10)
    assert [name for name, _ in compiled] == ["some", "all"][: 1 + (taken == "all")]
    assert ("all layers compute again" in caplog.text) == (taken == "all")


def test_another_error_of_the_compiler_passes():
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)
    broken = types.SimpleNamespace(lower=lambda *_: types.SimpleNamespace(compile=fail))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        SparingStep(broken, lambda: broken, device)(None, np.zeros(3))


def fail():
    raise jax.errors.JaxRuntimeError("INTERNAL: lost")


@pytest.mark.parametrize("limit", [2**40, 1])
def test_a_run_that_leaves_layers_fits_its_device(limit, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(fitted_step, "memory_limit", lambda device: limit)
    config = tiny_config(
        "from_scratch", max_steps=2, save_steps=0, gradient_checkpointing=True
    )
    config.training.save_final_model, config.model.scan_layers = False, False
    with caplog.at_level(logging.INFO):
        train(config, tmp_path / str(limit))
    assert ("all layers compute again" in caplog.text) == (limit == 1)


def test_one_process_with_less_memory_decides_for_all(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    answers = iter([True, False])  # whether a policy does not fit the other
    monkeypatch.setattr(
        fitted_step.multihost_utils,
        "process_allgather",
        lambda mine: np.array([mine, next(answers)]),
    )
    assert make(1300)[0](None, np.zeros(10))[0] == "minimal"


def test_a_run_takes_a_policy_by_the_compilers_own_account(
    tmp_path, monkeypatch, caplog
):
    """With memory that nothing but `full` fits, and with enough for everything."""
    accounts = {}
    for limit in (2**40, 1):
        monkeypatch.setattr(fitted_step, "memory_limit", lambda device, n=limit: n)
        keys = {"gradient_checkpointing": True, "remat_policy": "auto"}
        config = tiny_config("from_scratch", max_steps=2, save_steps=0, **keys)
        config.training.save_final_model = False
        caplog.clear()
        with caplog.at_level(logging.INFO):
            train(config, tmp_path / str(limit))
        (line,) = [text for text in caplog.messages if "remat_policy = auto" in text]
        accounts[limit] = line
    assert "took 'none'" in accounts[2**40]
    assert "took 'full'" in accounts[1]
    # The same numbers, for recomputing changes none but their last bits.
    losses = [[r["loss"] for r in records(tmp_path / str(limit))] for limit in accounts]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_report_ahead_of_time_is_of_the_policy_that_a_run_takes():
    keys = {"gradient_checkpointing": True, "remat_policy": "auto"}
    config = tiny_config("from_scratch", per_device_train_batch_size=8, **keys)

    def report(memory_bytes):
        chip = Chip("fake", 1e12, memory_bytes, 1e12, 1e9, 1e9)
        return aot.compile_for(config, jax.devices()[:1], "cpu", chip=chip)

    most = report(2**40)
    assert most.run.precision.remat == "none"
    less = report(most.device_bytes - 1)
    assert less.run.precision.remat in REMATS[1:]
    assert less.device_bytes < most.device_bytes
    assert less.fits


def test_arrays_as_much_as_their_descriptions_choose():
    step, _ = make(1300)
    shape = jax.ShapeDtypeStruct((10,), jnp.float32)
    assert step.lower(None, shape).compile()(None, np.zeros(10))[0] == "none"


@pytest.mark.parametrize(
    ("memory", "layers"),
    [(330, 1), (300, 2), (260, 4), (200, 7), (180, -1), (100, -1)],
)
def test_the_report_of_unrolled_layers_is_of_as_few_as_must_be(
    monkeypatch, memory, layers
):
    """Of eight layers each takes 20 bytes beside 180."""

    def compile_run(run, devices, topology, chip):
        precision = run.precision
        again = {-1: 8}.get(precision.remat_layers, precision.remat_layers)
        kept = {"none": 30, "minimal": 20}.get(precision.remat)
        needed = 180 + (8 * kept if kept else 20 * (8 - again))
        room = chip.memory_bytes
        return types.SimpleNamespace(
            run=run, needed=needed, room=room, fits=needed <= room
        )

    monkeypatch.setattr(aot_compile, "_compile_run", compile_run)
    keys = {"gradient_checkpointing": True, "remat_policy": "auto"}
    config = tiny_config("from_scratch", **keys)
    config.model.scan_layers, config.model.architecture.num_hidden_layers = False, 8
    chip = Chip("fake", 1e12, memory, 1e12, 1e9, 1e9)
    report = aot.compile_for(config, jax.devices()[:1], "cpu", chip=chip)
    assert report.run.precision.remat == "full"
    assert report.run.precision.remat_layers == layers
    assert report.fits == (memory >= 180)
