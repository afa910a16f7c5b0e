"""The harness's adapter, live against the harness's own `hf` model of the same weights.

Eight CPU devices hold our rows; theirs are on one.
"""

import json
import pathlib
import shutil
from typing import Any

import pytest

from jaxtrain import assets

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from jaxtrain import lm_eval as adapter
from jaxtrain.cli.ending import run_command
from jaxtrain.lm_eval.__main__ import main

LIMIT = 28  # tokens, so that the longer texts below are cut
VERSE = "And God said, Let there be light: and there was light."
PAIRS = [
    ("", "In the beginning"),
    ("In the beginning God created", " the heaven and the earth."),
    ("In the beginning God created ", "the heaven and the earth."),
    ("In the beginning God created  \n", "the heaven"),
    ("And God saw the light, that it was", " good"),
    ("<|im_start|>And God", " called"),
    (VERSE * 6, " And the evening"),
    ("And it came to", " pass"),
    ("Æ ☃", " naïve…"),
]
PROMPTS = [
    ("And God said, Let there be", {"until": ["\n", ","], "max_gen_toks": 12}),
    ("In the beginning", {"until": ["the month", "."], "max_gen_toks": 12}),
    (VERSE * 6 + " And", {"until": ["\n", ","], "max_gen_toks": 12}),
]
CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN = """
task: tiny_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{path}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n", ","], max_gen_toks: 12}}
metric_list: [{{metric: exact_match, ignore_case: true}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of two tasks and their six documents."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = folder / "documents.jsonl"
    starts = ["And God said,", "And it came to", "The LORD is my", "Now the sons of"]
    rows = [
        {"question": start, "choices": [" pass", " the light", " Let"], "label": i % 3}
        for i, start in enumerate([*starts, "And the evening and the ", "Behold"])
    ]
    documents.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE.format(path=documents))
    (folder / "written.yaml").write_text(WRITTEN.format(path=documents))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model, its tokenizer made to begin each text with `<|im_start|>`."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(assets.asset_path(assets.MODEL), folder, dirs_exist_ok=True)
    rules = json.loads((folder / "tokenizer.json").read_text())
    first, text = ({"id": name, "type_id": 0} for name in ("<|im_start|>", "A"))
    rules["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": first}, {"Sequence": text}],
        "pair": [{"SpecialToken": first}, {"Sequence": text}],
        "special_tokens": {
            "<|im_start|>": {
                "id": "<|im_start|>",
                "ids": [1],
                "tokens": ["<|im_start|>"],
            }
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["bos_token"] = "<|im_start|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.fixture(scope="module")
def ours(model) -> adapter.JaxtrainLM:
    return adapter.JaxtrainLM(model, max_length=LIMIT, batch_size=3, dtype="float32")


@pytest.fixture(scope="module")
def theirs(model) -> Any:
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=model, max_length=LIMIT, batch_size=3, device="cpu", dtype="float32"
    )


def ask(lm: Any, kind: str, arguments: list[tuple]) -> list[Any]:
    requests = [
        Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]
    return getattr(lm, kind)(requests)


@pytest.mark.torch
def test_likelihoods_are_those_of_the_harnesss_own_model(ours, theirs):
    """Empty contexts, spaces at the boundary, a cut context; float32 sums to 1e-4."""
    assert ours.model.plan.batch_shards == ours.batch_size == 8
    found, expected = (ask(lm, "loglikelihood", PAIRS) for lm in (ours, theirs))
    for pair, (logp, greedy), (their_logp, their_greedy) in zip(
        PAIRS, found, expected, strict=True
    ):
        assert logp == pytest.approx(their_logp, abs=1e-4), pair
        assert greedy == their_greedy, pair
    assert {greedy for _, greedy in found} == {False, True}
    texts = [(VERSE,), (VERSE * 6,), ("Amen",)]
    found, expected = (ask(lm, "loglikelihood_rolling", texts) for lm in (ours, theirs))
    assert found == pytest.approx(expected, abs=3e-4)  # sums of up to 90 tokens


@pytest.mark.torch
def test_greedy_texts_are_those_of_the_harnesss_own_model(ours, theirs):
    found = ask(ours, "generate_until", PROMPTS)
    # Theirs is asked one by one: in a batch the shorter prompts' padding counts as
    # context length, and cuts the longest.
    expected = [ask(theirs, "generate_until", [prompt])[0] for prompt in PROMPTS]
    assert found == expected
    assert all(found)


@pytest.mark.torch
def test_tasks_of_ones_own_give_the_same_results(ours, theirs, tasks):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["tiny_choice", "tiny_written"]
    found, expected = (
        simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)
        for lm in (ours, theirs)
    )
    assert found["results"] == expected["results"]
    for name in names:
        for sample, other in zip(
            found["samples"][name], expected["samples"][name], strict=True
        ):
            assert sample["arguments"] == other["arguments"]
            if name == "tiny_written":
                assert sample["filtered_resps"] == other["filtered_resps"]
    # Not all right and not all wrong, or the comparison would say little.
    assert 0 < found["results"]["tiny_choice"]["acc,none"] < 1


def test_the_command_prints_and_writes_the_results(tasks, tmp_path, capsys):
    output = tmp_path / "sub" / "results.json"
    code = run_command(
        main,
        [
            *("--tasks=tiny_choice", f"--include_path={tasks}"),
            *(f"--output={output}", "--limit=2"),
        ],
    )
    assert code == 0
    assert "tiny_choice" in capsys.readouterr().out
    results = json.loads(output.read_text())["results"]["tiny_choice"]
    assert results["sample_len"] == 2


def test_what_the_command_cannot_do_ends_with_code_2(
    tasks, tmp_path, capsys, monkeypatch
):
    # Without the harness's own thousands of tasks, which take seconds to list.
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda **options: TaskManager(**options | {"include_defaults": False}),
    )
    where = f"--include_path={tasks}"
    assert run_command(main, [where, "--tasks=no_such_task"]) == 2
    assert "no_such_task" in capsys.readouterr().err
    assert run_command(main, [where, f"--model={tmp_path}", "--tasks=tiny_choice"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"max_gen_toks": LIMIT}, "no room"),
    ],
)
def test_generation_settings_that_do_nothing_here_are_refused(ours, settings, message):
    with pytest.raises(ValueError, match=message):
        ask(ours, "generate_until", [("And", settings)])


def test_the_name_jaxtrain_is_known_to_the_harness():
    from lm_eval.api.registry import get_model

    assert get_model("jaxtrain") is adapter.JaxtrainLM
