"""The rates of a run are exact: the real loop on a device and a clock of the test.

The fake device computes one step after the other, each as long as the test says, and
the clock moves only where something takes time. What the log should say then follows
from the device's own record of starts and finishes.
"""

import dataclasses
import functools
import itertools
import pathlib
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain import assets, loop
from jaxtrain.batch import Batch
from jaxtrain.config import default_config, resolve
from jaxtrain.models.hf import load_config
from jaxtrain.record.goodput import Goodput
from jaxtrain.record.throughput import ThroughputMeter
from jaxtrain.run.bad_steps import BadSteps, PendingSteps
from jaxtrain.run.callbacks import Callbacks
from jaxtrain.run.preemption import Preempted
from jaxtrain.run.step_programs import StepPrograms
from jaxtrain.run.window import MetricWindow
from jaxtrain.types import TrainState, WeightedSum

CONFIG = load_config(assets.asset_path(assets.MODEL))

COMPILE_SECS, EVAL_SECS, SAVE_SECS = 50.0, 7.25, 3.5
FLOPS_PER_TOKEN, PEAK_FLOPS = 6e3, 1e6


class Clock:
    """Seconds that pass only where something takes them."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@dataclasses.dataclass
class Result:
    """A number that the device has computed at `ready`; waiting moves the clock."""

    value: float
    ready: float
    clock: Clock

    def block_until_ready(self):
        self.clock.now = max(self.clock.now, self.ready)
        return self

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.block_until_ready().value, dtype)

    def __float__(self):
        return float(self.block_until_ready().value)

    def copy_to_host_async(self):
        pass

    # As the future that `FinishTimes.watch` returns.
    def done(self):
        return self.clock.now >= self.ready

    def exception(self):
        return None

    def result(self):
        return self.block_until_ready().ready


class FinishTimes:
    """`jaxtrain.record.finish_times.FinishTimes`, of results that know."""

    def watch(self, result):
        return result

    def close(self):
        pass


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What a run does and how long it takes."""

    step_secs: tuple[float, ...]
    shapes: tuple[int, ...]  # the row length of each step's batch
    logging_steps: int = 2
    eval_steps: int = 0
    save_steps: int = 0
    fetch_secs: float = 0.0
    write_secs: float = 0.0
    nonfinite: frozenset[int] = frozenset()
    patience: int | None = None
    profiled: range = range(0)
    sync_steps: int = 0

    @property
    def num_steps(self):
        return len(self.step_secs)


class World:
    """The fake device, data, checkpoints and writer of one scenario."""

    def __init__(self, scenario, directory=pathlib.Path("/nowhere/checkpoints")):
        self.scenario, self.clock, self.directory = scenario, Clock(), directory
        self.free_at = 0.0  # when the device has done all it was given
        self.compiled: set[int | str] = set()
        # (start, finish, tokens, rows, whether it compiled), a step each.
        self.steps: list[tuple[float, float, int, int, bool]] = []
        self.pauses: list[tuple[float, float]] = []
        self.fetches: list[tuple[float, float]] = []
        self.records: list[tuple[int, float, dict[str, float]]] = []  # with the time
        self.saved: list[int] = []
        self.num_steps = scenario.num_steps
        self._next = 0

    # Data.
    def beside(self, name):
        return self.directory.with_name(name)

    def __iter__(self):
        return self

    def __next__(self):
        if self._next == self.num_steps:
            raise StopIteration
        index, self._next = self._next, self._next + 1
        start = self.clock.now
        self.clock.now += self.scenario.fetch_secs
        self.fetches.append((start, self.clock.now))
        length = self.scenario.shapes[index]
        rows = np.zeros((1, 2, length), np.int32)
        segment_ids = np.ones_like(rows)
        segment_ids[0, 1, index % length :] = 0  # padding: each step has its own count
        return Batch(rows, rows, segment_ids, rows, rows.astype(np.float32))

    def close(self):
        pass

    def get_state(self, step):
        return step

    def empty_batches(self):
        return []

    # The device.
    def compute(self, secs):
        start = max(self.clock.now, self.free_at)
        self.free_at = start + secs
        return start, self.free_at

    def sums(self, finish, **values):
        return {
            name: WeightedSum(
                Result(value, finish, self.clock), Result(1.0, finish, self.clock)
            )
            for name, value in values.items()
        }

    def train_step(self, state, batch):
        number, length = len(self.steps) + 1, batch.tokens.shape[-1]
        compiles = length not in self.compiled
        if compiles:
            self.compiled.add(length)
            self.clock.now += COMPILE_SECS
        start, finish = self.compute(self.scenario.step_secs[number - 1])
        tokens = int(np.count_nonzero(batch.segment_ids))
        rows = int(batch.segment_ids[0].any(-1).sum())
        self.steps.append((start, finish, tokens, rows, compiles))
        bad = number in self.scenario.nonfinite
        return state, self.sums(finish, loss=1.0, grad_norm=1.0, nonfinite=float(bad))

    def sync_reference(self, state):
        start = self.clock.now
        if "sync" not in self.compiled:
            self.compiled.add("sync")
            self.clock.now += COMPILE_SECS
        self.pauses.append((start, self.clock.now))
        return state

    def eval_step(self, state, batch):
        entered = self.clock.now
        _, finish = self.compute(EVAL_SECS)
        self.pauses.append((entered, finish))
        return self.sums(finish, loss=float(len(self.steps)))  # it only gets worse

    # Checkpoints.
    def latest_step(self):
        return self.saved[-1] if self.saved else None

    def save(self, step, *args, **kwargs):
        start = self.clock.now
        self.clock.now += SAVE_SECS
        self.pauses.append((start, self.clock.now))
        self.saved.append(step)

    def wait(self):
        pass

    def all_steps(self):
        return self.saved

    # The writer.
    def write(self, step, metrics):
        if "goodput_share" in metrics:
            self.records.append((step, self.clock.now, dict(metrics)))
            self.clock.now += self.scenario.write_secs


@functools.cache
def run_config():
    config = default_config()
    config.training.max_steps = 1
    return resolve(config)


def run_loop(world):
    scenario = world.scenario
    section = dataclasses.replace(
        run_config().loop,
        max_steps=scenario.num_steps,
        logging_steps=scenario.logging_steps,
        eval_steps=scenario.eval_steps,
        save_steps=scenario.save_steps,
        early_stopping_patience=scenario.patience,
        on_nonfinite="skip",
        step_timeout_secs=0.0,
    )
    profile = run_config().profile
    if scenario.profiled:
        first, last = scenario.profiled[0], scenario.profiled[-1]
        profile = dataclasses.replace(profile, start_step=first, stop_step=last)
    run = dataclasses.replace(run_config(), loop=section, profile=profile)
    if scenario.sync_steps:
        dpo = types.SimpleNamespace(ref_model_sync_steps=scenario.sync_steps)
        run = dataclasses.replace(run, dpo=dpo)
    eval_batch = Batch(*np.zeros((5, 1, 4)))
    parts = loop.Parts(
        run=run,
        model=types.SimpleNamespace(plan=None, config=CONFIG),
        state=TrainState(0, {}, {}, None, None),
        train_step=world.train_step,
        eval_step=world.eval_step,
        feed=types.SimpleNamespace(
            packs_batches=False,
            readers=1,
            place=lambda batch, leading_axes=0: batch,
            eval_batches=lambda data: iter([eval_batch]),
        ),
        train_batches=world,
        train_data=object(),
        eval_data={"": object()},
        steps_per_epoch=5,
        epochs_done=lambda step: step / 5,
        meter=ThroughputMeter(
            flops_per_token=FLOPS_PER_TOKEN,
            peak_flops_per_device=PEAK_FLOPS,
            clock=world.clock,
            finish_times=FinishTimes(),
        ),
        sync_reference=world.sync_reference if scenario.sync_steps else None,
        sampler=None,
        added_losses={},
    )
    progress = loop.Progress(
        loop.BestMetric(greater_is_better=False, patience=scenario.patience),
        goodput=Goodput(world.clock),
    )
    with mock.patch.object(loop, "make_programs", lambda step, _: StepPrograms(step)):
        running = loop.Loop(parts, progress, world, world)
    return running.run_to_end()


def overlap(one, other):
    return max(min(one[1], other[1]) - max(one[0], other[0]), 0.0)


def expected(world):
    """By step: its seconds without pauses, and those in which it waited for data."""
    times = {}
    for number in range(2, len(world.steps) + 1):
        previous, (start, finish, *_) = (
            world.steps[number - 2][1],
            world.steps[number - 1],
        )
        idle = (previous, start)
        paused = sum(overlap(idle, pause) for pause in world.pauses)
        waited = sum(overlap(idle, fetch) for fetch in world.fetches)
        times[number] = (finish - previous - paused, waited)
    return times


def check_records(world, until):
    """Compare every record with what the device did since the one before."""
    times, start_of_run = expected(world), 1000.0
    logged = [step for step, _, _ in world.records]
    due = range(1, until + 1)
    every = world.scenario.logging_steps
    assert logged == sorted({*(s for s in due if s % every == 0), until})
    productive = 0.0
    for previous, (step, now, record) in zip([0, *logged], world.records, strict=False):
        counted = [
            number
            for number in range(previous + 1, step + 1)
            if not world.steps[number - 1][4]  # compiled
            and number not in world.scenario.profiled
        ]
        secs = [times[number][0] for number in counted]
        productive += sum(secs)
        want = {"goodput_share": productive / (now - start_of_run)}
        if counted:
            tokens = sum(world.steps[number - 1][2] for number in counted)
            rows = sum(world.steps[number - 1][3] for number in counted)
            waited = sum(times[number][1] for number in counted)
            # Two rows a step, see `World.__next__`.
            slots = sum(2 * world.scenario.shapes[number - 1] for number in counted)
            want |= {
                "tokens_per_sec": tokens / sum(secs),
                "samples_per_sec": rows / sum(secs),
                "data_wait_share": waited / sum(secs),
                "useful_token_share": tokens / slots,
                "mfu": tokens / sum(secs) * FLOPS_PER_TOKEN / PEAK_FLOPS,
                "step_time_p50_secs": np.percentile(secs, 50),
                "step_time_p90_secs": np.percentile(secs, 90),
                "step_time_p99_secs": np.percentile(secs, 99),
            }
        endings = ("_per_sec", "_secs", "_share", "mfu")
        found = {name: v for name, v in record.items() if name.endswith(endings)}
        assert found == pytest.approx(want, rel=1e-9, abs=1e-9), step


@st.composite
def scenarios(draw):
    count = draw(st.integers(1, 14))
    secs = st.floats(0.125, 4.0, allow_subnormal=False)
    return Scenario(
        step_secs=tuple(draw(st.lists(secs, min_size=count, max_size=count))),
        shapes=tuple(
            draw(
                st.lists(st.sampled_from([4, 4, 4, 8]), min_size=count, max_size=count)
            )
        ),
        logging_steps=draw(st.integers(1, 6)),
        eval_steps=draw(st.integers(0, 5)),
        save_steps=draw(st.integers(0, 5)),
        fetch_secs=draw(st.sampled_from([0.0, 0.0, 0.5, 5.0])),
        write_secs=draw(st.sampled_from([0.0, 0.25])),
    )


@settings(max_examples=80, deadline=None)
@given(scenarios())
def test_every_record_is_exact(scenario):
    world = World(scenario)
    run_loop(world)
    check_records(world, until=scenario.num_steps)


@pytest.mark.parametrize("logging_steps", [1, 2, 5])
@pytest.mark.parametrize(("eval_steps", "save_steps"), [(3, 0), (3, 3), (0, 4), (2, 5)])
def test_evaluating_and_saving_change_no_rate(logging_steps, eval_steps, save_steps):
    """Steps of 2 s: each record says so, whatever else the run does."""
    world = World(
        Scenario((2.0,) * 13, (64,) * 13, logging_steps, eval_steps, save_steps)
    )
    run_loop(world)
    check_records(world, until=13)
    rated = [record for _, _, record in world.records if "mfu" in record]
    assert len(rated) == len(world.records) - (logging_steps == 1)  # the first compiled
    for record in rated:
        assert record["step_time_p99_secs"] == pytest.approx(2.0)
        assert record["samples_per_sec"] == pytest.approx(1.0, abs=0.3)
        assert record["data_wait_share"] == 0


def test_the_host_stays_two_steps_ahead_of_the_device():
    world, dispatched = World(Scenario((1.0,) * 9, (4,) * 9, logging_steps=9)), []
    train_step = world.train_step

    def note(state, batch):
        dispatched.append(world.clock.now)
        return train_step(state, batch)

    world.train_step = note
    run_loop(world)
    ahead = [
        sum(finish > now for _, finish, *_ in world.steps[:number])
        for number, now in enumerate(dispatched)
    ]
    # The first is waited for, because it compiles; then two are always on their way.
    assert ahead == [0, 0, 1, *[2] * 6]


def test_rows_cost_nothing_while_the_device_computes():
    """Rows that take 0.9 s beside steps of 1 s; then 3 s, of which 2 are waited for."""
    for fetch_secs, share in ((0.9, 0.0), (3.0, 2 / 3)):
        world = World(
            Scenario((1.0,) * 20, (4,) * 20, logging_steps=10, fetch_secs=fetch_secs)
        )
        run_loop(world)
        check_records(world, until=20)
        assert world.records[-1][2]["data_wait_share"] == pytest.approx(share, abs=0.09)


@pytest.mark.parametrize("logging_steps", [1, 3])
def test_logs_are_written_while_the_device_computes(logging_steps, monkeypatch):
    """Writers that take 0.9 s beside steps of 1 s keep no step waiting."""

    def mean(self):
        raise AssertionError("the host's numbers were sent to the device")

    monkeypatch.setattr(WeightedSum, "mean", mean)
    world = World(
        Scenario((1.0,) * 12, (4,) * 12, logging_steps=logging_steps, write_secs=0.9)
    )
    run_loop(world)
    check_records(world, until=12)
    begun = [start for start, *_ in world.steps[2:]]  # behind the one that compiled
    assert begun == [finish for _, finish, *_ in world.steps[1:-1]]


def test_a_batch_of_a_new_shape_compiles_and_counts_in_no_rate():
    shapes = (4, 4, 4, 8, 8, 4, 8, 16)
    world = World(Scenario((2.0,) * 8, shapes, logging_steps=4))
    run_loop(world)
    check_records(world, until=8)
    for _, _, record in world.records:
        assert record["step_time_p99_secs"] == pytest.approx(2.0)


def test_the_compilation_of_the_references_update_counts_in_no_rate():
    world = World(Scenario((2.0,) * 9, (4,) * 9, logging_steps=4, sync_steps=3))
    run_loop(world)
    check_records(world, until=9)
    for _, _, record in world.records:
        assert record["step_time_p99_secs"] == pytest.approx(2.0)


def test_steps_that_are_skipped_were_computed_and_count():
    world = World(
        Scenario((2.0,) * 8, (4,) * 8, logging_steps=2, nonfinite=frozenset({3, 4, 7}))
    )
    results = run_loop(world)
    check_records(world, until=8)
    skipped = [record.get("skipped_steps") for _, _, record in world.records]
    assert skipped == [None, 2, None, 1]
    assert ["loss" in record for _, _, record in world.records] == [1, 0, 1, 1]
    assert results["skipped_steps"] == 3


@pytest.fixture(autouse=True)
def no_bad_batches(monkeypatch):
    monkeypatch.setattr(BadSteps, "_save_batch", lambda *_: pathlib.Path("x.npz"))


def test_a_run_that_is_preempted_or_stops_early_ends_with_exact_rates(monkeypatch):
    class Watch(loop.PreemptionWatch):
        def requested(self, step):
            return step == 6

    world = World(Scenario((2.0,) * 13, (4,) * 13, 4, eval_steps=3, patience=2))
    assert run_loop(world)["ending"] == "stopped early"
    assert len(world.steps) == 9  # the best was at step 3
    check_records(world, until=9)
    monkeypatch.setattr(loop, "PreemptionWatch", Watch)
    world = World(Scenario((2.0,) * 13, (4,) * 13, logging_steps=4))
    with pytest.raises(Preempted):
        run_loop(world)
    assert world.saved == [6]
    check_records(world, until=4)  # the run that goes on logs steps 5 to 8


def test_profiled_steps_are_waited_for_and_count_in_no_rate(monkeypatch):
    world, busy = World(Scenario((2.0,) * 11, (4,) * 11, profiled=range(4, 8))), []

    def take_time(*args, **kwargs):
        busy.append((len(world.steps), world.free_at > world.clock.now))
        start = world.clock.now
        world.clock.now += 9.0
        world.pauses.append((start, world.clock.now))

    monkeypatch.setattr(jax.profiler, "start_trace", take_time)
    monkeypatch.setattr(jax.profiler, "stop_trace", take_time)
    run_loop(world)
    # It starts after step 3 and stops after step 7, with nothing in flight.
    assert busy == [(3, False), (7, False)]
    check_records(world, until=11)
    rated = [step for step, _, record in world.records if "mfu" in record]
    assert rated == [2, 4, 8, 10, 11]
    for _, _, record in world.records:
        assert record.get("step_time_p99_secs", 2.0) == pytest.approx(2.0)


def test_the_device_has_work_while_the_host_takes_a_record(monkeypatch):
    """The host takes 0.2 s for the metrics of a step, and records come every three."""
    world = World(Scenario((1.0,) * 12, (4,) * 12, logging_steps=3, write_secs=0.3))
    add = MetricWindow.add

    def add_slowly(self, sums):
        world.clock.now += 0.2
        add(self, sums)

    monkeypatch.setattr(MetricWindow, "add", add_slowly)
    run_loop(world)
    check_records(world, until=12)
    idle = [
        later[0] - before[1]
        for before, later in itertools.pairwise(world.steps[1:])  # the first compiles
    ]
    assert idle == [0.0] * 10
    # A record is there one step late; the last one waits for nothing.
    ends = {number + 1: step[1] for number, step in enumerate(world.steps)}
    for step, now, _ in world.records:
        assert ends[step] <= now < ends[step] + 1.0 + 0.6


def test_metrics_of_steps_that_are_done_are_on_the_host_before_a_record_is_due():
    pending = PendingSteps(ahead=1)
    steps = [{"nonfinite": WeightedSum(jnp.zeros(()), jnp.ones(()))} for _ in range(5)]
    for step in steps:
        pending.add(0, step, None)
    for number in jax.tree.leaves(steps[:3]):
        number.delete()  # with ahead = 1 the last two may be in flight
    assert len(pending.take()) == 5


def test_a_callback_that_may_stop_the_run_hears_of_each_record_at_once(monkeypatch):
    world, told = World(Scenario((1.0,) * 6, (4,) * 6, logging_steps=2)), []

    class Watching:
        def after_step(self, moment):
            told.append((moment.step, len(world.steps)))

    made = Callbacks({"mine": Watching()})
    monkeypatch.setattr(
        loop, "Progress", functools.partial(loop.Progress, callbacks=made)
    )
    run_loop(world)
    assert told == [(1, 2), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)]


def test_the_median_of_all_records_is_in_the_results():
    secs = tuple(itertools.chain([1.0] * 3, [2.0] * 3, [4.0] * 3))
    world = World(Scenario(secs, (4,) * 9, logging_steps=3))
    rates = run_loop(world)["median_tokens_per_sec"]
    found = [record["tokens_per_sec"] for _, _, record in world.records]
    assert rates == sorted(found)[1]
