import gzip
import json
import pathlib

import numpy as np
import pytest

from jaxtrain import assets
from jaxtrain.cli.ending import run_command
from jaxtrain.data.batches.dataset import TokenStore
from jaxtrain.data.inspect import count_duplicates, main, render
from jaxtrain.data.rows.formats import UnreadableRow

PAIRS = [
    {"prompt": "What color is the sky?", "completion": " It is blue."},
    {"prompt": "Where is the sun?", "completion": " Here."},
]


@pytest.fixture
def tokenizer_folder(bpe, tmp_path):
    bpe.save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def write(path, rows, between=""):
    path.write_text(between + f"\n{between}".join(map(json.dumps, rows)) + "\n")
    return str(path)


def inspect(capsys, *arguments):
    status = run_command(main, ["--no-color", *arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_a_file_is_shown_with_its_trained_tokens_marked(
    tokenizer_folder, tmp_path, capsys
):
    path = write(tmp_path / "train.jsonl", [*PAIRS, PAIRS[0]])
    status, out, _ = inspect(capsys, path, f"--tokenizer={tokenizer_folder}")
    assert status == 0
    assert "format: plain prompt_completion rows from columns prompt, completion" in out
    assert "validation: 0 of 3 rows cannot be used" in out
    assert "duplicates: 1 rows" in out
    assert "What color is the sky?⟦ It is blue.<|eos|>⟧" in out
    assert "Where is the sun?⟦ Here.<|eos|>⟧" in out


def test_a_model_named_beside_a_file_gives_its_tokenizer(
    tokenizer_folder, tmp_path, capsys
):
    path = write(tmp_path / "train.jsonl", PAIRS)
    _, expected, _ = inspect(capsys, path, f"--tokenizer={tokenizer_folder}")
    _, embedded, _ = inspect(capsys, path)
    for flag in ("--model", "--model.name_or_path"):
        status, out, _ = inspect(capsys, path, f"{flag}={tokenizer_folder}")
        assert status == 0 and out == expected != embedded
    status, _, error = inspect(capsys, path, "--model=/not/there")
    assert status == 2 and "'/not/there' is not a folder" in error


def test_tokens_that_the_model_does_not_know_are_bad_rows(
    tokenizer_folder, tmp_path, capsys
):
    """Training refused what this had called right."""
    path = write(tmp_path / "train.jsonl", PAIRS)
    folder = pathlib.Path(tokenizer_folder)
    config = json.loads((assets.asset_path(assets.MODEL) / "config.json").read_text())
    limit = 20
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": limit}))
    status, out, _ = inspect(capsys, path, f"--model={folder}")
    assert status == 1 and f"no embedding (vocab_size = {limit})" in out
    growing = ("--model.grow_vocabulary=true", "--training.bf16=false")
    for beside in ([f"--tokenizer={folder}"], [f"--model={folder}", *growing]):
        assert inspect(capsys, path, *beside)[0] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["{path}", "--data.train=b.jsonl"], "a.jsonl is named beside --data.train"),
        (["sft", "--tokenizer=a", "--model.tokenizer_name_or_path=b"], "a is named be"),
        (["{path}", "--max_length=9", "--data.max_length=8"], "is given twice, as 8 a"),
        (["sft", "--rows=-1"], "--rows=-1: give 0 or more"),
    ],
)
def test_what_is_named_twice_is_refused(given, message, tmp_path, capsys):
    """The file of a flag took the place of the one that was named."""
    path = write(tmp_path / "a.jsonl", PAIRS)
    status, _, error = inspect(capsys, *(each.format(path=path) for each in given))
    assert status == 2 and message in error


def test_a_length_acts_on_a_configuration_too(capsys):
    _, out, _ = inspect(capsys, "sft", "--max_length=20", "--rows=0")
    assert "longer than max_length = 20: " in out


def test_bad_rows_are_named_by_line_and_reason(tokenizer_folder, tmp_path, capsys):
    rows = [PAIRS[0], {"prompt": "a", "completion": None}, PAIRS[1]]
    path = write(tmp_path / "train.jsonl", rows, between="\n")  # blank lines between
    status, out, _ = inspect(capsys, path, f"--tokenizer={tokenizer_folder}")
    assert status == 1
    assert "validation: 1 of 3 rows cannot be used" in out
    assert "line 4: completion is None, expected a string" in out


def test_preferences_show_both_sides_and_truncation(tokenizer_folder, tmp_path, capsys):
    row = {"prompt": "the sky", "chosen": " is blue", "rejected": " is green" * 20}
    path = write(tmp_path / "pairs.jsonl", [row])
    status, out, _ = inspect(
        capsys, path, f"--tokenizer={tokenizer_folder}", "--max_length=24"
    )
    assert status == 0
    assert "chosen: <|bos|>the sky⟦ is blue<|eos|>⟧" in out
    assert "rejected: <|bos|>the sky⟦ is green" in out
    assert "1 truncated" in out
    assert "longer than max_length = 24: 1 of 1 rows" in out


def test_a_configuration_is_inspected_with_its_own_data(capsys):
    status, out, _ = inspect(
        capsys,
        "--config=configs/dpo.py",
        "--config.data.max_train_rows=5",
        "--rows=1",
    )
    assert status == 0
    assert "plain preference rows" in out
    assert "of 5 rows" in out
    assert out.count("--- row") == 1


def test_of_streams_the_first_rows_are_shown_by_source(tmp_path, capsys):
    one = write(tmp_path / "one.jsonl", [*PAIRS, {"prompt": "a"}])
    two = write(tmp_path / "two.jsonl", PAIRS)
    status, out, _ = inspect(
        capsys, "--config=configs/sft.py", "--config.data.streaming=true",
        f"--config.data.train={one}:1,{two}:2", "--rows=1",
    )  # fmt: skip
    assert status == 1
    assert f"===== {two} (of a stream, the first 10000 rows)" in out
    assert "one.jsonl line 3: completion is None, expected a string" in out
    assert out.count("--- row") == 2


def test_rows_that_are_all_bad_are_shown_with_their_reasons(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "completion": None}] * 12)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("{\n")
    status, out, err = inspect(capsys, path, "--data.format=prompt_completion")
    assert status == 2 and "column_map" not in err
    assert "no row among the first 100 has a value in 'prompt' and 'completion'" in err
    path = write(tmp_path / "b.jsonl", [{"prompt": 1, "completion": 2}] * 12)
    status, out, err = inspect(capsys, path)
    assert status == 1
    assert "validation: 12 of 12 rows cannot be used" in out
    assert "b.jsonl line 10: prompt is 1, expected a string" in out
    assert "and 2 more" in out
    assert "nothing to train on: of 12 rows 12 are bad; mend the bad rows" in out
    assert "max_length" not in out + err and "skipped" not in err


def test_what_is_no_utf8_is_never_half_read(tmp_path, capsys):
    path = tmp_path / "wide.jsonl"
    path.write_bytes("".join(json.dumps(row) + "\n" for row in PAIRS).encode("utf-16"))
    status, out, err = inspect(capsys, str(path))
    assert (status, out) == (2, "")
    assert "wide.jsonl line 1: the text is UTF-16" in err and "iconv" in err
    path = tmp_path / "zipped.jsonl"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    status, out, err = inspect(capsys, str(path))
    assert status == 2 and "let the file's name end in .gz" in err
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "\xe9"}\n' * 2)
    status, out, err = inspect(capsys, str(path))
    assert (status, out) == (2, "")
    assert "latin.jsonl line 1: is not UTF-8 (byte 0xe9)" in err


def test_pairs_that_prefer_nothing_are_shown(tokenizer_folder, tmp_path, capsys):
    rows = [{"prompt": "a", "chosen": "b", "rejected": x} for x in "cbb"]
    path = write(tmp_path / "pairs.jsonl", rows)
    status, out, _ = inspect(capsys, path, f"--tokenizer={tokenizer_folder}")
    assert status == 0
    assert "equal: 2 pairs have a chosen that equals rejected" in out
    assert "  pairs.jsonl line 2, pairs.jsonl line 3\n" in out
    assert "duplicates: 1 rows" in out


def test_lines_without_a_row_are_no_duplicates():
    bad = UnreadableRow("is not JSON")
    assert count_duplicates([bad, bad, {"text": "a"}]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no configuration or data file is named"),
        (["no_such.jsonl"], "does not exist"),
        (["--config=no_such.yaml"], "no_such.yaml"),
    ],
)
def test_what_cannot_be_read_is_said_with_status_2(arguments, message, capsys):
    status, _, err = inspect(capsys, *arguments)
    assert status == 2
    assert message in err


def test_the_first_token_of_each_packed_document_is_not_marked(bpe):
    ids = bpe(" the sky the sky", add_special_tokens=False)["input_ids"]
    half = len(ids) // 2
    store = TokenStore(
        np.array(ids, np.int32),
        np.ones(len(ids), bool),
        np.array([0, half]),
        np.array([half, len(ids) - half]),
        np.array([0, 1]),
        np.array([0, 2]),
    )
    shown = render(store, 0, bpe, color=False)
    assert shown.replace("⟦", "").replace("⟧", "") == " the sky the sky"
    assert shown.count("⟦") == 2 and not shown.startswith("⟦")
    assert "\x1b[32m" in render(store, 0, bpe, color=True)


def test_duplicates_are_rows_equal_in_every_column():
    rows = [{"text": "a", "n": 1}, {"n": 1, "text": "a"}, {"text": "a", "n": 2}]
    assert count_duplicates(rows) == 1
