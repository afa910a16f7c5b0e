"""Several evaluation sets by name: keys, metrics, what they decide, and commands."""

import json
import pathlib
import re
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from runs import records, tiny_config, train

from jaxtrain import assets, cli
from jaxtrain.config import ConfigError, default_config, eval_sets, load_config, resolve
from jaxtrain.config.flags import Flag, resolve_flags
from jaxtrain.record.console import ConsoleWriter
from jaxtrain.report.page import make_page, read_run

BASE = str(assets.asset_path(assets.MODEL))
SETS = {"helpful": "a.jsonl", "safe": "b.jsonl"}


def named(sets, **training):
    config = default_config()
    config.data.train = "train.jsonl"
    config.data.eval = sets
    config.training.training_type = "sft"
    for name, value in training.items():
        config.training[name] = value
    return config


def test_a_file_and_a_flag_name_the_same_sets(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data: {train: t.jsonl, eval: {helpful: a.jsonl, safe: b.jsonl}}\n"
        "training: {training_type: sft, metric_for_best_model: safe_loss}\n"
    )
    config = load_config(str(tmp_path / "run.yaml"))
    run = resolve(config)
    assert run.data.eval == run.data.eval_paths == SETS
    assert run.loop.best_metric == "eval_safe_loss" and not run.loop.greater_is_better
    flag = Flag("data.eval", "{safe: b.jsonl, other: c.jsonl}")
    _, flagged = resolve_flags(config, [flag])
    assert flagged.data.eval == {"safe": "b.jsonl", "other": "c.jsonl"}
    # As a checkpoint and config.json keep it.
    kept = json.loads(json.dumps(run.to_dict()))
    assert resolve(kept).data.eval == SETS


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ({}, "names no set"),
        ({"a/b": "x"}, "'a/b' is not a valid name"),
        ({"..": "x"}, "'..' is not a valid name"),
        ({"a.b": "x"}, "'a.b' is not a valid name"),
        ({"": "x"}, "'' is not a valid name"),
        ({1: "x"}, "not a string or a mapping of names to values"),
        ({"safe": "x", "Safe": "y"}, "told apart"),
        ({"safe": "x", "safe_aux": "y"}, "told apart"),
        ({"safe": ""}, "'safe' names no rows"),
        ({"safe": 3}, "'safe' names no rows"),
        ({"safe": ["a", "b"]}, "'safe' names no rows"),
    ],
)
def test_a_name_that_could_mislead_is_refused(sets, told):
    given = {"data": {"eval": sets}, "training": {"training_type": "sft"}}
    with pytest.raises(ConfigError, match=f"data.eval = .*{re.escape(told)}"):
        resolve(given)


def test_the_metric_to_rank_by_must_be_of_a_set():
    # Nothing depends on it: the first set's loss is shown as the best.
    assert resolve(named(SETS)).loop.best_metric == "eval_helpful_loss"
    for metric in ("eval_safe_loss", "safe_loss"):
        run = resolve(named(SETS, metric_for_best_model=metric))
        assert run.loop.best_metric == "eval_safe_loss"
    told = (
        r"metric_for_best_model = 'eval_loss'.*helpful, safe; set .*eval_helpful_loss"
    )
    with pytest.raises(ConfigError, match=told):
        resolve(named(SETS, early_stopping_patience=1))
    with pytest.raises(ConfigError, match="evaluation sets helpful, safe"):
        resolve(named(SETS, metric_for_best_model="rude_loss"))


def test_names_are_read_off_the_metrics():
    metrics = ["eval_a_loss", "eval_a_aux_loss", "eval_b_loss", "eval_b_nll/chosen"]
    assert eval_sets.names_in(metrics) == ["a", "b"]
    assert eval_sets.names_in(["eval_loss", "eval_aux_loss"]) == [""]
    assert eval_sets.plain_name("eval_a_aux_loss", ["a", "b"]) == "aux_loss"


def test_each_set_has_lines_of_its_own_on_the_console(capsys):
    writer = ConsoleWriter(20, show_bar=False)
    writer.write(5, {"eval_a_loss": 1.25, "eval_b_loss": 2.5, "eval_b_entropy": 3.0})
    lines = [re.sub(r"\|.*left ", "", x) for x in capsys.readouterr().out.splitlines()]
    assert lines == ["eval a  5/20 | loss 1.250", "eval b  5/20 | loss 2.500"]


def write_halves(folder, kind):
    """The embedded evaluation rows of a kind, in two files, by the names of sets."""
    import gzip

    with gzip.open(assets.asset_path(assets.DATA[kind][1]), "rt") as file:
        lines = file.readlines()[:10]
    paths = {"helpful": folder / "a.jsonl", "safe": folder / "b.jsonl"}
    paths["helpful"].write_text("".join(lines[:2]))
    paths["safe"].write_text("".join(lines[2:]))
    return {name: str(path) for name, path in paths.items()}


def evaluations(workdir):
    return [r for r in records(workdir) if any(n.startswith("eval_") for n in r)]


def test_sets_have_the_numbers_that_each_has_alone(tmp_path, capsys):
    """Pairs with a reference computed ahead; `jaxtrain eval` on each file is the judge.

    An evaluation at the start, `max_eval_rows`, the page and the last lines go along.
    """
    sets = write_halves(tmp_path, "preference")
    config = tiny_config(
        "dpo",
        BASE,
        max_steps=2,
        save_steps=2,
        eval_steps=2,
        eval_on_start=True,
        gradient_accumulation_steps=1,
        save_final_model=False,
        metric_for_best_model="safe_rewards/margins",
    )
    config.training.dpo.precompute_ref_log_probs = True
    config.data.eval, config.data.max_eval_rows = sets, 3
    workdir = tmp_path / "run"
    results = train(config, workdir)
    first, last = evaluations(workdir)
    assert (first["step"], last["step"]) == (0, 2)
    # At the start the policy is the reference, whose sums were taken by other programs.
    for name in sets:
        assert first[f"eval_{name}_rewards/margins"] == pytest.approx(0, abs=1e-4)
    margin = last["eval_safe_rewards/margins"]
    assert results["best_metric_name"] == "eval_safe_rewards/margins"
    assert results["best_metric"] == max(first["eval_safe_rewards/margins"], margin)

    def evaluate(*flags):
        output = tmp_path / "results.json"
        assert cli.main(["eval", str(workdir), f"--output={output}", *flags]) == 0
        return json.loads(output.read_text())

    whole = evaluate()
    assert whole["rows"] == {"helpful": 2, "safe": 3}
    for name, value in whole["metrics"].items():
        assert value == pytest.approx(last[name], rel=1e-6), name
    alone = evaluate(f"--data={sets['safe']}")
    assert alone["rows"] == 3
    for name, value in alone["metrics"].items():
        ours = last[f"eval_safe_{name.removeprefix('eval_')}"]
        assert ours == pytest.approx(value, rel=1e-6, abs=1e-7), name
    page = read_run(workdir)
    assert page["eval_sets"] == ["helpful", "safe"]
    assert page["summary"]["best_metric"] == "eval_safe_rewards/margins"
    assert '"eval_sets":["helpful","safe"]' in make_page([page])


def test_a_set_stops_early_and_its_texts_are_generated(tmp_path, caplog):
    """Sets that a program brings; at learning rate 0 nothing improves."""
    kinds = [{"prompt": "a b", "completion": " c"}, {"prompt": "d", "completion": " e"}]
    sets = {"easy": kinds[:1], "hard": kinds[1:]}
    settings = {
        "learning_rate": 0.0,
        "eval_steps": 1,
        "save_steps": 1,
        "generation__metrics": ("exact_match",),
        "generation__num_prompts": 1,
        "generation__max_new_tokens": 2,
        "gradient_accumulation_steps": 1,
        "save_final_model": False,
        "early_stopping_patience": 2,
    }
    good = tiny_config("sft", BASE, **settings, metric_for_best_model="hard_loss")
    rows = {"train_dataset": kinds * 4, "eval_dataset": sets}
    results = train(good, tmp_path, **rows)
    assert results["global_step"] == 3 and results["ending"] == "stopped early"
    assert {"eval_easy_exact_match", "eval_hard_generated_words"} <= set(results)
    (line, *_) = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert json.loads(line)["hard/sample_1/prompt"] == "d"
    # What the sets are called is known with the rows, before anything is trained.
    bad = tiny_config("sft", BASE, **settings, metric_for_best_model="loss")
    with pytest.raises(ValueError, match="evaluation sets easy, hard; set"):
        train(bad, tmp_path / "bad", **rows)
    bad.training.metric_for_best_model = "hard_mean_loss"
    with pytest.raises(ValueError, match=r"not an evaluation metric.*eval_hard_loss"):
        train(bad, tmp_path / "bad", **rows)
    bad.training.metric_for_best_model = "hard_loss"
    with pytest.raises(
        ValueError, match=r"not an evaluation metric.*these are: .*eval_los"
    ):
        train(bad, tmp_path / "bad", train_dataset=kinds, eval_dataset=kinds)
    with pytest.raises(ValueError, match="'a b' is not a valid name"):
        train(good, tmp_path / "bad", train_dataset=kinds, eval_dataset={"a b": kinds})
    assert not (tmp_path / "bad" / "metrics.jsonl").exists()


def test_a_set_that_is_not_there_is_named_before_anything_loads(tmp_path, capsys):
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    flags = [
        f"--data.train={rows}",
        f"--data.eval={{helpful: {rows}, safe: {tmp_path / 'none.jsonl'}}}",
        f"--workdir={tmp_path / 'run'}",
    ]
    assert cli.main(["train", "sft", *flags]) == 2
    told = capsys.readouterr().err
    assert "data.eval.safe = " in told and "no such file" in told
