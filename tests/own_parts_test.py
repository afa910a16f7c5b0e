"""Parts of the user's own: schedule, optimizer, rows, callbacks; weights by pattern."""

import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from jaxtrain import assets
from jaxtrain.config import ConfigError, resolve
from jaxtrain.models import load
from jaxtrain.optimizers.configured import make_optimizer
from jaxtrain.optimizers.multipliers import make_multipliers, without_frozen
from jaxtrain.run.step_log import StepLog
from jaxtrain.trainer import TrainingOrchestrator

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import act_at_log, interrupt, records, tiny_config, train, weights

MY_PARTS = """
import jax.numpy as jnp
import optax


def triangle(learning_rate, total_steps, warmup_steps, *, peak=0.5):
    def schedule(step):
        share = step / total_steps
        return learning_rate * jnp.minimum(share / peak, (1 - share) / (1 - peak))
    return schedule


def branches(learning_rate, total_steps, warmup_steps):
    return lambda step: learning_rate if step < 3 else 0.0


def nesterov(schedule, weight_decay, *, momentum=0.9):
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.sgd(schedule, momentum, nesterov=True),
    )


def no_optimizer(schedule, weight_decay):
    return schedule


def question_and_answer(row, *, mark="Q: "):
    return {"prompt": mark + row["q"], "completion": row["a"]}


def surprise(rows, *, above=0.0):
    assert all(row.text.endswith(row.trained) for row in rows)
    assert all(len(row.tokens) == len(row.logps) for row in rows)
    nll = sum(-row.logps.sum() for row in rows) / sum(len(row.logps) for row in rows)
    return {"mine_loss": nll, "mine_rows": len(rows)}


def wrong(rows):
    return {"loss": -4.0}


def also_mine(rows):
    return {"mine_rows": 1.0}


class Careless:
    def __init__(self, log=None):
        self.log = log

    def after_evaluation(self, moment):
        if self.log:
            moment.log(*self.log)

    def get_state(self):
        return {"seen": {1, 2}}

    def set_state(self, state):
        pass


class Recorder:
    '''Logs twice the loss, and stops at a step.'''

    def __init__(self, stop_at=0, save_at=0):
        self.stop_at, self.seen = stop_at, []

    def after_step(self, moment):
        self.seen.append(moment.step)
        moment.log("twice_the_loss", 2 * moment.metrics["loss"])
        if moment.step == self.stop_at:
            moment.stop("this is far enough")

    def after_evaluation(self, moment):
        moment.log("eval_steps_seen", len(self.seen))

    def on_save(self, moment):
        moment.log("saves", 1)

    def get_state(self):
        return {"seen": self.seen}

    def set_state(self, state):
        self.seen = state["seen"]


class Tracker:
    calls = []

    def __init__(self, folder, run_name, resume_step):
        self.calls.append(("made", folder.name, run_name, resume_step))

    def write(self, step, metrics):
        self.calls.append(("write", step, "loss" in metrics))

    def write_text(self, step, texts):
        pass

    def write_config(self, config):
        self.calls.append(("config", config["training"]["max_steps"]))

    def close(self):
        self.calls.append(("close",))


class Hugging:
    def on_step_end(self, moment):
        pass


class Nothing:
    pass


class HalfState:
    def after_step(self, moment):
        pass

    def get_state(self):
        return {}
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "my_parts.py").write_text(MY_PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)


def config_of(training_type: str = "sft", **training: Any) -> Any:
    config = tiny_config(training_type, **{"save_steps": 0, **training})
    config.training.save_final_model = False
    return config


def refused(match: str, **training: Any) -> None:
    """Both that the key is refused, and that no model is loaded before."""
    config = config_of(**training)
    config.model.name_or_path = "/no/such/model"
    with pytest.raises(ValueError, match=match):
        TrainingOrchestrator(config).prepare()


# --- schedule, optimizer, rows -------------------------------------------------------


def test_an_own_schedule_and_optimizer_train_as_optax_does() -> None:
    config = config_of(
        lr_scheduler_type="my_parts:triangle",
        optimizer="my_parts:nesterov",
        learning_rate=0.5,
        weight_decay=0.1,
        function_kwargs={
            "my_parts:triangle": {"peak": 0.25},
            "my_parts:nesterov": {"momentum": 0.8},
        },
    )
    schedule, optimizer = make_optimizer(resolve(config), 8)
    rates = [float(schedule(step)) for step in range(8)]
    expected = [0.5 * min(s / 8 / 0.25, (1 - s / 8) / 0.75) for s in range(8)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    # Nesterov's momentum, written out.
    w, v = np.float32([1.0, -2.0]), np.zeros(2, np.float32)
    params = {"w": jnp.array(w)}
    state = optimizer.init(params)
    for step in range(4):
        g = np.float32([0.3, 0.1 * step])
        updates, state = optimizer.update({"w": jnp.array(g)}, state, params)
        params = optax.apply_updates(params, updates)
        g = g + 0.1 * w
        v = g + 0.8 * v
        w = w - expected[step] * (g + 0.8 * v)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"lr_scheduler_type": "my_parts:triangel"}, "did you mean 'triangle'"),
        ({"lr_scheduler_type": "my_parts:branches"}, "jax.numpy.where and not with if"),
        ({"lr_scheduler_type": "my_parts:question_and_answer"}, "is called with"),
        ({"optimizer": "my_parts:no_optimizer"}, "returned function; return an optax"),
        ({"optimizer": "no_such_module:f"}, "training.optimizer = .*PYTHONPATH"),
        ({"optimizer": "adamv"}, "did you mean 'adamw'"),
        ({"callbacks": ("my_parts:Hugging",)}, "no run calls on_step_end; did you"),
        (
            {"callbacks": ("my_parts:Nothing",)},
            "none of the methods that a run calls; add one of after_step",
        ),
        ({"callbacks": ("my_parts:HalfState",)}, "add the other"),
        ({"report_to": ("jsonl", "my_parts:Nothing")}, "is called with"),
        ({"report_to": ("my_parts:Recorder",)}, "is called with|it has no write"),
        ({"report_to": ("tensorbord",)}, "report_to = "),
        ({"callbacks": ("Recorder",)}, "each item module:function"),
        (
            {"function_kwargs": {"my_parts:Recorder": {"stop_at": 1}}},
            "no key names 'my_parts:Recorder'",
        ),
        (
            {
                "callbacks": ("my_parts:Recorder",),
                "function_kwargs": {"my_parts:Recorder": {"stop": 1}},
            },
            "unexpected keyword argument 'stop'",
        ),
    ],
)
def test_a_part_that_cannot_work_is_refused_before_a_model_loads(
    keys: dict[str, Any], match: str
) -> None:
    refused(match, **keys)


def test_rows_are_formatted_by_an_own_function(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"q": f"What is {n}?", "a": f" It is {n}."} for n in range(8)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = config_of(max_steps=1)
    config.data.train = str(path)
    config.data.format_row = "my_parts:question_and_answer"
    config.training.function_kwargs = {"my_parts:question_and_answer": {"mark": "? "}}
    trainer = TrainingOrchestrator(config, workdir=tmp_path / "run")
    trainer.prepare()
    data, _ = trainer.prepare_data()
    text = trainer.model.tokenizer.decode(next(iter(data.stores.values())).tokens[:40])
    assert text.startswith("? What is 0? It is 0.")
    config.data.streaming = True
    with pytest.raises(ConfigError, match=r"data\.format_row = .*rows of a stream"):
        resolve(config)


def test_a_row_that_the_function_does_not_take_is_named(tmp_path: pathlib.Path) -> None:
    config = config_of(max_steps=1)
    config.data.format_row = "my_parts:question_and_answer"
    trainer = TrainingOrchestrator(config, workdir=tmp_path)
    trainer.prepare()
    with pytest.raises(ValueError, match="row 1: KeyError: 'a'"):
        trainer.prepare_rows([{"q": "1", "a": "2"}, {"q": "3"}])


# --- callbacks ----------------------------------------------------------------------


def test_a_callback_logs_and_stops_and_a_stopped_run_stays_over(
    tmp_path: pathlib.Path,
) -> None:
    keys = {
        "callbacks": ("my_parts:Recorder",),
        "function_kwargs": {"my_parts:Recorder": {"stop_at": 5}},
        "eval_steps": 2,
        "save_steps": 3,
    }
    results = train(config_of(**keys), tmp_path)
    assert (results["ending"], results["global_step"]) == ("stopped early", 5)
    found = records(tmp_path)
    steps = [r for r in found if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    for record in steps:
        assert record["twice_the_loss"] == pytest.approx(2 * record["loss"], rel=1e-6)
    evaluated = {r["step"]: r["eval_steps_seen"] for r in found if "eval_loss" in r}
    assert evaluated == {2: 2, 4: 4, 5: 5}
    assert [r["step"] for r in steps if "saves" in r] == [4]  # the record after it
    again = train(config_of(**keys), tmp_path)
    assert (again["ending"], again["global_step"]) == ("stopped early", 5)
    # With other arguments it goes on, and the callback remembers what it saw.
    keys["function_kwargs"] = {"my_parts:Recorder": {"stop_at": 7}}
    assert train(config_of(**keys), tmp_path)["global_step"] == 7
    last = [r for r in records(tmp_path) if "eval_loss" in r][-1]
    assert last["eval_steps_seen"] == 7


def test_an_own_metric_gets_texts_and_log_probs(tmp_path: pathlib.Path) -> None:
    keys = {
        "eval_steps": 1,
        "max_steps": 1,
        "row_metrics": ("my_parts:surprise",),
        "metric_for_best_model": "mine_loss",
    }
    config = config_of(**keys)
    config.data.max_length = 192  # drops none of the 12 rows
    results = train(config, tmp_path)
    assert results["eval_mine_loss"] == pytest.approx(results["eval_loss"], rel=1e-5)
    assert results["eval_mine_rows"] == 12
    assert results["best_metric"] == results["eval_mine_loss"]
    with pytest.raises(ConfigError, match=r"row_metrics = .*rows of dpo are pairs"):
        resolve(config_of("dpo", **keys))
    with pytest.raises(ConfigError, match=r"row_metrics = .*never evaluates"):
        resolve(config_of(**keys | {"eval_steps": 0}))


@pytest.mark.parametrize(
    ("metrics", "name"),
    [(("wrong",), "'loss'"), (("surprise", "also_mine"), "'mine_rows'")],
)
def test_an_own_metric_does_not_take_the_place_of_another(
    metrics: tuple[str, ...], name: str, tmp_path: pathlib.Path
) -> None:
    """The best model would be chosen by it."""
    keys = {"row_metrics": tuple(f"my_parts:{metric}" for metric in metrics)}
    config = config_of(**keys, eval_steps=1, max_steps=1)
    config.data.max_length = 192
    with pytest.raises(ValueError, match=f"gave {name}, which is a metric already"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (("x", "abc"), r"after_evaluation: log\('x', 'abc'\): not a number"),
        (("eval_loss", 1.0), "after_evaluation: 'eval_loss' is a metric of the run"),
        (None, "what get_state returned has no JSON form .*set"),
    ],
)
def test_what_a_callback_does_wrong_names_it(
    log: tuple[str, Any] | None, said: str, tmp_path: pathlib.Path
) -> None:
    keys = {"function_kwargs": {"my_parts:Careless": {"log": log}}} if log else {}
    keys |= {"eval_steps": 1, "save_steps": 1}
    config = config_of(callbacks=("my_parts:Careless",), **keys)
    with pytest.raises(ValueError, match=f"callbacks = 'my_parts:Careless'.*{said}"):
        train(config, tmp_path)


MLFLOW = """
import json

calls, metrics, artifacts = [], {}, {}


class Run:
    def __init__(self, run_id):
        self.info = type("Info", (), {"run_id": run_id or "abc"})


def start_run(run_id=None, run_name=None):
    calls.append(("start_run", run_id, run_name))
    return Run(run_id)


def log_metrics(values, step):
    assert all(type(value) in (int, float) for value in values.values()), values
    assert not any("@" in name for name in values), values
    for name, value in values.items():
        metrics.setdefault(name, {})[step] = value


def log_text(text, path):
    assert type(text) is str
    artifacts[path] = text


def log_dict(values, path):
    artifacts[path] = json.dumps(values)


def end_run():
    calls.append(("end_run",))
"""


def test_own_trackers_get_what_is_recorded_and_one_for_mlflow_goes_on_in_its_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one for MLflow is that of the docs, on a stand-in of what it calls."""
    page = pathlib.Path(__file__).resolve().parent.parent / "docs" / "extending.md"
    blocks = page.read_text().split("```python\n")[1:]
    (example,) = (b.partition("```")[0] for b in blocks if "import mlflow" in b)
    (tmp_path / "my_tracker.py").write_text(example)
    (tmp_path / "mlflow.py").write_text(MLFLOW)
    for name in ("my_tracker", "mlflow"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    keys = {
        "max_steps": 2,
        "save_steps": 1,
        "eval_steps": 1,
        "report_to": ("jsonl", "my_parts:Tracker", "my_tracker:MLflow"),
        "run_name": "mine",
        "generation__metrics": ("exact_match",),
        "generation__num_prompts": 1,
        "generation__max_new_tokens": 2,
    }
    train(config_of(**keys), tmp_path / "run")
    train(config_of(**keys | {"max_steps": 3}), tmp_path / "run")

    calls = sys.modules["my_parts"].Tracker.calls
    assert calls[:2] == [("made", "run", "mine", None), ("config", 2)]
    end = calls.index(("close",))
    steps = [call for call in calls[:end] if call[-1] is True]
    assert steps == [("write", 1, True), ("write", 2, True)]
    assert calls[end + 1] == ("made", "run", "mine", 2) and calls[-1] == ("close",)

    mlflow, ended = sys.modules["mlflow"], ("end_run",)
    first, second = ("start_run", None, "mine"), ("start_run", "abc", "mine")
    assert mlflow.calls == [first, ended, second, ended]
    for name in ("loss", "eval_loss"):
        logged = {r["step"]: r[name] for r in records(tmp_path / "run") if name in r}
        assert mlflow.metrics[name] == logged and list(logged) == [1, 2, 3]
    assert json.loads(mlflow.artifacts["config.json"])["training"]["max_steps"] == 3
    assert any(path.startswith("samples/3/") for path in mlflow.artifacts)


# --- learning rates by pattern --------------------------------------------------------

PARAMS = {
    "embed_tokens": {"embedding": jnp.ones((8, 4))},
    "layers": {"mlp": {"kernel": jnp.ones((3, 4, 4))}, "norm": jnp.ones((3, 4))},
    "norm": {"scale": jnp.ones(4)},
}


def test_the_first_pattern_counts_and_layers_have_their_own_numbers() -> None:
    whole = "layers/[0-1]/.*|layers/2"  # of a whole name, so of none in layer 2
    patterns = [("embed.*", 0.1), (whole, 0), (".*norm.*", 3), (".*", 1)]
    found = make_multipliers(patterns, PARAMS)
    assert found["embed_tokens"]["embedding"] == np.float32(0.1)
    np.testing.assert_array_equal(found["layers"]["mlp"]["kernel"].ravel(), [0, 0, 1])
    np.testing.assert_array_equal(found["layers"]["norm"].ravel(), [0, 0, 3])
    assert found["norm"]["scale"] == 3


@pytest.mark.parametrize(
    ("patterns", "match"),
    [
        (
            [("embed.*", 1), ("layers/0/.*", 1)],
            "no pattern matches layers/1/mlp/kernel",
        ),
        ([("embd.*", 0.1), (".*", 1)], "'embd.*' matches no parameter; names are such"),
        ([("layers/3/.*", 0), (".*", 1)], "'layers/3/.*' matches no parameter"),
        ([("norm/.*|embed.*", 1)], "layers/2/norm; end the list"),  # all six are named
        ([("norm/.*", 1)], "layers/1/norm and 1 more; end the list"),
    ],
)
def test_patterns_must_cover_every_parameter_and_match_one(
    patterns: Any, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        make_multipliers(patterns, PARAMS)


def test_no_gradient_reaches_a_frozen_layer() -> None:
    patterns = [("layers/1/.*|embed.*", 0), (".*", 1)]

    def score(params: Any, batch: Any) -> Any:
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(params))

    found = jax.grad(without_frozen(score, patterns))(PARAMS, None)
    assert not found["embed_tokens"]["embedding"].any()
    for leaf in (found["layers"]["mlp"]["kernel"], found["layers"]["norm"]):
        assert (leaf[1] == 0).all() and (leaf[::2] == 2).all()
    assert (found["norm"]["scale"] == 2).all()


@pytest.mark.parametrize(
    ("training_type", "patterns", "match"),
    [
        ("sft", [["embd.*", 0.1], [".*", 1]], "'embd.*' matches no parameter"),
        ("from_scratch", [["layers/[01]/.*", 1]], "no pattern matches embed_tokens/"),
        # Beside adapters nothing else trains, so that is all there is to match.
        ("lora", [[".*lora_a", 1]], "no pattern matches layers/0/.*lora_b"),
        ("lora", [["embed.*", 1], [".*", 1]], r"'embed\.\*' matches no parameter"),
    ],
)
def test_patterns_are_checked_before_the_weights_are_loaded(
    training_type: str, patterns: Any, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "load_model", lambda _: pytest.fail("it was loaded"))
    trainer = TrainingOrchestrator(config_of(training_type, lr_multipliers=patterns))
    with pytest.raises(ValueError, match=rf"training\.lr_multipliers: .*{match}"):
        trainer.prepare()


@pytest.mark.parametrize(
    ("patterns", "match"),
    [
        ((("a(", 1.0),), "not a regular expression"),
        ((("a", -1.0),), "negative"),
        (((".*", 0.0),), "nothing would train"),
        (((".*",),), "no pair"),
        (((0.1, "a"),), "no pair"),
    ],
)
def test_patterns_that_are_none_are_refused(patterns: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=rf"lr_multipliers = .*{match}"):
        resolve(config_of(lr_multipliers=patterns))


def test_frozen_weights_stay_to_the_bit_and_leave_the_gradient_norm(
    tmp_path: pathlib.Path,
) -> None:
    keys = {"max_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.0}
    model = assets.asset_path(assets.MODEL) / "model.safetensors"
    start = safetensors.numpy.load_file(model)
    patterns = [["embed.*", 0], ["layers/[0-1]/.*", 0], ["norm.*", 0], [".*", 1]]
    results = train_and_save(config_of(**keys, lr_multipliers=patterns), tmp_path / "a")
    after = weights(tmp_path / "a")
    changed = {name for name in start if not np.array_equal(start[name], after[name])}
    assert changed == {n for n in start if ".layers.2." in n or ".layers.3." in n}
    plain = train_and_save(config_of(**keys), tmp_path / "b")
    assert 0 < results["grad_norm"] < plain["grad_norm"]


def test_multipliers_scale_what_adamw_does(tmp_path: pathlib.Path) -> None:
    """AdamW's first step is the rate times a sign and a decay, so linear in it."""
    keys = {"max_steps": 1, "warmup_steps": 0, "weight_decay": 0.1}
    start = weights_of(config_of(**keys), tmp_path / "start")
    train_and_save(config_of(**keys), tmp_path / "plain")
    patterns = [["embed.*", 0.25], ["layers/1/.*", 2], [".*", 1]]
    train_and_save(config_of(**keys, lr_multipliers=patterns), tmp_path / "scaled")
    plain, scaled = weights(tmp_path / "plain"), weights(tmp_path / "scaled")
    for name, first in start.items():
        factor = 0.25 if "embed" in name else 2 if ".layers.1." in name else 1
        np.testing.assert_allclose(
            scaled[name] - first, factor * (plain[name] - first), rtol=2e-2, atol=3e-7
        )


def test_adapters_are_frozen_by_their_names(tmp_path: pathlib.Path) -> None:
    patterns = [[".*lora_a", 0], [".*", 1]]
    config = config_of("lora", max_steps=2, lr_multipliers=patterns)
    config.training.lora.lora_dropout = 0.0
    config.training.save_final_model = True
    train(config, tmp_path)
    found = safetensors.numpy.load_file(
        tmp_path / "adapter" / "adapter_model.safetensors"
    )
    assert all(np.any(x) for name, x in found.items() if "lora_B" in name)


def test_a_stopped_run_with_own_parts_and_multipliers_resumes_to_the_bit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate differs in each step, and momentum remembers the steps before."""
    keys = {
        "lr_scheduler_type": "my_parts:triangle",
        "optimizer": "my_parts:nesterov",
        "lr_multipliers": [["embed.*", 0.1], ["layers/1/.*", 0], [".*", 1]],
        "learning_rate": 0.1,
        "weight_decay": 0.1,
        "save_steps": 3,
    }
    train_and_save(config_of("from_scratch", **keys), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(StepLog, "ask", act_at_log(5, interrupt))
        with pytest.raises(KeyboardInterrupt):
            train_and_save(config_of("from_scratch", **keys), tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts/checkpoints").iterdir()] == ["3"]
    train_and_save(config_of("from_scratch", **keys), tmp_path / "parts")
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    found, expected = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)


def train_and_save(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    config.training.save_final_model = True
    return train(config, workdir)


def weights_of(config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """The tensors of the model as it is before training."""
    config.training.learning_rate = 0.0
    config.training.weight_decay = 0.0
    train_and_save(config, workdir)
    return weights(workdir)


# --- the moving average -------------------------------------------------------------


def test_the_average_is_numpys_of_the_weights_after_each_step() -> None:
    run = resolve(config_of(ema_decay=0.75, learning_rate=0.1))
    _, optimizer = make_optimizer(run, 10)
    params = {"w": jnp.array([1.0, 2.0, -3.0])}
    state = optimizer.init(params)
    expected = np.float64(params["w"])
    rng = np.random.default_rng(0)
    for _ in range(5):
        grads = {"w": jnp.array(rng.normal(size=3), jnp.float32)}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        expected = 0.75 * expected + 0.25 * np.float64(params["w"])
    np.testing.assert_allclose(state.average["w"], expected, rtol=1e-6)
    assert not np.allclose(state.average["w"], params["w"])


def test_a_run_exports_and_evaluates_its_average_and_resumes_to_the_bit(
    tmp_path: pathlib.Path,
) -> None:
    keys = {"ema_decay": 0.5, "eval_steps": 2, "save_steps": 2, "max_steps": 4}
    keys["lr_scheduler_type"] = "constant"  # whatever max_steps is
    whole = train_and_save(config_of(**keys), tmp_path / "whole")
    raw = train_and_save(config_of(**keys | {"ema_decay": None}), tmp_path / "raw")
    # Nothing of training changes, and what is measured and saved is another model.
    for one, other in zip(
        records(tmp_path / "whole"), records(tmp_path / "raw"), strict=True
    ):
        assert one.get("loss") == other.get("loss")
    assert whole["eval_loss"] != raw["eval_loss"]
    assert not np.array_equal(*(
        weights(tmp_path / name)["model.norm.weight"] for name in ("whole", "raw")
    ))  # fmt: skip
    # Two starts in place of one: the weights are the same.
    train_and_save(config_of(**keys | {"max_steps": 2}), tmp_path / "parts")
    train_and_save(config_of(**keys), tmp_path / "parts")
    parts, once = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(np.array_equal(parts[name], once[name]) for name in once)
    # A command that loads the checkpoint measures the average too.
    from jaxtrain.cli import main as jaxtrain

    assert (
        jaxtrain(["export", str(tmp_path / "whole"), f"--output={tmp_path / 'out'}"])
        == 0
    )
    exported = tmp_path / "out" / "model.safetensors"
    for name, tensor in safetensors.numpy.load_file(exported).items():
        np.testing.assert_array_equal(tensor, once[name])


@pytest.mark.parametrize(
    ("training_type", "keys", "match"),
    [
        ("lora", {"ema_decay": 0.9}, "averages of A and of B"),
        ("sft", {"ema_decay": 0.9, "cpu_offload": True}, "evaluations would bring"),
        ("sft", {"lr_multipliers": [[".*", 1]], "cpu_offload": True}, "a layer at a"),
        ("sft", {"ema_decay": 1.0}, "not a number in"),
    ],
)
def test_what_cannot_be_averaged_is_refused_with_the_reason(
    training_type: str, keys: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        resolve(config_of(training_type, **keys))
