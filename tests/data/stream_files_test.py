"""Every format of a stream, against `datasets`, and from any position onward."""

import gzip
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.data.rows.files import make_units
from jaxtrain.data.rows.formats import BadRow
from jaxtrain.data.rows.source import load_rows
from jaxtrain.data.stream.source import head, open_stream

ROWS = [
    {"prompt": f"p{i} ", "completion": f'say "{i}",\n\ttwice é' * (i % 3)}
    for i in range(23)
]
LINES = [f"line {i} é" for i in range(23)]
NAMES = (
    "a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.tsv", "a.parquet", "a.arrow",
    "a.json", "a.txt", "a.txt.gz", "feather.arrow", "saved", "splits", "folder",
    "a.array_record",
)  # fmt: skip


def write_json(path, rows=ROWS):
    text = "\n\n".join(json.dumps(row) for row in rows) + "\n"  # blank lines between
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All formats of the same rows."""
    folder = tmp_path_factory.mktemp("formats")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json"):
        write_json(folder / name)
    made = datasets.Dataset.from_list(ROWS)
    made.to_csv(folder / "a.csv")
    (folder / "a.csv.gz").write_bytes(gzip.compress((folder / "a.csv").read_bytes()))
    made.to_csv(folder / "a.tsv", sep="\t")
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=5)
    table = pa.Table.from_pylist(ROWS)
    for name, new in (("a", pa.ipc.new_stream), ("feather", pa.ipc.new_file)):
        with new(folder / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:3")
    for row in ROWS:
        writer.write(json.dumps(row).encode())
    writer.close()
    text = "\r\n".join([*LINES, "", " "])
    (folder / "a.txt").write_bytes(text.encode())
    (folder / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    datasets.DatasetDict({"train": made, "test": made.select(range(2))}).save_to_disk(
        folder / "saved", num_shards={"train": 2, "test": 1}
    )
    for name in ("splits/train", "splits/validation", "folder"):
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "0.jsonl", ROWS[:9] if name != "folder" else ROWS)
    write_json(folder / "folder" / "1.jsonl.gz", ROWS[9:])
    return folder


def streamed(path, **options):
    return list(head(open_stream(str(path), **options), 1000))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "feather.arrow"])
def test_a_stream_has_the_rows_that_datasets_reads(name, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    expected = load_rows(str(folder / name))
    assert streamed(folder / name) == list(expected)
    assert streamed(folder / name, max_rows=7) == list(expected)[:7]


def test_an_arrow_file_and_an_arrow_stream_are_told_apart(folder):
    assert streamed(folder / "feather.arrow") == ROWS


def test_the_split_is_found_as_for_data_in_memory(folder):
    assert streamed(folder / "splits", split="eval") == ROWS[:9]
    assert streamed(folder / "saved", split="test") == ROWS[:2]
    with pytest.raises(ValueError, match="no split 'other'"):
        open_stream(str(folder / "saved"), split="other")


@given(
    name=st.sampled_from([n for n in NAMES if "." in n]),
    count=st.integers(0, len(ROWS)),
)
def test_a_unit_goes_on_behind_any_row(folder, name, count):
    units = make_units(folder / name)
    everything = [(unit, item) for unit in units for item in unit.items()]
    assert len(everything) == len(ROWS)
    unit = everything[min(count, len(ROWS) - 1)][0]
    own = [item for of, item in everything if of is unit]
    for taken in range(len(own) + 1):
        start = own[taken - 1].end if taken else (0, 0)
        rest = list(unit.items(start))
        assert [i.end for i in rest] == [i.end for i in own[taken:]]
        assert [i.number for i in rest] == [i.number for i in own[taken:]]
        assert list(map(unit.parse, rest)) == list(map(unit.parse, own[taken:]))


def test_a_row_that_is_none_is_named_by_its_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\n\n{"text": \n[1]\n\xff\n{"text": "b"}'
    )
    rows = head(open_stream(str(path)), 10)
    assert rows.places == tuple(f"bad.jsonl line {n}" for n in (1, 3, 4, 5, 6))
    assert [row.get("text") for row in rows] == ["a", None, None, None, "b"]
    reasons = [getattr(row, "reason", "") for row in rows]
    assert [bool(reason) for reason in reasons] == [False, True, True, True, False]
    assert "is not JSON" in reasons[1]
    assert reasons[2] == "is not a JSON object"


def test_csv_cells_are_text_but_for_the_verdict(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\nNA,1,True\n,x,0\nx,y\na,b,maybe\n")
    (unit,) = make_units(path)
    items = list(unit.items())
    first, second, short, last = items
    assert unit.parse(first) == {"prompt": "NA", "completion": "1", "label": True}
    assert unit.parse(second) == {"prompt": "", "completion": "x", "label": False}
    with pytest.raises(BadRow, match="has 2 cells, the header has 3"):
        unit.parse(short)
    assert unit.parse(last)["label"] == "maybe"
    (tmp_path / "none.csv").write_text("")
    assert not list(make_units(tmp_path / "none.csv")[0].items())


def test_what_cannot_be_streamed_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*a.parquet.gz"):
        open_stream(str(tmp_path / "a.parquet.gz"))
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"cannot read .*a.parquet"):
        open_stream(str(tmp_path / "a.parquet"))
    (tmp_path / "a.xyz").write_text("")
    with pytest.raises(ValueError, match="no known suffix"):
        open_stream(str(tmp_path / "a.xyz"))
    with pytest.raises(ValueError, match="does not exist"):
        open_stream(str(tmp_path / "absent.jsonl"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text\n" * 9999)[:-20])
    with pytest.raises(ValueError, match=r"cannot read .*cut.txt.gz"):
        head(open_stream(str(tmp_path / "cut.txt.gz")), 10**6)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "a.txt").write_text("a")
    (mixed / "a.csv").write_text("text\na")
    with pytest.raises(ValueError, match="mixes formats"):
        open_stream(str(mixed))


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
@pytest.mark.parametrize("wrap", [lambda texts: texts, lambda texts: [[texts]]])
def test_offsets_that_lead_out_of_a_damaged_file_are_refused(new, wrap, tmp_path):
    # Arrow follows them: to a text of negative length, or to the process's end.
    table, path = pa.table({"text": wrap(["one", "two"])}), tmp_path / "a.arrow"
    with new(path, table.schema) as writer:
        writer.write_table(table)
    offsets = [np.array(ends, "<i4").tobytes() for ends in ([0, 3, 6], [0, 6, 3])]
    assert path.read_bytes().count(offsets[0]) == 1
    path.write_bytes(path.read_bytes().replace(*offsets))
    with pytest.raises(ValueError, match="column 'text' is damaged"):
        list(load_rows(str(path)))


def test_text_that_is_not_utf8_makes_one_row_of_columns_bad(tmp_path):
    path = tmp_path / "a.arrow"
    table = pa.table({"text": ["one", "two"]})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    path.write_bytes(path.read_bytes().replace(b"onetwo", b"\xffnetwo"))
    first, second = list(load_rows(str(path)))
    assert "cannot be read from its columns" in first.reason
    assert second == {"text": "two"}


def test_a_damaged_text_hides_no_offset_behind_it_in_a_nested_column(tmp_path):
    path = tmp_path / "a.arrow"
    table = pa.table({"row": [{"a": "xy", "b": "one"}, {"a": "z", "b": "two"}]})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    offsets = [np.array(ends, "<i4").tobytes() for ends in ([0, 3, 6], [0, 2**30, 6])]
    data = path.read_bytes().replace(b"xyz", b"\xffyz")
    path.write_bytes(data.replace(*offsets))
    with pytest.raises(ValueError, match="column 'row' is damaged"):
        list(load_rows(str(path)))
