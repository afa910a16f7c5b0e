import dataclasses
import logging
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest

from jaxtrain.data.batches import dataset
from jaxtrain.data.prepare import cache
from jaxtrain.data.prepare.cache import cache_key, prepare_cached
from jaxtrain.data.prepare.options import PrepareOptions
from jaxtrain.data.rows.source import load_rows

ROWS = [{"text": "the sky"}, {"text": "is blue"}, {"text": "and green"}]
OPTIONS = PrepareOptions(objective="next_token", max_length=64)


@pytest.fixture
def count_prepares(monkeypatch):
    calls = []
    original = cache.prepare

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(cache, "prepare", counted)
    return calls


def test_the_second_time_comes_from_disk_and_is_equal(
    bpe, tmp_path, count_prepares, caplog
):
    caplog.set_level(logging.DEBUG, logger="jaxtrain")
    made = prepare_cached(ROWS, bpe, OPTIONS, tmp_path)
    found = prepare_cached(ROWS, bpe, OPTIONS, tmp_path)
    assert len(count_prepares) == 1
    assert isinstance(found.stores[""].tokens, np.memmap)
    assert found.fingerprint == made.fingerprint and found.stats == made.stats
    assert "token ids from" in caplog.text
    # Nothing is left over, and nothing in it is pickled.
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    for file in entry.glob("*.npy"):
        np.load(file, allow_pickle=False)


def test_data_tokenizer_and_options_are_in_the_key(bpe, marked_template):
    key = cache_key(ROWS, bpe, OPTIONS)
    assert key == cache_key(
        [dict(row) for row in ROWS], bpe, dataclasses.replace(OPTIONS)
    )
    assert key != cache_key(ROWS[::-1], bpe, OPTIONS)
    assert key != cache_key(ROWS, bpe, dataclasses.replace(OPTIONS, max_length=65))
    bpe.chat_template = marked_template
    assert key != cache_key(ROWS, bpe, OPTIONS)
    bpe.add_tokens(["sky"])
    assert len({key, cache_key(ROWS, bpe, OPTIONS)}) == 2


def test_files_have_the_key_of_their_content(bpe):
    rows = datasets.Dataset.from_list(ROWS * 3)
    key = cache_key(rows, bpe, OPTIONS)
    assert key == cache_key(datasets.Dataset.from_list(ROWS * 3), bpe, OPTIONS)
    assert key != cache_key(rows.select(range(8)), bpe, OPTIONS)
    shuffled = rows.select([1, 0, *range(2, 9)])
    assert key != cache_key(shuffled, bpe, OPTIONS)
    assert cache_key(rows.select([1, 0, *range(2, 9)]), bpe, OPTIONS) == cache_key(
        shuffled, bpe, OPTIONS
    )


def test_a_template_with_todays_date_is_not_cached(bpe, tmp_path, count_prepares):
    bpe.chat_template = "{{ strftime_now('%d') }}"
    for _ in range(2):
        prepare_cached(ROWS, bpe, OPTIONS, tmp_path)
    assert len(count_prepares) == 2
    assert not list(tmp_path.iterdir())


def test_bad_rows_are_refused_and_leave_nothing(bpe, tmp_path):
    with pytest.raises(ValueError, match="row 1: text is empty"):
        prepare_cached([*ROWS[:1], {"text": ""}], bpe, OPTIONS, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_an_interrupted_write_is_not_taken_for_an_entry(bpe, tmp_path, monkeypatch):
    def fail(self, folder):
        np.save(os.path.join(folder, "tokens.npy"), np.zeros(3))
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(dataset.PreparedDataset, "save", fail)
        assert len(prepare_cached(ROWS, bpe, OPTIONS, tmp_path)) == 3
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    # What a process left that was killed while it wrote goes with the next one.
    remains = tmp_path / f"new-{cache_key(ROWS, bpe, OPTIONS)}" / "entry"
    remains.mkdir(parents=True)
    (remains / "tokens.npy").write_bytes(b"half of it")
    assert len(prepare_cached(ROWS, bpe, OPTIONS, tmp_path)) == 3
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert (entry / "checksum.json").is_file() and not entry.name.startswith("new-")


@pytest.mark.slow
def test_processes_prepare_once_and_share(bpe, tmp_path):
    bpe.save_pretrained(tmp_path / "tokenizer")
    program = (
        "import logging, sys; logging.basicConfig(level=logging.DEBUG)\n"
        "from jaxtrain.data.prepare.cache import prepare_cached\n"
        "from jaxtrain.data.prepare.options import PrepareOptions\n"
        "from jaxtrain.data.rows.tokenize import load_tokenizer\n"
        "prepare_cached([{'text': 'the sky'}] * 2000, load_tokenizer(sys.argv[1]),"
        " PrepareOptions(objective='next_token', max_length=64), sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "tokenizer"),
               str(tmp_path / "cache")]  # fmt: skip
    running = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    logs = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], logs
    assert sorted("are kept in" in log for log in logs) == [False, True]


@pytest.mark.parametrize("harm", ["a bit", "a short file", "no file", "no json"])
def test_a_damaged_entry_is_named_and_made_anew(
    harm, bpe, tmp_path, caplog, count_prepares
):
    rows = [{"prompt": "the", "completion": " sky", "hard": n} for n in range(9)]
    options = dataclasses.replace(OPTIONS, difficulty_column="hard")
    fingerprint = prepare_cached(rows, bpe, options, tmp_path).fingerprint
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    names = sorted(path.name for path in entry.glob("*.npy"))
    if harm != "a bit":
        names = names[:1]
    for number, name in enumerate(names):
        path = entry / name
        content = bytearray(path.read_bytes())
        if harm == "a bit":
            content[-1] ^= 1
            path.write_bytes(content)
        elif harm == "a short file":
            path.write_bytes(content[:-1])
        elif harm == "no file":
            path.unlink()
        else:
            (entry / "prepared.json").write_text('{"stats"')
        caplog.clear()
        found = prepare_cached(rows, bpe, options, tmp_path)
        assert len(count_prepares) == number + 2, name
        assert f"the token ids in the cache {entry} are damaged" in caplog.text
        assert found.fingerprint == fingerprint
        assert found.difficulty.tolist() == list(range(9))
        assert (tmp_path / f"{entry.name}.damaged").is_dir()
    caplog.clear()
    prepare_cached(rows, bpe, options, tmp_path)
    assert len(count_prepares) == len(names) + 1 and "damaged" not in caplog.text


def test_rows_in_files_are_told_apart_by_content_and_reader(bpe, tmp_path):
    """By what is read, not by the file's name or time."""
    written = {
        "a.txt": "x\ty\n", "b.txt": "x\ty\n", "c.txt": "x\tz\n",
        "a.csv": "x\ty\n", "a.tsv": "x\ty\n",
    }  # fmt: skip
    keys = {}
    for name, text in written.items():
        (tmp_path / name).write_text(text)
        keys[name] = cache_key(load_rows(str(tmp_path / name)), bpe, OPTIONS)
    assert keys["a.txt"] == keys.pop("b.txt")
    assert len(set(keys.values())) == len(keys)
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    whole, first = (load_rows(str(tmp_path / "c.txt"), max_rows=n) for n in (2, 1))
    assert cache_key(whole, bpe, OPTIONS) != cache_key(first, bpe, OPTIONS)
