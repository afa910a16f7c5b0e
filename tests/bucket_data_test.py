"""Data in buckets: held and streamed, as from a disk; checks before anything long."""

import gzip
import itertools
import json
import pathlib
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from jaxtrain import cli
from jaxtrain.config import resolve
from jaxtrain.data.prepare.cache import cache_key
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.rows.source import load_rows
from jaxtrain.data.rows.tokenize import load_tokenizer
from jaxtrain.data.sources import check_sources
from jaxtrain.data.stream.source import Share, open_stream
from jaxtrain.models import hf
from jaxtrain.storage import errors, reading
from jaxtrain.storage.address import filesystem
from jaxtrain.storage.reading import RemoteFile
from tests.buckets import Proxy, bucket, endpoint_of, gs_bucket, serve
from tests.runs import tiny_config

__all__ = ["bucket", "gs_bucket"]
ROWS = [{"text": f"row {n} " + "word " * (n % 7)} for n in range(40)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of copies of this test alone."""
    monkeypatch.setenv("JAXTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same rows in every format, and folders of them."""
    folder = tmp_path_factory.mktemp("data")
    lines = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "array.json").write_text(json.dumps(ROWS))
    (folder / "a.txt").write_text("".join(f"{row['text']}\n" for row in ROWS))
    (folder / "a.csv").write_text(
        "text\n" + "".join(f'"{row["text"]}"\n' for row in ROWS)
    )
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, folder / "a.parquet", row_group_size=16)
    with pa.ipc.new_stream(str(folder / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    records = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for row in ROWS:
        records.write(json.dumps(row).encode())
    records.close()
    for name, part in (("train", ROWS[:30]), ("val", ROWS[30:])):
        (folder / "splits" / name).mkdir(parents=True)
        for number in (0, 1):
            text = "".join(f"{json.dumps(row)}\n" for row in part[number::2])
            (folder / "splits" / name / f"{number}.jsonl").write_text(text)
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    (folder / "mixed").mkdir()
    for name in ("a.jsonl", "a.txt"):
        shutil.copy(folder / name, folder / "mixed")
    # A star in a name is a star: no path is a pattern.
    (folder / "*.jsonl").write_text(lines)
    return folder


FORMATS = [
    "a.jsonl", "a.jsonl.gz", "array.json", "a.txt", "a.csv", "a.parquet", "a.arrow",
    "a.array_record", "splits", "saved",
]  # fmt: skip


def put(folder, address):
    filesystem(address).put(f"{folder}/", f"{address}/", recursive=True)
    return address


def test_rows_that_are_held_are_those_of_a_disk(bucket, files, cache):
    put(files, bucket)
    for name in FORMATS:
        for split in ("train", "eval") if name == "splits" else ("train",):
            local = load_rows(str(files / name), split=split)
            ours = load_rows(f"{bucket}/{name}", split=split)
            assert list(ours) == list(local) and len(ours) > 9, name
    copied = {p.name for p in cache.rglob("*") if p.is_file()}
    assert {"a.jsonl", "a.parquet", "0.jsonl"} <= copied
    # A split's folder is found at any depth.
    assert list(load_rows(bucket)) == list(load_rows(str(files / "splits")))
    with pytest.raises(ValueError, match=f"{bucket}/mixed mixes formats"):
        load_rows(f"{bucket}/mixed")
    with pytest.raises(FileNotFoundError, match="nothing of this name"):
        load_rows(f"{bucket}/a*.jsonl")


@pytest.mark.parametrize("name", FORMATS)
def test_a_stream_goes_on_where_it_was(gs_bucket, files, name):
    address = f"{gs_bucket}/{name}"
    if (files / name).is_dir():
        put(files / name, address)
    else:
        filesystem(address).put_file(str(files / name), address)
    share = Share(0, 1, seed=3)
    local = [r.row for r in open_stream(str(files / name)).open(share, 1, None)]
    cursor = open_stream(address).open(share, 1, None)
    first = [row.row for row in itertools.islice(cursor, 13)]
    state = json.loads(json.dumps(cursor.get_state()))
    second = [row.row for row in open_stream(address).open(share, 1, state)]
    assert [*first, *second] == local and len(local) in (30, 40)
    told = open_stream(str(files / name)).identity()
    assert open_stream(address).identity() == told  # a run may move to a bucket


def test_a_stream_reads_no_more_than_it_gives(gs_bucket, tmp_path, monkeypatch):
    """The start of a large file, and a row group of it, do not cost the whole."""
    rows = [{"text": f"{n:09d}" * 1000} for n in range(2000)]
    pq.write_table(
        pa.Table.from_pylist(rows),
        tmp_path / "x.parquet",
        row_group_size=100,
        compression="none",
        use_dictionary=False,
    )
    address = f"{gs_bucket}/x.parquet"
    filesystem(address).put_file(str(tmp_path / "x.parquet"), address)
    read = []
    piece = RemoteFile._read_piece

    def counted(self, place):
        found = piece(self, place)
        read.append(len(found))
        return found

    monkeypatch.setattr(RemoteFile, "_read_piece", counted)
    stream = open_stream(address)
    row = next(stream.open(Share(), 0, {"unit": 11, "position": [7, 0], "rows": 1107}))
    assert row.row == rows[1107]
    assert sum(read) < (tmp_path / "x.parquet").stat().st_size / 10


def test_other_content_of_the_same_size_is_other_data(gs_bucket):
    address = f"{gs_bucket}/a.jsonl"
    tokenizer = load_tokenizer(
        str(pathlib.Path(hf.__file__).parents[1] / "assets/model")
    )
    found = []
    for letter in "xy":
        filesystem(address).pipe_file(address, b'{"text": "%s"}\n' % letter.encode())
        rows = load_rows(address)
        assert list(rows) == [{"text": letter}]
        found.append(
            cache_key(rows, tokenizer, PrepareOptions("next_token", max_length=8))
        )
    assert found[0] != found[1]


def test_faults_in_a_stream_are_tried_again(files):
    count = itertools.count()

    def fault(method, path):
        if "download" not in path:
            return None
        return {1: 503, 2: "cut", 4: 429}.get(next(count))

    with Proxy(endpoint_of("gs"), fault) as proxy, serve("gs", proxy.url) as root:
        address = f"{root}/stream/a.parquet"
        filesystem(address).put_file(str(files / "a.parquet"), address)
        rows = [row.row for row in open_stream(address).open(Share(), 0, None)]
    assert rows == ROWS
    assert next(count) > 5


def test_short_answers_and_lost_connections_are_tried_within_a_limit(monkeypatch):
    answers = []

    def answer(address, start, stop, version):
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(reading, "read_range", answer)
    monkeypatch.setattr(errors, "_FIRST_WAIT_SECS", 0.01)
    file = RemoteFile("gs://b/x", 4, "tag")
    answers[:] = [ConnectionResetError("gone"), b"ab", b"abcd"]
    assert file.read() == b"abcd"
    monkeypatch.setattr(errors, "LIMIT_SECS", 0.0)
    answers[:] = [b"ab", b"abcd"]
    with pytest.raises(OSError, match="gs://b/x: ConnectionError: 2 bytes came of 4"):
        file.read()


def test_nobody_reads_half_of_a_file_and_half_of_another(bucket):
    """Of the same length, so that only its version tells."""
    address = f"{bucket}/x.bin"
    filesystem(address).pipe_file(address, b"old " * 1000)
    file = reading.list_files(address)[""]
    with file.open() as opened:
        assert opened.read(8) == b"old old "
        filesystem(address).pipe_file(address, b"new " * 1000)
        with pytest.raises(OSError, match=f"{address} was replaced or deleted"):
            file.read(100, 200)
        assert reading.list_files(address)[""].read(0, 8) == b"new new "
        filesystem(address).rm_file(address)
        with pytest.raises(OSError, match=f"{address} was replaced or deleted"):
            file.read(100, 200)


def test_a_tokenizer_and_a_template_of_a_bucket(gs_bucket):
    model = pathlib.Path(hf.__file__).parents[1] / "assets/model"
    address = put(model, f"{gs_bucket}/m")
    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    filesystem(address).pipe_file(f"{gs_bucket}/t.jinja", text.encode())
    ours = load_tokenizer(address, chat_template=f"{gs_bucket}/t.jinja")
    assert ours.chat_template == text
    assert (
        ours("some text").input_ids == load_tokenizer(str(model))("some text").input_ids
    )


@pytest.mark.parametrize(
    "key, place, told",
    [
        ("model.name_or_path", "{0}/no", "has nothing of this name"),
        ("model.tokenizer_name_or_path", "{0}/no", "has nothing of this name"),
        ("training.lora.init_from", "gs://nobucket/a", "there is no bucket 'nobucket'"),
        ("data.train", "{0}/no.jsonl", "has nothing of this name"),
        ("data.eval", "gs://nobucket/x.jsonl", "there is no bucket 'nobucket'"),
        ("data.eval.safe", "{0}/no.jsonl", "has nothing of this name"),
        ("data.chat_template", "{0}/no.jinja", "has nothing of this name"),
        ("data.train", "{0}/bad.xyz", "has no known suffix"),
        ("data.train", "{0}/empty.jsonl", "holds no row"),
        ("data.train", "hdfs://host/x.jsonl", "give gs://"),
        ("data.train", "s3://id:hunter2@b/x.jsonl", "credentials"),
        ("model.name_or_path", "s3://id:hunter2@b/m", "credentials"),
    ],
)
def test_what_cannot_be_read_is_told_first_with_its_key(gs_bucket, key, place, told):
    place = place.format(gs_bucket)
    for name, content in (("bad.xyz", b"x"), ("empty.jsonl", b"\n")):
        filesystem(gs_bucket).pipe_file(f"{gs_bucket}/{name}", content)
    config = tiny_config("lora" if "lora" in key else "sft", eval_steps=2)
    section, _, name = key.rpartition(".")
    if key == "data.eval.safe":
        config.data.eval = {"safe": place}
    elif key == "training.lora.init_from":
        config.training.lora.init_from = place
    else:
        config[section][name] = place
    with pytest.raises(ValueError, match=told) as error:
        check_sources(resolve(config))
    message = str(error.value)
    assert message.startswith(f"{key} = ") and "\n" not in message
    assert ("hunter2" in place) != (place in message)
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "status, told", [(403, "may not be read"), (401, "no valid credentials")]
)
@pytest.mark.parametrize("key", ["data.train", "model.name_or_path"])
def test_who_may_not_read_is_told_so(key, status, told):
    with (
        Proxy(endpoint_of("gs"), lambda method, path: status) as proxy,
        serve("gs", proxy.url) as root,
    ):
        config = tiny_config("sft")
        section, _, name = key.partition(".")
        config[section][name] = f"{root}/x.jsonl"
        with pytest.raises(ValueError, match=f"{key} = '{root}/x.jsonl': .*{told}"):
            check_sources(resolve(config))


def test_a_library_that_is_missing_is_named(monkeypatch, capsys, tmp_path):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name in ("gcsfs", "s3fs") else find_spec(name, *a),
    )
    code = cli.main(
        ["train", "sft", f"--workdir={tmp_path}", "--data.train=s3://b/x.jsonl"]
    )
    told = capsys.readouterr().err
    assert code == 2
    assert "data.train = 's3://b/x.jsonl'" in told and "jaxtrain[s3]" in told
    assert len(told.strip().splitlines()) == 1
