"""Small inputs after the causes of public bug reports, each with its right value.

The files are those of ../shared/cases/data; the same contents stand here too, so that
every case runs without that folder.
"""

import json
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.rows.source import load_rows
from jaxtrain.data.stream.batches import StreamRows, prepare_stream
from jaxtrain.data.stream.source import head, open_stream

TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "part one"},
                                 {"type": "text", "text": " two"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "an answer"}]},
]  # fmt: skip
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tool_row(question: str, name: str, arguments: Any, kind: str) -> dict[str, Any]:
    call = {"name": name, "arguments": arguments}
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key in arguments},
        "required": list(arguments),
    }
    schema = {"name": name, "description": "d", "parameters": parameters}
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": None,
             "tool_calls": [{"type": "function", "id": "c1", "function": call}]},
            {"role": "tool", "name": name, "tool_call_id": "c1", "content": "3"},
            {"role": "assistant", "content": "3"},
        ],
        "tools": [{"type": "function", "function": schema}],
    }  # fmt: skip


TOOLS = [
    tool_row("weather?", "get_weather", {"city": "Oslo"}, "string"),
    tool_row("sum?", "add", {"x": 1, "y": 2}, "integer"),
]


def lines(rows: list[Any], encoding: str = "utf-8") -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode(encoding)


def pairs(*values: str) -> list[dict[str, str]]:
    return [{"prompt": f"q{i}", "completion": v} for i, v in enumerate(values)]


def table(rows: list[dict[str, str]]) -> bytes:
    records = [f"{row['prompt']},{row['completion']}\n" for row in rows]
    return "".join(["prompt,completion\n", *records]).encode()


FILES = {
    "set[1]/ok.jsonl": lines(pairs(" right")),
    "set1/ok.jsonl": lines(pairs(" leak")),
    "a*.jsonl": lines(pairs(" right")),
    "abc.jsonl": lines(pairs(" leak")),
    "parts.jsonl": lines([{"messages": TURNS}] * 2),
    "tools.jsonl": lines(TOOLS),
    "latin1.csv": "prompt,completion\ncafé is,naïve\nb,no\n".encode("latin-1"),
    "latin1.jsonl": lines([*pairs(" café"), *pairs(" no")], "latin-1"),
    "dates.jsonl": lines(pairs("2024-03-01", "2024-03-02")),
    "numbers.csv": table(pairs("001", "002")),
    "booleans.csv": table(pairs("True", "False")),
    "surrogate.jsonl": b'{"prompt":"smile \\ud83d","completion":" ok"}\n'
    + lines(pairs(" 1", " 2")),
}


@pytest.fixture(scope="module", params=["embedded", "shared"])
def cases(request, tmp_path_factory) -> pathlib.Path:
    """The folder of the files."""
    if request.param == "shared":
        folder = request.getfixturevalue("shared_directory") / "cases" / "data"
        if not folder.is_dir():
            pytest.skip(f"{folder} is absent")
        return folder
    folder = tmp_path_factory.mktemp("cases")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    pq.write_table(pa.Table.from_pylist(TOOLS), folder / "tools.parquet")
    return folder


def both(path: pathlib.Path, **options: Any) -> list[dict[str, Any]]:
    """A file's rows, in memory and streamed."""
    held = list(load_rows(str(path), **options))
    assert list(head(open_stream(str(path), **options), None)) == held
    return held


def plain(path: pathlib.Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def decoded(rows: Any, tokenizer: Any, **options: Any) -> list[str]:
    """The texts that are trained on."""
    prepared = prepare(rows, tokenizer, PrepareOptions("next_token", 999, **options))
    store = prepared.stores[""]
    ends = zip(store.starts, store.starts + store.lengths, strict=True)
    return [tokenizer.decode(store.tokens[a:b].tolist()) for a, b in ends]


@pytest.mark.parametrize("name", ["set[1]/ok.jsonl", "a*.jsonl", "set[1]"])
def test_a_path_is_never_a_pattern(name, cases):
    file = cases / name / "ok.jsonl" if name == "set[1]" else cases / name
    for split in ("train", "eval"):
        assert both(cases / name, split=split) == plain(file)
    assert [row["completion"] for row in both(cases / name)] == [" right"]


def test_saved_data_sets_are_no_patterns_either(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("run[1]", "run1", "a*"):
        made = datasets.Dataset.from_list([{"text": name}])
        made.save_to_disk(str(tmp_path / name))
    for name in ("run[1]", "a*"):
        assert both(tmp_path / name) == [{"text": name}]


def test_text_parts_are_what_the_template_wants(cases, small, tmp_path, monkeypatch):
    monkeypatch.setattr(small, "chat_template", CHATML)
    (text, *_) = decoded(load_rows(str(cases / "parts.jsonl")), small)
    assert text == (
        "<|im_start|>user\npart one two<|im_end|>\n"
        "<|im_start|>assistant\nan answer<|im_end|>\n"
    )


def test_nulls_that_arrow_fills_in_are_no_arguments(cases, small):
    in_json = both(cases / "tools.jsonl")
    texts = decoded(load_rows(str(cases / "tools.parquet")), small)
    assert texts == decoded(in_json, small)
    assert not any("null" in text for text in texts)
    datasets = pytest.importorskip("datasets")
    table = pq.read_table(cases / "tools.parquet")  # as rows of the hub come
    assert decoded(datasets.Dataset(table), small) == texts
    (first, _) = both(cases / "tools.parquet")
    (call,) = first["messages"][1]["tool_calls"]
    assert call["function"]["arguments"] == {"city": "Oslo"}


@pytest.mark.parametrize(
    ("name", "line"),
    [("latin1.csv", 2), ("latin1.jsonl", 1), ("surrogate.jsonl", 1)],
)
def test_one_line_that_is_no_text_is_named_and_can_be_skipped(name, line, cases, small):
    rows = load_rows(str(cases / name))
    place = rf"1 of {len(rows)} rows cannot be used: {name} line {line}: "
    with pytest.raises(ValueError, match=place):
        decoded(rows, small)
    skipped = decoded(rows, small, on_bad_row="skip")
    assert len(skipped) == len(rows) - 1
    assert "\ufffd" not in "".join(skipped)
    options = PrepareOptions("next_token", 64)
    prepare_stream(StreamRows((open_stream(str(cases / name)),)), small, options)


@pytest.mark.parametrize("name", ["dates.jsonl", "numbers.csv", "booleans.csv"])
def test_what_looks_like_a_date_or_a_number_is_text(name, cases):
    rows = both(cases / name)
    written = (cases / name).read_text()
    assert rows and all(type(row["completion"]) is str for row in rows)
    for row in rows:
        assert row["completion"] in written
    expected = {"dates.jsonl": "2024-03-01", "numbers.csv": "001"}
    assert rows[0]["completion"] == expected.get(name, "True")


def test_shared_files_are_the_embedded_ones(shared_directory):
    """Each case of the folder that is about data has its equal here."""
    folder = shared_directory / "cases" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    found = {
        str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()
    }
    assert found <= {*FILES, "tools.parquet", "chatml.jinja"}
