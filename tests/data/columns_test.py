"""`data.column_map`: in every reader, and what it says where it does not fit."""

import json

import pytest

from jaxtrain import assets
from jaxtrain.cli.ending import run_command
from jaxtrain.config import ConfigError, default_config, resolve
from jaxtrain.config.flags import Flag, resolve_flags
from jaxtrain.data import inspect, loading, sources
from jaxtrain.data.rows.folders import first_rows
from jaxtrain.data.rows.formats import BadRow, detect_format, read_row
from jaxtrain.data.rows.jinja import read_template
from jaxtrain.data.rows.tokenize import load_tokenizer

ROWS = [{"Question Text": f"q{n}", "Answer": f" a{n}", "n": n} for n in range(4)]
MAP = {"prompt": "Question Text", "completion": "Answer"}
FLAG = "{prompt: Question Text, completion: Answer}"


@pytest.fixture
def files(tmp_path):
    """The same rows as jsonl and as csv."""
    jsonl, table = tmp_path / "a.jsonl", tmp_path / "a.csv"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    lines = [
        ",".join(map(str, row.values())) for row in [{k: k for k in ROWS[0]}, *ROWS]
    ]
    table.write_text("\n".join(lines))
    return jsonl, table


def make_run(train, column_map=FLAG, **data):
    config = default_config()
    config.data.train = str(train)
    config.data.cache = False
    config.data.update(data)
    if data.get("streaming"):
        config.training.max_steps = 2
    return resolve_flags(config, [Flag("data.column_map", column_map)])[1]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(assets.asset_path(assets.TOKENIZER)))


def texts(store, tokenizer):
    spans = zip(store.starts, store.lengths, strict=True)
    return [tokenizer.decode(store.tokens[s : s + n].tolist()) for s, n in spans]


EXPECTED = [f"q{n} a{n}<|im_end|>" for n in range(4)]


def test_a_map_is_given_by_a_flag_or_in_a_file():
    config = default_config()
    config.data.column_map = MAP
    assert resolve(config).data.column_map == MAP
    assert make_run("x.jsonl").data.column_map == MAP
    assert make_run("x.jsonl", json.dumps(MAP)).data.column_map == MAP
    with pytest.raises(ConfigError, match=r"data\.column_map"):
        make_run("x.jsonl", "prompt")


@pytest.mark.parametrize("number", [0, 1])
def test_rows_in_memory_of_training_and_evaluation_are_mapped(number, files, tokenizer):
    run = make_run(files[number], eval=str(files[1 - number]))
    sources.check_sources(run)
    for rows in (loading.load_training_rows(run), loading.load_evaluation_rows(run)):
        prepared = loading.prepare_rows(run, rows, tokenizer)
        assert texts(prepared.stores[""], tokenizer) == EXPECTED


def test_a_mixture_and_a_stream_are_mapped(files, tokenizer):
    run = make_run(f"{files[0]}:1,{files[1]}:1")
    mixed = loading.prepare_rows(run, loading.load_training_rows(run), tokenizer)
    assert texts(mixed.stores[""], tokenizer) == EXPECTED * 2
    run = make_run(files[0], streaming=True)
    stream = loading.prepare_rows(run, loading.load_training_rows(run), tokenizer)
    row_format = stream.recipes[0].row_format
    assert read_row(ROWS[2], row_format) == {"prompt": "q2", "completion": " a2"}
    other = loading.prepare_rows(
        make_run(
            files[0], "{prompt: Answer, completion: Question Text}", streaming=True
        ),
        loading.load_training_rows(run),
        tokenizer,
    )
    assert stream.fingerprint != other.fingerprint


def test_inspect_takes_a_map_beside_a_file(files, capsys):
    arguments = ["--no-color", str(files[1]), f"--data.column_map={FLAG}"]
    assert run_command(inspect.main, arguments) == 0
    out = capsys.readouterr().out
    assert "'Question Text' as prompt, 'Answer' as completion" in out
    assert "q0⟦ a0<|im_end|>⟧" in out


def test_unknown_columns_are_refused_with_a_map_that_helps():
    with pytest.raises(
        ValueError,
        match=r"'Answer', 'Question Text'.*data\.column_map = "
        r"\{prompt: 'Question Text', completion: 'Answer'\}",
    ):
        detect_format(ROWS)


@pytest.mark.parametrize(
    ("column_map", "message"),
    [
        ("{prompt: Question, completion: Answer}",
         r"no column 'Question', only \['Answer', 'Question Text', 'n'\]; did you mean"
         r" 'Question Text'"),
        ("{promt: Question Text, completion: Answer}", "did you mean 'prompt'"),
        ("{prompt: Question Text, completion: 3}", "completion is 3; give the name"),
        ("{prompt: Question Text}", "does not make one of them"),
    ],
)  # fmt: skip
def test_a_map_that_does_not_fit_is_refused_before_the_run(column_map, message, files):
    for streaming in (False, True):
        run = make_run(files[0], column_map, streaming=streaming)
        with pytest.raises(ValueError, match=message):
            sources.check_sources(run)


def read(row, **column_map):
    row_format = detect_format([row], column_map=tuple(sorted(column_map.items())))
    return read_row(row, row_format)


def test_columns_that_are_named_win_over_others():
    row = {"prompt": "a", "completion": "b", "body": "c", "talk": []}
    assert read(row, text="body") == {"text": "c"}
    assert read(row, prompt="completion", completion="prompt") == {
        "prompt": "b", "completion": "a",
    }  # fmt: skip
    row["talk"] = [{"role": "user", "content": "x"}]
    assert read(row, messages="talk")["messages"] == row["talk"]
    pair = {"q": "a", "good": "b", "bad": "c"}
    assert read(pair, prompt="q", chosen="good", rejected="bad") == {
        "prompt": "a", "chosen": "b", "rejected": "c",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "proposed"),
    [
        (["original_question", "query", "response"], "query, completion: 'response'"),
        (["label", "prompt", "response_a"], "prompt, completion: 'response_a'"),
        (["conversation", "source"], "..., completion: ..."),
        (["context", "instruction", "response"], "output: response, input: context"),
    ],
)
def test_a_proposed_map_takes_the_columns_that_mean_the_text(columns, proposed):
    with pytest.raises(ValueError, match="column_map") as caught:
        detect_format([dict.fromkeys(columns, "a")])
    told = str(caught.value).partition("such as ")[2]
    assert proposed.replace("'", "") in told.replace("'", "")


@pytest.mark.parametrize("column", ["question", "input", "instruction"])
def test_a_prompt_in_a_column_that_is_not_read_is_refused(column):
    """Otherwise pairs without their questions are trained, as TRL trains them."""
    row = {"system": "s", column: "Why?", "chosen": "It is so.", "rejected": "It is."}
    with pytest.raises(ValueError, match=f"prompt: {column}"):
        detect_format([row])
    mapped = detect_format([row], column_map=(("prompt", column),))
    assert not mapped.implicit_prompt and "prompt" in mapped.columns
    for more in ({column: ""}, {column: None}, {"chosen": "Why? It is so."}):
        assert detect_format([row | more]).implicit_prompt


@pytest.mark.parametrize("column", ["image", "images"])
def test_rows_with_images_are_refused_and_empty_columns_are_not(column):
    row = {"prompt": "What is this?", "completion": " A cat."}
    with pytest.raises(ValueError, match=f"column '{column}' holds .*only text"):
        detect_format([row, row | {column: ["a.png"]}])
    for empty in (None, [], ""):
        assert detect_format([row | {column: empty}]).kind == "prompt_completion"


def test_pythons_text_of_a_conversation_is_refused_with_the_reason():
    """As pandas writes it to a csv file; JSON is read."""
    cell = str([{"role": "user", "content": "a"}])
    with pytest.raises(BadRow, match="its JSON, not Python's text of it"):
        read_row({"messages": cell}, detect_format([{"messages": cell}]))


def test_rows_below_a_name_are_refused_with_it():
    with pytest.raises(ValueError, match="the list in 'data', write that list alone"):
        detect_format([{"version": "1", "data": [{"messages": []}]}])


def test_a_pattern_for_a_path_is_told_to_be_none(tmp_path):
    with pytest.raises(ValueError, match="a path is no pattern: name the folder"):
        first_rows(tmp_path / "*.jsonl", "train")


@pytest.mark.parametrize("template", ["chatml", "chatml.txt", "owner/model"])
def test_a_chat_template_that_is_constant_is_refused(template):
    with pytest.raises(ValueError, match=r"neither \{\{ nor \{%"):
        read_template(template)
