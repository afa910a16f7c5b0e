"""Rows in memory equal streamed rows, and both what json, csv and pyarrow read."""

import csv
import datetime
import gzip
import io
import json
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.data.rows.formats import UnreadableRow
from jaxtrain.data.rows.source import load_rows
from jaxtrain.data.stream.source import head, open_stream

Rows = list[dict[str, Any]]

# What readers are tempted to take for something else.
ANY_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)
TEXTS = ANY_TEXT | st.sampled_from(
    ["001", "1", "1.0", "1e5", "2024-03-01", "2024-03-01T10:00:00", "True", "false",
     "NA", "null", "NaN", "", " ", "a\u2028b", "a\u2029b", "a\x85b", "a\x0bb", "a\tb",
     'say "x"', "a\nb", "a\r\nb", "\\ud83d", "😀", "é", "\ufeff", "[1]", "{}", "a,b"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS
    | st.sampled_from([2**63, -(2**70), 10**40])
    | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
    ),
    max_leaves=6,
)  # fmt: skip
ROW = st.dictionaries(st.sampled_from(["prompt", "n", "tools"]) | TEXTS, VALUES)


def both(name: str, content: bytes, *, zipped: bool = False) -> Rows:
    """The rows of a file, which must be the same in every way of reading it."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / (name + ".gz" * zipped)
        path.write_bytes(gzip.compress(content) if zipped else content)
        held = load_rows(str(path))
        streamed = head(open_stream(str(path)), None)
        rows = list(held)
        same(held[:], rows)
        backwards = [held[i] for i in reversed(range(len(held)))]  # a seek for each
        same(backwards[::-1], rows)
        same(streamed, rows)
        assert [held.place(i) for i in range(len(held))] == list(streamed.places)
        return rows


def same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    """Equal with types, the order of keys and NaN."""
    assert list(map(repr, found)) == list(map(repr, expected))


@settings(max_examples=80)
@given(
    st.lists(ROW, max_size=4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\n", " \t\n", "\r\n"]),
)
def test_json_lines(rows, is_ascii, mark, zipped, end, blank):
    texts = [json.dumps(row, ensure_ascii=is_ascii) for row in rows]
    content = "".join(text + end + blank for text in texts).encode()
    found = both("a.jsonl", b"\xef\xbb\xbf" * mark + content, zipped=zipped)
    same(found, [json.loads(text) for text in texts])


@settings(max_examples=40)
@given(
    st.lists(ROW, max_size=4), st.sampled_from([None, 1]), st.booleans(), st.booleans()
)
def test_one_json_array(rows, indent, mark, zipped):
    text = json.dumps(rows, ensure_ascii=False, indent=indent)
    content = b"\xef\xbb\xbf" * mark + text.encode()
    same(both("a.json", content, zipped=zipped), json.loads(text))


@settings(max_examples=60)
@given(st.data(), st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_csv(data, mark, zipped, end):
    names = data.draw(st.lists(TEXTS.filter(bool), min_size=1, max_size=3, unique=True))
    width = len(names)
    cells = st.lists(TEXTS, min_size=width, max_size=width)
    table = data.draw(st.lists(cells, max_size=4))
    delimiter = data.draw(st.sampled_from([",", "\t"]))
    file = io.StringIO(newline="")
    writer = csv.writer(
        file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL
    )
    writer.writerows([names, *table])
    content = b"\xef\xbb\xbf" * mark + file.getvalue().encode()
    name = "a.csv" if delimiter == "," else "a.tsv"
    found = both(name, content, zipped=zipped)
    again = io.StringIO(file.getvalue(), newline="")
    same(found, list(csv.DictReader(again, delimiter=delimiter)))
    assert [list(row.values()) for row in found] == table


@settings(max_examples=40)
@given(st.lists(TEXTS), st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_text(lines, mark, zipped, end):
    lines = [line.replace("\n", "").replace("\r", "") for line in lines]
    content = b"\xef\xbb\xbf" * mark + end.join(lines).encode()
    found = both("a.txt", content, zipped=zipped)
    if not mark and lines:
        lines[0] = lines[0].removeprefix("\ufeff")
    kept = [line for line in lines if line.strip(" \t\x0b\x0c")]
    same(found, [{"text": line} for line in kept])


COLUMNS = {
    "text": TEXTS,
    "day": st.dates(datetime.date(1970, 1, 1)),
    "yes": st.booleans(),
    "number": st.integers(-(2**63), 2**63 - 1),
    "part": st.floats(),
    "ids": st.lists(st.integers(0, 9), max_size=3),
    "turns": st.lists(
        st.fixed_dictionaries({"role": TEXTS}, optional={"x": TEXTS, "y": TEXTS}),
        max_size=3,
    ),
    "tool": st.fixed_dictionaries(
        {"name": TEXTS},
        optional={
            "arguments": st.fixed_dictionaries({"a": TEXTS}, optional={"b": TEXTS})
        },
    ),
}


@settings(max_examples=40)
@given(st.lists(st.fixed_dictionaries({}, optional=COLUMNS), min_size=1, max_size=5))
def test_columns_without_the_nulls_that_arrow_fills_in(rows):
    names = sorted({name for row in rows for name in row}) or ["text"]
    table = pa.Table.from_pylist(
        [{name: row.get(name) for name in names} for row in rows]
    )
    expected = [{name: row.get(name) for name in names} for row in rows]
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=2)
    for zipped in (False, True):
        same_columns(
            both("a.parquet", sink.getvalue().to_pybytes(), zipped=zipped), expected
        )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    same_columns(both("a.arrow", sink.getvalue().to_pybytes()), expected)


def same_columns(found: Rows, expected: Rows) -> None:
    """Arrow has its own order of keys in structs."""

    def sort(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: sort(value[key]) for key in sorted(value)}
        return [*map(sort, value)] if isinstance(value, list) else value

    same([*map(sort, found)], [*map(sort, expected)])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("a.jsonl", '{"text": "a"}\n'), ("a.csv", "text\na\n"), ("a.txt", "abcd\nefg\n"),
     ("a.json", '[{"text": "a"}]')],
)  # fmt: skip
def test_wide_encodings_are_refused_with_the_way_out(name, text, encoding, tmp_path):
    (tmp_path / name).write_bytes(text.encode(encoding))
    for read in (load_rows, open_stream):
        with pytest.raises(
            ValueError, match=rf"{name} line 1: .*UTF-(16|32).*iconv -f"
        ):
            read(str(tmp_path / name))


def reasons(name: str, content: bytes) -> dict[str, str]:
    """What is wrong with the lines of a file, alike in both readers."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / name
        path.write_bytes(content)
        held, streamed = load_rows(str(path)), head(open_stream(str(path)), None)
        found = {
            held.place(i): row.reason
            for i, row in enumerate(held)
            if isinstance(row, UnreadableRow)
        }
        bad = [row.reason for row in streamed if isinstance(row, UnreadableRow)]
        assert bad == list(found.values())
        return found


DEEP = b"[" * 200_000


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("a.jsonl", b'{"text": "caf\xe9"}', "is not UTF-8 (byte 0xe9)"),
        ("a.jsonl", b'{"text": "a \\ud83d"}', 'holds "\\ud83d", half of a surrogate'),
        ("a.jsonl", b'{"text": [{"\\udc00": 1}]}', 'holds "\\udc00"'),
        ("a.jsonl", b'{"text": "a"', "is not JSON"),
        ("a.jsonl", b'{"text": "a\0"}', "is not JSON"),
        ("a.jsonl", b"[1]", "is not a JSON object"),
        ("a.jsonl", b'{"text": %s' % DEEP, "nested too deeply"),
        ("a.jsonl", b'{"n": 1%s}' % (b"0" * 9999), "is not JSON (Exceeds the limit"),
        ("a.csv", b"a,b,c", "has 3 cells, the header has 2"),
        ("a.csv", b"a", "has 1 cells, the header has 2"),
        ("a.csv", b"a,caf\xe9", "is not UTF-8 (byte 0xe9)"),
        ("a.csv", b"a\rb,c", "carriage return outside of quotes"),
        ("a.txt", b"caf\xe9", "is not UTF-8 (byte 0xe9)"),
    ],
)  # fmt: skip
def test_one_bad_line_is_one_bad_row(name, line, reason):
    good = {"a.jsonl": b'{"text": "a"}', "a.csv": b'"x\ny",b', "a.txt": b"a"}[name]
    content = b"\n".join([good, b"", line, good, b""])
    at = 4 if name == "a.csv" else 3  # its first record has two lines
    found = reasons(name, content)
    assert list(found) == [f"{name} line {at}"] and reason in found[f"{name} line {at}"]


def test_a_row_over_several_lines_is_told_how_it_becomes_one():
    found = reasons("a.jsonl", json.dumps({"text": "a"}, indent=1).encode())
    assert found["a.jsonl line 1"].endswith("; a row is one line: jq -c . OLD > NEW")
    assert "jq" not in found["a.jsonl line 2"]


def test_a_quote_that_is_never_closed_is_told_where_it_opens():
    found = reasons("a.csv", b'text,n\na,1\n"b,2\nc,3\nd,4\n')
    assert found == {"a.csv line 3": "opens a quote that is never closed"}


def test_a_header_must_tell_columns_apart(tmp_path):
    path = tmp_path / "a.csv"
    for header, reason in ((b"a,a\n1,2\n", "two columns are called 'a'"),
                           (b"caf\xe9,b\n1,2\n", "is not UTF-8")):  # fmt: skip
        path.write_bytes(header)
        for read in (load_rows, lambda name: head(open_stream(name), 9)):
            with pytest.raises(ValueError, match=rf"a\.csv line 1: .*{reason}"):
                read(str(path))


def test_json_means_what_python_takes_it_for():
    """The last of equal keys counts, and numbers that are none in JSON are read."""
    line = b'{"a": 1, "a": 2, "b": NaN, "c": [Infinity, 99999999999999999999]}'
    same(both("a.jsonl", line), [json.loads(line)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n {"a": 2}', "line 2: .*the file's end stands where ','"),
        (b'[{"a": 1}\n\n{"a": 2}]', "line 3: .*'{' stands where ','"),
        (b'[{"a": 1},\n{"a": oops}]', "line 2: .*row 2: Expecting value"),
        (b'[{"a": 1},\n]', "line 2: .*row 2: Expecting value"),
        (b'[{"a": 1}]\n{"a": 2}', "line 2: .*there is something after its end"),
    ],
)
def test_a_broken_array_is_named_by_line(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    for read in (load_rows, lambda name: head(open_stream(name), 9)):
        with pytest.raises(ValueError, match=rf"a\.json {message}"):
            read(str(tmp_path / "a.json"))


def test_an_array_is_read_in_pieces():
    """Longer than what is read at once, so that elements are cut by its ends."""
    rows = [{"text": "é" * 300_000, "n": n} for n in range(9)]
    text = json.dumps(rows, ensure_ascii=False)
    same(both("a.json", text.encode()), rows)
    same(both("a.jsonl", text.encode()), rows)  # a .jsonl that holds one array
    same(both("a.jsonl", json.dumps(rows, indent=1).encode()), rows)
    for line in (b'[{"a": 1}]', b"[1]", b"[1, "):
        bad = reasons("a.jsonl", line + b'\n{"a": 2}\n')
        assert list(bad) == ["a.jsonl line 1"]


def test_bad_elements_of_an_array_are_bad_rows():
    found = reasons("a.json", b'[{"a": 1}, 7, {"a": "\\ud83d"}, {"a": "\xe9"}]')
    assert list(found) == ["a.json row 2", "a.json row 3", "a.json row 4"]
