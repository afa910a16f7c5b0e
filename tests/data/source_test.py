import gzip
import json
import pickle

import datasets
import pytest

from jaxtrain.data.rows import source
from jaxtrain.data.rows.formats import BadRow, detect_format, read_row
from jaxtrain.data.rows.indexed import FileRows
from jaxtrain.data.rows.places import name_rows
from jaxtrain.data.rows.source import load_rows

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "dé"}]


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return lambda path, **options: load_rows(str(path), **options)


def write(path, rows):
    """Write rows in the format of the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        dataset = datasets.Dataset.from_list(rows)
        getattr(dataset, f"to_{path.suffix[1:]}")(str(path))
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "a.csv"]
)
def test_files_of_every_format_give_the_same_rows(name, load, tmp_path):
    assert list(load(write(tmp_path / "data" / name, ROWS))) == ROWS


def test_arrow_files_and_saved_data_sets_are_read(load, tmp_path):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    assert list(load(folder)) == ROWS
    (arrow,) = folder.glob("*.arrow")
    arrow.rename(tmp_path / "a.arrow")
    assert list(load(tmp_path / "a.arrow")) == ROWS


def test_saved_splits_are_chosen_by_name(load, tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    saved = datasets.DatasetDict({"train": rows, "test": rows.select([1])})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert list(load(tmp_path / "saved", split="eval")) == ROWS[1:]
    with pytest.raises(ValueError, match=r"no split 'dpo'.*test.*train"):
        load(tmp_path / "saved", split="dpo")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_plain_text_is_one_document_a_line_without_blank_ones(name, load, tmp_path):
    text = b"first line\n\n  \nsecond line\n"
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    texts = [row["text"] for row in load(tmp_path / name)]
    assert texts == ["first line", "second line"]


def test_csv_text_stays_text(load, tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\nNA,\n")
    assert list(load(tmp_path / "a.csv")) == [{"prompt": "NA", "completion": ""}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_rows_stay_in_their_files(name, load, tmp_path):
    """Any slice of them, in any order, in a copy in another process too."""
    rows = [{"prompt": f"p{i}", "completion": "é" * i} for i in range(50)]
    whole = load(write(tmp_path / name, rows))
    copied = pickle.loads(pickle.dumps(whole))
    assert isinstance(whole, FileRows) and len(pickle.dumps(whole)) < 3000
    for held in (whole, copied):
        for start, stop in ((3, 9), (9, 20), (25, 30), (0, 2), (48, 99), (7, 7)):
            assert held[start:stop] == rows[start:stop]
        assert held[-1] == rows[-1] and held[::7] == rows[::7]
        assert list(held) == rows == list(held)
        with pytest.raises(IndexError):
            held[50]
    write(tmp_path / name, rows[:-1])
    with pytest.raises(ValueError, match="changed while it was read"):
        whole[0]


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("train/a.jsonl", "eval/a.jsonl"),
        ("train.jsonl", "validation.jsonl"),
        ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"),
        ("my_train.jsonl", "my_dev.jsonl"),
        ("my-train-00000-of-00001.jsonl", "my-dev-00000-of-00001.jsonl"),
        ("data/train/a.jsonl", "data/test/a.jsonl"),
        ("default/train/0000.jsonl", "default/validation/0000.jsonl"),
        ("data.jsonl", "eval.jsonl"),
    ],
)
def test_a_folder_is_divided_by_split_names(train, held_out, load, tmp_path):
    write(tmp_path / "data" / train, ROWS[:1])
    write(tmp_path / "data" / held_out, ROWS[1:])
    assert list(load(tmp_path / "data")) == ROWS[:1]
    assert list(load(tmp_path / "data", split="eval")) == ROWS[1:]
    with pytest.raises(ValueError, match="has no split 'dpo'"):
        load(tmp_path / "data", split="dpo")


def test_a_held_out_split_that_is_named_is_that_one_alone(load, tmp_path):
    """Rows for a last test are not what a run is chosen by."""
    rows = datasets.Dataset.from_list(ROWS)
    for name in ("test", "val"):
        write(tmp_path / name / "train.jsonl", ROWS[:1])
        write(tmp_path / name / f"{name}.jsonl", ROWS[1:])
        saved = datasets.DatasetDict({"train": rows, name: rows.select([1])})
        saved.save_to_disk(str(tmp_path / f"saved_{name}"))
    for other, name in (("validation", "test"), ("dev", "test"), ("test", "val")):
        for folder in (tmp_path / name, tmp_path / f"saved_{name}"):
            with pytest.raises(ValueError, match=f"has no split '{other}', only"):
                load(folder, split=other)
    for name, same in (("test", "test"), ("val", "validation"), ("val", "eval")):
        assert list(load(tmp_path / name, split=same)) == ROWS[1:]
        assert list(load(tmp_path / f"saved_{name}", split=same)) == ROWS[1:]


def test_shards_of_several_names_are_splits_of_these_names(load, tmp_path):
    """As ultrafeedback_binarized has them."""
    folder = tmp_path / "data"
    for number, name in enumerate(("train_sft", "train_prefs", "test_prefs")):
        write(folder / f"{name}-00000-of-00001.jsonl", ROWS[:1] * (number + 1))
    assert len(load(folder, split="train_prefs")) == 2
    assert len(load(folder, split="eval")) == 3  # one may be meant
    with pytest.raises(ValueError, match=r"'train': \['train_prefs', 'train_sft'\]"):
        load(folder)
    names = r"\['test_prefs', 'train_prefs', 'train_sft'\]"
    with pytest.raises(ValueError, match=f"no split 'train_stf', only {names}"):
        load(folder, split="train_stf")
    write(folder / "train-00000-of-00001.jsonl", ROWS[:1] * 4)
    assert len(load(folder)) == 4
    # Several data sets in one split's folder are parts of it, as are files by name.
    for name in ("train", "other"):
        write(tmp_path / "both" / "train" / f"{name}-00000-of-00001.jsonl", ROWS[:1])
    assert len(load(tmp_path / "both")) == 2
    for name in ("train", "train_more"):
        write(tmp_path / "files" / f"{name}.jsonl", ROWS[:1])
    assert len(load(tmp_path / "files")) == 2
    assert len(load(tmp_path / "files", split="train_more")) == 1


def test_shards_that_are_not_there_are_told_of_once(load, tmp_path, caplog):
    for name in ("train-00000-of-00003", "train-00002-of-00003", "test-00000-of-00001"):
        write(tmp_path / "some" / f"{name}.jsonl", ROWS[:1])
    assert len(load(tmp_path / "some")) == len(load(tmp_path / "some")) == 2
    assert len(load(tmp_path / "some", split="test")) == 1
    told = [message for message in caplog.messages if "only these are read" in message]
    assert len(told) == 1 and "has 2 of the 3 files of 'train'" in told[0]


def test_files_packed_otherwise_are_told_of(load, tmp_path, caplog):
    """They were passed over without a word, though data files stood beside them."""
    write(tmp_path / "train-0.jsonl", ROWS)
    for name in ("train-1.jsonl.zst", "train-2.parquet.bz2", "notes.md.zip", "a.tar"):
        (tmp_path / name).write_bytes(b"packed")
    for _ in range(2):
        assert len(load(tmp_path)) == 2
    told = [message for message in caplog.messages if "passed over" in message]
    assert len(told) == 1 and "2 data files such as 'train-1.jsonl.zst'" in told[0]


def test_an_empty_saved_data_set_is_refused(load, tmp_path):
    datasets.Dataset.from_list(ROWS).select([]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="saved holds no row"):
        load(tmp_path / "saved")


def test_a_folder_without_split_names_is_taken_whole(load, tmp_path):
    write(tmp_path / "data" / "1.jsonl", ROWS[:1])
    write(tmp_path / "data" / "2.jsonl", ROWS[1:])
    for split in ("train", "eval"):
        assert list(load(tmp_path / "data", split=split)) == ROWS


def test_rows_are_limited(load, tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS * 2)
    assert list(load(path, max_rows=3)) == (ROWS * 2)[:3]


@pytest.mark.parametrize("name", ["./absent", "/tmp/absent/file", "absent.jsonl"])
def test_an_absent_path_is_refused(name):
    with pytest.raises(ValueError, match="does not exist"):
        load_rows(name)


def test_a_hub_name_without_network_says_to_give_a_local_path():
    with pytest.raises(ValueError, match=r"no/such-data.*give a local path"):
        load_rows("no/such-data")


def test_malformed_lines_are_rows_that_cannot_be_read(load, tmp_path, capfd):
    path = write(tmp_path / "a.jsonl", ROWS)
    path.write_text(path.read_text() + '{"prompt": \n[1]\n')
    rows = load(path)
    assert list(rows)[: len(ROWS)] == ROWS
    assert capfd.readouterr() == ("", "")  # no bar, no line of a library
    assert name_rows(rows, [0, 2]) == ["a.jsonl line 1", "a.jsonl line 3"]
    with pytest.raises(BadRow, match="is not JSON"):
        read_row(rows[2], detect_format(rows))
    assert len(load(path, max_rows=3)) == 3
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\nc,d,e\n")
    held = load(tmp_path / "a.csv")
    assert name_rows(held, [1]) == ["a.csv line 3"]
    assert held[1].reason == "has 3 cells, the header has 2"
    path.write_text("no\njson\n")
    with pytest.raises(
        ValueError, match=r"none of the first 2 .*a\.jsonl line 1: is not JSON"
    ):
        detect_format(load(path))


def test_rows_know_their_lines(load, tmp_path):
    """Through blank lines, further files, compression and a limit on rows."""
    write(tmp_path / "data" / "1.jsonl", ROWS)
    path = write(tmp_path / "data" / "2.jsonl", ROWS)
    text = path.read_text().replace("\n", "\n\n").encode()
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(text))
    path.unlink()
    rows = load(tmp_path / "data", max_rows=4)
    names = ["1.jsonl line 2", "2.jsonl.gz line 1", "2.jsonl.gz line 3"]
    assert name_rows(rows, [1, 2, 3]) == names
    (tmp_path / "array.json").write_text(json.dumps(ROWS))
    assert name_rows(load(tmp_path / "array.json"), [1]) == ["array.json row 2"]
    assert name_rows(ROWS, [1]) == ["row 1"]


def test_unreadable_folders_are_refused(load, tmp_path):
    with pytest.raises(ValueError, match="holds no data file"):
        load(tmp_path)
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.csv", ROWS)
    with pytest.raises(ValueError, match="mixes formats"):
        load(tmp_path)
    (tmp_path / "c.bin").write_text("x")
    with pytest.raises(ValueError, match="no known suffix"):
        load(tmp_path / "c.bin")


def test_a_split_that_a_saved_data_set_lacks_names_the_key():
    with pytest.raises(ValueError, match=r"only \['train_sft'\]: .*data\.train_split"):
        source._choose_split({"train_sft": ROWS}, "train", "saved")
