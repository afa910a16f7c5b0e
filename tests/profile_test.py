"""`training.profile`: the trace has these steps and no other; the rest is refused."""

import json
import logging
import pathlib
import sys

import jax
import pytest

from jaxtrain.config import ConfigError, resolve
from jaxtrain.run.profile import StepProfiler

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import tiny_config, train


def annotated_steps(path):
    """The numbers of the step markers in a trace, as the profiler's reader has them."""
    data = jax.profiler.ProfileData.from_file(str(path))
    return sorted(
        dict(event.stats)["step_num"]
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    )


def run(workdir, **training):
    config = tiny_config(
        "from_scratch",
        gradient_accumulation_steps=1,
        save_final_model=False,
        **training,
    )
    return train(config, workdir)


def traces(workdir):
    folder = workdir / "profile" / "plugins" / "profile"
    return sorted(folder.glob("*/*.xplane.pb"))


def test_the_trace_has_exactly_these_steps(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = {"max_steps": 6, "save_steps": 2, "logging_steps": 2}
    window = {"profile__start_step": 3, "profile__stop_step": 4}
    with caplog.at_level(logging.INFO):
        run(tmp_path / "out", **whole, **window)
    (trace,) = traces(tmp_path / "out")
    assert trace.parent.name == "steps_3_to_4"
    assert annotated_steps(trace) == [3, 4]
    (line,) = [m for m in caplog.messages if "profiled" in m]
    assert line.startswith("steps 3 to 4 are profiled: xprof --port 8791 out/profile ")
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rated = ["tokens_per_sec" in json.loads(line) for line in lines]
    assert rated == [True, False, True]  # of the traced steps there is no rate

    # A run that goes on after these steps traces nothing and says so.
    trace.unlink()
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(tmp_path / "out", **whole | {"max_steps": 7}, **window)
    assert not traces(tmp_path / "out")
    (line,) = [m for m in caplog.messages if "training.profile" in m]
    assert "steps 3 to 4 were done before this start" in line


def test_a_run_that_ends_within_the_steps_still_writes_its_trace(tmp_path):
    run(tmp_path, max_steps=4, save_steps=0, profile__start_step=3)
    (trace,) = traces(tmp_path)
    assert annotated_steps(trace) == [3, 4]


def test_other_processes_trace_nothing(tmp_path):
    settings = resolve(
        {"training": {"profile": {"start_step": 1, "processes": [1]}}}
    ).profile
    profiler = StepProfiler(settings, tmp_path, None, done=0)
    with profiler.step(1) as is_traced:
        assert not is_traced
    profiler.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        ({"start_step": 5, "stop_step": 4}, "stop_step = 4: it lies before"),
        ({"start_step": 11}, "start_step = 11: the run's last step is 10"),
        ({"start_step": 9, "stop_step": 11}, "stop_step = 11: the run's last step"),
        ({"stop_step": 4}, "stop_step = 4: nothing is traced without a first step"),
        ({"processes": [1]}, "processes = (1,): nothing is traced without"),
        ({"start_step": 2, "processes": []}, "processes = (): no process would trace"),
        ({"start_step": 0}, "start_step = 0"),
        ({"start_step": 2, "processes": [-1]}, "processes"),
    ],
)
def test_what_cannot_be_is_refused(profile, problem):
    config = {"training": {"max_steps": 10, "profile": profile}}
    with pytest.raises(ConfigError) as refused:
        resolve(config)
    (found,) = refused.value.problems
    assert f"training.profile.{problem}" in found


@pytest.mark.parametrize(
    ("profile", "problem"),
    [
        ({"start_step": 9}, "start_step = 9: the run's last step is "),
        ({"start_step": 2, "processes": (0, 1)}, "1 process"),
    ],
)
def test_what_only_the_run_can_tell_is_refused_before_training(
    tmp_path, profile, problem
):
    keys = {f"profile__{name}": value for name, value in profile.items()}
    with pytest.raises(ValueError, match=problem):
        run(tmp_path, max_steps=-1, num_train_epochs=0.1, **keys)
    assert not (tmp_path / "metrics.jsonl").exists()
