"""ArrayRecord files: JSON and tf.train.Example records, shards, damage."""

import json
import struct
import sys

import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from jaxtrain.config import resolve
from jaxtrain.data.rows.array_records import parse_example
from jaxtrain.data.rows.files import make_units
from jaxtrain.data.rows.formats import BadRow
from jaxtrain.data.rows.source import load_rows
from jaxtrain.data.sources import check_sources
from jaxtrain.data.stream.source import Share, head, open_stream


def write(path, records, group_size=1):
    writer = ArrayRecordWriter(str(path), f"group_size:{group_size}")
    for record in records:
        writer.write(record)
    writer.close()


def _make_example_class():
    """tf.train.Example by the protobuf library, from what its .proto file says."""
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="example.proto", package="t", syntax="proto3"
    )

    def field(message, name, number, kind, repeated=False, of=None, oneof=None):
        label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
        made = message.field.add(name=name, number=number, type=kind, label=label)
        if of is not None:
            made.type_name = f".t.{of}"
        if oneof is not None:
            made.oneof_index = oneof

    for name, kind in (
        ("BytesList", types.TYPE_BYTES),
        ("FloatList", types.TYPE_FLOAT),
        ("Int64List", types.TYPE_INT64),
    ):
        field(file.message_type.add(name=name), "value", 1, kind, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    names = ("bytes_list", "float_list", "int64_list")
    lists = ("BytesList", "FloatList", "Int64List")
    for number, (name, of) in enumerate(zip(names, lists, strict=True), 1):
        field(feature, name, number, types.TYPE_MESSAGE, of=of, oneof=0)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    field(entry, "key", 1, types.TYPE_STRING)
    field(entry, "value", 2, types.TYPE_MESSAGE, of="Feature")
    kind = types.TYPE_MESSAGE
    field(features, "feature", 1, kind, repeated=True, of="Features.FeatureEntry")
    example = file.message_type.add(name="Example")
    field(example, "features", 1, kind, of="Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = _make_example_class()


def example(**columns):
    """Bytes of an Example; each column is a list of texts, floats or integers."""
    made = Example()
    for name, values in columns.items():
        feature = made.features.feature[name]
        if isinstance(values[0], str):
            feature.bytes_list.value.extend(value.encode() for value in values)
        elif isinstance(values[0], float):
            feature.float_list.value.extend(values)
        else:
            feature.int64_list.value.extend(values)
    return made.SerializeToString()


_VALUES = st.one_of(
    st.lists(st.text(max_size=200), min_size=1, max_size=3),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4),
)


@given(st.dictionaries(st.text(min_size=1, max_size=9), _VALUES, min_size=1))
def test_an_example_is_what_the_protobuf_library_wrote(columns):
    columns.pop("label", None)
    if columns:
        expected = {k: v[0] if len(v) == 1 else v for k, v in columns.items()}
        assert parse_example(example(**columns)) == expected


def test_numbers_that_are_not_packed_and_columns_that_are_lists():
    """As proto2 writers put them: one field a value."""
    integers = b"\x08\x05\x08" + b"\xff" * 9 + b"\x01"
    floats = b"\x0d" + struct.pack("<f", 1.5)

    def field(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    def entry(name, number, content):
        return field(1, field(1, name) + field(2, field(number, content)))

    record = field(1, entry(b"a", 3, integers) + entry(b"b", 2, floats))
    assert Example.FromString(record).features.feature["a"].int64_list.value == [5, -1]
    assert parse_example(record) == {"a": [5, -1], "b": 1.5}
    row = parse_example(example(input_ids=[7], labels=[7], label=[0], text=["x"]))
    assert row == {"input_ids": [7], "labels": [7], "label": False, "text": "x"}


@given(st.binary(max_size=60))
def test_other_bytes_are_no_example_and_no_error(data):
    try:
        row = parse_example(data)
    except BadRow:
        return
    assert row is None or Example.FromString(data).features.feature.keys() >= row.keys()


def test_records_of_both_kinds_are_rows_and_others_are_bad_ones(tmp_path):
    path = tmp_path / "rows.array_record"
    records = [
        b'{"text": "a"}',
        example(text=["b"]),
        b'\n {"text": "c"}',
        b"\x81\xa4text\xa1d",  # msgpack
        b"[1]",
        example(text=["e"]).replace(b"e", b"\xff")[:40],
        b"",
    ]
    write(path, records)
    rows = load_rows(str(path))
    assert [row.get("text") for row in rows][:3] == ["a", "b", "c"]
    assert rows.place(3) == "rows.array_record row 4"
    reasons = [getattr(row, "reason", "") for row in rows]
    assert [bool(reason) for reason in reasons] == [False] * 3 + [True] * 4
    assert "neither a JSON object nor a tf.train.Example" in reasons[3]
    streamed = head(open_stream(str(path)), 100)
    assert [row.get("text") for row in streamed] == [row.get("text") for row in rows]


def test_shards_of_a_split_stream_in_shares_and_go_on_where_they_were(tmp_path):
    """By the names of TensorFlow Datasets."""
    for shard in range(4):
        records = [example(text=[f"{shard} {n}"]) for n in range(10)]
        write(tmp_path / f"c4-train.array_record-0000{shard}-of-00004", records, 3)
    write(tmp_path / "c4-validation.array_record-00000-of-00001", [b'{"text": "v"}'])
    assert [row["text"] for row in load_rows(str(tmp_path), split="eval")] == ["v"]
    expected = [f"{shard} {n}" for shard in range(4) for n in range(10)]
    rows = load_rows(str(tmp_path))
    assert [row["text"] for row in rows] == expected
    assert rows[23]["text"] == "2 3" and rows[7]["text"] == "0 7"  # in any order
    source = open_stream(str(tmp_path))
    seen = []
    for index in range(2):
        cursor = source.open(Share(index, 2, seed=1), 0, None)
        whole = [row.row["text"] for row in cursor]
        seen += whole
        for taken in (1, 9, 10, 13):
            cursor = source.open(Share(index, 2, seed=1), 0, None)
            for _ in range(taken):
                next(cursor)
            state = json.loads(json.dumps(cursor.get_state()))
            again = source.open(Share(index, 2, seed=1), 0, state)
            assert [row.row["text"] for row in again] == whole[taken:]
    assert sorted(seen) == sorted(expected)


def test_damage_and_files_of_another_kind_are_refused_by_name(tmp_path):
    path = tmp_path / "a.array_record"
    write(path, [json.dumps({"text": f"text {n}"}).encode() for n in range(100)])
    data = path.read_bytes()
    for wrong in (b"", b"{}", data[:-1], data[: len(data) // 2], bytes(len(data))):
        path.write_bytes(wrong)
        with pytest.raises(
            ValueError, match=r"a\.array_record is not an ArrayRecord file"
        ):
            load_rows(str(path))
    middle = data.index(b"text 50")
    path.write_bytes(data[:middle] + b"TEXT" + data[middle + 4 :])
    rows = load_rows(str(path))
    with pytest.raises(ValueError, match=r"cannot read .*a\.array_record: .*mismatch"):
        list(rows)
    packed = tmp_path / "a.array_record.gz"
    packed.write_bytes(data)
    with pytest.raises(ValueError, match="decompress it"):
        make_units(packed)


def test_without_the_package_a_run_is_refused_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "a.array_record"
    write(path, [b'{"text": "a"}'])
    run = resolve({"data": {"train": str(path)}, "training": {"eval_steps": 0}})
    check_sources(run)
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    path.touch()  # not the reader that is open
    with pytest.raises(ValueError, match=r"data\.train = .*pip install array_record"):
        check_sources(run)
